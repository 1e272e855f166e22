"""Ghosts against HotCaches of the sizes that they stand for, on the same operations."""

import numpy as np
import pytest
import torch

from sglang_ess.tiers import HotCache
from sglang_ess.tiers.balance import ghost_cache
from sglang_ess.tiers.balance.ghost_cache import GhostCache

NUM_SLOTS = 300


class Stage:
    """A ghost and a HotCache of each of its sizes, asked the same."""

    def __init__(self, sizes, num_slots=NUM_SLOTS, rate=1.0):
        self.ghost = GhostCache(num_slots, rate, sizes)
        self.caches = [HotCache(None, size, num_slots) for size in sizes]

    def plan(self, topk):
        topk = torch.from_numpy(np.ascontiguousarray(topk, np.int32))
        self.ghost.access(topk)
        for cache in self.caches:
            start = (0, 0)
            while start is not None:
                start = cache.plan(topk, start).stop

    def install(self, slots, min_age=0):
        slots = torch.as_tensor(slots)
        self.ghost.install(slots, min_age)
        for cache in self.caches:
            cache.install(slots, torch.zeros(len(slots), 1), min_age)

    def invalidate(self, slots):
        slots = torch.as_tensor(slots)
        self.ghost.invalidate(slots)
        for cache in self.caches:
            cache.invalidate(slots)

    def warm(self, topk):
        topk = torch.from_numpy(np.ascontiguousarray(topk, np.int32))
        self.ghost.warm(topk)
        for cache in self.caches:
            cache.warm(topk)

    def misses(self):
        """(HotCache's, the ghost's), of all steps."""
        curve = self.ghost.curve()
        assert curve.rows == (0, *(cache.num_rows for cache in self.caches))
        counted = [cache.counters["misses"] for cache in self.caches]
        return counted, [round(value * curve.steps, 6) for value in curve.misses[1:]]


def skewed(rng, shape, num_slots=NUM_SLOTS):
    return (rng.random(shape) ** 2.5 * num_slots).astype(np.int32)


class TestExact:
    @pytest.mark.parametrize("seed", range(3))
    def test_one_lookup_a_step_is_equal_to_the_last_miss(self, seed):
        """No order within a step: one queue says what every size holds."""
        rng, stage = np.random.default_rng(seed), Stage([1, 2, 3, 17, 64, 65, 200, 299])
        for _ in range(2500):
            kind = rng.integers(20)
            if kind < 16:
                stage.plan(skewed(rng, (1, 1)))
            elif kind < 18:
                stage.install(skewed(rng, 1).astype(np.int64))
            elif kind < 19:
                stage.invalidate(rng.integers(NUM_SLOTS, size=rng.integers(9)))
            else:
                stage.warm(skewed(rng, (4, 1)))
        counted, estimated = stage.misses()
        assert estimated == counted and counted[0] > counted[-1] > 0

    def test_steps_in_the_same_order_are_equal(self):
        """Fixed groups in turn, hot as a whole or not at all."""
        groups = np.arange(NUM_SLOTS).reshape(30, 2, 5)
        rng, stage = np.random.default_rng(0), Stage([10, 20, 50, 100, 250])
        for group in rng.zipf(1.3, size=1500) % len(groups):
            stage.plan(groups[group])
        counted, estimated = stage.misses()
        assert estimated == counted

    @pytest.mark.parametrize("similarity", [0.0, 0.6, 0.9])
    def test_whole_steps_are_within_one_percent(self, similarity):
        """From 1.5 steps of slots on, with writes between them."""
        rng, stage = np.random.default_rng(1), Stage([72, 120, 200, 400, 900], 1000)
        topk = skewed(rng, (3, 16), 1000)
        for step in range(1200):
            fresh = rng.random(topk.shape) >= similarity
            topk = np.where(fresh, skewed(rng, topk.shape, 1000), topk)
            stage.plan(np.where(rng.random(topk.shape) < 0.1, -1, topk))
            if step % 7 == 0:
                stage.install(rng.integers(1000, size=5))
                stage.invalidate(rng.integers(1000, size=5))
        counted, estimated = stage.misses()
        assert np.allclose(estimated, counted, rtol=0.01)

    def test_repeats_and_pads(self):
        ghost = GhostCache(NUM_SLOTS, 1.0, [1, 2, 3])
        ghost.access(torch.tensor([[7, 7, -1], [8, 7, -1]], dtype=torch.int32))
        ghost.access(torch.tensor([[8, 7, 9]], dtype=torch.int32))
        curve = ghost.curve()
        assert curve.rows == (0, 1, 2, 3) and curve.misses == (2.5, 2.0, 1.5, 1.5)
        assert curve.lookups == 3.5 and curve.union == 3 and curve.steps == 2
        assert curve.misses_per_lookup[0] == pytest.approx(2.5 / 3.5)
        assert curve.at(0.5) == 2.25 and curve.at(99) == 1.5

    def test_a_row_that_was_freed_is_taken_first(self):
        """Two rows: 1 and 2 are hot, 1 goes, 3 comes: 2 is still there; with one row it is not."""
        ghost = GhostCache(NUM_SLOTS, 1.0, [1, 2])
        for slot in (1, 2):
            ghost.access(torch.tensor([[slot]], dtype=torch.int32))
        ghost.invalidate(torch.tensor([1]))
        for slot in (3, 2, 1):
            ghost.access(torch.tensor([[slot]], dtype=torch.int32))
        assert (np.array(ghost.curve().misses) * 5).tolist() == [5, 5, 4]

    def test_a_write_that_may_find_no_room_is_cold(self):
        ghost = GhostCache(NUM_SLOTS, 1.0, [5])
        for min_age, misses in ((0, 0), (64, 1)):
            ghost.clear()
            ghost.install(torch.tensor([4]), min_age)
            ghost.access(torch.tensor([[4]], dtype=torch.int32))
            assert ghost.curve().misses == (1, misses)

    def test_the_queue_is_compacted(self):
        """Far more uses than it has entries, of slots that are all in one word in the end."""
        stage = Stage([2, 5, 9], 10)
        for step in range(2000):
            stage.plan([[step % 3], [step % 10], [9 - step % 4]])
        counted, estimated = stage.misses()
        assert np.allclose(estimated, counted, rtol=0.2)  # steps are half a hot tier
        assert len(stage.ghost._queue) == ghost_cache.WORD

    def test_seeded_by_a_hot_cache(self):
        """Sizes up to that cache's are right from the next step on, larger ones from later on."""
        rng, stage = np.random.default_rng(4), Stage([20, 60, 120])
        for _ in range(300):
            stage.plan(skewed(rng, (1, 1)))
        before = [cache.counters["misses"] for cache in stage.caches]
        stage.ghost.seed(stage.caches[1].slots_by_recency())
        for _ in range(300):
            stage.plan(skewed(rng, (1, 1)))
        since = [
            cache.counters["misses"] - b for cache, b in zip(stage.caches, before, strict=True)
        ]
        estimated = [round(misses * 300) for misses in stage.ghost.curve().misses[1:]]
        assert estimated[:2] == since[:2] and since[2] < estimated[2] < since[1]


class TestCounts:
    def test_forget(self):
        ghost = GhostCache(NUM_SLOTS, 1.0, [4])
        topk = torch.arange(8, dtype=torch.int32).view(1, 8)
        for _ in range(4):
            ghost.access(topk)
        ghost.forget(0.5)
        assert ghost.steps == 2 and ghost.curve().misses == (8.0, 5.0) and ghost.curve().union == 0
        ghost.forget()
        assert ghost.curve().misses == (0.0, 0.0)
        ghost.access(topk)
        assert ghost.curve().misses == (8.0, 4.0)  # what was hot still is
        ghost.clear()
        ghost.access(topk)
        assert ghost.curve().misses == (8.0, 8.0)

    @pytest.mark.parametrize("num_slots, rate", [(1000, 1.0), (5000, 1 / 3), (70_000, 1 / 64)])
    def test_bytes(self, num_slots, rate):
        ghost = GhostCache(num_slots, rate, [100, 200, 500])
        assert ghost.nbytes == GhostCache.bytes_for(num_slots, rate, 3)


class TestSampled:
    def test_every_slot_is_sampled_or_not_for_good_and_evenly(self):
        """Each run of 1,024 slots has its share, whichever hash they are given."""
        ghost = GhostCache(1 << 16, 1 / 64, [1000])
        found = []
        for slots in np.split(np.arange(1 << 16, dtype=np.int32), 64):
            picked = np.empty(1025, np.int32)
            count = ghost_cache._pick(slots, 0, 1024, ghost._hash, picked, 0)
            found += picked[:count].tolist()
            assert abs(count - 16) <= 3
        assert sorted(found) == list(range(1024))

    def test_near_the_exact_curve(self):
        """1/8 of 16,000 slots: within 6 % at sizes that hold 100 sampled rows, 3 % on average."""
        rng, sizes = np.random.default_rng(0), [800, 1200, 2000, 3500, 6000]
        order = rng.permutation(16_000)
        exact, sampled = (GhostCache(16_000, rate, sizes) for rate in (1.0, 1 / 8))
        for _ in range(400):
            topk = torch.from_numpy(order[skewed(rng, (2, 128), 16_000)].astype(np.int32))
            exact.access(topk)
            sampled.access(topk)
        errors = np.abs(np.divide(sampled.curve().misses[1:], exact.curve().misses[1:]) - 1)
        assert errors.max() <= 0.06 and errors.mean() <= 0.03
        assert sampled.curve().lookups == pytest.approx(exact.curve().lookups, rel=0.1)
        assert sampled.curve().union == pytest.approx(exact.curve().union, rel=0.4)


@pytest.mark.parametrize(
    "arguments, text",
    [((10, 0.0, [1]), "rate must be"), ((10, 1.5, [1]), "got 1.5"), ((10, 0.5, []), "got \\[\\]"),
     ((10, 0.5, [0, 3]), "at least 1"), ((0, 0.5, [3]), "at least 1")],
)  # fmt: skip
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=text):
        GhostCache(*arguments)
