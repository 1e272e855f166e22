"""Rows follow the misses, on layers that select from ranges of different widths."""

import numpy as np
import pytest
import torch

from sglang_ess.tiers import HotCache, HotGroups, PlanBuffers
from sglang_ess.tiers.balance import rebalance
from sglang_ess.tiers.balance.ghost_cache import GhostCache
from sglang_ess.tiers.balance.rebalance import Rebalancer, Schedule
from sglang_ess.tiers.hot_arena import HotArena

NUM_SLOTS, EVEN = 2000, 150
QUICK = Schedule(warmup_steps=10, counted=30, rest=20)
ROUND = 1 + 10 + 30 + 20 + 1  # two layers are seeded in its first step


class Stage:
    """Layers of one arena; in each step, layer i selects 16 of its first widths[i] slots."""

    def __init__(self, widths, schedule=QUICK, **options):
        arena, buffers = HotArena(EVEN * len(widths)), PlanBuffers()
        self.caches = [
            HotCache(None, EVEN, NUM_SLOTS, buffers, arena=arena) for _ in widths
        ]  # fmt: skip
        self.arena, self.layers = arena, HotGroups(self.caches)
        self.widths, self._random = list(widths), np.random.default_rng(0)
        self.rebalancer = Rebalancer(self.layers, schedule=schedule, rate=1.0, **options)

    def run(self, steps, queries=2, moves=True):
        """Returns the misses of these steps."""
        before = self.misses()
        for _ in range(steps):
            if moves:
                self.rebalancer.step()
            for cache, width in zip(self.caches, self.widths, strict=True):
                topk = self._random.integers(0, width, (queries, 8), np.int32)
                start = (0, 0)
                while start is not None:
                    start = cache.plan(torch.from_numpy(topk), start).stop
        return self.misses() - before

    def misses(self):
        return sum(cache.counters["misses"] for cache in self.caches)

    @property
    def rows(self):
        return [cache.num_rows for cache in self.caches]


def test_rows_go_where_they_save_misses():
    """Of 240 slots 150 are hot and a third of the lookups miss; the other layer needs 60."""
    stage = Stage([60, 240])
    stage.run(200, moves=False)
    before = stage.run(200, moves=False)
    stage.run(3 * ROUND)
    assert stage.rows[0] >= 60 and stage.rows[1] >= 230 and sum(stage.rows) == 2 * EVEN
    stage.layers.check_integrity()
    assert stage.run(200, moves=False) < 0.1 * before
    assert stage.rebalancer.rebalances == 1  # what is left to gain is no reason to move
    assert stage.rebalancer.rows_moved == stage.rows[1] - EVEN
    assert stage.rebalancer.budgets.rows == tuple(stage.rows)


def test_rows_come_back_when_the_load_turns():
    stage = Stage([60, 240])
    stage.run(2 * ROUND)
    stage.widths.reverse()
    stage.run(3 * ROUND)
    assert stage.rows[0] >= 230 and stage.rows[1] >= 60 and stage.rebalancer.rebalances == 2


def test_alike_layers_keep_their_rows():
    stage = Stage([400, 400, 400])
    stage.run(4 * ROUND)
    assert stage.rows == [EVEN] * 3 and stage.rebalancer.rebalances == 0
    assert stage.rebalancer.curves is not None


@pytest.mark.parametrize("least", [1, 90])
def test_a_layer_that_misses_nothing_keeps_a_share(least):
    stage = Stage([1, 300], min_rows=least)
    stage.run(2 * ROUND)
    assert stage.rows[0] == max(least, round(rebalance.MIN_SHARE * EVEN))


def test_a_step_that_outgrows_a_layer_evens_them_out():
    """180 slots a step: no layer is left with less than the most that can be."""
    stage = Stage([60, 240])
    stage.run(2 * ROUND)
    assert stage.rows[0] < 100
    stage.widths = [2000, 2000]
    stage.run(2 * ROUND, queries=24)
    assert stage.rows == [EVEN, EVEN]


def test_ghosts_are_there_while_they_count_only():
    stage = Stage([60, 240, 240], Schedule(warmup_steps=2, counted=4, rest=3))
    watched = []
    for _ in range(24):
        stage.run(1)
        watched.append(sum(cache.ghost is not None for cache in stage.caches))
    assert watched == [2, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0, 0] * 2
    assert {curve.steps for curve in stage.rebalancer.curves} == {4}


def test_seeded_ghosts_know_the_present_size_at_once():
    """No settling: the curve at EVEN rows is what the cache missed in those steps."""
    stage = Stage([300, 300], Schedule(warmup_steps=0, counted=100, rest=0))
    stage.run(200, moves=False)
    stage.run(1)  # seeds
    missed = stage.run(100)
    stage.rebalancer.step()
    estimated = sum(curve.at(EVEN) for curve in stage.rebalancer.curves) * 100
    assert estimated == pytest.approx(missed, rel=0.03)


def test_large_moves_take_several_steps():
    """A few layers a step; in between rows may be spare, and are all owned in the end."""
    stage = Stage([40] * 6 + [300] * 6)
    spare, sizes = [], []
    for _ in range(ROUND + 10):
        stage.run(1)
        spare.append(stage.arena.spare)
        sizes.append(stage.rows)
    changed = np.count_nonzero(np.diff(sizes, axis=0), axis=1)
    assert changed.max() == rebalance.LAYERS_A_STEP and changed.sum() == 12
    assert max(spare) > 0 and spare[-1] == 0
    stage.layers.check_integrity()


def test_rows_on_their_way_are_shared_out_too():
    """A round without rest decides again while rows move; then a step outgrows its layer."""
    stage = Stage([40] * 6 + [300] * 6, Schedule(warmup_steps=10, counted=30, rest=0))
    while not stage.arena.spare:
        stage.run(1)
    stage.widths = [2000] * 12
    stage.run(1, queries=24)
    stage.run(2 * ROUND, queries=24)
    assert stage.rows == [EVEN] * 12 and stage.arena.spare == 0


@pytest.mark.parametrize("num_slots", [100, 16_384, 1 << 20, 5_000_000])
def test_ghost_bytes(num_slots):
    """At most 16 B for each of the slots sampled, those of a domain of powers of two."""
    rate = rebalance.ghost_rate(num_slots)
    ghost = GhostCache(num_slots, rate, range(1, 1 + rebalance.NUM_SIZES))
    assert ghost.nbytes == rebalance.ghost_bytes(num_slots)
    assert rebalance.ghost_bytes(num_slots) <= max(16 * 2 * rate * num_slots, 2500)
