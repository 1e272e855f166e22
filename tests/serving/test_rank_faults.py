"""Two ranks under load, and one of their processes is killed: all end within a bound, and nothing
is left.

The slow tests print the seconds of each, with pytest -s. With one rank: tests/launch.
"""

import http.client
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_ess.config import REFUSED
from sglang_ess.launch import shutdown
from tests.support import short_of_memory
from tests.support.leftovers import FLAGS, GRACE, ForkedServer, MarkedServer, command, stat

KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
BOUND = 15.0  # seconds from a kill until nothing is left
SLACK = 20.0  # that a busy machine may need on top, where no process is at fault
START_SECONDS = 400.0
WATCHDOG = 10  # seconds of a pass after which SGLang ends a server; 300 by default
TWO_TIERS = ("--ess-hot-ratio", "0.2")
TP2 = ("--tp-size", "2")
DP2 = ("--dp-size", "2")
DP_ATTENTION = (*TP2, *DP2, "--enable-dp-attention")
CLIENTS, PROMPT, OUTPUT = 4, 300, 200
FIXED = {"input_ids": [5 + i % 200 for i in range(PROMPT)]}


def started(model, log, *flags) -> MarkedServer:
    # A data-parallel controller starts its schedulers from threads, which must not fork.
    kind = MarkedServer if DP2[0] in flags else ForkedServer
    return until_ready(kind(model, *FLAGS, *TWO_TIERS, *flags, log=log))


def until_ready(server) -> MarkedServer:
    server.wait_for(lambda: "    URL " in text(server), START_SECONDS, "ready")
    server.note_segments()
    return server


def text(server) -> str:
    """The log of the last start."""
    return server.log.read_bytes()[server.log_start :].decode(errors="replace")


def answer(server) -> str:
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    status, body = server.post("/generate", {**FIXED, "sampling_params": sampling})
    assert status == 200, body
    return body.partition('"meta_info"')[0]


class Load:
    """Clients that send one request after the other until the server is gone."""

    def __init__(self, server):
        self.server, self.got = server, Counter()
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._clients = [self._pool.submit(self._send, seed) for seed in range(CLIENTS)]
        server.wait_for(lambda: self.got["sent"] >= CLIENTS and is_busy(server), SLACK, "busy")

    def _send(self, seed):
        draw = random.Random(seed)
        sampling = {"temperature": 0, "max_new_tokens": OUTPUT, "ignore_eos": True}
        while not self.got.keys() - {"sent", 200}:
            ids = [draw.randrange(3, 250) for _ in range(PROMPT)]
            self.got["sent"] += 1
            body = {"input_ids": ids, "sampling_params": sampling}
            try:
                self.got[self.server.post("/generate", body)[0]] += 1
            except (OSError, http.client.HTTPException):
                self.got["cut off"] += 1

    def results(self) -> Counter:
        with self._pool:
            for client in self._clients:
                client.result(BOUND)
        return self.got


def is_busy(server) -> bool:
    return any(load["num_running_reqs"] for load in server.get("/v1/loads")["loads"])


# --- who is killed ----------------------------------------------------------------------------

SCHEDULERS = "sglang::scheduler"
NAMES = {"detokenizer": "sglang::detokenizer", "controller": "sglang::data_parallel_controller"}


def victim(server, who) -> int:
    """Pid of a process by its part: NAMES, "launcher", "main", "scheduler 0", ..."""
    launcher = server.process.pid
    if who == "launcher":
        return launcher
    if who == "main":
        return stat(victim(server, "detokenizer")).parent
    if who.startswith("scheduler"):
        return server.named(SCHEDULERS)[int(who.split()[1])]  # they start in this order
    if who == "tracker":
        return next(pid for pid in server.processes() if "resource_tracker" in command(pid))
    (pid,) = server.named(NAMES[who])
    return pid


def killed_under_load(server, who) -> float:
    """Seconds until nothing is left after a process was killed; what the log and clients say."""
    load = Load(server)
    server.note_segments()
    pid = victim(server, who)
    since = time.monotonic()
    os.kill(pid, KILL)
    status = server.process.wait(BOUND)
    seconds = server.seconds_until_gone(since, BOUND)
    got = load.results()
    assert got["cut off"] and got.keys() <= {"sent", 200, 503, "cut off"}
    lines = [line for line in text(server).splitlines() if line.startswith("sglang-ess: ")]
    if who == "launcher":  # nobody is left to say it
        assert status == -KILL and not lines
    else:
        name = "the main one" if who == "main" else f"(process {pid})"
        assert status == 1 and len(lines) == 1 and name in lines[0], lines
    print(f"{who:>12} killed: nothing left after {seconds:5.2f} s, {dict(got)}")
    return seconds


def test_a_rank_that_is_killed_ends_the_group_and_nothing_is_left(tiny_v32, tmp_path):
    with started(tiny_v32, tmp_path / "log", *TP2) as server:
        assert len(server.named(SCHEDULERS)) == 2 and len(server.remains()) > 8
        assert any("hot rows" in line for line in text(server).splitlines())
        killed_under_load(server, "scheduler 1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "victims"),
    [
        (TP2, "launcher,main,scheduler 0,scheduler 1,detokenizer"),
        (DP2, "launcher,main,controller,scheduler 0,scheduler 1,detokenizer"),
        (DP_ATTENTION, "launcher,main,controller,scheduler 0,scheduler 1,detokenizer"),
    ],
    ids=["TP2", "DP2", "DP attention"],
)
def test_each_process_killed_and_the_next_server_serves_on_its_port(
    tiny_v32, tmp_path, flags, victims
):
    with started(tiny_v32, tmp_path / "log", *flags) as server:
        expected = answer(server)
        for who in victims.split(","):
            killed_under_load(server, who)
            server.start()
            until_ready(server)
            assert answer(server) == expected
        assert server.stop() == 0 and server.remains() == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [TP2, DP2], ids=["TP2", "DP2"])
def test_a_resource_tracker_that_is_killed_is_no_reason_to_end(tiny_v32, tmp_path, flags):
    server = MarkedServer(tiny_v32, *FLAGS, *TWO_TIERS, *flags, log=tmp_path / "log")
    with until_ready(server):
        expected = answer(server)
        os.kill(victim(server, "tracker"), KILL)
        assert answer(server) == expected
        killed_under_load(server, "scheduler 0")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [TP2, DP2, DP_ATTENTION], ids=["TP2", "DP2", "DP attention"])
def test_a_signal_under_load_leaves_the_requests_their_grace(tiny_v32, tmp_path, flags):
    with started(tiny_v32, tmp_path / "log", *flags) as server:
        load = Load(server)
        since = time.monotonic()
        server.process.send_signal(TERM)
        assert server.process.wait(GRACE + shutdown.END_SECONDS + SLACK) == 0, server.tail()
        seconds, got = time.monotonic() - since, load.results()
        assert server.remains() == [] and "Traceback" not in text(server)
        assert set(got) <= {"sent", 200, 503, "cut off"}
        print(f"SIGTERM: ended after {seconds:.2f} s, {dict(got)}")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [TP2, DP_ATTENTION], ids=["TP2", "DP attention"])
def test_a_rank_that_hangs_in_a_pass_is_ended_by_the_watchdog(tiny_v32, tmp_path, flags):
    """Of another rank, which waits for it: between 1 and 1.5 times its limit, and 5 s later."""
    limit = 1.5 * WATCHDOG + 5 + BOUND + SLACK
    watched = ("--watchdog-timeout", str(WATCHDOG))
    with started(tiny_v32, tmp_path / "log", *flags, *watched) as server:
        Load(server)
        since = time.monotonic()
        os.kill(victim(server, "scheduler 1"), STOP)
        assert server.process.wait(limit) == 1
        seconds = server.seconds_until_gone(since, limit)
        print(f"a stopped rank: nothing left after {seconds:.2f} s")
        assert seconds > WATCHDOG and "Scheduler watchdog timeout" in text(server)


class FailingServer(ForkedServer):
    """One that tests.support.short_of_memory starts."""

    where: str

    def begin(self, output):
        self.command[2] = short_of_memory.__name__
        self.env[short_of_memory.FAILS] = self.where
        return super().begin(output)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["tier", "rank"])
def test_a_rank_that_cannot_start_ends_all_with_one_line(tiny_v32, tmp_path, where):
    kind = type("Failing", (FailingServer,), {"where": where})
    with kind(tiny_v32, *FLAGS, *TP2, log=tmp_path / "log") as server:
        assert server.process.wait(START_SECONDS) == (1 if where == "rank" else REFUSED)
        since = time.monotonic()
        server.seconds_until_gone(since, BOUND)
        lines = [line for line in text(server).splitlines() if line.startswith("sglang-ess: ")]
        words = SCHEDULERS if where == "rank" else short_of_memory.LINE
        assert len(lines) == 1 and words in lines[0], server.tail()
