"""One rank of a prefill or decode server of two is killed while prompts are sent.

Its server ends, what the other server holds of the lost requests is given up, every client is
answered, and the server that is started again serves.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.disagg.cluster import start
from tests.support import parity
from tests.support.forked import ForkedNode

pytestmark = pytest.mark.slow
OUTPUT = 12
TP2 = ("--tp-size", "2")
# What a request waits for its lost other half (SGLang: 300 s); the tests' bounds are above it.
LOST_SECONDS = 30
ENV = {
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": str(LOST_SECONDS),
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": str(LOST_SECONDS),
}
END_SECONDS = 60  # of the server whose rank is killed
ANSWER_SECONDS = 2 * LOST_SECONDS + END_SECONDS  # of its requests
SCHEDULERS = "sglang::schedul"  # what the kernel keeps of their names
TRANSFERS = "decode_transfer_queue_reqs"


@pytest.fixture(scope="module")
def cluster(model, tmp_path_factory):
    """Its router never tries again, so that a client hears what the servers say."""
    more = dict(decode_flags=TP2, env=ENV, node=ForkedNode, router_flags=("--mini-lb",))
    with start(model, tmp_path_factory.mktemp("pd"), TP2, **more) as running:
        running.wait_ready(600)
        yield running


@pytest.fixture(autouse=True)
def goes_on(cluster, colocated):
    """After each test both servers are at rest, and the next request is served."""
    yield
    cluster.settle(ANSWER_SECONDS)
    (prompt,) = parity.prompts_of([333], seed=99)
    status, answer = cluster.generate(prompt, OUTPUT)
    assert status == 200, answer
    assert answer["output_ids"] == expected(colocated, prompt)


def expected(colocated, prompt, tokens=OUTPUT):
    return colocated.generate([prompt], tokens, start=-1)[0].token_ids


def end_of(node, rank: int) -> float:
    """SIGKILL to one scheduler of a server. They start in the order of their ranks.

    Returns when, by time.monotonic(), after the end of all the server's processes.
    """
    family = psutil.Process(node.process.pid).children(recursive=True)
    schedulers = [one for one in family if one.name().startswith(SCHEDULERS)]
    killed = time.monotonic()
    sorted(schedulers, key=psutil.Process.create_time)[rank].kill()
    node.process.wait(END_SECONDS)
    assert not psutil.wait_procs(family, END_SECONDS)[1]
    print(f"{node.log.stem}: ended {time.monotonic() - killed:.1f} s after rank {rank}")
    return killed


def asked(cluster, prompt):
    """(status, tokens, when answered): status 0 if the connection broke."""
    try:
        status, answer = cluster.generate(prompt, OUTPUT)
    except OSError:
        status, answer = 0, {}
    return status, answer.get("output_ids"), time.monotonic()


def check_answers(answers, killed, rights) -> None:
    """Each client got its whole answer or an error, and soon."""
    print([(status, round(when - killed, 1)) for status, _, when in answers])
    for (status, tokens, when), right in zip(answers, rights, strict=True):
        assert when - killed < ANSWER_SECONDS
        assert status == 0 or status >= 500 or tokens == right, (status, tokens)
    assert any(status != 200 for status, *_ in answers), "nothing was lost"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_decode_rank_is_killed(cluster, colocated, rank):
    prompts = parity.prompts_of([1400] * 4, seed=41 + rank)
    rights = [expected(colocated, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(asked, cluster, prompt) for prompt in prompts]
        cluster.decode.wait_for(lambda: cluster.decode.loads()[TRANSFERS], 120, "in a transfer")
        killed = end_of(cluster.decode, rank)
        check_answers([answer.result() for answer in answers], killed, rights)
    assert cluster.prefill.process.poll() is None
    cluster.restart(cluster.decode)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prefill_rank_is_killed(cluster, colocated, rank):
    """What decode has already goes on."""
    (early,), late = parity.prompts_of([100], seed=51), parity.prompts_of([1400] * 3, seed=52)
    rights = [expected(colocated, prompt) for prompt in late]
    long = 600
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(cluster.generate, early, long)
        cluster.decode.wait_for(lambda: cluster.decode.loads()["num_running_reqs"], 60, "busy")
        answers = [pool.submit(asked, cluster, prompt) for prompt in late]
        cluster.decode.wait_for(lambda: cluster.decode.loads()[TRANSFERS], 120, "in a transfer")
        killed = end_of(cluster.prefill, rank)
        check_answers([answer.result() for answer in answers], killed, rights)
        status, answer = first.result()
    assert cluster.decode.process.poll() is None
    assert status == 200, answer
    assert answer["output_ids"] == expected(colocated, early, long)
    cluster.restart(cluster.prefill)
