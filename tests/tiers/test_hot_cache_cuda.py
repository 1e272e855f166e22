"""DeviceHotCache against an OrderedDict of slots: what is hot, its rows, its counters."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from ess_kernels import hot_state
from ess_kernels.scatter import scatter_rows
from sglang_ess.tiers import RowCorruption
from sglang_ess.tiers.hot_cache_cuda import DeviceTier, passes
from tests.support.hot_state import check_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW = (1, 16)


class Served:
    """A tier of some layers; in each every written slot has the row `content` says."""

    def __init__(self, slots, rows, topk, max_queries, seed=0, layers=2, moves=False):
        self.random = np.random.default_rng(seed)
        self.content = torch.zeros(layers, slots, *ROW, dtype=torch.int32)
        host = [torch.zeros(slots, *ROW, dtype=torch.int32) for _ in range(layers)]
        self.host = [rows.pin_memory() for rows in host] if DEVICE == "cuda" else host
        self.tier = DeviceTier(self.host, rows, topk, max_queries, DEVICE, moves)
        self.version = 0

    def save(self, slots):
        """New values of slots in the host tier of all layers: [layers][slots, ...]."""
        self.version += 1
        for layer, host in enumerate(self.host):
            values = slots.int()[:, None, None] * 10_000 + layer * 1000 + self.version
            self.content[layer, slots] = values.expand(-1, *ROW).contiguous()
            host[slots] = self.content[layer, slots]
        return self.content[:, slots].to(DEVICE)

    def check_states(self):
        for layer, cache in enumerate(self.tier.caches):
            owned = None if self.tier.owned is None else self.tier.owned.layer(layer)
            check_state(cache.state, owned)

    def decode(self, layer, topk, written=()):
        """One step of one layer. Returns the plan of its last pass."""
        cache = self.tier.caches[layer]
        written = torch.tensor(written, dtype=torch.int64)
        if len(written):
            rows = self.save(written)
            for other in self.tier.caches:
                room = other.has_room_for_writes(len(written), topk.shape[1])
                if other is cache and room:
                    scatter_rows(rows[layer], other.reserve(written.to(DEVICE)), other.rows)
                else:
                    other.invalidate(written.to(DEVICE))
        for part in cache.passes(*topk.shape):
            lookups = topk[part.queries, part.columns].to(DEVICE)
            planned = cache.plan(lookups, part.queries.start)
            cache.fetch(planned)
            self.check_rows(layer, topk[part.queries, part.columns], planned.rows.cpu())
            cache.rebuild_order()
            self.check_states()
        return planned

    def check_rows(self, layer, lookups, rows):
        real = lookups >= 0
        assert torch.equal(rows >= 0, real)
        got = self.tier.caches[layer].rows[rows[real].long().to(DEVICE)].cpu()
        assert torch.equal(got, self.content[layer, lookups[real].long()])

    def draw(self, queries, width, universe):
        lists = [self.random.permutation(universe)[:width] for _ in range(queries)]
        topk = torch.from_numpy(np.stack(lists)).int()
        topk[torch.from_numpy(self.random.random(topk.shape) < 0.15)] = -1
        return topk


@pytest.mark.parametrize(
    ("slots", "rows", "queries", "width", "universe"),
    [
        pytest.param(400, 80, 3, 20, 200, id="one pass"),
        pytest.param(300, 30, 4, 12, 120, id="passes of whole queries"),
        pytest.param(200, 10, 2, 24, 90, id="a query wider than the tier"),
        pytest.param(130, 130, 3, 20, 130, id="every slot has a row"),
    ],
)
def test_every_lookup_finds_its_slots_row(slots, rows, queries, width, universe):
    served = Served(slots, rows, topk=width, max_queries=4)
    for step in range(10):
        written = served.random.permutation(universe)[:queries].tolist() if step % 2 else ()
        served.decode(step % 2, served.draw(queries, width, universe), written)
    for cache in served.tier.caches:
        assert cache.counters["short"] == 0
        cache.check_rows(np.arange(rows), "layer 0")


@pytest.mark.parametrize(
    ("rows", "steps", "seed"),
    [
        (30, 35, 1),
        pytest.param(8, 400, 2, marks=pytest.mark.slow),
        pytest.param(64, 400, 3, marks=pytest.mark.slow),
    ],
)
def test_any_order_of_operations(rows, steps, seed):
    """Slots change owners between and inside steps; a lookup always finds the last values."""
    served = Served(64, rows, topk=8, max_queries=3, seed=seed)
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
            values = served.save(torch.tensor(slots))
            for i, cache in enumerate(served.tier.caches):
                if i == layer:
                    cache.install(torch.tensor(slots), values[i], int(random.integers(4)))
                else:
                    cache.invalidate(torch.tensor(slots))
        elif kind < 0.85:
            served.save(torch.tensor(slots))
            served.tier.invalidate(torch.tensor(slots))
        else:
            served.tier.caches[layer].warm(served.draw(4, 8, 64))
        served.check_states()
        for cache in served.tier.caches:
            cache.check_rows(np.arange(rows), "any layer")
    assert all(cache.counters["short"] == 0 for cache in served.tier.caches)


def test_victims_are_the_least_recently_used():
    served = Served(100, 8, topk=4, max_queries=1)
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
        hot = set((served.tier.caches[0].state.slot_row >= 0).nonzero().flatten().tolist())
        # Slots of one step are equally old, so of the last of those that stay any may.
        kept = list(order)[-8:]
        assert set(kept[4:]) <= hot and len(hot) == min(8, len(order))
        for slot in list(order):
            if slot not in hot:
                assert slot not in topk[0].tolist()
                del order[slot]
    assert served.tier.caches[0].counters["misses"] >= misses


def test_prompts_of_any_length_leave_rows_for_the_next_plan():
    served = Served(500, 40, topk=10, max_queries=3)
    cache = served.tier.caches[0]
    for start in (0, 130, 260):
        slots = torch.arange(start, start + 125)
        rows = served.save(slots)
        cache.install(slots.to(DEVICE), rows[0], min_age=start // 130)
        check_state(cache.state)
        served.decode(0, served.draw(3, 10, 385))
    assert cache.counters["short"] == 0 and cache.counters["installs"] >= 40


def test_warm_makes_the_last_queries_hot():
    served = Served(300, 40, topk=10, max_queries=4)
    served.save(torch.arange(300))
    topk = torch.arange(80, dtype=torch.int32).view(8, 10)
    served.tier.caches[1].warm(topk.to(DEVICE))
    hot = (served.tier.caches[1].state.slot_row >= 0).nonzero().flatten()
    assert torch.equal(hot.cpu(), torch.arange(40, 80))
    assert served.tier.caches[1].counters["lookups"] == 0
    planned = served.decode(1, topk[4:7])
    assert int(planned.num_misses) == 0


def test_invalidate_reaches_every_layer():
    served = Served(60, 20, topk=5, max_queries=2)
    topk = torch.arange(10, dtype=torch.int32).view(2, 5)
    for layer in (0, 1):
        served.decode(layer, topk)
    served.save(torch.arange(4))
    served.tier.invalidate(torch.arange(4, device=DEVICE))
    for layer in (0, 1):
        assert int(served.decode(layer, topk).num_misses) == 4


def test_a_corrupt_row_is_reported():
    served = Served(60, 20, topk=5, max_queries=1)
    served.save(torch.arange(60))
    served.decode(0, torch.arange(5, dtype=torch.int32).view(1, 5))
    cache = served.tier.caches[0]
    cache.rows[int(cache.state.slot_row[3]), 0, 7] += 1
    with pytest.raises(RowCorruption, match=r"layer 9, slot 3, hot row"):
        cache.check_rows(np.arange(20), "layer 9")
    cache.check_rows(np.arange(20), "layer 9", first_slot=4)


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
    assert figures == {**cache.counters, "steps": cache.steps, "occupied": cache.occupied}
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
        plans = [served.decode(layer, topk, written) for served in (young, old)]
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
    planned = served.decode(0, torch.arange(12, dtype=torch.int32).view(2, 6))
    assert int(planned.num_misses) == 0 and served.tier.caches[0].steps == before + 1
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
