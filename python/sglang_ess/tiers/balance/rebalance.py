"""Moves hot rows between layers while they serve, to where they save the most misses.

    watch (seed ghosts, warm up, count) -> budgets -> resize, a few layers a step -> rest -> ...

Ghosts run for a part of the time only: that keeps what they cost below 2 % of planning. What a
step is asked to do beside, seeding or resizing a layer or two, takes as long as a few plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_ess.tiers.balance.budgets import (
    MIN_GAIN,
    Budgets,
    allot,
    expected_misses,
    rebalanced,
    uniform,
)
from sglang_ess.tiers.balance.ghost_cache import GhostCache, MissCurve
from sglang_ess.tiers.balance.row_ages import age_curve
from sglang_ess.tiers.contract import AgeSnapshot
from sglang_ess.tiers.hot_cache import HotCache
from sglang_ess.tiers.hot_layers import HotLayers

# Sampled slots of a host tier, and the rates that may give them: about 400 sampled rows at a hot
# ratio of 0.2, which gives a layer's misses to some per cent (benchmarks/layer_budgets.py; SHARDS
# wants some thousands for 2 %). More cost more beside a plan, and what is chosen by the curves of
# all layers together errs less than each.
SAMPLED_SLOTS = 2048
MIN_RATE, MAX_RATE = 1 / 128, 1 / 4
# Sizes of a curve, as shares of an even share: MIN_SHARE to 8 in steps of 15 %.
MIN_SHARE = 0.25  # a layer is left this much of an even share, whatever was measured
NUM_SIZES = 26
SIZE_STEP = 1.15
UNION_MARGIN = 1.25  # of a step's slots as sampled: that much more is kept for each layer
# Of n misses that ghosts counted, sqrt(n) is chance, and the best of many budgets has picked the
# luckiest: a gain below this many times that is none.
NOISE = 3.0
# By ages: rows that they say are evicted a step, of those that are. Further apart, the layers have
# not turned over since their sizes or their load changed, and the ages tell of what was before.
STEADY = 0.85, 1.2
LAYERS_A_STEP = 2  # that are seeded or resized in one decode step


def ghost_rate(num_slots: int) -> float:
    """Share of the slots that a layer's ghost samples."""
    return min(MAX_RATE, max(MIN_RATE, SAMPLED_SLOTS / num_slots))


def floor_rows(even: int, min_rows: int) -> int:
    """Rows that each layer keeps where all would have `even` and a step takes `min_rows`."""
    return min(max(min_rows, round(MIN_SHARE * even)), even)


def _choose(
    curves: list[MissCurve],
    current: Sequence[int],
    total: int,
    floor: int,
    cap: int,
    counted: float,
) -> Budgets | None:
    """Budgets worth moving to from the current rows, if any; counted: misses that curves saw.

    total: rows of all layers, those on their way from one to another too
    """
    if min(current) < floor:  # a step has become larger than a layer: that is not for choice
        return allot(curves, total, floor, cap)
    gain = max(MIN_GAIN, NOISE / max(1.0, counted) ** 0.5)
    return rebalanced(curves, current, floor, cap, min_gain=gain)


def ghost_bytes(num_slots: int) -> int:
    """Device bytes of one layer's ghost."""
    return GhostCache.bytes_for(num_slots, ghost_rate(num_slots), NUM_SIZES)


@dataclass(frozen=True)
class Schedule:
    """Decode steps of each part of a round.

    warmup_steps  after the ghosts are seeded, so that they know sizes above the present one too
    counted  of which the curves are made
    rest     until the next round, without ghosts
    """

    warmup_steps: int = 64
    counted: int = 192
    rest: int = 2048


class Rebalancer:
    """The layers of an arena, all of one host tier, and when they change size.

    arena   with a row for some slots of each layer, not for all
    min_rows  rows that each layer keeps at any rate: a query's top-k, so that it is attended whole
    rate    of the ghosts
    budgets, curves: of the last round that moved rows, and of the last round; None before
    rebalances, rows_moved: rounds that moved rows, and how many of them, since the start
    """

    def __init__(
        self,
        layers: HotLayers,
        min_rows: int = 1,
        schedule: Schedule | None = None,
        rate: float | None = None,
    ):
        self.layers, self._min_rows = layers, min_rows
        self._schedule = schedule or Schedule()
        self.budgets: Budgets | None = None
        self.curves: list[MissCurve] | None = None
        self.rebalances = self.rows_moved = 0
        num_slots = layers.caches[0].num_slots
        self._total = sum(layers.sizes)
        even = self._even = self._total // len(layers.caches)
        sizes = [
            min(num_slots, max(1, round(even * MIN_SHARE * SIZE_STEP**i)))
            for i in range(NUM_SIZES)
        ]  # fmt: skip
        rate = ghost_rate(num_slots) if rate is None else rate
        self._ghosts = [GhostCache(num_slots, rate, sizes) for _ in layers.caches]
        self._pending: list[HotCache] = []
        self._position = 0  # in the round
        _compile()

    @property
    def nbytes(self) -> int:
        """Of the ghosts."""
        return sum(ghost.nbytes for ghost in self._ghosts)

    def step(self) -> Budgets | None:
        """Before each decode step, while no plan is under way. Returns new budgets, if any."""
        schedule, layers = self._schedule, len(self._ghosts)
        seeding = -(-layers // LAYERS_A_STEP)
        position, self._position = self._position, self._position + 1
        if position < seeding:
            self._seed(position * LAYERS_A_STEP)
        if position == seeding + schedule.warmup_steps:
            for ghost in self._ghosts:
                ghost.forget()
        found = None
        if position == seeding + schedule.warmup_steps + schedule.counted:
            found = self._decide()
        if self._pending:
            self._resize()
        if position >= seeding + schedule.warmup_steps + schedule.counted + schedule.rest:
            self._position = 0 if not self._pending else position
        return found

    def _seed(self, first: int) -> None:
        for cache in self.layers.caches[first : first + LAYERS_A_STEP]:
            cache.ghost = self._ghosts[cache.number]
            cache.ghost.seed(cache.slots_by_recency())

    def _decide(self) -> Budgets | None:
        caches = self.layers.caches
        for cache in caches:
            cache.ghost = None
        self.curves = [ghost.curve() for ghost in self._ghosts]
        current = [cache.num_rows for cache in caches]
        union = max(curve.union for curve in self.curves)
        floor = floor_rows(self._even, max(self._min_rows, round(UNION_MARGIN * union)))
        # One row less than all: with all of them a layer keeps no order of use to go by.
        cap = caches[0].num_slots - 1
        counted = self._counted(current)
        found = _choose(self.curves, current, self._total, floor, cap, counted)
        if found is None:
            return None
        self.budgets = found
        self._pending = [c for c in caches if c.num_rows != found.rows[c.number]]
        self._pending.sort(key=self._change)  # who gives up most first
        self.rebalances += 1
        self.rows_moved += sum(max(0, self._change(cache)) for cache in caches)
        return found

    def _counted(self, rows: list[int]) -> float:
        """Misses of the last round's ghosts at so many rows, as sampled."""
        pairs = zip(self._ghosts, self.curves, rows, strict=True)
        return sum(curve.at(count) * curve.steps * ghost.rate for ghost, curve, count in pairs)

    def _change(self, cache: HotCache) -> int:
        return self.budgets.rows[cache.number] - cache.num_rows

    def _resize(self) -> None:
        """The next few: who takes most, as soon as that is there, else who gives up most."""
        for _ in range(min(LAYERS_A_STEP, len(self._pending))):
            takes = 0 < self._change(self._pending[-1]) <= self.layers.arena.spare
            cache = self._pending.pop(-1 if takes else 0)
            cache.resize(self.budgets.rows[cache.number])


@dataclass(frozen=True)
class AgeSchedule:
    """Decode steps of each part of a round by ages.

    warmup_steps  after rows have moved, or a round before has ended
    counted  of which the curves are made
    """

    warmup_steps: int = 64
    counted: int = 192


class AgeRebalancer:
    """When and how rows move in a device's tier, by the ages of its rows (row_ages.py).

    A decision only: who calls step() moves the rows. Looks at the ages cost a step nothing, so
    rounds follow one another, each with layers that grow by row_ages.GROWTH at the most.
    rows        of each layer now, in the beginning as many in each
    cap, min_rows  rows that a layer may have, and keeps
    budgets, curves, rebalances, rows_moved: as Rebalancer's
    """

    def __init__(
        self,
        layers: int,
        even: int,
        cap: int,
        min_rows: int = 1,
        schedule: AgeSchedule | None = None,
    ):
        self.rows = uniform(layers, layers * even)
        self._even, self._cap, self._min_rows = even, cap, min_rows
        self._schedule = schedule or AgeSchedule()
        self.budgets: Budgets | None = None
        self.curves: list[MissCurve] | None = None
        self.rebalances = self.rows_moved = 0
        self._begin()

    def _begin(self) -> None:
        self._position, self._demand = 0, 0
        self._snapshots, self._ages = 0, 0
        self._first: AgeSnapshot | None = None

    def step(self, demand: int, snapshot: AgeSnapshot | None = None) -> Budgets | None:
        """Before each decode step. Returns budgets to move to before it is planned, if any.

        demand: rows that the step needs in each layer, no more than even; the layers have them
            when it returns and its budgets are kept
        snapshot: where there has been one since the step before
        """
        schedule = self._schedule
        self._position += 1
        self._demand = max(self._demand, demand)
        if snapshot is not None and self._position > schedule.warmup_steps:
            self._ages = self._ages + snapshot.ages.astype(np.int64)
            self._snapshots += 1
            self._first = self._first or snapshot
        is_end = snapshot is not None and self._position > schedule.warmup_steps + schedule.counted
        is_short = min(self.rows) < demand
        if not (is_end or is_short):
            return None
        is_steady = is_end and self._measure(snapshot)
        floor = floor_rows(self._even, max(self._min_rows, round(UNION_MARGIN * self._demand)))
        found = None
        if is_steady:
            counted = self._snapshots * expected_misses(self.curves, self.rows)
            total = sum(self.rows)
            found = _choose(self.curves, self.rows, total, floor, self._cap, counted)
        elif is_short:
            found = allot(self.curves, sum(self.rows), floor, self._cap)
        self._begin()
        return self._moved(found)

    def _measure(self, last: AgeSnapshot) -> bool:
        """Make the round's curves; whether they are of the layers as they are now."""
        first = self._first
        steps = np.maximum(1, last.steps - first.steps)
        evicted = float(((last.evictions - first.evictions) / steps).sum())
        curves = [
            age_curve(counts / self._snapshots, rows, self._snapshots)
            for counts, rows in zip(self._ages, self.rows, strict=True)
        ]
        least, most = (limit * evicted for limit in STEADY)
        if not least <= expected_misses(curves, self.rows) <= most:
            return False
        self.curves = curves
        return True

    def _moved(self, found: Budgets | None) -> Budgets | None:
        if found is None or found.rows == self.rows:
            return None
        self.rows_moved += sum(
            max(0, new - old) for new, old in zip(found.rows, self.rows, strict=True)
        )
        self.rebalances += 1
        self.budgets, self.rows = found, found.rows
        return found


def _compile() -> None:
    """Have numba's machine code for all this before the first request."""
    topk, slots = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    cache, ghost = HotCache(None, 2, 2), GhostCache(2, 1.0, [1])
    ghost.seed(cache.slots_by_recency())
    cache.ghost = ghost
    cache.plan(topk)
    cache.warm(topk)
    cache.install(slots, torch.zeros(1, 1))
    cache.invalidate(slots)
    cache.resize(1)
