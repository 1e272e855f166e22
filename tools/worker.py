"""A process with an environment of its own, for the part of a benchmark that needs one."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tools.processes import end_with_parent


class WorkerError(RuntimeError):
    """A call failed, ran out of time, or lost its process."""


class Worker:
    """An object in a process of its own, with an environment of its own.

    worker = Worker(Factory, *args, env={"NAME": "value", "GONE": None}); worker.call("method")
    start() returns at once; call() starts the process if there is none and waits until it is ready.
    After a timeout or a death the next call starts a new process. Calls block: two workers
    never compute at once, unless one is still starting.

    log: file for stdout and stderr; memory_gib: limit of the process's data, None for no limit
    """

    def __init__(self, factory: Callable, *args, env=None, log: Path, memory_gib=None):
        self._factory, self._args = factory, args
        self._env, self._log, self._memory_gib = env or {}, log, memory_gib
        self._process = self._pipe = None
        self._ready = False

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        target = (child, str(self._log), self._memory_gib, self._factory, self._args)
        self._process = context.Process(target=_worker_main, args=target)
        # SGLang's children are killed while they hold semaphores; the tracker warns about each.
        with _environment({"PYTHONWARNINGS": "ignore:resource_tracker"} | self._env):
            self._process.start()
        child.close()
        self._ready = False

    def wait(self, timeout: float = 300) -> None:
        """Return once the object exists. Raises: WorkerError if its constructor failed."""
        if self._process is None:
            self.start()
        if not self._ready:
            self._receive(timeout)
            self._ready = True

    def call(self, method: str, *args, timeout: float = 600) -> Any:
        """object.method(*args). Raises: WorkerError if it raised, or gave no answer in time."""
        self.wait()
        try:
            self._pipe.send((method, args))
        except OSError:
            pass  # the process died: _receive says so
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        try:
            if not self._pipe.poll(timeout):
                raise WorkerError(f"no answer in {timeout:.0f} s")
            status, value = self._pipe.recv()
        except (EOFError, ConnectionError, WorkerError) as error:
            self.close(grace=0)
            lines = self._log.read_text(errors="replace").splitlines()[-3:]
            reason = str(error) or "the process died"
            raise WorkerError(" | ".join([reason, *lines])) from None
        if status == "error":
            raise WorkerError(value)
        return value

    def hang_up(self) -> None:
        """Tell the process to end, without waiting for it."""
        if self._pipe is not None:
            self._pipe.close()

    def close(self, grace: float = 30) -> None:
        """End the process and everything it started."""
        if self._process is None:
            return
        family = _family(self._process.pid)
        self.hang_up()
        self._process.join(grace)
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                pass
        self._process.join()
        self._process = self._pipe = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.Error:
        return []


@contextmanager
def _environment(changes: dict[str, str | None]):
    before = os.environ.copy()
    for key, value in changes.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _worker_main(pipe, log: str, memory_gib, factory, args) -> None:
    """Body of a worker's process. stdout and stderr go to the log."""
    end_with_parent()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if memory_gib is not None:  # a larger allocation raises instead of waking the OOM killer
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        target = factory(*args)
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        raise
    pipe.send(("ok", None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(("ok", getattr(target, method)(*arguments)))
        except Exception as error:  # the caller raises it
            first_line = str(error).strip().splitlines()[:1]
            pipe.send(("error", " ".join([f"{type(error).__name__}:", *first_line])))
    getattr(target, "close", lambda: None)()
