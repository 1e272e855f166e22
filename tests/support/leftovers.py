"""What a server leaves behind: processes, its port, shared memory, temporary files."""

import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from pathlib import Path

from tests.support.server import Server

MARK = "ESS_TEST_SERVER"  # variable that each process of one server inherits, whoever adopts it
SHM = Path("/dev/shm")
SLOTS, GRACE = 2048, 2.0
FLAGS = ("--max-total-tokens", str(SLOTS), "--ess-grace-seconds", str(GRACE))


class Marked:
    """Processes of one server, told from anybody else's, and whatever they leave.

    env: variables with which to start the first of them
    """

    port: int | None = None

    def __init__(self):
        self.mark = uuid.uuid4().hex
        # In /tmp, because a path of a socket has 107 characters at most.
        self.directory = Path(tempfile.mkdtemp(prefix="ess-end-"))
        self.segments: set[Path] = set()
        self.sessions: set[int] = set()
        self.env = {MARK: self.mark, "TMPDIR": str(self.directory)}

    def processes(self) -> list[int]:
        """Those that run; one that ended and waits for its parent does not.

        By the mark, or by the session of one that had it: SGLang's processes give themselves
        titles, which are written over their variables.
        """
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = {pid: stat(pid) for pid in pids}
        self.sessions |= {found[pid][1] for pid in pids if has(self.mark, pid)} - {0}
        marked = {pid for pid in pids if found[pid][1] in self.sessions or has(self.mark, pid)}
        return sorted(pid for pid in marked if found[pid][0] not in "ZX")

    def note_segments(self) -> set[Path]:
        """Remember the shared memory that the processes have now."""
        for pid in self.processes():
            self.segments |= segments(pid)
        return self.segments

    def named(self, title: str) -> list[int]:
        """Those whose command line begins so."""
        return [pid for pid in self.processes() if command(pid).startswith(title)]

    def remains(self) -> list[str]:
        """What is there, in words; empty once all is gone."""
        found = [f"process {pid}: {command(pid)[:60]}" for pid in self.processes()]
        if self.port and not is_free(self.port):
            found.append(f"port {self.port}")
        found += [str(path) for path in self.segments if path.exists()]
        entries = self.directory.rglob("*")  # but for caches, which are empty directories
        return found + [str(path) for path in entries if "-" in path.name or not path.is_dir()]

    def clear(self) -> None:
        """End and remove all that is left."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(self.directory, ignore_errors=True)


class MarkedServer(Marked, Server):
    """A server that says what is left of it."""

    def __init__(self, model, *flags: str, log: Path):
        Marked.__init__(self)
        Server.__init__(self, model, *flags, log=log, env=self.env)

    def stop(self, seconds: float = 60) -> int:
        try:
            return super().stop(seconds)
        finally:
            self.clear()

    def seconds_until_gone(self, since: float, limit: float) -> float:
        """Seconds from since, a time.monotonic(). Raises: AssertionError saying what is left."""
        while remains := self.remains():
            assert time.monotonic() - since < limit, (remains, self.tail())
            time.sleep(0.02)
        return time.monotonic() - since


def start(model, log: Path, *flags: str, workers: int = 1) -> MarkedServer:
    """One that starts, of so many tokenizer workers."""
    return MarkedServer(model, *FLAGS, "--tokenizer-worker-num", str(workers), *flags, log=log)


def stat(pid: int) -> tuple[str, int]:
    """(state, session) of a process; ("X", 0) if there is none."""
    try:
        # The name, in parentheses, may hold anything.
        fields = read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    except OSError:
        return "X", 0
    return fields[0].decode(), int(fields[3])


def has(mark: str, pid: int) -> bool:
    try:
        return f"{MARK}={mark}".encode() in read(Path(f"/proc/{pid}/environ"))
    except OSError:  # it ended, or is another user's
        return False


def segments(pid: int) -> set[Path]:
    """Files of /dev/shm that a process has mapped or open and that have a name."""
    found = set()
    try:
        for line in read(Path(f"/proc/{pid}/maps")).decode(errors="replace").splitlines():
            found.add(line.split(maxsplit=5)[-1])
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            found.add(os.readlink(descriptor))
    except OSError:
        pass
    return {Path(name) for name in found if name.startswith(f"{SHM}/") and Path(name).exists()}


def command(pid: int) -> str:
    try:
        return read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def read(path: Path) -> bytes:
    return path.read_bytes()


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
