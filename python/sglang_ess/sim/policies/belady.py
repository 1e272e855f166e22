"""Belady's optimum: evict the row whose slot is used again last. It must know the future.

All rows have one size, and attention needs every missed row, so no policy misses less over a
whole stream. Over a part of the stream one may.
Source: Belady, IBM Systems Journal 5 (1966). It holds for steps that are sets, too: a slot of
this step is used next in a later step, and slots used next in the same step are exchangeable.
"""

import numpy as np

from sglang_ess.sim.policies.base import Policy, assign, jit

NEVER = np.iinfo(np.int32).max


class Belady(Policy):
    """steps [steps, queries, K] int32: every argument of step(), in order.

    Rows that the current step does not use are in singly linked lists: one for each step of
    their next use, one for never. A victim comes from the last list that is not empty.
    Raises: ValueError for a step that is not the next of `steps`.
    """

    def __init__(self, rows: int, num_slots: int, steps: np.ndarray):
        super().__init__(rows, num_slots)
        self._steps = steps
        self._next = next_uses(steps.reshape(len(steps), -1), num_slots)
        self._first = np.full(len(steps) + 1, -1, np.int32)  # list heads; the last: never
        self._after = np.full(rows, -1, np.int32)

    def step(self, topk: np.ndarray) -> np.ndarray:
        if self.steps == len(self._steps) or not np.array_equal(topk, self._steps[self.steps]):
            raise ValueError(
                f"Belady's steps must be those it was made with: got another at {self.steps}, "
                f"limit {len(self._steps)}. Make a new one."
            )
        return super().step(topk)

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        place(
            topk.reshape(-1), self._next[self.steps], missed, free, self.steps, self.slot_row,
            self.row_slot, self.row_step, self._first, self._after,
        )  # fmt: skip


@jit
def next_uses(steps: np.ndarray, num_slots: int) -> np.ndarray:
    """Return [steps, lookups] int32: the next step that looks the same slot up, or NEVER."""
    found = np.full(steps.shape, NEVER, np.int32)
    later = np.full(num_slots, NEVER, np.int32)
    for step in range(steps.shape[0] - 1, -1, -1):
        for i in range(steps.shape[1]):
            if steps[step, i] >= 0:
                found[step, i] = later[steps[step, i]]
        for i in range(steps.shape[1]):
            if steps[step, i] >= 0:
                later[steps[step, i]] = step
    return found


@jit
def place(
    topk: np.ndarray,
    next_use: np.ndarray,
    missed: np.ndarray,
    free: np.ndarray,
    step: int,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    first: np.ndarray,
    after: np.ndarray,
) -> None:
    """Give the missed slots rows, then put every row of the step into the list of its next use.

    The hits are in this step's own list. No search reaches it, because the step fits the rows
    and so a later list has a row to take.
    """
    last = first.shape[0] - 1
    for i in range(missed.shape[0]):
        if i < free.shape[0]:
            row = free[i]
        else:
            while first[last] < 0:
                last -= 1
            row = first[last]
            first[last] = after[row]
        assign(row, missed[i], step, slot_row, row_slot, row_step)
    for i in range(topk.shape[0]):
        if topk[i] < 0:
            continue
        row = slot_row[topk[i]]
        if row_step[row] == step:
            row_step[row] = -1  # now listed, so that a repeated slot is not listed again
            number = min(next_use[i], first.shape[0] - 1)
            after[row], first[number] = first[number], row
