"""SGLang's two entry points into ESS. Both run in every SGLang process, so imports are lazy.

SGLang logs an Exception of a plugin and continues without it, but does not catch SystemExit
(sglang/srt/plugins/__init__.py, `except Exception`). If ESS is requested and cannot work, the
process must stop. So every failure here raises SystemExit.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import sys

from sglang_ess import errors
from sglang_ess.config import ENV_VAR, EssConfig

logger = logging.getLogger(__name__)

CPU_PLATFORM = "sglang_ess.platforms.cpu.CpuDsaPlatform"
PLUGIN_NAMES = ("sglang_ess", "ess_cpu")  # our entry points in pyproject.toml
# SGLang's variable for the HTTP app of its tokenizer workers, which load no plugins themselves.
APP_VAR, APP = "SGLANG_HTTP_SERVER_APP_PATH", "sglang_ess.intake.http_app:app"
NO_PLATFORM = (
    "SGLang must have an accelerator or a platform: got neither. Start with "
    "sglang_ess.engine(...) or python -m sglang_ess.launch_server, or set "
    f"{ENV_VAR}='{{}}' (two tiers) or SGLANG_PLATFORM=ess_cpu (one) before Python starts."
)

# SGLang's clients that resolve server arguments in their own process, without plugins.
CLIENTS = tuple(
    f"sglang.{name}"
    for name in (
        "bench_one_batch_server",
        "benchmark.one_batch_server",
        "bench_offline_throughput",
        "benchmark.offline_throughput",
    )
)

registered = False  # whether register() has registered the hooks; the launcher checks it


def register() -> None:
    """Entry point of group sglang.srt.plugins: check the contract, register the hooks.

    Raises: SystemExit if ENV_VAR is set and malformed, or the contract does not hold.
    """
    global registered
    config = _config()
    if config is None and _named():  # SGLANG_PLATFORM=ess_cpu alone means one tier
        config = EssConfig(enabled=False)
    if config is None:
        logger.info("sglang-ess: inert, %s is not set", ENV_VAR)
        _advise()
        return
    _mark_log_lines(config)
    try:
        targets = _register_hooks(config)
    except Exception as error:
        logger.debug("sglang-ess: registering the hooks failed", exc_info=True)
        reason = errors.with_place(errors.root(error))
        raise SystemExit(
            f"sglang-ess: hooks must register: got {reason}. Mend that first."
        ) from error
    registered = True
    os.environ.setdefault(APP_VAR, APP)
    logger.info("sglang-ess: %s, %d hooks", config, len(targets))


def _advise() -> None:
    """Print what to do if SGLang, started without us, finds no platform.

    SGLang loads plugins when it launches something, not when it is imported.
    """
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.interface import SRTPlatform

    if type(current_platform) is SRTPlatform:  # the base class: SGLang has found none
        print(f"sglang-ess: {NO_PLATFORM}", file=sys.stderr, flush=True)


def _advise_clients() -> None:
    """Print the same for `python -m CLIENT`, which would end with SGLang's "No accelerator"."""
    rest = " ".join(sys.orig_argv).partition(" -m ")[2]
    name = rest.split(" ")[0]
    if name in CLIENTS and not os.environ.get("SGLANG_USE_CPU_ENGINE") and accelerator() is None:
        print(
            f"sglang-ess: {name} must have an accelerator or SGLANG_PLATFORM=ess_cpu: got "
            "neither. Set that variable and run it again.",
            file=sys.stderr,
            flush=True,
        )


def _register_hooks(config: EssConfig) -> list[str]:
    from ess_patches import all_hooks, contract, topk_stream

    platform = active_platform()
    hooks = [row for row in all_hooks() if row.applies(platform, config.enabled)]
    if config.topk_stream:
        # A stream's rows come first, with one tier too: the first hook on a target is the
        # innermost, so ESS plans what the stream returns.
        hooks = [*(row for row in topk_stream.HOOKS if row.applies(platform)), *hooks]
    if mismatches := contract.check(hooks):
        for mismatch in mismatches:
            print(f"sglang-ess: {mismatch}", file=sys.stderr)
        if mismatches[-1].state == contract.BROKEN:  # an import failed: nothing was compared
            raise SystemExit(1)
        names = ", ".join(mismatch.target for mismatch in mismatches)
        raise SystemExit(f"sglang-ess: the contract with SGLang is broken at {names}. Stopping.")
    return contract.register(hooks, platform)


def activate_cpu_platform() -> str | None:
    """Entry point of group sglang.srt.platforms: the CPU platform's class path, or None.

    The platform is chosen if ENV_VAR asks for it (`cpu`, or `auto` on a host without an
    accelerator), or if SGLANG_PLATFORM=ess_cpu names it. `import sglang` calls this function, so
    ENV_VAR must be set before that import.
    Raises: SystemExit if ENV_VAR is malformed.
    """
    config = _config()
    _mark_log_lines(config)
    if _named():
        chosen = config is None or config.platform != "native"
    elif config is None:
        chosen = False
        _advise_clients()
    else:
        chosen = config.platform == "cpu" or (config.platform == "auto" and accelerator() is None)
    return CPU_PLATFORM if chosen else None


def accelerator() -> str | None:
    """The first torch device type that is available ("cuda" includes HIP); None if none is."""
    import torch

    for name in ("cuda", "xpu", "npu", "musa"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return name
    return None


def active_platform() -> str:
    """The platform's name in Hook.when: "cpu" on the CPU platform, else accelerator() or "none"."""
    return "cpu" if activate_cpu_platform() else accelerator() or "none"


def _named() -> bool:
    return os.environ.get("SGLANG_PLATFORM") == "ess_cpu"


def _mark_log_lines(config: EssConfig | None) -> None:
    """Under --ess-topk-stream, let every log line of this process say that outputs are wrong."""
    if config is not None and config.topk_stream:
        from ess_patches import topk_stream

        pkgutil.resolve_name(topk_stream.MARK_LOG_LINES)()


def _config() -> EssConfig | None:
    try:
        return EssConfig.from_env()
    except ValueError as error:
        raise SystemExit(f"sglang-ess: {error}") from None
