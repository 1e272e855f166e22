"""Rows that change their owner. tests/tiers/test_state_machine.py mixes this with all else."""

import weakref

import numpy as np
import pytest
import torch

from sglang_ess.tiers import HotCache, HotGroups, PlanBuffers, lru
from sglang_ess.tiers.hot_arena import HotArena


def host_rows(seed, num_slots=20):
    made = torch.randint(0, 255, (num_slots, 24), generator=torch.Generator().manual_seed(seed))
    return made.to(torch.uint8)


def make(*sizes, spare=0):
    """Layers of one arena, and their caches, one of each size."""
    arena, buffers = HotArena(sum(sizes) + spare, [host_rows(0)]), PlanBuffers()
    caches = [
        HotCache(host_rows(i), size, buffers=buffers, arena=arena) for i, size in enumerate(sizes)
    ]
    layers = HotGroups(caches)
    for cache in caches:
        cache.layers = layers  # for use()
    return layers, caches


def use(cache, *slots):
    plan = cache.plan(torch.tensor([slots], dtype=torch.int32))
    cache.fetch(plan)
    assert plan.stop is None
    assert torch.equal(cache.rows[plan.rows.long()[0]], cache.host_rows[list(slots)])
    cache.layers.check_integrity()
    return plan.miss_slots.tolist()


class TestResize:
    def test_the_least_recently_used_rows_go(self):
        layers, (one, two) = make(6, 2)
        use(one, 1, 2, 3, 4)
        use(one, 2)
        one.resize(3)  # two free rows, and those of 1
        assert one.slots_by_recency().tolist() == [3, 4, 2] and layers.spare == 3
        assert one.counters["evictions"] == 1 and one.counters["evicted_age"] == 1
        two.resize(5)
        assert layers.spare == 0 and (one.num_rows, two.num_rows) == (3, 5)
        assert use(two, 5, 6, 7, 8, 9) == [5, 6, 7, 8, 9] and use(one, 2, 3, 4) == []
        assert use(one, 11) == [11] and use(two, 5, 9) == []

    def test_what_stays_keeps_its_row_and_its_order(self):
        _, (one, _) = make(6, 2)
        use(one, 1, 2, 3, 4, 5, 6)
        rows = {slot: one.slot_row[slot] for slot in (3, 4, 5, 6)}
        one.resize(4)
        assert {slot: one.slot_row[slot] for slot in rows} == rows
        use(one, 7)
        assert one.slots_by_recency().tolist() == [4, 5, 6, 7]
        one.resize(6)
        assert use(one, 8, 9) == [8, 9] and one.counters["evictions"] == 3

    def test_pairs_at_once(self):
        layers, caches = make(4, 4, 4)
        for cache in caches:
            use(cache, 1, 2, 3, 4)
        assert layers.resize([2, 6, 4]) == 2
        assert [cache.num_rows for cache in caches] == [2, 6, 4] and layers.spare == 0
        assert [use(cache, 3, 4) for cache in caches] == [[], [], []]
        assert layers.resize([7, 1, 4]) == 5
        assert [use(cache, 4) for cache in caches] == [[], [], []]

    def test_rows_of_more_steps_than_one(self):
        """The layer that shrinks keeps what it used last; no row has two owners."""
        layers, caches = make(12, 12)
        for cache in caches:
            for first in (0, 4, 8):
                use(cache, *range(first, first + 4))
        assert layers.resize([6, 18]) == 6 and layers.sizes == (6, 18)
        layers.check_integrity()
        hot = [set(cache.slots_by_recency().tolist()) for cache in caches]
        assert set(range(8, 12)) < hot[0] and len(hot[0]) == 6 and hot[1] == set(range(12))
        for cache in caches:
            assert use(cache, *range(8, 12)) == []
            assert use(cache, *range(12, 16)) == [12, 13, 14, 15]
        assert [cache.occupied for cache in caches] == [6, 16]

    @pytest.mark.parametrize("sizes", [(12, 13), (0, 24), (3, 21)])
    def test_sizes_are_refused_before_any_row_moves(self, sizes):
        layers, caches = make(12, 12)
        for cache in caches:
            use(cache, *range(12))
        with pytest.raises(ValueError, match="must be"):
            layers.resize(sizes)
        layers.check_integrity()
        assert layers.sizes == (12, 12) and [use(one, *range(12)) for one in caches] == [[], []]

    def test_bytes_move_with_the_rows(self):
        layers, caches = make(4, 4)
        before = [cache.nbytes for cache in caches]
        layers.resize([1, 7])
        after = [cache.nbytes for cache in caches]
        assert sum(after) == sum(before) and after[1] - before[1] == 3 * (24 + 30)

    def test_cleared_it_keeps_its_size_and_leaves_others_alone(self):
        layers, (one, two) = make(4, 4)
        use(one, 1, 2, 3)
        use(two, 5, 6)
        layers.resize([2, 6])
        one.clear()
        layers.check_integrity()
        assert one.num_rows == 2 and one.occupied == 0 and use(two, 5, 6) == []
        assert use(one, 2, 3) == [2, 3]

    def test_from_a_row_for_every_slot_and_back(self):
        layers, (one, _) = make(20, 5)
        use(one, *range(20))
        layers.resize([15, 10])
        assert one.occupied == 15
        layers.resize([20, 5])
        use(one, *range(20))
        assert one.occupied == 20

    @pytest.mark.parametrize("rows, text", [(0, "1 to 20"), (21, "1 to 20"), (8, "limit 3 spare")])
    def test_refusals(self, rows, text):
        layers, (one, _) = make(4, 4, spare=3)
        with pytest.raises(ValueError, match=text):
            one.resize(rows)
        layers.check_integrity()
        with pytest.raises(ValueError, match="got 4, limit 3"):
            HotCache(host_rows(3), 4, arena=layers.caches[0].arena)


def test_a_cache_with_an_arena_of_its_own_is_gone_at_once():
    """A simulator makes thousands of them."""
    cache = HotCache(None, 4, num_slots=20)
    gone = weakref.ref(cache.arena)
    cache.resize(2)
    cache.resize(4)
    cache.check_integrity()
    del cache
    assert gone() is None


def test_the_canary_passes_over_other_layers_rows():
    _, (one, two) = make(4, 4)
    use(one, 1, 2)
    use(two, 1, 2)
    one.check_rows(np.arange(8), "layer 0")
    two.host_rows[2] += 1
    one.check_rows(np.arange(8), "layer 0")
    with pytest.raises(RuntimeError, match="layer 1, slot 2"):
        two.check_rows(np.arange(8), "layer 1")


class TestFaults:
    def handed_over(self, monkeypatch, broken):
        """Two full layers, of which one gives up rows by a broken release."""
        layers, (one, two) = make(4, 2)
        use(one, 1, 2, 3, 4)
        use(two, 1, 2)
        monkeypatch.setattr(lru, "release", broken)
        layers.resize([2, 4])
        return layers

    def test_a_row_handed_over_while_still_mapped(self, monkeypatch):
        release = lru.release

        def keeps_mapped(slot_row, *args):
            before = slot_row.copy()
            release(slot_row, *args)
            slot_row[:] = before

        with pytest.raises(RuntimeError, match="must map back"):
            self.handed_over(monkeypatch, keeps_mapped).check_integrity()

    def test_a_row_handed_over_as_it_was(self, monkeypatch):
        release = lru.release

        def leaves_it(slot_row, row_slot, *args):
            before = row_slot.copy()
            release(slot_row, row_slot, *args)
            row_slot[:] = before

        with pytest.raises(RuntimeError, match="free or owned|map back"):
            self.handed_over(monkeypatch, leaves_it).check_integrity()

    def test_a_row_given_twice(self):
        layers, (one, two) = make(4, 2)
        two.free[0] = one.free[0]
        with pytest.raises(RuntimeError, match="free or owned"):
            layers.check_integrity()
        layers, (one, two) = make(4, 2)
        layers.caches[0].arena.owner[0] = two.number
        with pytest.raises(RuntimeError, match=r"owners of \[0, 3, 3\].*caches of \[0, 4, 2\]"):
            layers.check_integrity()
