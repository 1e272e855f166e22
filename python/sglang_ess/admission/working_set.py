"""Working sets: the distinct slots per layer that a request selected in the last decode steps.

A step of speculative decoding has several queries a request, whose lists count together.
WorkingSetWindow counts them for sampled requests. WorkingSets estimates those of the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, overload

import numba
import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

# Decode steps. SparseServe (Figure 8): the overlap with the next step's selection rises by 10.68 %
# from window 1 to 12 and by 0.31 % from 12 to 16.
WINDOW = 12
# Of the newest window in the means. Chosen: benchmarks/serving/pd_serving.py.
WINDOW_WEIGHT = 0.5
# The working set before any measurement, in top-k's. The union of T steps grows by the misses of an
# LRU that holds the union of T - 1 (Denning). HiSparse's published misses are 614 / 274 / 137 rows
# of k = 2048 at 2K / 4K / 8K slots. So the union grows from the first step's 2,048 by 614, 453,
# 376 ... to about 5.5K rows after 12 steps: 2.7 top-k's.
PRIOR_TOPKS = 3
PRIOR_NEW = 0.3  # share of a top-k that the second step adds: 614 of 2,048 rows
PRIOR_DECAY = 0.44  # 614, 453, 376 fall as 1, 2, 3 to the power of minus this

_count_type = "i8(i4[:, :, ::1], b1[::1], i4[::1], i4, i8[:, ::1])"


@numba.njit(_count_type, cache=True, nogil=True)
def _count_distinct(topk: Array, kept: Array, stamps: Array, base: int, counts: Array) -> int:
    """Set counts[step, row] to the distinct slots of topk[: step + 1, row] where kept[row].

    topk: [steps, rows, K]. Returns the distinct slots of all rows together.
    stamps: [slots], no entry above base. A slot that has a stamp above base, but not this row's,
    was counted for another row. Entries that are no slots are skipped.
    """
    num_slots, union = np.uint32(stamps.shape[0]), 0
    for row in range(topk.shape[1]):
        if not kept[row]:
            continue
        stamp = base + row + 1
        distinct = 0
        for step in range(topk.shape[0]):
            for slot in topk[step, row]:
                place = np.uint32(slot)  # a pad is past the end
                if place < num_slots:
                    seen = stamps[place]
                    stamps[place] = stamp
                    distinct += seen != stamp
                    union += seen <= base
            counts[step, row] = distinct
    return union


@dataclass(frozen=True)
class WindowCounts:
    """The counts of one full window.

    rows    owner -> distinct slots that it selected in the window
    union   distinct slots of all these owners together
    growth  [steps] distinct slots in the first 1, 2, ... steps, summed over owners
    """

    rows: dict[Hashable, int] = field(default_factory=dict)
    union: int = 0
    growth: tuple[int, ...] = ()

    @property
    def sharing(self) -> float:
        """union / sum(rows); 1 if no slot is shared or nothing was counted."""
        total = sum(self.rows.values())
        return self.union / total if total else 1.0


class WorkingSetWindow:
    """Keeps the lists of up to `samples` requests in one layer for `window` decode steps.

    A row counts if it had the same owner in all steps of the window. The top-k is copied before it
    is checked: on a GPU it may be written while it is read, and a torn value may only cause a wrong
    count, never an access out of bounds.

    num_slots      slots of the host tier
    samples, topk  the largest [n, K] that add takes; K is that of all a request's lists in a step
    Raises: ValueError for a size below 1.
    """

    def __init__(self, num_slots: int, samples: int, topk: int, window: int = WINDOW):
        if min(num_slots, samples, topk, window) < 1:
            raise ValueError(
                "slots, samples, topk and window must be at least 1: got "
                f"{num_slots}, {samples}, {topk} and {window}."
            )
        self._topk = np.full((window, samples, topk), -1, np.int32)
        self._stamps = np.zeros(num_slots, np.int32)
        self._base = 0  # no earlier stamp is above it
        self._counts = np.zeros((window, samples), np.int64)
        self.reset()

    def reset(self) -> None:
        """Drop the window under way."""
        self._steps = 0
        self._owners: list[Hashable] = []
        self._kept = np.zeros(self._topk.shape[1], np.bool_)

    def add(self, topk: np.ndarray, owners: Sequence[Hashable]) -> WindowCounts | None:
        """Take a decode step. Returns the counts if the window is full, and begins the next.

        topk    [n, K] int32 slots, -1 pads, each row of one request; n <= samples, K <= topk
        owners  [n] distinct, the request of each row
        Raises: ValueError for more rows or columns, or an owner given twice.
        """
        _, samples, columns = self._topk.shape
        num_rows, width = topk.shape
        if num_rows > samples or width > columns or num_rows != len(set(owners)):
            raise ValueError(
                f"sampled top-k must be [n <= {samples}, K <= {columns}] with n distinct owners: "
                f"got {topk.shape} and {len(owners)} owners, {len(set(owners))} of them distinct."
            )
        if self._steps == 0:
            self._owners = list(owners)
            self._kept[:num_rows] = True
        for row, owner in enumerate(self._owners):
            self._kept[row] &= row < num_rows and owners[row] == owner
        kept = self._topk[self._steps]
        kept[:num_rows, :width] = topk
        kept[:num_rows, width:] = -1
        self._steps += 1
        return self._finish() if self._steps == len(self._topk) else None

    def _finish(self) -> WindowCounts:
        if self._base > np.iinfo(np.int32).max - 2 * len(self._kept):
            self._stamps[:] = 0
            self._base = 0
        union = _count_distinct(self._topk, self._kept, self._stamps, self._base, self._counts)
        self._base += len(self._kept)
        rows = {
            owner: int(self._counts[-1, row])
            for row, owner in enumerate(self._owners)
            if self._kept[row]
        }
        growth = tuple(self._counts[:, self._kept].sum(1).tolist())
        self.reset()
        return WindowCounts(rows, union, growth)


@overload
def blend(old: float, new: float, weight: float) -> float: ...


@overload
def blend(old: Array, new: Array, weight: float) -> Array: ...


def blend(old: float | Array, new: float | Array, weight: float) -> float | Array:
    """Return an exponentially weighted mean after a new value of this weight."""
    return old + weight * (new - old)


def prior_lists(count: int) -> np.ndarray:
    """Return [count] float64: the union of 1, 2 ... successive lists, in top-k's."""
    new = PRIOR_NEW * np.arange(1.0, count) ** -PRIOR_DECAY
    union: np.ndarray = 1 + np.concatenate([[0.0], np.cumsum(new)])
    return union


def prior_growth(queries: int = 1) -> np.ndarray:
    """Return [WINDOW] float64: the share of a working set selected in the first 1, 2 ... steps.

    queries: lists of a request in a step; successive ones, as if every draft was accepted
    """
    union = prior_lists(queries * WINDOW)[queries - 1 :: queries]
    growth: np.ndarray = union / union[-1]
    return growth


class WorkingSets:
    """Estimates working sets by context length, from the windows measured so far.

    queries    lists of a request in a decode step
    mean       mean rows of a running request; the policy updates it when it admits others
    sharing    union / sum of rows
    growth     [WINDOW] share of a working set selected in the first 1, 2 ... steps; the last is 1
    step_rows  distinct rows of a request's lists in one step, mean; topk if there is one list
    """

    def __init__(self, topk: int, queries: int = 1):
        self._topk, self._queries = topk, queries
        self._buckets: dict[int, tuple[float, float]] = {}  # log2 tokens -> mean tokens, rows
        self.sharing = 1.0
        union = prior_lists(queries * WINDOW)
        self._more = float(union[-1] / union[WINDOW - 1])  # rows, relative to one list a step
        self.mean = PRIOR_TOPKS * topk * self._more
        self.growth = prior_growth(queries)
        self.step_rows = topk * float(union[queries - 1])

    def _prior(self, tokens: float) -> float:
        return max(1, min(tokens, PRIOR_TOPKS * self._topk * self._more))

    def estimate(self, tokens: int, known: int | None = None) -> float:
        """Estimate the rows of a request with this context length, at most `tokens`.

        known: a lower bound of its rows, if any: those of about WINDOW successive lists
        Uses the nearest measured length, else `known`, else the prior. Other lengths scale as the
        prior does: with the tokens for short requests, and not at all for long ones, since
        locality is almost flat in context length (ESS, Figure 2).
        """
        tokens = max(1, tokens)
        lower = max(1, known or 1)
        if not self._buckets:
            return min(tokens, lower * self._more) if known is not None else self._prior(tokens)
        bucket = tokens.bit_length()
        nearest = min(self._buckets, key=lambda other: (abs(other - bucket), other))
        mean_tokens, mean_rows = self._buckets[nearest]
        scaled = mean_rows * self._prior(tokens) / self._prior(mean_tokens)
        return min(tokens, max(lower, scaled))

    def observe(
        self,
        tokens_and_rows: Sequence[tuple[int, int]],
        sharing: float,
        running: int,
        growth: Sequence[int] = (),
    ) -> None:
        """Take one window of samples.

        tokens_and_rows: (context length, rows) of each sample
        sharing: their union / sum of rows
        running: number of running requests
        growth: of the window, if it has WINDOW steps
        In the mean, the samples count for themselves only and not for all running requests. A mean
        that followed a few samples would admit at each low one, and never take it back.
        """
        samples = [(max(1, tokens), rows) for tokens, rows in tokens_and_rows if rows > 0]
        if not samples:
            return
        first = not self._buckets
        for bucket in {tokens.bit_length() for tokens, _ in samples}:
            means = np.mean([s for s in samples if s[0].bit_length() == bucket], axis=0)
            means = blend(np.array(self._buckets.get(bucket, means)), means, WINDOW_WEIGHT)
            self._buckets[bucket] = tuple(means.tolist())
        weight = 1.0 if first else min(WINDOW_WEIGHT, len(samples) / max(1, running))
        rows = float(np.mean([rows for _, rows in samples]))
        self.mean = blend(self.mean, rows, weight)
        self.sharing = blend(self.sharing, min(1.0, sharing), weight)
        if len(growth) == WINDOW:
            self.growth = blend(self.growth, np.array(growth) / growth[-1], WINDOW_WEIGHT)
            lists = min(self._queries, max(1.0, growth[0] / (len(samples) * self._topk)))
            self.step_rows = blend(self.step_rows, lists * self._topk, WINDOW_WEIGHT)

    def missed(self, rows: np.ndarray | float, hot_rows: float) -> np.ndarray:
        """Predict the rows of a layer that a step misses with LRU.

        rows: sum of the working sets; hot_rows: of the layer
        If hot_rows hold the union of t steps, a step misses what one more step would add (Denning).
        If they hold less than one step's union, every lookup misses.
        """
        new = np.diff(self.growth)
        demand = self.sharing * np.asarray(rows, float)
        share = hot_rows / np.maximum(demand, 1e-9)
        missed: np.ndarray = demand * np.interp(share, self.growth[:-1], new, left=self.growth[0])
        return missed

    def held_steps(self, steps: float) -> float:
        """Return the share of the working sets that is hot if rows are evicted at this age."""
        return float(np.interp(steps, np.arange(1, WINDOW + 1), self.growth))
