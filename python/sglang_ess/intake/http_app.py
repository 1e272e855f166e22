"""SGLang's HTTP app for its tokenizer workers, which do not load plugins themselves.

With --tokenizer-worker-num above 1, each worker imports the app that SGLANG_HTTP_SERVER_APP_PATH
names. plugin.py sets the variable to this module, so that our hooks work there too.
"""

from sglang.srt.entrypoints.http_server import app
from sglang.srt.plugins import load_plugins

from sglang_ess.intake.streams import add_to

load_plugins()
add_to(app)

__all__ = ["app"]
