"""A tier's miss curve from the ages of its rows, and the rows that move by it."""

import numpy as np
import pytest
import torch

from benchmarks.layer_budgets import age_snapshot_of
from sglang_ess.tiers import HotCache, HotGroups, PlanBuffers
from sglang_ess.tiers.balance import rebalance
from sglang_ess.tiers.balance.ghost_cache import GhostCache
from sglang_ess.tiers.balance.rebalance import AgeRebalancer, AgeSchedule
from sglang_ess.tiers.balance.row_ages import GROWTH, age_curve
from sglang_ess.tiers.contract import AgeSnapshot
from sglang_ess.tiers.hot_arena import HotArena

NUM_SLOTS, EVEN = 6000, 1200
QUERIES, WIDTH = 8, 24
DEMAND = QUERIES * WIDTH
QUICK = AgeSchedule(warmup_steps=40, counted=80)
ROUND = QUICK.warmup_steps + QUICK.counted + 1


class Stage:
    """Layers of one arena; layer i's slots are selected with a weight that falls by their number
    to the power exponents[i].
    """

    def __init__(self, exponents, min_rows=1):
        arena, buffers = HotArena(EVEN * len(exponents)), PlanBuffers()
        self.caches = [HotCache(None, EVEN, NUM_SLOTS, buffers, arena=arena) for _ in exponents]
        self.layers = HotGroups(self.caches)
        self.exponents, self._random = list(exponents), np.random.default_rng(0)
        self.rebalancer = AgeRebalancer(len(exponents), EVEN, NUM_SLOTS, min_rows, QUICK)
        self.found = []  # budgets
        self._shares = {}

    def topk(self, exponent):
        if exponent not in self._shares:
            weights = np.arange(1, NUM_SLOTS + 1) ** -float(exponent)
            self._shares[exponent] = np.cumsum(weights) / weights.sum()
        drawn = self._random.random((QUERIES, WIDTH))
        return torch.from_numpy(self._shares[exponent].searchsorted(drawn).astype(np.int32))

    def run(self, steps, moves=True, demand=DEMAND, ghosts=()):
        """Returns the misses of these steps."""
        before = self.misses()
        for _ in range(steps):
            if moves:
                snapshot = age_snapshot_of(self.caches)
                if (budgets := self.rebalancer.step(demand, snapshot)) is not None:
                    self.layers.resize(budgets.rows)
                    self.found.append(budgets)
            for cache, exponent in zip(self.caches, self.exponents, strict=True):
                topk = self.topk(exponent)
                assert cache.plan(topk).stop is None
                for ghost in ghosts:
                    ghost.access(topk)
        return self.misses() - before

    def misses(self):
        return sum(cache.counters["misses"] for cache in self.caches)

    @property
    def rows(self):
        return tuple(cache.num_rows for cache in self.caches)


@pytest.mark.parametrize("exponent", [0.2, 0.6, 1.0])
def test_the_curve_is_what_caches_of_other_sizes_miss(exponent):
    """Beside a ghost that samples every slot; below the present size, at it, and past it."""
    stage = Stage([exponent])
    shares = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
    ghost = GhostCache(NUM_SLOTS, 1.0, [round(share * EVEN) for share in shares])
    stage.run(150, moves=False, ghosts=[ghost])
    ghost.forget()
    looks = []
    for _ in range(60):
        stage.run(4, moves=False, ghosts=[ghost])
        looks.append(age_snapshot_of(stage.caches).ages[0])
    curve, truth = age_curve(np.mean(looks, 0), EVEN, len(looks)), ghost.curve()
    for share in shares:
        found = curve.at(share * EVEN) / truth.at(share * EVEN)
        assert found == pytest.approx(1, abs=0.06 if share < 1 else 0.15), share
    assert curve.rows[-1] >= GROWTH * EVEN and curve.steps == 60
    assert curve.union == pytest.approx(truth.union, rel=0.15)  # a mean, and the most
    assert list(curve.misses) == sorted(curve.misses, reverse=True)


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(np.zeros(64), id="an empty layer"),
        pytest.param(np.eye(1, 64, 0)[0] * 500, id="all used in every step"),
        pytest.param(np.eye(1, 64, 63)[0] * 500, id="all idle for long"),
        pytest.param(np.full(64, 9.0), id="a scan"),
        pytest.param(np.array([500.0, 90, 3] + [0] * 61), id="turned over in three steps"),
    ],
)
def test_a_curve_of_any_ages_is_one(counts):
    curve = age_curve(counts, 593)
    assert list(curve.rows) == sorted(set(curve.rows)) and curve.rows[0] == 0
    assert np.isfinite(curve.misses).all() and (np.diff(curve.misses) <= 0).all()
    assert 0 <= curve.at(593) <= max(1.0, counts[:-1].max())


def test_rows_go_where_they_save_misses():
    stage = Stage([1.3, 0.3])
    stage.run(150, moves=False)
    before = stage.run(150, moves=False)
    stage.run(4 * ROUND)
    assert stage.rows[1] > 1.3 * EVEN and sum(stage.rows) == 2 * EVEN
    stage.layers.check_integrity()
    assert stage.run(150, moves=False) < 0.95 * before
    rebalancer = stage.rebalancer
    assert rebalancer.rows == stage.rows == rebalancer.budgets.rows
    assert rebalancer.rebalances == len(stage.found) < 4
    first = np.array(stage.found[0].rows)
    assert first[1] <= GROWTH * 1.05 * EVEN  # a round goes no further than it can see
    assert rebalancer.rows_moved >= stage.rows[1] - EVEN


def test_rows_come_back_when_the_load_turns(monkeypatch):
    monkeypatch.setattr(rebalance, "NOISE", 1.0)  # two layers' misses are few
    stage = Stage([1.3, 0.3])
    stage.run(4 * ROUND)
    assert stage.rows[1] > 1.3 * EVEN
    stage.exponents.reverse()
    stage.run(6 * ROUND)
    assert stage.rows[0] > 1.2 * EVEN


def test_alike_layers_keep_their_rows():
    stage = Stage([0.6, 0.6, 0.6])
    stage.run(5 * ROUND)
    assert stage.rows == (EVEN,) * 3 and stage.rebalancer.rebalances == 0
    assert len(stage.rebalancer.curves) == 3


@pytest.mark.parametrize("min_rows", [1, 300])
def test_a_layer_that_misses_nothing_keeps_a_share(min_rows):
    stage = Stage([6.0, 0.3], min_rows=min_rows)
    stage.run(4 * ROUND)
    floor = max(min_rows, round(rebalance.MIN_SHARE * EVEN))
    assert stage.rows[0] == max(floor, round(rebalance.UNION_MARGIN * DEMAND))


def test_a_step_gets_the_rows_that_it_needs_at_once():
    """Before it is planned, not when a round ends; then all layers have some to spare."""
    stage = Stage([1.3, 0.3])
    stage.run(4 * ROUND)
    assert stage.rows[0] < 900
    stage.run(1, demand=900)
    assert stage.rows[0] >= 900 and len(stage.found) > 1
    moved = len(stage.found)
    stage.run(10, demand=round(900 * rebalance.UNION_MARGIN))
    assert len(stage.found) == moved
    assert min(stage.rows) < EVEN
    stage.run(1, demand=EVEN)
    assert stage.rows == (EVEN, EVEN)


def test_layers_that_have_not_turned_over_are_left_alone():
    """Ages that say one thing while another is evicted tell of a size or a load that was before."""
    ages = np.zeros((2, 64))
    ages[0, :12], ages[1, 0], ages[1, 1:] = 386 / np.arange(1, 13), 1000, 200 / 63

    def run(evictions, rounds=1):
        rebalancer = AgeRebalancer(2, EVEN, NUM_SLOTS, schedule=QUICK)
        for step in range(rounds * ROUND):
            seen = np.array(evictions) * step, np.full(2, step)
            if (found := rebalancer.step(DEMAND, AgeSnapshot(ages, *seen))) is not None:
                return found.rows
        return None

    assert run([33, 3])[0] > 1.1 * EVEN
    for evictions in ([25, 3], [0, 0], [50, 3]):
        assert run(evictions, rounds=3) is None


def test_noise_is_no_reason_to_move(monkeypatch):
    """Few misses seen: what looks better may be luck."""
    stage = Stage([0.6, 0.7])
    stage.run(3 * ROUND)
    moved = stage.rebalancer.rebalances
    monkeypatch.setattr(rebalance, "NOISE", 1e9)
    stage.exponents = [1.3, 0.3]
    stage.run(3 * ROUND)
    assert stage.rebalancer.rebalances == moved
