"""CLOCK: a hand goes round the rows and takes the first one that had no hit since it passed."""

import numpy as np

from sglang_ess.sim.policies.base import Policy, assign, jit


class Clock(Policy):
    """One bit for each row: clear when the row is filled, set by a hit.

    The hand clears the bits that it passes, except for rows that this step uses.
    """

    def __init__(self, rows: int, num_slots: int):
        super().__init__(rows, num_slots)
        self._reused = np.zeros(rows, np.bool_)
        self._hand = 0

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        self._hand = place(
            used, missed, free, self.steps, self.slot_row, self.row_slot, self.row_step,
            self._reused, self._hand,
        )  # fmt: skip


@jit
def place(
    used: np.ndarray,
    missed: np.ndarray,
    free: np.ndarray,
    step: int,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    reused: np.ndarray,
    hand: int,
) -> int:
    """Give the missed slots rows. Returns the hand's new place."""
    for row in used:
        reused[row] = True
    for i in range(missed.shape[0]):
        if i < free.shape[0]:
            row = free[i]
        else:
            while row_step[hand] == step or reused[hand]:
                if row_step[hand] != step:
                    reused[hand] = False
                hand = (hand + 1) % reused.shape[0]
            row, hand = hand, (hand + 1) % reused.shape[0]
        assign(row, missed[i], step, slot_row, row_slot, row_step)
    return hand
