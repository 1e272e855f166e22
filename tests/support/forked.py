"""`python -m MODULE ARGUMENTS` as a fork of the server that has imported SGLang: 10 to 40 s less.

For tests whose subject is not how processes are started: SGLang's own are forked too, and not
spawned. tests/conftest.py's server is a real one.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import setproctitle

from sglang_ess.cpu import set_thread_defaults
from tests.support.pd import Node
from tools.forks import fork_children
from tools.processes import end_with_parent

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.support.preload"])


class Forked:
    """What tools.processes needs of a subprocess.Popen, in a session of its own.

    command: [interpreter, "-m", module, *arguments]; log: continued with stdout and stderr
    env: all of its variables; folder: where it runs; default: this process's
    """

    def __init__(
        self, command: list[str], log: Path, env: dict[str, str], folder: Path | None = None
    ):
        self.args = command
        arguments = (command[2:], str(log), dict(env), folder or Path.cwd())
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises: subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class ForkedNode(Node):
    """A node of a cluster that is forked."""

    def begin(self, output) -> Forked:
        return Forked(self.command, self.log, self.env)


def run(
    module: str, *arguments: str, log: Path, folder: Path | None = None, seconds: float = 300
) -> int | None:
    """Exit status of a module that ends by itself; None if it did not, and is killed.

    log: its stdout and stderr; folder: where it runs; default: this process's
    """
    process = Forked([sys.executable, "-m", module, *arguments], log, {**os.environ}, folder)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # what it has left behind
        except ProcessLookupError:
            pass


def use_host_transport() -> None:
    """What the CPU platform does at its start, when the fork server knew no server's options."""
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ess.platforms import cpu_transfer as transfer

    initialize = Scheduler.init_disaggregation

    def initialize_on_host(scheduler):
        transfer.use_host_transport()
        return initialize(scheduler)

    Scheduler.init_disaggregation = initialize_on_host


def _run(argv: list[str], log: str, env: dict[str, str], folder: Path) -> None:
    """Body of the process. argv: of the module, its name first"""
    os.setsid()
    end_with_parent()
    os.chdir(folder)
    setproctitle.getproctitle()  # sets up, which it cannot once the variables have moved
    os.environ.clear()
    os.environ.update(env)
    set_thread_defaults()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    fork_children()
    use_host_transport()
    from sglang_ess.launch import startup

    # It runs kernels in OpenMP threads, after which GNU OpenMP lets nobody fork.
    startup.before_processes = lambda *args: None
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
