"""Moves hot rows between layers while they serve, to where they save the most misses.

A layer here is an index group: its layers share one top-k. All groups of one rebalancer have as
many layers, so that a row costs the same in each.

    watch (seed ghosts, warm up, count) -> budgets -> resize, a few layers a step -> rest -> ...

Ghosts run only part of the time, which keeps their cost below 2 % of planning. Seeding or resizing
one or two layers in a step takes as long as a few plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_ess.tiers.balance.budgets import (
    MIN_GAIN,
    Budgets,
    allot,
    expected_misses,
    rebalanced,
)
from sglang_ess.tiers.balance.ghost_cache import GhostCache, MissCurve
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
    agree       (rows of each layer that this rank chose) -> those that all ranks of one batch take;
                every rank calls it at the same step
    budgets     of the last round that moved rows; curves: of the last round; None before
    rebalances  rounds that moved rows since the start; rows_moved: rows that they moved
    """

    def __init__(
        self,
        layers: HotGroups,
        min_rows: int = 1,
        schedule: Schedule | None = None,
        rate: float | None = None,
        agree: Callable[[Sequence[int]], Sequence[int]] = tuple,
    ):
        self.layers, self._min_rows, self._agree = layers, min_rows, agree
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
        choice = _choose(self.curves, current, self._total, floor, cap, counted)
        # Other ranks may have been told of other rows to warm, and chosen otherwise.
        rows = tuple(self._agree(current if choice is None else choice.rows))
        if list(rows) == current:
            return None
        found = self.budgets = Budgets(rows, expected_misses(self.curves, rows))
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
