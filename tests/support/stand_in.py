"""Stands in for SGLang under the launcher's outer process: `... stand_in GRACE BEHAVIOUR [FLAGS]`.

FLAGS: SGLang's, that place the launcher among its server's nodes
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sglang_ess import errors
from sglang_ess.config import REFUSED
from sglang_ess.launch import peers, shutdown

SLEEP = "import time; time.sleep(600)"
SCHEDULER = "sglang::scheduler"
PR_SET_NAME = 15
BOUND = 1.0  # seconds, for each of the launcher's


def start(name: str, code: str = SLEEP) -> subprocess.Popen:
    """A child with this name, as setproctitle gives it to SGLang's: it has it before it serves."""
    code = f"import ctypes; ctypes.CDLL(None).prctl({PR_SET_NAME}, {name.encode()!r}); {code}"
    command = ["bash", "-c", 'exec -a "$@"', "-", name, sys.executable, "-c", code]
    child = subprocess.Popen(command)
    while Path(f"/proc/{child.pid}/comm").read_text().strip() != name[: shutdown.COMM]:
        time.sleep(0.01)
    return child


def drain(seconds: float) -> int:
    """Serve until asked to end; then as long as requests of so many seconds take."""
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(time.monotonic()))
    shutdown.serving()
    say("serving")
    while not asked or time.monotonic() < asked[0] + seconds:
        time.sleep(0.01)
    return 0


def fail() -> int:
    raise RuntimeError("the reason")


def refuse_then(end: Callable[[], int]) -> int:
    """A scheduler refuses, in a child; then this process ends as SGLang's may."""
    if os.fork() == 0:

        def check(scheduler):
            raise errors.Refusal("the reason")

        try:
            errors.make_scheduler(check, None)
        except SystemExit as error:
            os._exit(error.code)
    os.wait()
    return end()


def kill_itself() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def lose_scheduler() -> int:
    """It does not notice."""
    return start(SCHEDULER, "import time; time.sleep(3)").wait() or drain(600)


def orphan() -> int:
    """Its child's child has another session and no parent."""
    start("helper", f"import os; os.fork() and os._exit(0); os.setsid(); {SLEEP}")
    return drain(0)


def semaphore() -> int:
    """It holds one, of which a resource tracker knows."""
    with multiprocessing.get_context("spawn").Lock():
        return drain(0)


BEHAVIOURS = {
    "semaphore": semaphore,
    "idle": lambda: drain(0),
    "busy": lambda: drain(0.7),
    "hung": lambda: drain(600),
    "starting": lambda: say("serving") or time.sleep(600),
    "orphan": orphan,
    "fails": fail,
    "refuses": lambda: REFUSED,
    "kills itself": kill_itself,
    "refuses and kills itself": lambda: refuse_then(kill_itself),
    "refuses and fails": lambda: refuse_then(fail),
    "refuses and loses a scheduler": lambda: refuse_then(lose_scheduler),
}


def say(word: str) -> None:
    print(word, flush=True)


def serve(behaviour: str) -> int:
    start(SCHEDULER)
    tempfile.NamedTemporaryFile(delete=False)
    tempfile.mkdtemp()
    return BEHAVIOURS[behaviour]()


if __name__ == "__main__":
    grace, behaviour, *flags = sys.argv[1:]
    shutdown.FAULT_SECONDS = shutdown.END_SECONDS = BOUND
    place = peers.Place.of(flags, {})
    launchers = peers.Peers(place) if place else None
    sys.exit(shutdown.supervised(lambda: serve(behaviour), float(grace), launchers))
