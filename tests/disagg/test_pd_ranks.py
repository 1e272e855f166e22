"""Prefill and decode servers of equal and unequal numbers of ranks, against one server of one."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.disagg.cluster import start
from tests.support import parity
from tests.support.forked import ForkedNode

pytestmark = pytest.mark.slow
OUTPUT = 12
TP2 = ("--tp-size", "2")
DP2 = (*TP2, "--enable-dp-attention", "--dp-size", "2")
# (flags of prefill, flags of decode). DP2: two ranks of data-parallel attention, each with its own
# requests and its own tiers.
SHAPES = {
    "tp2-tp2": (TP2, TP2),
    "tp1-tp2": ((), TP2),
    "tp2-tp1": (TP2, ()),
    "tp2-dp2": (TP2, DP2),
    "dp2-tp2": (DP2, TP2),
}


@pytest.fixture(scope="module", params=SHAPES)
def cluster(request, model, tmp_path_factory):
    prefill, decode = SHAPES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    with start(model, directory, prefill, decode_flags=decode, node=ForkedNode) as running:
        running.wait_ready(600)
        yield running


def served(cluster, prompt, tokens=OUTPUT, **more):
    status, answer = cluster.generate(prompt, tokens, **more)
    assert status == 200, answer
    return answer


def test_same_as_colocated(cluster, colocated):
    """Tokens, and logprobs but for the order of the ranks' sums; one by one, then all at once."""
    prompts = parity.prompts_of([20, 100, 700, 1500], seed=11)
    prompts.append(prompts[3][:900] + prompts[1])  # begins as another does
    expected = [colocated.generate([prompt], OUTPUT, start=-1)[0] for prompt in prompts]
    for prompt, one in zip(prompts, expected, strict=True):
        answer = served(cluster, prompt, return_logprob=True)
        assert answer["output_ids"] == one.token_ids, len(prompt)
        logprobs = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
        np.testing.assert_allclose(logprobs, one.logprobs, rtol=0, atol=1e-5)
    cluster.settle()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: served(cluster, prompt), prompts))
    assert [answer["output_ids"] for answer in answers] == [one.token_ids for one in expected]
    cluster.settle()


def counted(cluster, name):
    """An ESS counter of the decode server: [index groups], summed over the ranks that report."""
    with cluster.decode.open("/metrics") as response:
        text = response.read().decode()
    totals = {}
    for layer, value in re.findall(
        rf'^sglang:ess_{name}_total\{{.*layer="(\d)".*\}} (\S+)$', text, re.M
    ):
        totals[layer] = totals.get(layer, 0.0) + float(value)
    return np.array([totals[layer] for layer in sorted(totals)])


def test_warm_up(cluster):
    """What a prompt's end selected on a prefill rank is hot on the decode rank that has it.

    The layers are two index groups, of one layer and of three.
    """
    prompt, other = parity.prompts_of([900, 100], seed=16)
    for _ in range(2):  # with DP2 on both ranks, whose figures are published by the last step
        served(cluster, other, 2)
    names = ("installed_rows", "lookups", "misses")
    before = [counted(cluster, name) for name in names]
    served(cluster, prompt, 2)  # prefill's token, and one step
    installed, lookups, misses = (
        counted(cluster, name) - old for name, old in zip(names, before, strict=True)
    )
    assert len(installed) == 2
    assert (installed > 64).all(), installed
    assert (misses < lookups / 2).all(), (misses, lookups)
    assert "warm-up ids" not in cluster.decode.log.read_text(errors="replace")
