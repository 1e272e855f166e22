"""DeviceHotCache: what only the CUDA tier has. test_hot_tier_contract.py has the rest."""

import numpy as np
import pytest
import torch

from ess_kernels import hot_state, plan_fetch
from sglang_ess.tiers.batch_passes import passes
from tests.support.served_tier import DEVICE
from tests.support.served_tier import CudaServed as Served


def test_the_mirror_gives_counters_without_asking_the_device():
    served = Served(60, 20, topk=5, max_queries=1)
    served.decode(1, torch.arange(5, dtype=torch.int32).view(1, 5))
    before, _ = served.tier.read()
    served.decode(1, torch.arange(5, 10, dtype=torch.int32).view(1, 5))
    assert np.array_equal(served.tier.read()[0], before)
    served.tier.mirror()
    counters, words = served.tier.read()
    assert counters[1].tolist()[:2] == [10, 10] and words[1][hot_state.TICK] == 3
    cache, figures = served.tier.caches[1], served.tier.figures()[1]
    assert figures == {
        **cache.counters, "occupied": cache.occupied, "rows": cache.num_rows, "layers": 1,
    }  # fmt: skip
    assert figures["occupied"] == 10


def test_ticks_that_outgrow_31_bits_change_nothing():
    """The same steps by a tier that just started and by one that has run for years: the same rows
    hit, miss and are evicted at the same ages.
    """
    young, old = (Served(64, 24, topk=6, max_queries=1) for _ in range(2))
    first = hot_state.TICK_MASK - 5
    old.tier.state.words[:, hot_state.TICK] = first
    for step in range(16):
        topk = young.draw(1, 6, 20 + 2 * step)
        for served in (young, old):
            served.decode(0, topk, [step] if step % 3 == 0 else ())
        assert torch.equal(young.planned.rows, old.planned.rows)
        for name in ("slot_row", "row_slot", "counters"):
            pair = (getattr(served.tier.state, name) for served in (young, old))
            assert torch.equal(*pair), name
    ticks = [int(served.tier.state.words[0, hot_state.TICK]) for served in (young, old)]
    assert ticks[1] == (ticks[0] - 1 + first) & hot_state.TICK_MASK < first
    assert young.tier.caches[0].counters["evictions"] > 0


def test_victims_are_among_the_oldest():
    """Recently used rows stay, without a list: the limit settles where one row in 16 is older."""
    served = Served(2000, 512, topk=16, max_queries=1)
    cache = served.tier.caches[0]
    for step in range(200):  # 8 slots come back each step, 8 are new: rows turn over in 63 steps
        new = torch.arange(8) + 100 + 8 * step % 1800
        served.decode(0, torch.cat([torch.arange(8), new]).int()[None])
        if step == 100:
            before = cache.counters
    evictions, ages, scans = (
        cache.counters[name] - before[name] for name in ("evictions", "evicted_age", "scans")
    )
    assert served.hot(0)[:8] == list(range(8)) and cache.occupied == 512
    assert evictions == 8 * 99
    assert ages / evictions > 0.9 * (512 - 8) / 8, "LRU's are 63 steps old"
    assert scans / evictions < 64


def test_a_limit_that_nothing_meets_falls_within_one_step():
    """The tier was idle for long, so the limit is far above every row's age."""
    served = Served(400, 64, topk=16, max_queries=2)
    cache = served.tier.caches[0]
    for first in (0, 32):
        served.decode(0, torch.arange(first, first + 32, dtype=torch.int32).view(2, 16))
    cache.state.words[hot_state.AGE_LIMIT] = hot_state.MAX_AGE_LIMIT
    assert len(served.decode(0, torch.arange(100, 132, dtype=torch.int32).view(2, 16))) == 32
    assert int(cache.state.words[hot_state.AGE_LIMIT]) <= 1 and cache.counters["short"] == 0


def test_a_warm_up_does_not_take_what_the_last_step_used():
    served = Served(200, 40, topk=10, max_queries=4)
    served.save(torch.arange(200))
    step = torch.arange(30, dtype=torch.int32).view(3, 10)
    served.decode(0, step)
    served.tier.caches[0].warm(torch.arange(100, 140, dtype=torch.int32).view(4, 10).to(DEVICE))
    assert served.decode(0, step) == []
    counters = served.tier.caches[0].counters
    assert counters["skipped"] == 30 and counters["short"] == 0
    assert counters["steps"] == 2  # a warm-up is no step, nor is a prompt
    served.prompt(torch.arange(150, 160))
    assert served.tier.caches[0].steps == 2
    assert len([slot for slot in served.hot(0) if slot >= 100]) == 10  # the free rows


def test_a_tier_with_a_row_for_every_slot_evicts_nothing():
    """However long a row was not used; with fewer rows it would go, though others are free."""
    for slots, evictions in ((256, 0), (257, 1)):
        served = Served(slots, 256, topk=8, max_queries=1)
        served.decode(0, torch.arange(8, dtype=torch.int32)[None])
        served.tier.state.words[0, hot_state.TICK] += 5000
        served.tier.state.words[0, hot_state.HAND] = 0
        served.decode(0, torch.arange(8, 16, dtype=torch.int32)[None])
        assert (served.tier.caches[0].counters["evictions"] > 0) == evictions


def test_a_warm_up_is_no_stall():
    served = Served(60, 20, topk=5, max_queries=1, layers=1)
    cache, topk = served.tier.caches[0], torch.arange(5, dtype=torch.int32)[None]
    served.decode(0, topk)
    served.tier.state.times[0, 0, hot_state.MAIN_READY] = 1
    before = served.tier.state.times.clone()
    cache.warm(topk + 10)
    assert torch.equal(served.tier.state.times, before)


def test_many_queries_of_a_small_tier_find_rows():
    """Each block lowers the limit once, and all of them pass over the tier meanwhile."""
    served = Served(2000, 64 * 9, topk=8, max_queries=64)
    for first in (0, 700):
        topk = torch.arange(512, dtype=torch.int32).view(64, 8) + first
        served.decode(0, topk)
        served.tier.state.words[0, hot_state.AGE_LIMIT] = hot_state.MAX_AGE_LIMIT
    assert served.tier.caches[0].counters["short"] == 0


def test_stalls_are_counted_by_layer_and_step():
    served = Served(60, 20, topk=5, max_queries=1)
    state, slots = served.tier.state, torch.tensor([7], device=DEVICE)
    for ready, fetched in ((1000, 1400), (1400, 1000), (0, 900), (5, 0)):
        state.times[0, 0] = torch.tensor([ready, fetched])
        served.tier.reserve(slots)
    assert served.tier.caches[0].counters["stall_ns"] == 400
    assert served.tier.caches[1].counters["stall_ns"] == 0 and not state.times.any()


@pytest.mark.parametrize(
    ("shape", "rows", "most", "count"),
    [
        ((5, 8), 40, 8, 1),
        ((5, 8), 39, 8, 2),
        ((5, 8), 8, 8, 5),
        ((2, 8), 7, 8, 4),
        ((9, 8), 99, 4, 3),
    ],
)
def test_passes_cover_the_batch_and_fit(shape, rows, most, count):
    parts = passes(*shape, rows, most)
    covered = np.zeros(shape, int)
    for part in parts:
        covered[part.queries, part.columns] += 1
        assert covered[part.queries, part.columns].size <= rows
    assert (covered == 1).all() and len(parts) == count


@pytest.mark.parametrize(
    ("rows", "most", "queries"),
    [
        (96, 12, [12]),
        (95, 12, [9, 3]),  # 11 queries fit, but 3 of a request stay together
        (96, 8, [6, 6]),
        (47, 12, [3, 3, 3, 3]),
        (23, 12, [2] * 6),  # no request fits
        (12, 12, [1] * 12),
    ],
)
def test_a_pass_has_whole_requests(rows, most, queries):
    parts = passes(12, 8, rows, most, lists=3)
    assert [part.queries.stop - part.queries.start for part in parts] == queries
    assert [part.queries.start for part in parts] == [sum(queries[:i]) for i in range(len(queries))]


def test_with_a_row_for_every_slot_any_batch_fits():
    assert len(passes(12, 8, 40, 12, num_slots=41)) == 3
    assert len(passes(12, 8, 40, 12, num_slots=40)) == 1
    assert len(passes(13, 8, 40, 12, num_slots=40)) == 2  # queries of a plan
    assert len(passes(2, 48, 40, 12, num_slots=40)) == 1


def test_a_top_k_wider_than_a_plan_is_refused():
    widest = plan_fetch.max_width()
    with pytest.raises(ValueError, match=f"topk must be at most {widest}, .* got {widest + 1}"):
        Served(60, 20, topk=widest + 1, max_queries=1)
