"""EngineProcess for a CUDA device: a fork of a process that has looked at the device cannot use it.

So SGLang's processes are spawned, as outside of tests, and import everything; faults and
recorders are installed in each of them.
"""

import multiprocessing
import os
import signal
import tempfile
import time
from importlib import import_module
from pathlib import Path

from sglang_ess.config import EssConfig
from tests.support import engine as engines

PATCHES_VAR = "ESS_TEST_PATCHES"
START_SECONDS = 420  # a first start on a GPU compiles kernels
_context = multiprocessing.get_context("spawn")


class SpawnedEngine(engines.EngineProcess):
    """One engine in a session of its own, which ends with it.

    model, ess, patches, server_args: as EngineProcess's; log: of all its processes
    deadline: (time.monotonic()) after which it gives no answer; env: further environment
    Raises: EOFError or RuntimeError if it ends while it starts, TimeoutError
    """

    def __init__(self, model, log, deadline, ess=None, patches=(), env=None, **server_args):
        self._deadline = deadline
        self._record = Path(tempfile.mkdtemp(prefix="ess-test-")) / "record.pickle"
        args = {"model_path": str(model), "log_level": "info", "random_seed": 1}
        args |= {"skip_tokenizer_init": True} | server_args
        environ = (env or {}) | EssConfig(**(ess or {})).to_env()
        environ |= {engines.RECORD_VAR: str(self._record), PATCHES_VAR: " ".join(patches)}
        self._pipe, child = _context.Pipe()
        self._process = _context.Process(
            target=_serve, args=(child, args, environ, tuple(patches), str(log))
        )
        self._process.start()
        child.close()
        try:
            self._receive(START_SECONDS)
        except BaseException:
            self._kill()
            raise

    def _receive(self, timeout=300):
        return super()._receive(max(0, min(timeout, self._deadline - time.monotonic())))

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._kill()

    def _kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.join()


def _serve(pipe, server_args, env, patches, log) -> None:
    """Body of the engine's process."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(env)
    from sglang_ess.cpu import set_thread_defaults

    set_thread_defaults()
    import sglang.srt.entrypoints.engine as engine_module
    from sglang.srt.plugins import load_plugins

    load_plugins()  # before the patches, as where engines are forked

    class Engine(engine_module.Engine):
        run_scheduler_process_func = staticmethod(run_scheduler)

    engine_module.Engine = Engine
    engines.fork_children = lambda: None
    engines._serve(pipe, server_args, env, patches)


def run_scheduler(*args, **kwargs):
    """Body of the scheduler's process: SGLang's, once the patches are in."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins import load_plugins

    load_plugins()
    for patch in os.environ[PATCHES_VAR].split():
        module, function = patch.split(":")
        getattr(import_module(module), function)()
    return run_scheduler_process(*args, **kwargs)
