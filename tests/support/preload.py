"""Imported once by the fork server, so that every engine of a test run starts warm.

Importing SGLang takes some 15 s on two cores; a fork takes none. The CPU platform is
resolved during the import, so the configuration has to be in the environment before it.
"""

import gc
import os

from sglang_ess.config import EssConfig
from sglang_ess.cpu import set_thread_defaults

os.environ.update(EssConfig().to_env())
set_thread_defaults()

import sglang.srt.entrypoints.engine  # noqa: E402
import sglang.srt.entrypoints.http_server  # noqa: E402
import sglang.srt.managers.detokenizer_manager  # noqa: E402
import sglang.srt.managers.scheduler  # noqa: E402, F401
from sglang.srt.models.registry import ModelRegistry  # noqa: E402, F401
from sglang.srt.plugins import load_plugins  # noqa: E402

import sglang_ess.platforms.cpu  # noqa: E402, F401
from tests.support import interpreter  # noqa: E402
from tools.forks import renew_torch_pools  # noqa: E402

load_plugins()
interpreter.refuse()
renew_torch_pools()
# What was imported stays: a collection in a fork would walk and copy all of it, 2 s a start.
gc.freeze()
