"""The hot rows of several index groups; each row belongs to one group at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

NOBODY = -1
# Per row: its slot and its place in the group's queue (4 B each), and its owner (2 B).
ARENA_ROW_BYTES = 10


class HotArena:
    """Hot rows shared by the HotCaches of index groups that have as many layers each.

    layers     for each layer of a group, [num_rows, ...] like its host rows; empty to run the
               policy without rows. Row r has the same slot in each
    row_slot   [num_rows] int32 slot whose copy the row holds, in its owner's layers; -1: free
    row_place  [num_rows] int32 the row's entry in its owner's queue; -1: free
    owner      [num_rows] int16 number of the cache that owns the row; NOBODY: spare
    host_rows: of the layers of one group, for their format
    Only HotCache.resize changes an owner, and only of rows that hold no copy: attention reads a
    row by its number, whatever its owner.
    """

    def __init__(self, num_rows: int, host_rows: Sequence[torch.Tensor] = ()):
        self.layers = [
            torch.zeros(num_rows, *rows.shape[1:], dtype=rows.dtype) for rows in host_rows
        ]
        self.row_slot = np.full(num_rows, -1, np.int32)
        self.row_place = np.full(num_rows, -1, np.int32)
        self.owner = np.full(num_rows, NOBODY, np.int16)
        self._num_caches = 0
        self._fresh = 0  # this row and those after it never had an owner
        self._returned = np.empty(0, np.int32)

    @property
    def spare(self) -> int:
        """Rows without an owner."""
        return len(self._returned) + len(self.owner) - self._fresh

    def next_number(self) -> int:
        """The owner number of a new cache."""
        self._num_caches += 1
        return self._num_caches - 1

    def check_spare(self, count: int) -> None:
        """Raises: ValueError if fewer rows are spare."""
        if count > self.spare:
            raise ValueError(
                f"hot rows must be there to take: got {count}, limit {self.spare} spare ones. "
                "Resize another group of as many layers first."
            )

    def take(self, number: int, count: int) -> np.ndarray:
        """Give `count` spare rows to the cache with this number. Returns them, [count] int32.

        Raises: ValueError if fewer rows are spare.
        """
        self.check_spare(count)
        fresh = min(count, len(self.owner) - self._fresh)
        taken = np.arange(self._fresh, self._fresh + fresh, dtype=np.int32)
        if fresh < count:
            returned, self._returned = np.split(self._returned, [count - fresh])
            taken = np.concatenate([taken, returned])
        self._fresh += fresh
        self.owner[taken] = number
        return taken

    def give_back(self, rows: np.ndarray) -> None:
        """Make rows [n] int32 spare; they must hold no copy."""
        self.owner[rows] = NOBODY
        self._returned = np.concatenate([self._returned, rows])

    def rows_of(self, number: int) -> np.ndarray:
        """The rows [n] int32 of the cache with this number, ascending."""
        return np.flatnonzero(self.owner == number).astype(np.int32)

    def check_integrity(self, sizes: list[int]) -> None:
        """Check that each row is spare or owned once.

        sizes: rows that the caches say they have, by number
        Raises: RuntimeError.
        """
        counts = np.bincount(self.owner + 1, minlength=len(sizes) + 1).tolist()
        expected = [self.spare, *sizes]
        spare_rows = self.rows_of(NOBODY)
        listed = np.append(self._returned, np.arange(self._fresh, len(self.owner)))
        if counts != expected or not np.array_equal(np.sort(listed), spare_rows):
            raise RuntimeError(
                "each hot row must be spare or one cache's own: got owners of "
                f"{counts} rows, spare ones first, and caches of {expected}."
            )
        if (self.row_slot[spare_rows] >= 0).any() or (self.row_place[spare_rows] >= 0).any():
            raise RuntimeError("a spare row must hold no slot's copy.")
