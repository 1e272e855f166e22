"""A tiny GLM-5.3-Flash served on the CPU platform, against transformers' glm5_next.

Half of its layers are linear attention (KDA), so SGLang wraps the DSA pool and keeps a state for
each request; one index key stands for four tokens, and rows have no rope.
"""

import numpy as np
import pytest

from tests.support import parity
from tests.support.parity import EXACT, check

TOPK = 32
FEW = {"max_total_tokens": 2048}
FAULTY = [parity.FAULTS, parity.FAULTS + "_linear"]
GATHER = "tests.support.gather:install"  # the same batches in both engines
# Where each corruption must show, and how: tests/serving/test_parity.py.
FAULTS = {
    "swap_neighbour": "logprob mean",
    "shift_index_page": "selection",
    "late_gate": "selection",
    "stale_state": "logprob mean",
    "next_expert": "experts",
}
NOTICED = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("glm5") / "model"
    return parity.write_model(path, arch="glm5_next", index_topk=TOPK, **parity.NARROW)


@pytest.fixture(scope="module")
def one_tier(model):
    with EXACT.engine(model, faults=[GATHER, *FAULTY], ess={"enabled": False}, **FEW) as engine:
        yield engine


@pytest.fixture(scope="module")
def two_tiers(model):
    """A hot tier of about six queries' top-k, and room for two of the longest prompts."""
    ess = {"hot_ratio": 0.1, "admission": "off"}
    patches = [GATHER, "tests.support.tiers:expose"]
    with EXACT.engine(model, faults=patches, ess=ess, **FEW) as engine:
        yield engine


def lengths():
    """Below, at and past top-k; open pools of every size; over 16 times top-k."""
    return [TOPK // 2, TOPK + 1, 3 * TOPK + 6, 16 * TOPK + 19]


def ratios(model, sequences):
    found = parity.compare(EXACT, model, sequences).ratios()
    print(*(f"{key} {value:.3g}" for key, value in found.items()))
    return found


def test_parity(model, one_tier):
    """A cold batch of mixed lengths in chunks, decode over page ends, then prefix hits."""
    prompts = parity.prompts_of(lengths())
    with one_tier.switched(chunk=256):
        outputs, cold = parity.scored(one_tier, prompts)
        check(ratios(model, cold))
        again = [prompts[-1][:300] + suffix for suffix in parity.prompts_of([3, 70], seed=2)]
        hits, warm = parity.scored(one_tier, again, start=300, donor=outputs[-1].rid)
        assert all(output.cached_tokens == 256 for output in hits)
        check(ratios(model, warm))


@pytest.mark.parametrize("fault", FAULTS)
def test_corruptions_are_noticed(model, one_tier, fault):
    with one_tier.switched(fault=fault):
        _, sequences = parity.scored(one_tier, parity.prompts_of([5, 16 * TOPK + 19], seed=4))
    assert ratios(model, sequences)[FAULTS[fault]] > NOTICED


def test_decode_past_a_page(one_tier):
    """A page of 256 tokens ends within the answer: its states go to the radix cache."""
    prompt = parity.prompts_of([250], seed=5)
    (first,) = one_tier.generate(prompt, max_new_tokens=12, start=-1)
    whole = [prompt[0] + first.token_ids[:10]]
    (again,) = one_tier.generate(whole, max_new_tokens=2, start=-1)
    assert again.cached_tokens == 256
    assert again.token_ids == first.token_ids[10:]
    assert np.allclose(again.logprobs, first.logprobs[10:], atol=1e-4)


def test_two_tiers_equal_one(model, one_tier, two_tiers):
    """The same bits from a hot tier that misses, in slots that others have used before."""
    two_tiers.generate(parity.prompts_of([900, 700], seed=8), max_new_tokens=4)
    two_tiers.flush()
    prompts = parity.prompts_of([700, 300, 90], seed=6)
    engines = (one_tier, two_tiers)
    one, two = (engine.together("bits", prompts, 24, start=0) for engine in engines)
    for a, b in zip(one, two, strict=True):
        assert a.token_ids == b.token_ids
        assert np.array_equal(a.logprobs, b.logprobs)
        assert np.array_equal(a.prompt_logprobs, b.prompt_logprobs)
    assert all(group["misses"] for group in two_tiers.call("_hot_counters"))
    _, sequences = parity.scored(two_tiers, parity.prompts_of([16 * TOPK + 19], seed=7))
    check(ratios(model, sequences))
