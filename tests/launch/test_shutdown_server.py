"""Real servers: ready when they answer, no request beyond the limits they print, a whole end.

The slow ones print the time from a signal to nothing left, with pytest -s.
"""

import http.client
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from sglang_ess.launch import shutdown, startup
from tests.support import leftovers
from tests.support.leftovers import FLAGS, GRACE, SLOTS, Marked, MarkedServer, is_free
from tests.support.pd import PdCluster

TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
SLACK = 20.0  # seconds beyond its bounds that a busy machine may need
PROMPT = 1800


def start(model, log, *flags, workers=1) -> MarkedServer:
    return until_ready(leftovers.start(model, log, *flags, workers=workers))


def until_ready(server: MarkedServer) -> MarkedServer:
    server.wait_for(lambda: "    URL " in server.log.read_text(errors="replace"), 300, "ready")
    server.note_segments()
    return server


@pytest.fixture(scope="module")
def server(starting_pair):
    """A server with two tokenizer workers; the last fast test of this file ends it."""
    return until_ready(starting_pair)


def generate(server, prompt: int, output: int, **more) -> tuple[int, dict]:
    """(status, meta_info or the error) of a request with this many tokens, none of them cached.

    more: of the body, or input_ids
    """
    sampling = {"temperature": 0, "max_new_tokens": output, "ignore_eos": True}
    ids = [random.randrange(3, 250) for _ in range(prompt)]
    body = {"input_ids": ids, "sampling_params": sampling, **more}
    status, text = server.post("/generate", body)
    try:
        return status, json.loads(text).get("meta_info", text)
    except ValueError:
        return status, text


def test_it_is_ready_when_every_worker_answers(server):
    for _ in range(20):  # whichever of them takes the connection
        with server.open("/ready") as response:
            assert response.status == 200
    assert len(server.named("sglang::tokenizer_worker")) == 2
    facts = server.get("/server_info")["ess"]
    limits = startup._LIMIT_ROWS[1][1].format_map(facts)
    assert f"    limits          {limits}\n" in server.log.read_text()


def test_a_request_has_what_the_limits_say(server):
    facts = server.get("/server_info")["ess"]
    prompt, both = facts["max_prompt_tokens"], facts["max_request_tokens"]
    assert prompt < SLOTS < facts["context_tokens"]
    status, error = generate(server, prompt + 1, 1)
    assert status == 400 and str(prompt + 1) in str(error)
    ids = [random.randrange(3, 250) for _ in range(prompt)]  # cached after the first time
    for output in (both - prompt, both - prompt + 1):  # SGLang cuts the output, and says so
        meta = generate(server, prompt, output, input_ids=ids)[1]
        assert meta["prompt_tokens"] + meta["completion_tokens"] == both
        assert meta["finish_reason"] == {"type": "length", "length": both - prompt}


# --- states in which a signal finds a server, and what its clients then get ---------------------


class Requests:
    """Send requests of this many tokens at once. What each client got: a status or a word."""

    def __init__(self, server, count, prompt, output, **more):
        self.pool = ThreadPoolExecutor(count)
        self.futures = [
            self.pool.submit(self.one, server, prompt, output, more) for _ in range(count)
        ]
        server.wait_for(lambda: busy(server), SLACK, "busy")

    def one(self, server, prompt, output, more):
        try:
            return generate(server, prompt, output, **more)[0]
        except (OSError, http.client.HTTPException):
            return "cut off"

    def got(self) -> list:
        """Wait until each client has its answer or an error."""
        with self.pool:
            return [future.result(SLACK) for future in self.futures]


class Unread:
    """A client that asks for a stream and does not read it."""

    def __init__(self, server):
        body = json.dumps(
            {"text": "x", "stream": True, "sampling_params": {"max_new_tokens": 1900}}
        )
        self.socket = socket.create_connection(("127.0.0.1", server.port))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        head = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        server.wait_for(lambda: busy(server), SLACK, "busy")

    def got(self) -> list:
        self.socket.close()
        return ["cut off"]


class Nothing:
    def __init__(self, server):
        pass

    def got(self) -> list:
        return []


class Stopped(Nothing):
    """Stop the scheduler, so that it hangs."""

    def __init__(self, server):
        os.kill(server.named("sglang::scheduler")[0], signal.SIGSTOP)


STATES = {
    "idle": Nothing,
    "prefill": lambda server: Requests(server, 24, PROMPT, 1),
    "decode": lambda server: Requests(server, 2, 8, 1900),
    "stream": lambda server: Requests(server, 2, 8, 1900, stream=True),
    "unread": Unread,
    "stopped": Stopped,
}
ANSWERS = {200, 503, "cut off"}  # in time; after the grace period; then, or not accepted at all


def busy(server):
    """Wait until requests run, or wait while a prefill runs, which does not count as running."""
    loads = server.get("/v1/loads")["loads"]
    return any(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


def ended(server, state, number=TERM, group=False) -> tuple[float, int, Counter]:
    """(seconds from the signal until nothing is left, exit status, what the clients got)."""
    clients = STATES[state](server)
    server.note_segments()
    since = time.monotonic()
    (os.killpg if group else os.kill)(server.process.pid, number)
    status = server.process.wait(GRACE + shutdown.END_SECONDS + SLACK)
    seconds = time.monotonic() - since
    got = Counter(clients.got())
    assert server.remains() == [], server.tail()
    print(
        f"{state:>9} {signal.Signals(number).name:>8} {seconds:6.2f} s, exit {status}, {dict(got)}"
    )
    return seconds, status, got


def test_in_the_middle_of_a_prefill_all_end_and_every_request_is_answered(server):
    """A server with two tokenizer workers; this test ends it."""
    assert len(server.note_segments()) > 0 and len(server.remains()) > 8
    _, status, got = ended(server, "prefill")
    assert status == 0
    assert got.keys() <= {200, 503} and got[503]  # those whose turn did not come in time
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("state", "number", "group"),
    [
        ("idle", TERM, False),
        ("idle", INT, True),
        ("prefill", TERM, False),
        ("decode", TERM, False),
        ("stream", INT, False),
        ("unread", TERM, False),
        ("stopped", TERM, False),
    ],
)
def test_every_state(tiny_v32, tmp_path, workers, state, number, group):
    with start(tiny_v32, tmp_path / "log", workers=workers) as server:
        seconds, status, got = ended(server, state, number, group)
    assert status == 0 and got.keys() <= ANSWERS
    if state in ("decode", "prefill"):
        assert got["cut off"] == 0 and got[503]
    assert seconds < GRACE + shutdown.END_SECONDS + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("how", ["second signal", "scheduler killed", "launcher killed"])
def test_ends_that_nobody_waits_for(tiny_v32, tmp_path, workers, how):
    with start(tiny_v32, tmp_path / "log", "--ess-grace-seconds", "60", workers=workers) as server:
        clients = STATES["decode"](server)
        since = time.monotonic()
        if how == "scheduler killed":
            os.kill(server.named("sglang::scheduler")[0], KILL)
            assert server.process.wait(shutdown.FAULT_SECONDS + SLACK) == 1
            assert "got the end of sglang::scheduler" in server.log.read_text()
        elif how == "second signal":
            server.process.send_signal(TERM)
            time.sleep(2 * shutdown.SAME_SECONDS)
            since = time.monotonic()
            server.process.send_signal(TERM)
            assert server.process.wait(SLACK) == 128 + TERM
        else:
            server.process.kill()
            server.seconds_until_gone(since, SLACK)
        print(f"{how}, {workers} workers: {time.monotonic() - since:.2f} s")
        assert set(clients.got()) == {"cut off"}
        assert server.remains() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "workers"),
    [
        ("importing SGLang", 1),
        ("starting the scheduler", 1),
        ("the scheduler is ready", 1),
        ("the scheduler is ready", 2),
    ],
)
def test_while_it_starts(tiny_v32, tmp_path, words, workers):
    log = tmp_path / "log"
    flags = (*FLAGS, "--tokenizer-worker-num", str(workers))
    with MarkedServer(tiny_v32, *flags, log=log) as server:
        server.wait_for(lambda: words in log.read_text(errors="replace"), 120, words)
        time.sleep(random.uniform(0, 5))
        seconds, status, _ = ended(server, "idle")
    assert status == 0 and seconds < SLACK


@pytest.mark.slow
@pytest.mark.parametrize("prefill_flags", [(), ("--disable-ess",)], ids=["both", "one-tier"])
@pytest.mark.parametrize("requests", [0, 24])
def test_prefill_and_decode_servers(tiny_v32, tmp_path, requests, prefill_flags):
    """Both nodes are signalled at once: one still has prompts, the other tokens."""
    marked = Marked()
    with PdCluster(tiny_v32, tmp_path, FLAGS, prefill_flags, env=marked.env) as cluster:
        cluster.wait_ready()
        with ThreadPoolExecutor(max(requests, 2)) as clients, ThreadPoolExecutor(2) as waiting:
            for _ in range(requests):
                clients.submit(generate, cluster.router, PROMPT, 200)
            for node in cluster.nodes if requests else ():
                node.wait_for(lambda node=node: busy(node), 60, "busy")
            marked.note_segments()
            since, bound = time.monotonic(), GRACE + shutdown.END_SECONDS + SLACK
            for node in cluster.nodes:
                node.process.send_signal(TERM)
            ended = [waiting.submit(_ended, node, since, bound) for node in cluster.nodes]
            for node, (seconds, status) in zip(
                cluster.nodes, map(Future.result, ended), strict=True
            ):
                words = f"{node.log.stem}, {requests} requests, prefill {prefill_flags}"
                print(f"{words}: {seconds:.2f} s, exit {status}")
                assert status == 0, node.tail()
            assert marked.remains() == [] and all(is_free(node.port) for node in cluster.nodes)
            cluster.router.stop()  # which tries again for ever
    marked.clear()


def _ended(node, since, bound) -> tuple[float, int]:
    status = node.process.wait(bound)
    return time.monotonic() - since, status
