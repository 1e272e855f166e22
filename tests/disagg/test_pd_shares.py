"""Decode ranks that share one host tier: a prompt's rows cross once, and each rank has them."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.disagg.cluster import SHARING, start
from tests.support import parity
from tests.support.pd import SHARES, faulty

pytestmark = pytest.mark.slow
TP2 = ("--tp-size", "2")
TOKENS, OUTPUT, PAGE, ROW_BYTES = 1400, 12, 64, 4 * 576


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The file that says what is sent."""
    return tmp_path_factory.mktemp("told") / "shares"


@pytest.fixture(scope="module", params=[(), TP2], ids=["tp1-tp2", "tp2-tp2"])
def cluster(request, model, told, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pd")
    env = faulty(directory, "tests.support.pd:shares_as_told") | {SHARES: str(told)}
    told.write_text("shares")
    with start(model, directory, request.param, decode_flags=TP2, env=env) as running:
        running.wait_ready(600)
        yield running


def is_right(cluster, colocated, prompt) -> bool:
    """Whether tokens, and logprobs but for the order of the ranks' sums, are one server's."""
    (expected,) = colocated.generate([prompt], OUTPUT, start=-1)
    status, answer = cluster.generate(prompt, OUTPUT, return_logprob=True)
    assert status == 200, answer
    logprobs = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
    close = np.allclose(logprobs, expected.logprobs, rtol=0, atol=1e-5)
    return close and answer["output_ids"] == expected.token_ids


def sent(cluster, told, what: str, prompt, colocated) -> int:
    """Bytes that all prefill ranks sent for one prompt, whose answer is right."""
    told.write_text(what)
    cluster.settle()
    since = cluster.prefill.log.stat().st_size
    assert is_right(cluster, colocated, prompt)
    cluster.settle()
    log = cluster.prefill.log.read_bytes()[since:].decode(errors="replace")
    return sum(int(number) for number in re.findall(r"test: sent (\d+) bytes", log))


def test_rows_cross_once(cluster, told, colocated):
    """Without shares they cross once for each of two ranks: harmless, and twice the bytes."""
    shared, plain = parity.prompts_of([TOKENS, TOKENS], seed=61)
    once = sent(cluster, told, "shares", shared, colocated)
    twice = sent(cluster, told, "all", plain, colocated)
    rows = -(-TOKENS // PAGE) * PAGE * ROW_BYTES * len(SHARING)
    print(f"{once} bytes sent with shares, {twice} without; {rows} of rows")
    assert twice - once == rows
    assert once < 1.5 * rows


def test_many_at_once(cluster, told, colocated):
    told.write_text("shares")
    prompts = parity.prompts_of([40, 300, 900, 64, 128, 1300], seed=13)
    expected = [colocated.generate([prompt], OUTPUT, start=-1)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: cluster.generate(prompt, OUTPUT)[1], prompts))
    assert [answer["output_ids"] for answer in answers] == expected
    cluster.settle()


def test_a_lost_share_would_be_seen(cluster, told, colocated):
    """The tests above can fail: they do where one rank's layers never arrive."""
    told.write_text("lost")
    (prompt,) = parity.prompts_of([TOKENS], seed=62)
    assert not is_right(cluster, colocated, prompt)
    told.write_text("shares")
    cluster.settle()
    assert is_right(cluster, colocated, prompt)  # its slots are written anew
