"""Ends a server in a bounded time, whatever its processes are doing, and leaves nothing behind.

The launcher forks: SGLang runs in the child, and the parent stays small and handles the signals.
So no handler, import or lock of SGLang's can delay a signal, and the launcher outlives every
process that it has to end. It is also a child subreaper: it becomes the parent of every process
whose own parent has ended, so that it finds all of them.

A second small child, the sweeper, outlives a launcher that is killed, and removes its files.
"""

from __future__ import annotations

import ctypes
import glob
import math
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from sglang_ess.config import REFUSED, TEMPLATE
from sglang_ess.errors import refusal_mark
from sglang_ess.launch.peers import ASKED, FAILED, GONE, News, Peers
from sglang_ess.launch.startup import progress

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
END_SECONDS = 4.0  # after the grace period, for error responses and for releasing resources
RELEASE_SECONDS = 3.0  # the schedulers' part of it; one may be in the middle of a step
FAULT_SECONDS = 5.0  # for SGLang to end by itself once one of its processes has died
SAME_SECONDS = 0.5  # `timeout` and some shells signal a process and then its group: one signal
PARENT_SECONDS = 0.5  # between a child's checks that its parent lives
TICK_SECONDS = 2.0  # between scans of the processes
# SGLang's names of the processes that it cannot serve without. A tokenizer worker is not among
# them: SGLang starts another one if it dies.
VITAL = ("sglang::scheduler", "sglang::detokenizer", "sglang::data_parallel_controller")
COMM = 15  # characters of a process's name that the kernel keeps, even after its end
_SHORT_NAMES = tuple(name[:COMM] for name in VITAL)
# Prefixes of the segments in /dev/shm that SGLang and its libraries make for one server.
SEGMENTS = tuple(f"/dev/shm/{name}" for name in ("sglang_loads_", "sgl_shm_", "nccl-", "cuda.shm."))
SEMAPHORES = "/dev/shm/sem.mp-*"  # of Python's multiprocessing
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
SWEEPER = "ess-sweeper"  # its name in ps

_pipe: int | None = None  # in SGLang's process: the write end of the pipe to the launcher


def supervised(serve: Callable[[], int], grace_seconds: float, peers: Peers | None = None) -> int:
    """Run serve() in a child of this process. Returns once every process has ended.

    peers: the launchers of the server's other nodes; all nodes end together

    At the first SIGTERM, SIGINT or SIGHUP the server stops taking requests; running requests have
    grace_seconds to finish and then get an error. A second signal, or a first one before
    serving() was called, ends all processes at once.
    Returns the exit status: 0 if the server ended as asked; 128 + the number of a second signal;
    what serve() returned; 1, with one line on stderr, if a process died or had to be killed.
    """
    launcher = os.getpid()
    template = f"ess-{os.urandom(4).hex()}-"
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signals = set(ENDING)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
        signals.remove(signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # so that run() misses none
    sweeper = _start_sweeper(template, peers)
    pipe, pipe_of_child = os.pipe()
    main = os.fork()
    if main == 0:
        os.close(sweeper)
        _become_server(launcher, pipe_of_child, template)
        if peers is not None:
            peers.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        _leave(serve)
    os.close(pipe_of_child)
    return _Supervisor(main, pipe, sweeper, template, grace_seconds, peers).run(signals)


def serving() -> None:
    """Tell the launcher that the server takes requests: a signal now starts a grace period."""
    _notify()


def served() -> None:
    """Tell the launcher that all requests are answered: it may kill without losing any."""
    _notify()


def follow_parent() -> None:
    """End this process, a child that SGLang spawned, when its parent ends or is killed.

    SGLang also arranges this, but 10 to 20 s later, after its imports. This uses a thread, because
    PR_SET_PDEATHSIG already fires when the parent's thread that spawned this process ends.
    Effect: temporary files get this server's prefix, so that the launcher can remove them.
    """
    tempfile.template = os.environ.get(TEMPLATE, tempfile.template)
    threading.Thread(target=_die_after, args=(os.getppid(),), daemon=True).start()


class _Supervisor:
    """The launcher after the forks.

    main: pid of SGLang's process; pipe: read end of its pipe; sweeper: write end of the sweeper's
    """

    def __init__(
        self,
        main: int,
        pipe: int,
        sweeper: int,
        template: str,
        grace_seconds: float,
        peers: Peers | None,
    ):
        self.main, self.template, self.grace_seconds = main, template, grace_seconds
        self.peers, self.news = peers, list[News]()
        self.sweeper = sweeper
        self.main_status: int | None = None
        self.stage = 0  # 1 after serving(), 2 after served()
        self.repeats_until = 0.0  # until then a signal may be the first one again
        self.vital: dict[int, tuple[int, str]] = {}  # pidfd: (pid, SGLang's name of it)
        self.segments: set[str] = set()
        self.semaphores = set(_semaphores())  # those of the machine at the last scan
        self._note({f"/dev/shm/multi_tokenizer_args_{main}"})
        self.signals, self.signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.poll = select.poll()
        self.pipe = pipe
        for descriptor in (self.pipe, self.signals, *([] if peers is None else [peers.fileno()])):
            self.poll.register(descriptor, select.POLLIN)

    def run(self, signals: set[signal.Signals]) -> int:
        for one in (*signals, signal.SIGCHLD):
            signal.signal(one, lambda *_: None)
        signal.set_wakeup_fd(self.signalled)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        if self.peers is not None:
            self.peers.start()
        try:
            return self._serve_until_asked()
        finally:
            self._end_all()

    def _serve_until_asked(self) -> int:
        while True:
            self._scan()
            numbers, lost = self._wait(TICK_SECONDS)
            if numbers:
                self.repeats_until = time.monotonic() + SAME_SECONDS
                return self._asked(signal.Signals(numbers[0]).name)
            if self.news:
                return self._told(self.news.pop(0))
            if lost:
                return self._lost(*lost[0])
            if self.main_status is not None:
                if self.main_status in (0, REFUSED):
                    return self.main_status
                self._tell(FAILED)
                return self._failed("the main one")

    def _asked(self, name: str) -> int:
        self._tell(ASKED)
        if self.peers is not None and self.peers.place.node and self.peers.links:
            return self._ends_with_node_0(name)
        if self.stage == 0:
            progress(f"{name} before the server was ready: ended")
            return 0
        progress(
            f"{name}: no more requests are taken; those that run have {self.grace_seconds:g} s to "
            "finish (--ess-grace-seconds), then they get an error; a second signal ends at once"
        )
        _signal(self.main, signal.SIGINT)  # at SIGTERM SGLang would wait without a limit
        status = self._main_ends_within(self.grace_seconds + END_SECONDS)
        if status is None and self.stage < 2:
            progress(f"warning: a process hung: all are killed, {END_SECONDS:g} s after the grace")
            return 1
        return status or 0

    def _lost(self, pid: int, name: str) -> int:
        """A vital process has ended. SGLang may end by itself and say why, or not notice."""
        self._tell(FAILED)
        state = _read(self.main, "stat").rpartition(")")[2].split()[:1]
        if state in ([], ["Z"], ["X"]):  # it ended first, and the kernel its children
            self._reap()
            return self._failed("the main one")
        status = self._main_ends_within(FAULT_SECONDS)
        if status is not None and status > 128:  # a signal came
            return status
        return self._failed(f"{name} (process {pid})")

    def _failed(self, what: str) -> int:
        """One line for the operator, unless a refusal has printed one.

        SGLang's process may not tell: its watchdog can kill it before it sees the reason.
        """
        if self.main_status == REFUSED or refusal_mark(self.template).exists():
            return REFUSED
        print(
            f"sglang-ess: SGLang's processes must live as long as the server: got the end of {what}"
            ". All are ended. The reason stands above, unless it was killed from outside.",
            file=sys.stderr,
            flush=True,
        )
        return 1

    def _main_ends_within(self, seconds: float) -> int | None:
        """Exit status of SGLang's process, or 128 + a signal that came; None if it still runs."""
        until = time.monotonic() + seconds
        while self.main_status is None:
            if (left := until - time.monotonic()) <= 0:
                return None
            numbers, _ = self._wait(left)
            if self._insists(numbers):
                return 128 + numbers[0]
        return max(0, self.main_status)

    def _insists(self, numbers: list[int]) -> bool:
        """Whether one of these signals is a second one."""
        if numbers and self.repeats_until == math.inf:  # another node had the first one
            self.repeats_until = time.monotonic() + SAME_SECONDS
        return bool(numbers) and time.monotonic() > self.repeats_until

    def _tell(self, word: bytes) -> None:
        if self.peers is not None:
            self.peers.tell(word)

    def _told(self, news: News) -> int:
        """Another node ends, so this one does."""
        if news.word == ASKED:
            self.repeats_until = math.inf
            return self._asked(news.got)
        print(
            "sglang-ess: all nodes of a server must live and reach each other: got "
            f"{news.got}. All processes of this node are ended. {news.advice}.",
            file=sys.stderr,
            flush=True,
        )
        return 1

    def _ends_with_node_0(self, name: str) -> int:
        """Node 0 answers the requests that run, and then ends the schedulers of all nodes."""
        progress(f"{name}: this node ends when node 0 has answered the requests that run")
        while True:
            numbers, _ = self._wait(TICK_SECONDS)
            if self._insists(numbers):
                return 128 + numbers[0]
            for news in self.news:
                if news.word != ASKED:
                    return 0 if news.word == GONE else self._told(news)
            self.news.clear()

    def _wait(self, seconds: float) -> tuple[list[int], list[tuple[int, str]]]:
        """(signals that came, vital processes that ended), after `seconds` at the latest."""
        numbers, lost = [], []
        for descriptor, _ in self.poll.poll(seconds * 1000):
            if descriptor == self.signals:
                numbers = [one for one in os.read(self.signals, 64) if one != signal.SIGCHLD]
                continue
            if self.peers is not None and descriptor == self.peers.fileno():
                self.news.append(self.peers.read())
                continue
            if descriptor == self.pipe and (messages := os.read(self.pipe, 8)):
                self.stage += len(messages)
                continue
            self.poll.unregister(descriptor)  # the process at its other end has ended
            if descriptor in self.vital:
                lost.append(self.vital[descriptor])
        self._reap()
        return numbers, lost

    def _reap(self) -> None:
        """Collect the exit status of every child that has ended, adopted ones included."""
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.main:
                    self.main_status = os.waitstatus_to_exitcode(ended[1])
        except ChildProcessError:
            pass

    def _scan(self) -> None:
        """Find the vital processes, and the shared memory of all processes."""
        known = {pid for pid, _ in self.vital.values()}
        semaphores = _semaphores()
        new, self.semaphores = semaphores.keys() - self.semaphores, set(semaphores)
        for pid in _descendants(os.getpid()):
            self._note(_shared_memory(pid))
            if new:
                self._note({semaphores[file] for file in new & _mapped(pid)})
            name = _read(pid, "comm").strip()  # one that has ended has it until _reap()
            if pid in known or not name.startswith(_SHORT_NAMES):
                continue
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:  # it has ended, or the kernel is older than 5.3
                continue
            full = next(vital for vital in VITAL if vital.startswith(name))
            title = _command(pid).split("\0")[0].strip()  # it says the rank, too
            self.vital[descriptor] = (pid, title if title.startswith(full) else full)
            self.poll.register(descriptor, select.POLLIN)

    def _note(self, segments: set[str]) -> None:
        """Remember what is to be removed at the end, and tell the sweeper."""
        if new := segments - self.segments:
            self.segments |= new
            try:
                os.write(self.sweeper, "".join(f"{name}\n" for name in new).encode())
            except BrokenPipeError:  # somebody killed the sweeper
                pass

    def _end_all(self) -> None:
        """Kill the remaining processes; remove the server's temporary files and shared memory."""
        self._scan()
        since = time.monotonic()
        while left := _descendants(os.getpid()):
            waited = time.monotonic() - since
            for pid in left:
                # A resource tracker first removes what its processes left, then ends by itself.
                if waited > END_SECONDS or "resource_tracker" not in _command(pid):
                    _signal(pid, signal.SIGKILL)
            if waited > 2 * END_SECONDS:
                progress(f"warning: processes {left} cannot be killed")
                break
            time.sleep(
                0.05
            )  # the kernel needs a while to free their memory; a scan reads all of /proc
            self._reap()
        _sweep(self.template, self.segments)


def _start_sweeper(template: str, peers: Peers | None) -> int:
    """Fork the sweeper. Returns the write end of its pipe: names of segments, one a line.

    At the end of the pipe the launcher has ended. As a rule it has killed the sweeper before; if
    not, it was killed itself, and the kernel ends SGLang's processes meanwhile.
    """
    pipe, other_end = os.pipe()
    if os.fork() != 0:
        os.close(pipe)
        return other_end
    try:
        os.close(other_end)
        if peers is not None:
            peers.close()  # so that the other nodes notice the launcher's end
        os.setsid()
        _prctl(PR_SET_NAME, SWEEPER.encode())
        for one in ENDING:
            signal.signal(one, signal.SIG_IGN)
        with open(pipe) as lines:
            segments = set(lines.read().split())
        time.sleep(2 * PARENT_SECONDS)
        _sweep(template, segments)
    finally:
        os._exit(0)


def _sweep(template: str, segments: set[str]) -> None:
    """Remove a server's temporary files and shared memory."""
    files = Path(tempfile.gettempdir()).glob(f"{template}*")
    for path in [*files, *map(Path, segments)]:
        _remove(path)


def _become_server(launcher: int, pipe: int, template: str) -> None:
    """Set up the forked child: only the launcher signals it, and it ends with the launcher."""
    global _pipe
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(1)
    os.setsid()  # only the launcher receives a Ctrl-C
    for one in ENDING:  # inherited by SGLang's processes; HTTP servers set handlers
        signal.signal(one, signal.SIG_IGN)
    _pipe = pipe
    os.environ[TEMPLATE] = tempfile.template = template
    if not os.environ.get("SGLANG_CUDA_COREDUMP"):
        # With a rank that hangs, SGLang would wait 60 s for dumps that nobody has asked for.
        os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")


def _notify() -> None:
    if _pipe is not None:
        os.write(_pipe, b"1")


def _leave(serve: Callable[[], int]) -> None:
    """End this process with serve()'s status, without exit handlers: zmq's would wait for ever."""
    try:
        status = serve()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, value: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _descendants(leader: int) -> list[int]:
    """Pids of a process's children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            # The name stands in parentheses and may hold any character; state and parent follow.
            fields = _read(entry, "stat").rpartition(")")[2].split()
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry))
    found = [leader]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def _command(pid: int) -> str:
    return _read(pid, "cmdline")


def _read(pid: int | str, name: str) -> str:
    """Text of a process's file in /proc; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _shared_memory(pid: int) -> set[str]:
    """Segments in /dev/shm that a process has open and that belong to its server alone."""
    found = set()
    try:
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(descriptor.path)
            if target.startswith(SEGMENTS):
                found.add(target)
    except OSError:  # the process ended, or closed a file meanwhile
        pass
    return found


def _semaphores() -> dict[tuple[str, str], str]:
    """{(device, inode): path} of the machine's semaphores.

    Resource trackers remove them, unless they are killed. A process has a semaphore mapped under a
    name that it had only at first.
    """
    found = {}
    for path in glob.glob(SEMAPHORES):
        try:
            stat = os.stat(path)
        except OSError:  # removed meanwhile
            continue
        device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
        found[device, str(stat.st_ino)] = path
    return found


def _mapped(pid: int) -> set[tuple[str, str]]:
    """(device, inode) of each file that a process has mapped."""
    lines = (line.split(maxsplit=5) for line in _read(pid, "maps").splitlines())
    return {(fields[3], fields[4]) for fields in lines}


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError:  # already removed
        pass
