"""ESS for SGLang: the latent KV cache in host memory, a hot tier on the device."""

from sglang_ess.config import EssConfig
from sglang_ess.launch import commands
from sglang_ess.launch.offline import EngineRefused, engine

__all__ = ["EngineRefused", "EssConfig", "engine"]

commands.install_short_names()
