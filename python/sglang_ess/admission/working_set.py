"""Working sets: the distinct slots that a request selected in the last decode steps, a layer.

WorkingSetWindow counts them for sampled requests, WorkingSets says what others will have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numba
import numpy as np

# Decode steps. SparseServe: the overlap with the next step's selection rises by 10.68 % from
# window 1 to 12 and by 0.31 % from 12 to 16 (papers.md 2.4).
WINDOW = 12
WINDOW_WEIGHT = (
    0.5  # of the newest window in the means: chosen, see benchmarks/serving/pd_serving.py
)
# The working set before any is measured, in top-k's. The union of T steps grows by the misses
# of an LRU that holds the union of T - 1 (Denning). HiSparse misses 614 / 274 / 137 rows of
# k = 2048 at 2K / 4K / 8K slots (papers.md 1.6), so from the first step's 2,048 on, the union
# grows by 614, 453, 376 ... to about 5.5K rows after 12: 2.7 top-k's.
PRIOR_TOPKS = 3
PRIOR_NEW = 0.3  # of a top-k, that a step selects anew: HiSparse's 614 rows of 2,048
PRIOR_DECAY = 0.44  # its 614, 453, 376 fall as 1, 2, 3 to the power of minus this

_count_type = "i8(i4[:, :, ::1], b1[::1], i4[::1], i4, i8[:, ::1])"


@numba.njit(_count_type, cache=True, nogil=True)
def _count_distinct(topk, kept, stamps, base, counts):
    """counts[step, row] = distinct slots of topk[: step + 1, row] where the row is kept.

    topk [steps, rows, K]. Returns the union of all.

    stamps holds nothing above base at first. Row by row: a slot stamped above base, but not
    with this row's stamp, was counted for another row. What is no slot is passed over.
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
    """One full window.

    rows   owner -> distinct slots that it selected in the window
    union  distinct slots of all these owners together
    growth [steps] distinct slots of each owner after its first steps, summed over owners
    """

    rows: dict[int, int] = field(default_factory=dict)
    union: int = 0
    growth: tuple[int, ...] = ()

    @property
    def sharing(self) -> float:
        """union / sum(rows): 1 when no slot is shared, or nothing was counted."""
        total = sum(self.rows.values())
        return self.union / total if total else 1.0


class WorkingSetWindow:
    """Top-k of up to `samples` requests of one layer, kept for `window` decode steps.

    A row counts if it had one owner in all steps of the window. The top-k is copied first and
    checked then: on a GPU it may be written while it is read, and a torn value is one wrong
    count, never an access out of bounds.

    num_slots  of the host tier; samples, topk: the largest [n, K] that add takes
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
        self._base = 0  # of the stamps: above all that earlier windows gave
        self._counts = np.zeros((window, samples), np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget the window under way."""
        self._steps = 0
        self._owners: list[int] = []
        self._kept = np.zeros(self._topk.shape[1], np.bool_)

    def add(self, topk: np.ndarray, owners: Sequence[int]) -> WindowCounts | None:
        """One decode step. Returns the counts when the window is full, and begins the next.

        topk    [n, K] int32 slots, -1 pads; n <= samples, K <= topk
        owners  [n] request of each row, distinct
        Raises: ValueError for more rows or columns than that, or an owner given twice.
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
        held = self._topk[self._steps]
        held[:num_rows, :width] = topk
        held[:num_rows, width:] = -1
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


def blend(old, new, weight: float):
    """An exponentially weighted mean, after a new value."""
    return old + weight * (new - old)


def prior_growth() -> np.ndarray:
    """[WINDOW] float64: the part of a working set that its first 1, 2 ... steps select."""
    new = PRIOR_NEW * np.arange(1.0, WINDOW) ** -PRIOR_DECAY
    rows = 1 + np.concatenate([[0.0], np.cumsum(new)])
    return rows / rows[-1]


class WorkingSets:
    """Working sets by length, from the windows measured so far.

    mean     rows of a running request; whoever admits others keeps it up to date
    sharing  union / sum of rows
    growth   [WINDOW] the part of them that 1, 2 ... steps select; the last is 1
    """

    def __init__(self, topk: int):
        self._topk = topk
        self._buckets: dict[int, tuple[float, float]] = {}  # log2 tokens -> mean tokens, rows
        self.sharing = 1.0
        self.mean = float(PRIOR_TOPKS * topk)
        self.growth = prior_growth()

    def _prior(self, tokens: float) -> float:
        return max(1, min(tokens, PRIOR_TOPKS * self._topk))

    def estimate(self, tokens: int, known: int | None = None) -> float:
        """As the nearest measured length, else as known, else the prior; tokens at most.

        known: rows that it has at least

        Other lengths scale as the prior does: with the tokens of short requests, and not at
        all for long ones (papers.md 1.6: locality is almost flat in context length).
        """
        tokens = max(1, tokens)
        least = max(1, known or 1)
        if not self._buckets:
            return min(tokens, least) if known is not None else self._prior(tokens)
        bucket = tokens.bit_length()
        nearest = min(self._buckets, key=lambda other: (abs(other - bucket), other))
        mean_tokens, mean_rows = self._buckets[nearest]
        scaled = mean_rows * self._prior(tokens) / self._prior(mean_tokens)
        return min(tokens, max(least, scaled))

    def observe(
        self,
        tokens_and_rows: Sequence[tuple[int, int]],
        sharing: float,
        running: int,
        growth: Sequence[int] = (),
    ) -> None:
        """One window of samples: (tokens, rows) of each, and their union / sum of rows.

        growth: of the window, where it has WINDOW steps

        They stand for themselves in the mean of the running requests, not for the others: a
        mean that follows a few samples admits at each low one, and takes none of it back.
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

    def missed(self, rows: np.ndarray | float, hot_rows: float) -> np.ndarray:
        """Rows of a layer that a step misses of requests with working sets of so many rows.

        Which LRU holds: where hot_rows are the union of t steps, what a step more would add
        (Denning); where they are less than one step's, nothing is read twice before it goes.
        """
        new = np.diff(self.growth)
        demand = self.sharing * np.asarray(rows, float)
        held = hot_rows / np.maximum(demand, 1e-9)
        return demand * np.interp(held, self.growth[:-1], new, left=self.growth[0])

    def held_steps(self, steps: float) -> float:
        """The part of the working sets that is hot where rows are evicted at so many steps."""
        return float(np.interp(steps, np.arange(1, WINDOW + 1), self.growth))
