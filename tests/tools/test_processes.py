"""Whatever tests and benchmarks start ends with them, even if they are killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools.processes import HttpProcess

REPO = Path(__file__).resolve().parents[2]
FAMILY, SLEEPS = "tests.support.family", 2
SERVER = f"""
from tools.processes import HttpProcess
server = HttpProcess({FAMILY!r}, log=LOG)
server.process.wait()
"""
# The thread that starts it ends: what dies with a thread would die here.
THREAD = f"""
import threading, time
from tools.processes import HttpProcess
starter = threading.Thread(target=lambda: HttpProcess({FAMILY!r}, log=LOG))
starter.start()
starter.join()
time.sleep(600)
"""
WORKER = f"""
from pathlib import Path
from tools.worker import Worker
from {FAMILY} import Family
if __name__ == "__main__":
    Worker(Family, log=Path(LOG)).call("sleep", 600)
"""
REAL = """
from tests.support.server import Server
Server(MODEL, log=LOG).process.wait()
"""


@pytest.fixture
def parent(tmp_path):
    """parent(script): a process that runs it; killed at the end, with its descendants."""
    started = []

    def start(script, **names):
        names = {"LOG": str(tmp_path / "log")} | names
        lines = [f"{name} = {value!r}" for name, value in names.items()]
        file = tmp_path / "parent.py"
        file.write_text("\n".join([*lines, script]))
        env = os.environ | {"PYTHONPATH": str(REPO)}
        process = subprocess.Popen([sys.executable, file], cwd=REPO, env=env)
        started.append(psutil.Process(process.pid))
        return started[-1]

    yield start
    for process in started:
        end(family(process))


def family(process):
    """A process and its descendants."""
    return [process, *process.children(recursive=True)] if process.is_running() else []


def end(processes):
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def poll(condition, seconds=20.0):
    """The condition's first true value. Raises: TimeoutError."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > until:
            raise TimeoutError(f"not so in {seconds} s")
        time.sleep(0.01)
    return found


def status(process):
    """None for a process that is no more."""
    try:
        return process.status()
    except psutil.NoSuchProcess:
        return None


def alive(processes):
    """Those that run; one that ended may be a zombie for as long as its new parent likes."""
    return [p for p in processes if status(p) not in (None, psutil.STATUS_ZOMBIE)]


def grown(process):
    """A process's family once both its sleeps are there; None before."""
    members = family(process)
    commands = [Path(f"/proc/{member.pid}/comm") for member in members]
    try:
        sleeps = sum(command.read_text() == "sleep\n" for command in commands)
    except OSError:  # one is gone
        return None
    return members if sleeps == SLEEPS else None


@pytest.mark.parametrize("script", [SERVER, THREAD, WORKER], ids=["server", "thread", "worker"])
def test_all_descendants_end_with_a_parent_that_is_killed(parent, script):
    process = parent(script)
    members = poll(lambda: grown(process))
    try:
        process.kill()
        poll(lambda: not alive(members))
    finally:
        end(members)


def test_what_a_server_leaves_behind_ends_with_it(tmp_path):
    with HttpProcess(FAMILY, log=tmp_path / "log") as server:
        members = poll(lambda: grown(psutil.Process(server.process.pid)))
        server.process.send_signal(signal.SIGKILL)
        poll(lambda: not alive(members))


def test_a_stopped_server_leaves_neither_a_process_nor_a_guard(tmp_path):
    before = set(psutil.Process().children(recursive=True))
    with HttpProcess(FAMILY, log=tmp_path / "log") as server:
        poll(lambda: grown(psutil.Process(server.process.pid)))
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.slow
@pytest.mark.parametrize("ready", [False, True], ids=["starting", "serving"])
def test_a_real_server_ends_with_a_parent_that_is_killed(parent, tiny_v32, tmp_path, ready):
    process = parent(REAL, MODEL=str(tiny_v32))
    poll(lambda: len(family(process)) >= 5, 120)  # guard, server and two that import
    if ready:
        poll(lambda: "ready to roll" in (tmp_path / "log").read_text(errors="replace"), 120)
    members = family(process)
    try:
        process.kill()
        poll(lambda: not alive(members))
    finally:
        end(members)
