"""SGLang's HTTP app for its tokenizer workers, which load no plugins of their own.

With --tokenizer-worker-num above 1, uvicorn imports the app that SGLANG_HTTP_SERVER_APP_PATH
names in each worker. plugin.py names this one, so that the hooks are in force there too.
"""

from sglang.srt.entrypoints.http_server import app
from sglang.srt.plugins import load_plugins

from sglang_ess.intake.streams import add_to

load_plugins()
add_to(app)

__all__ = ["app"]
