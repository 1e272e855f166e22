"""DeviceHotCache: what only the CUDA tier has. test_hot_tier_contract.py has the rest."""

import numpy as np
import pytest
import torch

from ess_kernels import hot_state
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
    assert counters[1].tolist()[:2] == [10, 10] and words[1][0] == 3
    cache, figures = served.tier.caches[1], served.tier.figures()[1]
    assert figures == {
        **cache.counters, "steps": cache.steps, "occupied": cache.occupied, "rows": cache.num_rows,
        "layers": 1,
    }  # fmt: skip
    assert figures["occupied"] == 10


@pytest.mark.skipif(DEVICE == "cuda", reason="there rows of one age go in any order")
@pytest.mark.parametrize(
    ("first_tick", "moves"), [(hot_state.EPOCH_TICKS - 5, False), (hot_state.FREE_STAMP - 9, True)]
)
def test_ticks_that_outgrow_int32_change_nothing(first_tick, moves):
    """The same steps by a tier that just started and by one that has run for years: the same rows
    hit, miss and are evicted at the same ages, across the end of an epoch.
    """
    young, old = (Served(64, 24, topk=6, max_queries=3, moves=moves) for _ in range(2))
    for word in (hot_state.TICK, hot_state.BUILT):
        old.tier.state.words[:, word] += first_tick
    compared = 0
    for step in range(16):
        layer, universe = step % 2, 20 + 2 * step
        written = young.random.permutation(64)[: 2 * (step % 3 == 0)].tolist()
        topk = young.draw(2, 6, universe)
        plans = []
        for served in (young, old):
            served.decode(layer, topk, written)
            plans.append(served.planned)
        if step % 4 == 1:
            slots = torch.arange(40, 50)
            for served in (young, old):
                rows = served.save(slots)
                served.tier.caches[0].install(slots.to(DEVICE), rows[0], min_age=2)
                served.tier.caches[1].invalidate(slots.to(DEVICE))
        if moves and step == 10:
            for served in (young, old):
                served.tier.resize((18, 30))
        assert torch.equal(plans[0].rows, plans[1].rows)
        assert torch.equal(plans[0].query_misses, plans[1].query_misses)
        for name in ("slot_row", "row_slot", "counters"):
            pair = (getattr(served.tier.state, name) for served in (young, old))
            assert torch.equal(*pair), name
        # The end of an epoch makes a list of its own; of lists of one tick all is the same.
        built = [int(served.tier.state.words[layer, hot_state.BUILT]) for served in (young, old)]
        epoch = int(old.tier.state.words[layer, hot_state.EPOCH])
        if built[0] + first_tick == built[1] + epoch * hot_state.EPOCH_TICKS:
            compared += 1
            assert torch.equal(*(s.tier.caches[layer].state.order for s in (young, old)))
            assert not moves or torch.equal(*(s.tier.owned.ages[layer] for s in (young, old)))
    for one, other in zip(young.tier.caches, old.tier.caches, strict=True):
        assert other.steps == one.steps + first_tick
        assert other.counters["evictions"] > 0 and other.counters["short"] == 0
    assert (old.tier.state.words[:, hot_state.EPOCH] >= 1).all() and compared >= 4
    old.tier.mirror()
    assert [layer["steps"] for layer in old.tier.figures()] == [c.steps for c in old.tier.caches]


def test_an_epoch_ends_where_no_list_is_ever_short():
    """Every slot has a row, so nothing else would have the list made."""
    served = Served(40, 40, topk=6, max_queries=2)
    served.decode(0, torch.arange(12, dtype=torch.int32).view(2, 6))
    served.tier.state.words[0, hot_state.TICK] = hot_state.EPOCH_TICKS + 1
    before = served.tier.caches[0].steps
    missed = served.decode(0, torch.arange(12, dtype=torch.int32).view(2, 6))
    assert missed == [] and served.tier.caches[0].steps == before + 1
    words = served.tier.state.words[0].tolist()
    assert words[hot_state.EPOCH] == 1 and words[hot_state.TICK] == 2


def test_rows_that_nobody_used_for_epochs_stay_the_oldest():
    served = Served(40, 8, topk=4, max_queries=1)
    state, oldest = served.tier.caches[0].state, hot_state.OLDEST_STAMP
    served.decode(0, torch.arange(4, dtype=torch.int32).view(1, 4))
    for _ in range(4):
        state.words[hot_state.TICK] = hot_state.EPOCH_TICKS + 1
        served.decode(0, torch.arange(4, 8, dtype=torch.int32).view(1, 4))
        stamps = state.row_stamp[state.slot_row[:8].long()].tolist()
        assert all(oldest <= stamp < stamps[4] for stamp in stamps[:4])
        assert max(stamps) < int(state.words[hot_state.TICK])
    served.decode(0, torch.arange(10, 14, dtype=torch.int32).view(1, 4))
    assert (state.slot_row[:4] < 0).all() and (state.slot_row[4:8] >= 0).all()


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
