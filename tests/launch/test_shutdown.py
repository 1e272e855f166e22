"""The launcher's outer process around stand-ins for SGLang: each way to end, within its bound.

With real servers: tests/launch/test_shutdown_server.py. Bounds, not times: a machine may be busy.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_ess.config import REFUSED
from sglang_ess.launch import shutdown
from tests.support import leftovers
from tests.support.leftovers import command
from tests.support.stand_in import BOUND, SCHEDULER
from tests.tools.test_processes import poll
from tools.hosts import LOOPBACK, Host

REPO = Path(__file__).resolve().parents[2]
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
GRACE = 60.0
SOON = 20.0  # seconds that what takes a moment may take on a busy machine; less than GRACE


def hang_up_ends() -> None:
    """Undo nohup's ignored SIGHUP, which the tests may run under: the launcher respects it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class StandIn(leftovers.Marked):
    """Start tests.support.stand_in with this behaviour on a host. flags: its, that place a node"""

    def __init__(
        self, log: Path, behaviour: str, *flags: str, grace: float = GRACE, host: Host = LOOPBACK
    ):
        super().__init__()
        self.log = log
        command = [
            *host.command,
            sys.executable,
            "-m",
            "tests.support.stand_in",
            str(grace),
            behaviour,
        ]
        command += flags
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPO,
                stdout=output,
                stderr=output,
                env=os.environ | self.env,
                start_new_session=True,
                preexec_fn=hang_up_ends,
            )

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def text(self) -> str:
        return self.log.read_text()

    def wait_serving(self) -> None:
        poll(lambda: "serving" in self.text() and self.named(SCHEDULER))

    def status(self) -> int:
        """Its exit status. It must end in time and leave nothing behind."""
        status = self.process.wait(GRACE + BOUND + SOON)
        assert self.remains() == []
        return status


@pytest.fixture
def stand_in(tmp_path):
    """stand_in(behaviour, grace) starts one that serves; what is left ends after the test."""
    started = []

    def start(behaviour, grace=GRACE, ready=True):
        started.append(StandIn(tmp_path / "log", behaviour, grace=grace))
        if ready:
            started[-1].wait_serving()
        return started[-1]

    yield start
    for one in started:
        one.clear()
        one.process.wait()


def to_group(server, number):
    """Signal the group, as a terminal does at Ctrl-C."""
    os.killpg(server.process.pid, number)


def to_every_process(server, number):
    """Signal every process, as systemd does."""
    for pid in server.processes():
        os.kill(pid, number)


def signalled(server, *numbers, gap=0.8, send=StandIn.send) -> tuple[int, float]:
    """(exit status, seconds from the last signal)."""
    for i, number in enumerate(numbers):
        time.sleep(gap * bool(i))
        since = time.monotonic()
        send(server, number)
    return server.status(), time.monotonic() - since


@pytest.mark.parametrize("number", [TERM, INT, signal.SIGHUP])
def test_idle_it_ends_at_once_and_leaves_nothing(stand_in, number):
    status, seconds = signalled(stand_in("idle"), number)
    assert status == 0 and seconds < SOON


@pytest.mark.parametrize("send", [StandIn.send, to_group, to_every_process])
def test_what_runs_has_its_grace(stand_in, send):
    server = stand_in("busy")
    status, seconds = signalled(server, TERM, send=send)
    assert status == 0 and 0.7 < seconds < SOON
    assert "SIGTERM: no more requests are taken; those that run have 60 s" in server.text()


def test_a_signal_that_comes_twice_at_once_is_one(stand_in):
    """GNU timeout signals the process and then its group."""
    status, seconds = signalled(stand_in("busy"), TERM, TERM, gap=0.05)
    assert status == 0 and seconds > 0.5


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_second_signal_ends_at_once(stand_in, number):
    status, seconds = signalled(stand_in("hung"), TERM, number)
    assert status == 128 + number and seconds < SOON


def test_the_bound_holds_for_processes_that_hang(stand_in):
    server = stand_in("hung", 0.1)
    (scheduler,) = server.named(SCHEDULER)
    os.kill(scheduler, signal.SIGSTOP)
    status, seconds = signalled(server, TERM)
    assert status == 1 and BOUND < seconds < 0.1 + BOUND + SOON
    assert "warning: a process hung" in server.text()


def test_before_it_serves_a_signal_ends_it_at_once(stand_in):
    status, seconds = signalled(stand_in("starting"), INT)
    assert status == 0 and seconds < SOON


def test_a_process_that_left_its_parent_and_session_is_found(stand_in):
    server = stand_in("orphan")
    poll(lambda: len(server.processes()) == 5)
    assert signalled(server, TERM)[0] == 0


def test_all_end_with_a_launcher_that_is_killed(stand_in):
    """Their files, too: the sweeper removes them. The scheduler here does not follow its parent."""
    server = stand_in("idle")
    scheduler = server.named(SCHEDULER)
    assert len(server.remains()) > 3
    server.process.kill()
    poll(lambda: server.processes() == scheduler)
    os.kill(scheduler[0], KILL)
    poll(lambda: server.remains() == [])


def test_a_sweeper_that_is_killed_is_no_reason_to_end(stand_in):
    server = stand_in("idle")
    os.kill(server.called(shutdown.SWEEPER)[0], KILL)
    time.sleep(2 * shutdown.PARENT_SECONDS)
    assert len(server.processes()) == 3 and signalled(server, TERM)[0] == 0


@pytest.mark.parametrize("who", ["server", "launcher"])
def test_a_semaphore_whose_resource_tracker_was_killed_goes_too(stand_in, who):
    server = stand_in("semaphore")
    (tracker,) = (pid for pid in server.processes() if "resource_tracker" in command(pid))
    (path,) = server.note_segments()
    assert path.name.startswith("sem.")
    time.sleep(1.5 * shutdown.TICK_SECONDS)
    os.kill(tracker, KILL)
    if who == "server":
        assert signalled(server, TERM)[0] == 0
    else:
        server.process.kill()
        poll(lambda: not path.exists())


def test_a_scheduler_that_is_killed_ends_the_server(stand_in):
    """SGLang with several tokenizer workers does not notice."""
    server = stand_in("idle")
    os.kill(server.named(SCHEDULER)[0], KILL)
    assert server.status() == 1
    (line,) = [line for line in server.text().splitlines() if line.startswith("sglang-ess: ")]
    assert f"got the end of {SCHEDULER} (process" in line


@pytest.mark.parametrize(
    ("behaviour", "status", "part"),
    [
        ("refuses", REFUSED, ""),
        ("fails", 1, "RuntimeError: the reason"),
        ("kills itself", 1, "got the end of the main one"),
    ],
)
def test_an_end_by_itself(stand_in, behaviour, status, part):
    server = stand_in(behaviour, ready=False)
    assert server.status() == status and part in server.text()
    lines = [line for line in server.text().splitlines() if line.startswith("sglang-ess: ")]
    assert len(lines) == (status != REFUSED)


@pytest.mark.parametrize("end", ["kills itself", "fails", "loses a scheduler"])
def test_a_refusal_is_the_only_reason_however_the_server_ends(stand_in, end):
    server = stand_in(f"refuses and {end}", ready=False)
    assert server.status() == REFUSED
    lines = [line for line in server.text().splitlines() if line.startswith("sglang-ess: ")]
    assert lines == ["sglang-ess: the reason"]


def test_a_scheduler_that_has_died_before_it_was_seen_is_noticed():
    """A zombie has no command line."""
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(15, b"sglang::scheduler")  # PR_SET_NAME
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    supervisor = shutdown._Supervisor.__new__(shutdown._Supervisor)
    supervisor.vital, supervisor.segments, supervisor.poll = {}, set(), select.poll()
    supervisor.sweeper, supervisor.semaphores = os.open(os.devnull, os.O_WRONLY), set()
    try:
        supervisor._scan()
        (seen,) = [number for number, vital in supervisor.vital.items() if vital[0] == pid]
        assert supervisor.vital[seen] == (pid, SCHEDULER)
        assert seen in [number for number, _ in supervisor.poll.poll(0)]
    finally:
        os.waitpid(pid, 0)
