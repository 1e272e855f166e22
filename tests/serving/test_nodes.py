"""Two hosts in network namespaces: a server with a node on each, and prefill and decode apart.

What they answer must be what one host answers, bit for bit; with data-parallel attention, the same
tokens, and logprobs but for rounding (docs/ranks.md). And each way to lose a host must end
the other one, or its request, in a bounded time; pytest -s prints the times.
"""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from tests.support.leftovers import Marked
from tests.support.nodes import FAULTS, PD_WAIT, NodeGroup, own_core, pd_on_hosts
from tests.support.server import Server
from tools import hosts as network

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(network.unavailable() is not None, reason=str(network.unavailable())),
]

FLAGS = (
    *("--dtype", "float32", "--ess-index-dtype", "float32", "--max-total-tokens", "4096"),
    *("--context-length", "4096", "--chunked-prefill-size", "128", "--skip-tokenizer-init"),
    *("--ess-grace-seconds", "40"),
)
TWO_TIERS, ONE_TIER = ("--ess-hot-ratio", "0.1"), ("--disable-ess",)
RANKS = {
    "pd": (),
    "tp": ("--tp-size", "2"),
    "dp": ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
}
# Two of a length that takes several chunks; the third begins as the first and finds its prefix.
FIRST, SECOND = [list(range(10, 310)), list(range(319, 110, -1))]
PROMPTS = [FIRST, SECOND, [*FIRST[:290], 7, 8, 9]]
TOKENS, SHORTER, LONG = 24, 200, 3500
START, ENDS = 600, 60  # seconds; ENDS is the bound of the slowest way, a cut link, and slack
ROUNDING = {"pd": 0, "tp": 0, "dp": 1e-4}  # of logprobs
SILENCE = 15  # seconds: sglang_ess.launch.peers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = TinyModelConfig(index_topk=32, heads=4, layers=3)
    return write_tiny_model(tmp_path_factory.mktemp("nodes") / "tiny", shape)


@pytest.fixture
def hosts():
    with network.Hosts(2) as made:
        yield made


@pytest.fixture(scope="module")
def one_host(model, tmp_path_factory):
    """one_host(kind): what one host with as many ranks answers, one-tier; each is asked once."""
    answers = {}

    def ask(kind):
        if kind not in answers:
            log = tmp_path_factory.mktemp(kind) / "one_host.log"
            cores = [own_core(rank) for rank in range(2)]
            env = {name: "|".join(core[name] for core in cores) for name in cores[0]}
            env["OMP_NUM_THREADS"] = "1"
            with Server(model, *RANKS[kind], *ONE_TIER, *FLAGS, log=log, env=env) as server:
                server.wait_ready(START)
                answers[kind] = answered(server)
        return answers[kind]

    return ask


def answered(server) -> list:
    """Ids and logprobs of each prompt, asked one after the other."""
    found = []
    for prompt in PROMPTS:
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
            "return_logprob": True,
        }
        status, text = server.post("/generate", body, START)
        assert status == 200, text
        answer = json.loads(text)
        found.append((answer["output_ids"], answer["meta_info"]["output_token_logprobs"]))
    return found


def check_same(found, expected, ranks) -> None:
    """Raises: AssertionError for another token, or a logprob further away than rounding"""
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    values, others = [[[row[0] for row in rows] for _, rows in one] for one in (found, expected)]
    np.testing.assert_allclose(values, others, rtol=0, atol=ROUNDING[ranks])


def long_request(server, tokens) -> str:
    """How a request of so many tokens ended, in a word."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": PROMPTS[0], "sampling_params": sampling}
    try:
        return str(server.post("/generate", body, START)[0])
    except OSError as error:
        return type(error).__name__


def runs(server) -> bool:
    loads = server.get("/v1/loads?include=all")["loads"]
    return sum(load["num_running_reqs"] for load in loads) > 0


def asked(_, group) -> None:
    group.nodes[1].process.send_signal(signal.SIGTERM)


def gone(marked, since) -> float:
    """Seconds from since until no process of both nodes is left."""
    while marked.processes():
        assert time.monotonic() - since < ENDS, marked.remains()
        time.sleep(0.05)
    return time.monotonic() - since


# (ranks, tiers, what happens to the second host, whether a request runs then,
#  statuses of the launchers, what the first node's line says)
CASES = [
    ("tp", TWO_TIERS, "cut", True, [1, 1], f"no answer from node 1 for {SILENCE} s"),
    ("tp", ONE_TIER, "launcher", True, [1, -signal.SIGKILL], "the end of node 1"),
    ("tp", TWO_TIERS, "asked", True, [0, 0], ""),
    ("dp", TWO_TIERS, "scheduler", True, [1, 1], "node 1"),
    ("dp", ONE_TIER, "cut", False, [1, 1], f"no answer from node 1 for {SILENCE} s"),
]


@pytest.mark.parametrize(
    ("ranks", "tiers", "fault", "busy", "statuses", "words"),
    CASES,
    ids=[f"{case[0]}-{case[2]}" for case in CASES],
)
def test_two_hosts_answer_as_one_and_end_together(
    model, hosts, one_host, tmp_path, ranks, tiers, fault, busy, statuses, words
):
    expected, marked = one_host(ranks), Marked()
    flags = (*RANKS[ranks], *tiers, *FLAGS)
    with NodeGroup(model, hosts.hosts, tmp_path, *flags, env=marked.env) as group:
        group.wait_ready(START)
        first, second = group.nodes
        assert "node 1 is ready; node 0 takes the requests" in second.log.read_text()
        check_same(answered(first), expected, ranks)
        if not busy:  # an outage that is shorter than SILENCE
            hosts.cut(1)
            time.sleep(SILENCE / 3)
            hosts.mend(1)
            first.wait_for(lambda: first.post("/flush_cache", b"")[0] == 200, 60, "idle")
            check_same(answered(first), expected, ranks)
        with ThreadPoolExecutor(1) as pool:
            tokens = SHORTER if fault == "asked" else LONG
            request = pool.submit(long_request, first, tokens) if busy else None
            first.wait_for(lambda: not busy or runs(first), 60, "busy")
            since = time.monotonic()
            (FAULTS | {"asked": asked})[fault](hosts, group)
            ends = group.seconds_to_end(since, ENDS)
            result = request.result(ENDS) if busy else "none"
        last = gone(marked, since)
        print(f"\n{ranks} {fault}: launchers {ends[0]:.1f} and {ends[1]:.1f} s, all {last:.1f} s, "
              f"the request that ran: {result}")  # fmt: skip
        assert [node.process.returncode for node in group.nodes] == statuses, group.last_lines()
        assert words in group.last_lines()[0], group.last_lines()
        assert bool(group.last_lines()[0]) == bool(words)
        # One that is asked to end answers what runs first.
        assert (result == "200") == (fault == "asked"), result
    marked.clear()


def test_prefill_and_decode_on_two_hosts(model, hosts, one_host, tmp_path):
    """A cable that is cut costs no request that decode already has, and ends no server."""
    expected = one_host("pd")
    with pd_on_hosts(model, hosts.hosts, tmp_path, *FLAGS) as cluster:
        cluster.wait_ready(START)
        check_same(answered(cluster.router), expected, "pd")
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(long_request, cluster.router, SHORTER)
            cluster.decode.wait_for(lambda: runs(cluster.decode), 60, "busy")
            hosts.cut(0)
            assert request.result(ENDS) == "200"
        since = time.monotonic()
        refused = long_request(cluster.router, TOKENS)
        print(f"\nprefill cut off: {refused} after {time.monotonic() - since:.1f} s")
        assert refused != "200" and time.monotonic() - since < 2 * PD_WAIT + ENDS
        hosts.mend(0)
        since = time.monotonic()
        cluster.router.wait_for(
            lambda: long_request(cluster.router, 4) == "200", 2 * ENDS, "mended"
        )
        print(f"mended: served after {time.monotonic() - since:.1f} s")
        cluster.settle()  # no slot is lost, and no prefix is cached
        check_same(answered(cluster.router), expected, "pd")
