"""What a server leaves behind: processes, ports, shared memory, semaphores, temporary files."""

import os
import shutil
import signal
import socket
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sglang_ess.launch.shutdown import COMM
from tests.support.forked import Forked
from tests.support.server import Server

MARK = "ESS_TEST_SERVER"  # variable that each process of one server inherits, whoever adopts it
SHM, MEMFD = Path("/dev/shm"), "/memfd:"
File: TypeAlias = tuple[str, str]  # device and inode
SLOTS, GRACE = 2048, 2.0
FLAGS = ("--max-total-tokens", str(SLOTS), "--ess-grace-seconds", str(GRACE))


class Marked:
    """Processes of one server, told from anybody else's, and whatever they leave.

    env: variables with which to start the first of them
    """

    port: int | None = None
    root: int | None = None  # the first process, where it is a fork

    def __init__(self):
        self.mark = uuid.uuid4().hex
        # In /tmp, because a path of a socket has 107 characters at most.
        self.directory = Path(tempfile.mkdtemp(prefix="ess-end-"))
        self.segments: set[Path] = set()
        self._foreign = shared_files().keys() | everyones_memfds()  # were there before
        self.unnamed: set[File] = set()  # memory without a name: memfd's
        self.listening: dict[str, int] = {}  # inode of a socket: its port
        self.sessions: set[int] = set()
        self.env = {MARK: self.mark, "TMPDIR": str(self.directory)}

    def processes(self) -> list[int]:
        """Those that run; one that ended and waits for its parent does not.

        By the mark, or by the session of one that had it: SGLang's processes give themselves
        titles, which are written over their variables.
        """
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = {pid: stat(pid) for pid in pids}
        own = {pid for pid in pids if pid == self.root or has(self.mark, pid)}
        # Forks have the variables of the process that they were forked from.
        while more := {pid for pid in pids if found[pid].parent in own} - own:
            own |= more
        self.sessions |= {found[pid].session for pid in own} - {0}
        own |= {pid for pid in pids if found[pid].session in self.sessions}
        return sorted(pid for pid in own if found[pid].state not in "ZX")

    def note_segments(self) -> set[Path]:
        """Remember the shared memory and the ports that the processes have now.

        Returns the memory that has a name, semaphores included.
        """
        ports, files = listening_ports(), shared_files()
        for pid in self.processes():
            own = mapped_or_open(pid, f"{SHM}/") - self._foreign
            self.segments |= {files[file] for file in own & files.keys()}
            self.unnamed |= mapped_or_open(pid, MEMFD) - self._foreign
            self.listening |= {inode: ports[inode] for inode in sockets(pid) & ports.keys()}
        return self.segments

    def named(self, title: str) -> list[int]:
        """Those whose command line begins so, and forks with its beginning as their short name."""
        return [
            pid
            for pid in self.processes()
            if command(pid).startswith(title) or comm(pid) == title[:COMM]
        ]

    def called(self, name: str) -> list[int]:
        """Those of this short name."""
        return [pid for pid in self.processes() if comm(pid) == name]

    def remains(self) -> list[str]:
        """What is there, in words; empty once all is gone."""
        found = [f"process {pid}: {command(pid)[:60]}" for pid in self.processes()]
        if self.port and not is_free(self.port):
            found.append(f"port {self.port}")
        found += [str(path) for path in self.segments if path.exists()]
        there = listening_ports()
        found += [f"port {port}" for inode, port in self.listening.items() if inode in there]
        if self.unnamed:  # whoever has it; it is gone with the last of them
            found += [f"memfd {file}" for file in self.unnamed & everyones_memfds()]
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


class ForkedServer(MarkedServer):
    """One whose processes are forks: it starts without their imports. It cannot be told from others
    by a variable, so it must not outlive its first process by more than a session.
    """

    def begin(self, output) -> Forked:
        process = Forked(self.command, self.log, self.env)
        self.root = process.pid
        return process


def start(model, log: Path, *flags: str, workers: int = 1) -> MarkedServer:
    """One that starts, of so many tokenizer workers."""
    return MarkedServer(model, *FLAGS, "--tokenizer-worker-num", str(workers), *flags, log=log)


class Stat(NamedTuple):
    state: str = "X"
    parent: int = 0
    session: int = 0


def stat(pid: int) -> Stat:
    """Of a process; Stat() if there is none."""
    try:
        # The name, in parentheses, may hold anything.
        fields = read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    except OSError:
        return Stat()
    return Stat(fields[0].decode(), int(fields[1]), int(fields[3]))


def has(mark: str, pid: int) -> bool:
    try:
        return f"{MARK}={mark}".encode() in read(Path(f"/proc/{pid}/environ"))
    except OSError:  # it ended, or is another user's
        return False


def shared_files() -> dict[File, Path]:
    """What is in /dev/shm. A semaphore is mapped under a name that it has no more."""
    found = {}
    for path in SHM.iterdir():
        with suppress(OSError):
            found[file_of(path)] = path
    return found


def file_of(path: Path) -> File:
    stat = path.stat()
    return f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}", str(stat.st_ino)


def mapped_or_open(pid: int, prefix: str) -> set[File]:
    """Files that a process has mapped or open whose names begin so."""
    found = {(line[3], line[4]) for line in maps(pid) if line[-1].startswith(prefix)}
    for number, name in descriptors(pid).items():
        if name.startswith(prefix):
            with suppress(OSError):
                found.add(file_of(Path(f"/proc/{pid}/fd/{number}")))
    return found


def everyones_memfds() -> set[File]:
    """Those of all processes."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {file for pid in pids for file in mapped_or_open(pid, MEMFD)}


def sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    return {name[8:-1] for name in descriptors(pid).values() if name.startswith("socket:[")}


def listening_ports() -> dict[str, int]:
    """{inode of a socket that listens: its port}"""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                found[fields[9]] = int(fields[1].rpartition(":")[2], 16)
    return found


def maps(pid: int) -> list[list[str]]:
    """Fields of each line of a process's memory map: the fourth and fifth are a File, the last is
    its name.
    """
    try:
        text = read(Path(f"/proc/{pid}/maps")).decode(errors="replace")
    except OSError:
        return []
    return [line.split(maxsplit=5) for line in text.splitlines()]


def descriptors(pid: int) -> dict[str, str]:
    """{number: what a process has open there}"""
    found = {}
    try:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            found[descriptor.name] = os.readlink(descriptor)
    except OSError:
        pass
    return found


def command(pid: int) -> str:
    try:
        return read(Path(f"/proc/{pid}/cmdline")).replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def comm(pid: int) -> str:
    try:
        return read(Path(f"/proc/{pid}/comm")).decode().strip()
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
