"""HTTP servers that tests and benchmarks start.

Each runs in a session of its own, so ending it by its group touches no other process. Each ends
with the process that started it, even if that one is killed (guard.py).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tools.hosts import LOOPBACK, Host

POLL_SECONDS = 0.1


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def guard(leader: int, parent: int) -> subprocess.Popen:
    """End the process `leader` and its descendants when `parent` ends. Returns the guard."""
    script = Path(__file__).with_name("guard.py")
    return subprocess.Popen(
        # No site-packages: it only waits. No inherited pipe: its reader would wait for the guard.
        [sys.executable, "-I", "-S", script, str(parent), str(leader)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C must not end it
    )


def end_with_parent() -> None:
    """Called in a multiprocessing child: it and its descendants end with its parent."""
    global _own_guard
    _own_guard = guard(os.getpid(), multiprocessing.parent_process().pid)


_own_guard: subprocess.Popen | None = None  # kept: an unreferenced Popen warns


class HttpProcess:
    """`python -m MODULE --host ADDRESS --port PORT FLAGS`; as a context manager, exit stops it.

    log: file for stdout and stderr, emptied here; port: one of free_port()'s if None
    env: variables on top of this process's; settle: called in the child before exec
    host: where it runs, of tools/hosts.py; this machine's loopback by default
    After kill() or stop(), start() begins again on the same port.
    """

    ready_path = "/ready"  # answers 200 once the server takes requests

    def __init__(
        self,
        module: str,
        *flags: str,
        log: Path,
        port: int | None = None,
        env: dict[str, str] | None = None,
        settle: Callable[[], None] | None = None,
        host: Host = LOOPBACK,
    ):
        self.port, self.log = port or free_port(), Path(log)
        self.url = f"http://{host.address}:{self.port}"
        self.command = [*host.command, sys.executable, "-m", module, "--host", host.address]
        self.command += ["--port", str(self.port), *flags]
        self.env, self._settle = {**os.environ, **(env or {})}, settle
        self.log.write_bytes(b"")
        self.start()

    def start(self) -> None:
        """Start the process, which must not be running. The log continues from log_start on."""
        with self.log.open("ab") as output:
            self.log_start = output.tell()
            self.process = self.begin(output)
        self._guard = guard(self.process.pid, os.getpid())

    def begin(self, output) -> subprocess.Popen:
        """Start the process in a session of its own. output: file for stdout and stderr"""
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=self.env,
            start_new_session=True,
            preexec_fn=self._settle,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def wait_ready(self, seconds: float = 300) -> None:
        """Return once the server takes requests.

        Raises: RuntimeError with the log's tail if it ends or is not ready in time.
        """
        self.wait_for(self.is_ready, seconds, "ready")

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Poll until the condition holds.

        Raises: RuntimeError with the log's tail if the server ends or time is up.
        """
        until = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise RuntimeError(f"server ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > until:
                raise RuntimeError(f"server not {what} in {seconds} s:\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def is_ready(self) -> bool:
        try:
            with self.open(self.ready_path) as response:
                return response.status == 200
        except OSError:  # refused, or a status that is not 200 (HTTPError is an OSError)
            return False

    def tail(self, lines: int = 40) -> str:
        """The log's end, long lines cut."""
        text = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join(line[:200] for line in text)

    def get(self, path: str):
        """JSON body of a GET."""
        with self.open(path) as response:
            return json.load(response)

    def open(self, path: str):
        """The response of a GET; raises OSError for any status but 200."""
        return urllib.request.urlopen(self.url + path, timeout=60)

    def post(self, path: str, body, seconds: float = 120) -> tuple[int, str]:
        """(status, body text) of a POST; `body` is sent as JSON, or as it is if bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self, seconds: float = 60) -> int:
        """Ask the server to end, then kill the rest of its session.

        Returns its exit status (negative for a signal).
        """
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
            self._guard.wait()
