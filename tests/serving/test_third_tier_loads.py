"""Prefixes that are loaded while their requests wait (mem_cache/waiting_loads.py)."""

import pytest

from tests.support import parity
from tests.support.third_tier import LATE_SECONDS, over_store, wait_for_objects
from tests.support.tier_scripts import all_same

PAGE = 64
SHAPE = dict(arch="glm", index_topk=32, layers=3, sharing="FFS", **parity.NARROW)
LENGTHS = [700, 330, 650, 200, 450, 520]  # more than are loaded at a time
PAGES = [length // PAGE for length in LENGTHS]
TAIL = [1, 2, 3]
SLOTS = 6144


def prompts():
    return parity.prompts_of(LENGTHS)


def cached(outputs):
    return [output.cached_tokens // PAGE for output in outputs]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server whose store has all prompts, and the outputs of hits of its radix tree."""
    root = tmp_path_factory.mktemp("third")
    model = parity.write_model(root / "glm", **SHAPE)
    with over_store(model, root / "store", max_total_tokens=SLOTS) as engine:
        for i, prompt in enumerate(prompts()):
            engine.together(f"fill {i}", [prompt], 1)
        engine.expected = one_by_one(engine, "warm")
        assert cached(engine.expected) == PAGES
        wait_for_objects(root / "store", sum(PAGES))
        yield engine


def one_by_one(engine, name):
    return [
        output
        for i, prompt in enumerate(prompts())
        for output in engine.together(f"{name} {i}", [prompt + TAIL], 16)
    ]


def test_others_decode_while_a_prefix_is_loaded(served):
    """A load in the scheduler's own thread would let no step run meanwhile."""
    (running,) = parity.prompts_of([100], seed=5)
    served.flush()
    with served.switched(fault="late"):
        steps, hit = served.call("_beside", running, prompts()[0] + TAIL, 500)
        assert hit == PAGES[0] * PAGE
        assert steps >= 5 * LATE_SECONDS  # two rounds of reads: far more on any machine


def test_more_loads_than_at_a_time(served):
    """All are loaded, none is computed, and each has its own rows."""
    served.flush()
    before = served.call("_store_figures")
    outputs = served.generate([prompt + TAIL for prompt in prompts()], 16, start=-1)
    assert cached(outputs) == PAGES
    after = served.call("_store_figures")
    for name in ("lookup_pages", "hit_pages", "loaded_pages"):
        assert after[name] - before[name] == sum(PAGES), name
    again = one_by_one(served, "after many")
    assert all_same({"hits": again}, {"hits": served.expected})


def test_two_requests_for_one_document(served):
    """Both load it; the tree keeps one copy, and the other one's slots are free again."""
    served.flush()
    prompt = prompts()[0] + TAIL
    outputs = served.generate([prompt, prompt], 16, start=-1)
    assert cached(outputs) == [PAGES[0]] * 2
    served.flush()  # an idle scheduler has counted its slots before
    again = one_by_one(served, "after two")
    assert all_same({"hits": again}, {"hits": served.expected})


def test_a_request_that_leaves_gives_its_slots_back(served):
    served.flush()
    with served.switched(fault="late"):
        served.abort([prompt + TAIL for prompt in prompts()], LATE_SECONDS / 3, 4)
    for seed in range(3):  # together more than all slots
        others = parity.prompts_of([2500], seed=20 + seed)
        assert len(served.together(f"others {seed}", others, 4)[0].token_ids) == 4
    outputs = one_by_one(served, "after leaving")
    assert cached(outputs) == PAGES
    assert all_same({"hits": outputs}, {"hits": served.expected})


@pytest.mark.slow
def test_loads_where_the_slots_are_few(served):
    """Loads and running requests never wait for each other's slots."""
    served.flush()
    others = parity.prompts_of([1500, 1400, 1300], seed=30)
    mixed = [prompt for pair in zip(others, prompts(), strict=False) for prompt in pair]
    outputs = served.generate([prompt + TAIL for prompt in mixed], 300, start=-1)
    assert all(len(output.token_ids) == 300 for output in outputs)
    again = one_by_one(served, "after few")
    assert all_same({"hits": again}, {"hits": served.expected})
