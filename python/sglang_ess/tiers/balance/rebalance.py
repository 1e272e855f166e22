"""Moves hot rows between layers while they serve, to where they save the most misses.

A layer here is an index group: its layers share one top-k. All groups of one rebalancer have as
many layers, so that a row costs the same in each.

    watch (seed ghosts, warm up, count) -> budgets -> resize, a few layers a step -> rest -> ...

Ghosts run only part of the time, which keeps their cost below 2 % of planning. Seeding or resizing
one or two layers in a step takes as long as a few plans.
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
from sglang_ess.tiers.hot_groups import HotGroups

# Sampled slots of a host tier, and limits of the sampling rate. At a hot ratio of 0.2 that is about
# 400 sampled rows, which estimates a layer's misses within a few per cent
# (benchmarks/layer_budgets.py; SHARDS needs thousands for 2 %). More samples cost more, and a
# choice by the curves of all layers errs less than each curve.
SAMPLED_SLOTS = 2048
MIN_RATE, MAX_RATE = 1 / 128, 1 / 4
# Sizes of a curve: MIN_SHARE to 8 even shares in steps of 15 %.
MIN_SHARE = 0.25  # a layer keeps at least this part of an even share
NUM_SIZES = 26
SIZE_STEP = 1.15
UNION_MARGIN = 1.25  # each layer keeps this multiple of the slots of the largest sampled step
# n counted misses vary by chance by sqrt(n), and the best of many budgets is the luckiest one. So a
# gain below this multiple of that is ignored.
NOISE = 3.0
# Limits for the evictions that ages predict, relative to those counted. Outside them, the layers
# have not turned over since their sizes or load changed, and the ages describe the time before.
STEADY = 0.85, 1.2
LAYERS_A_STEP = 2  # layers seeded or resized in one decode step


def ghost_rate(num_slots: int) -> float:
    """Return the share of the slots that a layer's ghost samples."""
    return min(MAX_RATE, max(MIN_RATE, SAMPLED_SLOTS / num_slots))


def floor_rows(even: int, min_rows: int) -> int:
    """Return the rows that each layer keeps: `even` is an equal share, a step takes `min_rows`."""
    return min(max(min_rows, round(MIN_SHARE * even)), even)


def _choose(
    curves: list[MissCurve],
    current: Sequence[int],
    total: int,
    floor: int,
    cap: int,
    counted: float,
) -> Budgets | None:
    """Return budgets worth moving to from the current rows, or None.

    total: rows of all layers, including spare ones between two resizes
    counted: misses on which the curves are based
    """
    if min(current) < floor:  # a step has become larger than a layer: rows must move
        return allot(curves, total, floor, cap)
    gain = max(MIN_GAIN, NOISE / max(1.0, counted) ** 0.5)
    return rebalanced(curves, current, floor, cap, min_gain=gain)


def ghost_bytes(num_slots: int) -> int:
    """Return the device bytes of one layer's ghost."""
    return GhostCache.bytes_for(num_slots, ghost_rate(num_slots), NUM_SIZES)


@dataclass(frozen=True)
class Schedule:
    """Decode steps of each part of a round.

    warmup_steps  after seeding the ghosts, so that they also know sizes above the present one
    counted       steps that the curves are based on
    rest          steps without ghosts until the next round
    """

    warmup_steps: int = 64
    counted: int = 192
    rest: int = 2048


class Rebalancer:
    """Measures the layers with ghosts and resizes them, a few in each step.

    layers      hot tiers of one arena, with hot rows for some of the slots, not for all
    min_rows    rows that each layer keeps in any case: a query's top-k, attended in one pass
    rate        sampling rate of the ghosts
    budgets     of the last round that moved rows; curves: of the last round; None before
    rebalances  rounds that moved rows since the start; rows_moved: rows that they moved
    """

    def __init__(
        self,
        layers: HotGroups,
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
        """Bytes of the ghosts."""
        return sum(ghost.nbytes for ghost in self._ghosts)

    def step(self) -> Budgets | None:
        """Do a step's part of the round. Call it before each decode step, before any plan.

        Returns new budgets, or None.
        """
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
        # One row less than all slots: with a row for each, a layer keeps no order of use.
        cap = caches[0].num_slots - 1
        counted = self._counted(self.curves, current)
        found = _choose(self.curves, current, self._total, floor, cap, counted)
        if found is None:
            return None
        self.budgets = found
        self._pending = [c for c in caches if c.num_rows != found.rows[c.number]]
        self._pending.sort(key=self._change)  # the layer that shrinks most first
        self.rebalances += 1
        self.rows_moved += sum(max(0, self._change(cache)) for cache in caches)
        return found

    def _counted(self, curves: list[MissCurve], rows: list[int]) -> float:
        """Return the sampled misses of the last round at these rows."""
        pairs = zip(self._ghosts, curves, rows, strict=True)
        return sum(curve.at(count) * curve.steps * ghost.rate for ghost, curve, count in pairs)

    def _change(self, cache: HotCache) -> int:
        """Return the rows that a layer is to gain, by the last budgets."""
        assert self.budgets is not None
        return self.budgets.rows[cache.number] - cache.num_rows

    def _resize(self) -> None:
        """Resize the next layers: the one that grows most if enough rows are spare, else the one
        that shrinks most.
        """
        for _ in range(min(LAYERS_A_STEP, len(self._pending))):
            takes = 0 < self._change(self._pending[-1]) <= self.layers.spare
            cache = self._pending.pop(-1 if takes else 0)
            cache.resize(cache.num_rows + self._change(cache))


@dataclass(frozen=True)
class AgeSchedule:
    """Decode steps of each part of a round by ages.

    warmup_steps  after rows have moved, or after the last round
    counted       steps that the curves are based on
    """

    warmup_steps: int = 64
    counted: int = 192


class AgeRebalancer:
    """Decides when and how rows move between layers, by the ages of the rows (row_ages.py).

    The caller of step() moves the rows. Age snapshots cost a step nothing, so rounds follow one
    another; in each, a layer grows by row_ages.GROWTH at most.

    layers, even   number of layers, and hot rows of each at the start
    cap, min_rows  the most and the fewest rows of a layer
    rows           of each layer now
    budgets, curves, rebalances, rows_moved: as in Rebalancer
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
        self._snapshots = 0
        self._ages: np.ndarray = np.zeros(1, np.int64)
        self._first: AgeSnapshot | None = None

    def step(self, demand: int, snapshot: AgeSnapshot | None = None) -> Budgets | None:
        """Decide before each decode step. Returns budgets to move to before its plan, or None.

        demand: rows that the step needs in each layer, at most `even`; each layer has them once
            the caller has applied the budgets
        snapshot: taken since the last step, if any
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
        curves = self._measure(snapshot) if is_end and snapshot is not None else None
        floor = floor_rows(self._even, max(self._min_rows, round(UNION_MARGIN * self._demand)))
        found = None
        if curves is not None:
            counted = self._snapshots * expected_misses(curves, self.rows)
            found = _choose(curves, self.rows, sum(self.rows), floor, self._cap, counted)
        elif is_short:
            found = allot(self.curves or [], sum(self.rows), floor, self._cap)
        self._begin()
        return self._moved(found)

    def _measure(self, last: AgeSnapshot) -> list[MissCurve] | None:
        """Return the round's curves, or None if they do not describe the layers as they are now."""
        first = self._first or last
        steps = np.maximum(1, last.steps - first.steps)
        evicted = float(((last.evictions - first.evictions) / steps).sum())
        curves = [
            age_curve(counts / self._snapshots, rows, self._snapshots)
            for counts, rows in zip(self._ages, self.rows, strict=True)
        ]
        low, high = (limit * evicted for limit in STEADY)
        if not low <= expected_misses(curves, self.rows) <= high:
            return None
        self.curves = curves
        return curves

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
    """Compile the numba kernels before the first request."""
    topk, slots = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    cache, ghost = HotCache(None, 2, 2), GhostCache(2, 1.0, [1])
    ghost.seed(cache.slots_by_recency())
    cache.ghost = ghost
    cache.plan(topk)
    cache.warm(topk)
    cache.install(slots, torch.zeros(1, 1))
    cache.invalidate(slots)
    cache.resize(1)
