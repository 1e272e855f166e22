"""ESS for SGLang: the latent KV cache in host memory, a hot tier on the device."""

import importlib.metadata

from sglang_ess.config import EssConfig
from sglang_ess.launch import commands
from sglang_ess.launch.offline import EngineRefused, engine

__all__ = ["EngineRefused", "EssConfig", "__version__", "engine"]

try:
    __version__ = importlib.metadata.version("sglang-ess")
except importlib.metadata.PackageNotFoundError:  # a source tree on PYTHONPATH, not installed
    __version__ = "0+unknown"

commands.install_short_names()
