"""SGLang's offline engine with ESS: `with sglang_ess.engine(model_path=...) as llm:`."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any

from sglang_ess import errors
from sglang_ess.config import REFUSED, TEMPLATE, EssConfig
from sglang_ess.cpu import set_thread_defaults

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine

UNGUARDED = 3  # exit status of a spawned child in which the user's script calls engine() again


class EngineRefused(errors.Refusal):
    """The engine cannot start. The message has one line for each reason."""


def engine(model_path: str, ess: EssConfig | None = None, **server_args: Any) -> Engine:
    """Start an sglang.Engine with ESS. As a context manager it shuts down at the end.

    ess: ESS's options, EssConfig() if None; server_args: sglang.Engine's own arguments
    Call it before anything imports SGLang, because that import chooses the platform. SGLang's
    processes run the calling script again, so a script must call it under
    `if __name__ == "__main__":`.
    Effect: sets SGLANG_ESS_CONFIG for this process and its children.
    Raises: EngineRefused for everything that the launcher refuses.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(UNGUARDED)  # _reason() explains it in the parent
    config = ess or EssConfig()
    given = {"model_path": str(model_path), "log_level": "error", **server_args}
    try:
        return _started(_checked(config, given))
    except EngineRefused:
        raise
    except Exception as error:
        raise EngineRefused(_reason(error)) from error


def _started(server_args: Any) -> Engine:
    """Start the engine. If that fails, end the processes that SGLang would leave behind.

    Effect: sets TEMPLATE for its processes, of which then one says why it refuses.
    """
    from sglang.srt.entrypoints.engine import Engine

    before = set(multiprocessing.active_children())
    template = os.environ[TEMPLATE] = f"ess-{os.urandom(4).hex()}-"
    try:
        return Engine(server_args=server_args)
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()
        errors.refusal_mark(template).unlink(missing_ok=True)
        raise


def _checked(config: EssConfig, given: dict[str, Any]) -> Any:
    """The ServerArgs for these arguments, after all checks. Raises: EngineRefused."""
    os.environ.update(config.to_env())
    from sglang_ess import plugin
    from sglang_ess.launch import preflight, store_option

    if reasons := preflight.environment_reasons(config, os.environ) + _platform_reasons(plugin):
        raise EngineRefused("\n".join(reasons))
    set_thread_defaults()
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    if not plugin.registered:
        raise EngineRefused(preflight.NOT_LOADED)
    server_args = ServerArgs(**given)
    on_cpu = plugin.activate_cpu_platform() is not None
    if reasons := preflight.engine_reasons(server_args, config, on_cpu):
        raise EngineRefused("\n".join(reasons))
    store_option.apply(server_args, config)
    preflight.resolve(server_args)
    return server_args


def _platform_reasons(plugin: Any) -> list[str]:
    """Why it is too late: an earlier `import sglang` chose another platform or loaded no hooks."""
    module = sys.modules.get("sglang.srt.platforms")
    platform = getattr(module, "_current_platform", None)
    plugins = sys.modules.get("sglang.srt.plugins")
    if platform is None:
        return []
    ours = f"{type(platform).__module__}.{type(platform).__name__}" == plugin.CPU_PLATFORM
    wanted = plugin.activate_cpu_platform() is not None
    loaded = getattr(plugins, "_plugins_loaded", False)
    if ours == wanted and (plugin.registered or not loaded):
        return []
    return [
        "sglang_ess.engine must come before SGLang's import and its engines: got "
        f"{type(platform).__name__} already. Call it first, or set SGLANG_ESS_CONFIG='{{}}' "
        "before Python starts."
    ]


def _reason(error: Exception) -> str:
    """One line for an exception; a scheduler process reports its reason by its exit status."""
    if f"(exit code: {UNGUARDED})" in str(error):
        return (
            'sglang_ess.engine must be called under `if __name__ == "__main__":` in a script: '
            "got a call at its top level, which SGLang's processes ran again. Move it there."
        )
    if f"(exit code: {REFUSED})" in str(error):
        return "the scheduler refused: its line, `sglang-ess: ...`, is on stderr above."
    return errors.refusal(error)
