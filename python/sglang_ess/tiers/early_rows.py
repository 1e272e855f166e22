"""Rows of one hot tier that were fetched before anyone asked for them, and what became of them.

They go to the front of the queue of lru.py, as the first to be evicted: a wrong guess costs the
least recently used rows, and only until the next misses. A row that is used moves to the back as
any other.

    queue:   [ early, worst | early, best | row 7 | row 2 | ... )  tail
              ^ head
"""

import numpy as np

from sglang_ess.tiers import lru
from sglang_ess.tiers.lru import jit

MIN_AGE = 2  # steps since the last use of a row that gives way: no row of the last step does
# Indices into the counters of EarlyRows.
FETCHED, USED = 0, 1
COUNTER_BYTES = 16


@jit
def take(
    slots,
    most,
    min_age,
    slot_row,
    row_slot,
    row_place,
    queue,
    queue_step,
    free,
    state,
    early_slots,
    early_rows,
):
    """Give rows to cold slots of `slots` [requests, m], at most `most` for each request.

    The best slots of all requests come first. Fills early_slots and early_rows with them and their
    rows, best first. Returns how many there are.
    """
    count, guard = 0, state[lru.TAIL]
    left = np.full(slots.shape[0], most, np.int64)
    for rank in range(slots.shape[1]):
        for request in range(slots.shape[0]):
            slot = slots[request, rank]
            if slot < 0 or left[request] == 0 or slot_row[slot] >= 0:
                continue
            row = lru._take(
                slot_row, row_slot, row_place, queue, queue_step, free, state, guard, min_age
            )
            if row < 0:
                _to_front(row_place, queue, queue_step, state, early_rows, count)
                return count
            slot_row[slot], row_slot[row], row_place[row] = row, slot, -1
            early_slots[count], early_rows[count] = slot, row
            count += 1
            left[request] -= 1
    _to_front(row_place, queue, queue_step, state, early_rows, count)
    return count


@jit
def _to_front(row_place, queue, queue_step, state, rows, count):
    """Put rows[:count], which have no place in the queue, before all others, the first one last."""
    if state[lru.HEAD] < count:  # they were free
        lru._compact(row_place, queue, queue_step, state)
        for place in range(state[lru.TAIL] - 1, -1, -1):
            queue[place + count], queue_step[place + count] = queue[place], queue_step[place]
            row_place[queue[place]] = place + count
        state[lru.HEAD] = count
        state[lru.TAIL] += count
    while (
        state[lru.HEAD] < state[lru.TAIL] and row_place[queue[state[lru.HEAD]]] != state[lru.HEAD]
    ):
        state[lru.HEAD] += 1
    # Their step is that of the oldest row, but never the last one: settle tells them by that.
    head, step = state[lru.HEAD], state[lru.STEP] - 1
    if head < state[lru.TAIL] and ((state[lru.STEP] - queue_step[head]) & lru.STEP_MASK) > 0:
        step = queue_step[head]
    for i in range(count):
        place = head - 1 - i
        queue[place], queue_step[place], row_place[rows[i]] = rows[i], step, place
    state[lru.HEAD] = head - count


@jit
def settle(slots, rows, count, counts_uses, slot_row, row_place, queue_step, state, counters):
    """Drop the entries that are no longer early. Returns how many stay.

    An entry whose slot has lost the row is dropped, and one whose row this step has used. The
    latter counts if counts_uses.
    """
    kept = 0
    for i in range(count):
        slot, row = slots[i], rows[i]
        if slot_row[slot] != row:
            continue
        if (queue_step[row_place[row]] - state[lru.STEP]) & lru.STEP_MASK == 0:
            counters[USED] += counts_uses
            continue
        slots[kept], rows[kept] = slot, row
        kept += 1
    return kept


class EarlyRows:
    """The early rows of one hot tier that nobody has used yet, each with its slot.

    counters [2] int64: rows fetched since the start, and those of them that a plan has used
    """

    def __init__(self) -> None:
        self.counters = np.zeros(2, np.int64)
        self._slots, self._rows = np.empty(0, np.int32), np.empty(0, np.int32)
        self._count = 0

    @property
    def nbytes(self) -> int:
        """COUNTER_BYTES until the first fetch."""
        return self.counters.nbytes + self._slots.nbytes + self._rows.nbytes

    def fetch(
        self, slots: np.ndarray, most: int, min_age: int, arrays: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Give rows to cold slots; see take. Returns the slots and rows to fill, each [n] int32.

        arrays: slot_row, row_slot, row_place, queue, queue_step, free and state of the tier
        """
        room = self._count + min(slots.shape[0] * min(most, slots.shape[1]), len(arrays[0]))
        if room > len(self._slots):
            self._slots = np.resize(self._slots, room)
            self._rows = np.resize(self._rows, room)
        first = self._count
        taken = self._slots[first:], self._rows[first:]
        count: int = take(slots, most, min_age, *arrays, *taken)
        self._count += count
        self.counters[FETCHED] += count
        return taken[0][:count], taken[1][:count]

    def forget(self) -> None:
        """Take all rows for ordinary ones, in no figure from now on."""
        self._count = 0

    def settle(self, counts_uses: bool, arrays: tuple[np.ndarray, ...]) -> None:
        """Forget what was used or evicted. arrays: as fetch's"""
        if self._count:
            slot_row, _, row_place, _, queue_step, _, state = arrays
            self._count = settle(
                self._slots, self._rows, self._count, counts_uses, slot_row, row_place, queue_step,
                state, self.counters,
            )  # fmt: skip
