"""Evict a row at random: the cost of remembering nothing."""

from typing import Any

import numba
import numpy as np

from sglang_ess.sim.policies.base import Policy, assign, jit


class Random(Policy):
    """Evict uniformly among rows that this step does not use; splitmix64 draws from `seed`."""

    def __init__(self, rows: int, num_slots: int, seed: int = 0):
        super().__init__(rows, num_slots)
        self._state = np.array([seed], np.uint64)
        self._candidates = np.empty(rows, np.int32)

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        place(
            missed, free, self.steps, self.slot_row, self.row_slot, self.row_step,
            self._candidates, self._state,
        )  # fmt: skip


@jit
def splitmix64(state: np.ndarray) -> Any:
    """Return the next 64 random bits. Source: Steele, Lea, Flood, OOPSLA 2014."""
    state[0] += numba.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> numba.uint64(30))) * numba.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> numba.uint64(27))) * numba.uint64(0x94D049BB133111EB)
    return z ^ (z >> numba.uint64(31))


@jit
def place(
    missed: np.ndarray,
    free: np.ndarray,
    step: int,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    candidates: np.ndarray,
    state: np.ndarray,
) -> None:
    """Give the missed slots free rows, then rows drawn without replacement."""
    count = 0
    if missed.shape[0] > free.shape[0]:
        for row in range(row_step.shape[0]):
            candidates[count] = row
            count += row_step[row] != step and row_slot[row] >= 0
    for i in range(missed.shape[0]):
        if i < free.shape[0]:
            row = free[i]
        else:
            # The bias of the modulo is below rows / 2^64.
            pick = splitmix64(state) % numba.uint64(count)
            count -= 1
            row = candidates[pick]
            candidates[pick] = candidates[count]
        assign(row, missed[i], step, slot_row, row_slot, row_step)
