"""First in, first out: evict the row that was filled longest ago, however often it was used."""

import numpy as np

from sglang_ess.sim.policies.base import Policy, assign, jit

OLDEST, NEWEST = 0, 1  # places in `ends`
NONE = -1  # no row


class Fifo(Policy):
    """Rows in a doubly linked list, oldest first. Rows that the step uses keep their places.

    ends [2] int32: the oldest and the newest row; links [rows, 2] int32: the rows before and after
    """

    def __init__(self, rows: int, num_slots: int):
        super().__init__(rows, num_slots)
        self._ends = np.full(2, NONE, np.int32)
        self._links = np.full((rows, 2), NONE, np.int32)

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        place(
            missed, free, self.steps, self.slot_row, self.row_slot, self.row_step, self._ends,
            self._links,
        )  # fmt: skip


@jit
def place(
    missed: np.ndarray,
    free: np.ndarray,
    step: int,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    ends: np.ndarray,
    links: np.ndarray,
) -> None:
    """Give the missed slots free rows, then the oldest rows that this step does not use."""
    oldest = ends[OLDEST]
    for i in range(missed.shape[0]):
        if i < free.shape[0]:
            row = free[i]
        else:
            while row_step[oldest] == step:
                oldest = links[oldest, 1]
            row, oldest = oldest, links[oldest, 1]
            unlink(row, ends, links)
        append(row, ends, links)
        if oldest < 0:
            oldest = row
        assign(row, missed[i], step, slot_row, row_slot, row_step)


@jit
def append(row: int, ends: np.ndarray, links: np.ndarray) -> None:
    """Make the row the newest of the list."""
    last = ends[NEWEST]
    links[row, 0], links[row, 1] = last, NONE
    if last >= 0:
        links[last, 1] = row
    else:
        ends[OLDEST] = row
    ends[NEWEST] = row


@jit
def unlink(row: int, ends: np.ndarray, links: np.ndarray) -> None:
    """Take the row out of the list."""
    before, after = links[row, 0], links[row, 1]
    if before >= 0:
        links[before, 1] = after
    else:
        ends[OLDEST] = after
    if after >= 0:
        links[after, 0] = before
    else:
        ends[NEWEST] = before
