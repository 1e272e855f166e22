"""What every hot tier promises (sglang_ess/tiers/contract.py), on the CPU's and the CUDA one."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from sglang_ess.tiers.contract import COUNTERS, RowCorruption
from tests.support.served_tier import CpuServed, CudaServed


@pytest.fixture(params=[CpuServed, CudaServed], ids=["hot_cache", "hot_cache_cuda"])
def served(request):
    return request.param


def short(served):
    """Lookups that found no row: only the CUDA tier could have any."""
    return sum(cache.counters.get("short", 0) for cache in served.tier.caches)


def topk_of(*queries):
    return torch.tensor(queries, dtype=torch.int32)


# --- lookups ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "rows", "queries", "width", "universe"),
    [
        pytest.param(400, 80, 3, 20, 200, id="one pass"),
        pytest.param(300, 30, 4, 12, 120, id="passes of whole queries"),
        pytest.param(200, 10, 2, 24, 90, id="a query wider than the tier"),
        pytest.param(130, 130, 3, 20, 130, id="every slot has a row"),
    ],
)
def test_every_lookup_finds_its_slots_row(served, slots, rows, queries, width, universe):
    served = served(slots, rows, topk=width, max_queries=4)
    for step in range(10):
        written = served.random.permutation(universe)[:queries].tolist() if step % 2 else ()
        served.decode(step % 2, served.draw(queries, width, universe), written)
    assert short(served) == 0
    for cache in served.tier.caches:
        cache.check_rows(np.arange(rows), "layer 0")


@pytest.mark.parametrize(
    ("rows", "steps", "seed"),
    [
        (30, 35, 1),
        pytest.param(8, 400, 2, marks=pytest.mark.slow),
        pytest.param(64, 400, 3, marks=pytest.mark.slow),
    ],
)
def test_any_order_of_operations(served, rows, steps, seed):
    """Slots change owners between and inside steps; a lookup always finds the last values."""
    served = served(64, rows, topk=8, max_queries=3, seed=seed)
    served.save(torch.arange(64))
    random = served.random
    for _ in range(steps):
        layer, kind = int(random.integers(2)), random.random()
        slots = random.permutation(64)[: random.integers(1, 20)].tolist()
        if kind < 0.55:
            queries = int(random.integers(1, 4))
            written = slots[:queries] if len(slots) >= queries and kind < 0.35 else ()
            served.decode(layer, served.draw(queries, 8, 64), written)
        elif kind < 0.7:
            served.prompt(torch.tensor(slots), int(random.integers(4)))
        elif kind < 0.85:
            served.save(torch.tensor(slots))
            served.tier.invalidate(torch.tensor(slots))
        else:
            served.tier.caches[layer].warm(served.draw(4, 8, 64))
        served.check_states()
        for cache in served.tier.caches:
            cache.check_rows(np.arange(rows), "any layer")
    assert short(served) == 0


def test_victims_are_the_least_recently_used(served):
    served = served(100, 8, topk=4, max_queries=1)
    order: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for _ in range(20):
        topk = torch.from_numpy(served.random.permutation(20)[:4]).int().view(1, 4)
        missing = [slot for slot in topk[0].tolist() if slot not in order]
        misses += len(missing)
        for slot in topk[0].tolist():
            order[slot] = None
            order.move_to_end(slot)
        served.decode(0, topk)
        hot = set(served.hot(0))
        # Slots of one step are equally old, so of the last of those that stay any may.
        kept = list(order)[-8:]
        assert set(kept[4:]) <= hot and len(hot) == min(8, len(order))
        for slot in list(order):
            if slot not in hot:
                assert slot not in topk[0].tolist()
                del order[slot]
    assert served.tier.caches[0].counters["misses"] >= misses


def test_a_miss_never_evicts_a_later_hit(served):
    """What the step is about to hit is the least recently used: it stays all the same."""
    served = served(20, 4, topk=4, max_queries=2)
    served.decode(0, topk_of([1, 2, 3, 4]))
    assert served.decode(0, topk_of([5, 6, 1, 2])) == [5, 6]
    assert served.hot(0) == [1, 2, 5, 6]
    assert served.decode(0, topk_of([7, 8], [5, 6])) == [7, 8]  # in another query too
    assert served.hot(0) == [5, 6, 7, 8]


def test_repeats_are_fetched_once(served):
    served = served(20, 6, topk=3, max_queries=2)
    assert sorted(served.decode(0, topk_of([1, 2, 1], [2, -1, 3]))) == [1, 2, 3]
    rows = served.planned.rows.cpu()
    assert rows[0, 0] == rows[0, 2] and rows[0, 1] == rows[1, 0] and rows[1, 1] == -1


def test_free_rows_are_taken_before_any_is_evicted(served):
    served = served(20, 4, topk=4, max_queries=1)
    served.decode(0, topk_of([1, 2, 3, 4]))
    row = int(served.slot_rows(0)[1])
    served.tier.invalidate(torch.tensor([3, 4, 9], device=served.device))
    served.decode(0, topk_of([7, 8, -1, -1]))
    assert served.hot(0) == [1, 2, 7, 8] and int(served.slot_rows(0)[1]) == row
    assert served.tier.caches[0].counters["evictions"] == 0


# --- writes -------------------------------------------------------------------------------


def test_a_hot_slot_is_updated_in_place(served):
    served = served(20, 4, topk=4, max_queries=1)
    served.decode(0, topk_of([1, 2, 3, 4]))
    row = int(served.slot_rows(0)[2])
    served.prompt(torch.tensor([2]), min_age=1000)
    assert int(served.slot_rows(0)[2]) == row and served.hot(0) == [1, 2, 3, 4]
    assert served.decode(0, topk_of([2, 1, -1, -1])) == []
    assert served.tier.caches[0].counters["evictions"] == 0


def test_a_free_row_needs_no_age_and_a_young_one_is_not_evicted(served):
    served = served(20, 2, topk=2, max_queries=1)
    served.prompt(torch.tensor([3, 4, 5]), min_age=1000)
    assert set(served.hot(0)) < {3, 4, 5}
    assert len(served.hot(0)) == 2 == served.tier.caches[0].occupied
    counters = served.tier.caches[0].counters
    assert counters["installs"] == 2 and counters["skipped"] == 1 and counters["evictions"] == 0


def test_prompts_of_any_length_leave_rows_for_the_next_plan(served):
    served = served(500, 40, topk=10, max_queries=3)
    cache = served.tier.caches[0]
    for start in (0, 130, 260):
        served.prompt(torch.arange(start, start + 125), min_age=start // 130)
        served.check_states()
        served.decode(0, served.draw(3, 10, 385))
    assert short(served) == 0 and cache.counters["installs"] >= 40


def test_warm_makes_the_last_queries_hot(served):
    served = served(300, 40, topk=10, max_queries=4)
    served.save(torch.arange(300))
    topk = torch.arange(80, dtype=torch.int32).view(8, 10)
    served.tier.caches[1].warm(topk.to(served.device))
    assert served.hot(1) == list(range(40, 80))
    assert served.tier.caches[1].counters["lookups"] == 0
    assert served.decode(1, topk[4:7]) == []


def test_invalidate_reaches_every_layer(served):
    served = served(60, 20, topk=5, max_queries=2)
    topk = torch.arange(10, dtype=torch.int32).view(2, 5)
    for layer in (0, 1):
        served.decode(layer, topk)
    served.save(torch.arange(4))
    served.tier.invalidate(torch.arange(4, device=served.device))
    for layer in (0, 1):
        assert len(served.decode(layer, topk)) == 4


# --- sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, -1, 21])
def test_sizes_outside_the_host_tier_are_refused(served, num_rows):
    with pytest.raises(ValueError, match=f"1 to 20, .*: got {num_rows}"):
        served(20, num_rows, topk=4, max_queries=1)


# --- figures and checks -------------------------------------------------------------------


def test_counters(served):
    served = served(20, 2, topk=2, max_queries=2)
    cache = served.tier.caches[0]
    served.decode(0, topk_of([1, 2]))
    served.decode(0, topk_of([2, -1]))
    served.decode(0, topk_of([3, 4]))  # evicts 1, unused for 2 steps, and 2, for 1
    expected = {
        "lookups": 5, "misses": 4, "evictions": 2, "evicted_age": 3, "installs": 0, "skipped": 0,
    }  # fmt: skip
    assert tuple(expected) == COUNTERS
    assert {name: cache.counters[name] for name in COUNTERS} == expected
    assert cache.steps == 3 and cache.occupied == 2 == cache.num_rows and cache.num_slots == 20


def test_figures_are_those_of_the_layers(served):
    served = served(60, 20, topk=5, max_queries=1)
    for first in (0, 5):
        served.decode(1, torch.arange(first, first + 5, dtype=torch.int32)[None])
    if hasattr(served.tier, "mirror"):
        served.tier.mirror()
    for cache, figures in zip(served.tier.caches, served.tier.figures(), strict=True):
        assert figures == cache.counters | {
            "steps": cache.steps, "occupied": cache.occupied, "rows": cache.num_rows, "layers": 1,
        }  # fmt: skip
    assert served.tier.figures()[1]["occupied"] == 10 and served.tier.totals() == (10, 0, 0)


def test_a_corrupt_row_is_reported(served):
    served = served(60, 20, topk=5, max_queries=1)
    served.save(torch.arange(60))
    served.decode(0, torch.arange(5, dtype=torch.int32).view(1, 5))
    cache = served.tier.caches[0]
    cache.rows[int(served.slot_rows(0)[3]), 0, 7] += 1
    with pytest.raises(RowCorruption, match=r"layer 9, slot 3, hot row"):
        cache.check_rows(np.arange(20), "layer 9")
    cache.check_rows(np.arange(20), "layer 9", first_slot=4)
