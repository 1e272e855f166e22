"""Base of the replacement policies: look up a step, then place its misses.

A step is everything that one layer looks up at once. The rules are those of HotCache.plan: all
hits count as used before any miss takes a row, no miss takes a row that the same step uses, and
a slot that is looked up twice in a step misses at most once.
"""

import numba
import numpy as np

jit = numba.njit(cache=True, nogil=True)

SEEN = -2  # slot_row of a missed slot that is listed and has no row yet


class Policy:
    """Hot rows of one layer, without contents. A subclass chooses the row that a miss takes.

    slot_row [slots] int32: the row of a hot slot, else -1
    row_slot [rows] int32: the slot in a row, else -1
    row_step [rows] int64: the step that used the row last; occupied: rows below it are in use
    query_misses [queries] int64: misses of the last step, by query
    Raises: ValueError for rows outside 1 to num_slots.
    """

    def __init__(self, rows: int, num_slots: int):
        if not 1 <= rows <= num_slots:
            raise ValueError(f"hot rows must be 1 to {num_slots} (the slots): got {rows}.")
        self.rows, self.num_slots, self.steps, self.occupied = rows, num_slots, 0, 0
        self.slot_row = np.full(num_slots, -1, np.int32)
        self.row_slot = np.full(rows, -1, np.int32)
        self.row_step = np.full(rows, -1, np.int64)
        self._used = self._missed = np.empty(0, np.int32)
        self.query_misses = np.zeros(0, np.int64)

    def step(self, topk: np.ndarray) -> np.ndarray:
        """Look up topk [queries, K] int32 slots, -1 pads. Returns misses [queries] int64.

        A miss that several queries share counts for the first of them.
        Raises: ValueError if the step's distinct slots exceed the rows.
        """
        if topk.size > len(self._used):
            self._used, self._missed = np.empty(topk.size, np.int32), np.empty(topk.size, np.int32)
        misses = self.query_misses = np.zeros(len(topk), np.int64)
        used, missed = look_up(
            topk, self.slot_row, self.row_step, self.steps, self._used, self._missed, misses
        )
        if used + missed > self.rows:
            raise ValueError(does_not_fit(self.rows, used + missed))
        free = min(missed, self.rows - self.occupied)
        rows = np.arange(self.occupied, self.occupied + free, dtype=np.int32)
        self._place(topk, self._used[:used], self._missed[:missed], rows)
        self.occupied += free
        self.steps += 1
        return misses

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        """Give the slots `missed` [n] int32 rows: first those of `free`, then evicted ones.

        used [n] int32: rows of this step's hits, in order of first use, each once
        """
        raise NotImplementedError


def does_not_fit(rows: int, distinct: int | None = None) -> str:
    """Return the error text for a step that uses more slots than there are rows."""
    got = "more" if distinct is None else distinct
    return (
        f"one step's distinct slots must fit the hot rows: got {got}, limit {rows}. "
        "Give the tier more rows or the step fewer queries."
    )


@jit
def look_up(
    topk: np.ndarray,
    slot_row: np.ndarray,
    row_step: np.ndarray,
    step: int,
    used: np.ndarray,
    missed: np.ndarray,
    misses: np.ndarray,
) -> tuple[int, int]:
    """List a step's hit rows in `used` and its missed slots in `missed`, each once.

    Returns the number of both. Effect: row_step of the hits becomes `step`, slot_row of the
    misses becomes SEEN, and misses [queries] counts.
    """
    num_used = num_missed = 0
    for query in range(topk.shape[0]):
        for column in range(topk.shape[1]):
            slot = topk[query, column]
            if slot < 0:
                continue
            row = slot_row[slot]
            if row >= 0:
                if row_step[row] != step:
                    row_step[row] = step
                    used[num_used] = row
                    num_used += 1
            elif row != SEEN:
                slot_row[slot] = SEEN
                missed[num_missed] = slot
                num_missed += 1
                misses[query] += 1
    return num_used, num_missed


@jit
def assign(
    row: int, slot: int, step: int, slot_row: np.ndarray, row_slot: np.ndarray, row_step: np.ndarray
) -> None:
    """Put the slot into the row. The slot that was there is no longer hot."""
    if row_slot[row] >= 0:
        slot_row[row_slot[row]] = -1
    slot_row[slot], row_slot[row], row_step[row] = row, slot, step
