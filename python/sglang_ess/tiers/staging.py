"""Prefill's rows on the device, one layer of the batch at a time.

A thread copies the prefix rows of a batch from the host tier, layer by layer, into one of two
buffers while attention reads the other. So prefill needs device memory for two layers of its
longest request, however many layers and slots there are (SparseServe's layer-segmented prefill).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from sglang_ess.tiers.row_words import copy_rows

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Group:
    """Requests of a batch whose rows fit into a buffer together.

    queries  the group's queries in the batch
    prefix   [p] int64 slots, each once, in buffer rows 0, 1, ...
    new      [n] int64 slots of the new tokens, in the rows after them
    """

    queries: slice
    prefix: torch.Tensor
    new: torch.Tensor


@numba.njit(cache=True, nogil=True, parallel=True)
def _translate(topk: Array, place: Array, out: Array) -> None:
    for t in numba.prange(topk.shape[0]):
        for j in range(topk.shape[1]):
            slot = topk[t, j]
            out[t, j] = place[slot] if slot >= 0 else -1


def split_requests(lengths: Sequence[int], num_rows: int, num_slots: int) -> list[range]:
    """Cut requests of `lengths` rows, in order, into runs that fit into num_rows together.

    num_slots: of the host tier. num_rows is at most that; if less, the context length bounds it
    Raises: ValueError if one request alone is longer than num_rows.
    """
    runs: list[range] = []
    first = size = 0
    for i, length in enumerate(lengths):
        if length > num_rows:
            advice = "Raise --context-length."
            if num_rows >= num_slots:
                advice = (
                    "All slots are fewer: raise --max-total-tokens, or the host and device memory "
                    "that they are cut from."
                )
            raise ValueError(
                f"a prefill request must fit into the staging buffer: got {length} rows, "
                f"limit {num_rows}. {advice}"
            )
        if size + length > num_rows:  # shared prefixes count twice, which is rare
            runs.append(range(first, i))
            first, size = i, 0
        size += length
    return [run for run in [*runs, range(first, len(lengths))] if len(run)]


class Staging:
    """Two buffers of num_rows rows, filled in the order (layer, group) of one prefill pass.

    host_rows: [slots, width] of each layer. Call begin() once a pass; then rows() layer by layer
    and group by group, after the layer's new rows are in the host tier.
    """

    def __init__(self, host_rows: Sequence[torch.Tensor], num_rows: int):
        self._host_rows = host_rows
        self._buffers = [
            torch.zeros(num_rows, *host_rows[0].shape[1:], dtype=host_rows[0].dtype)
            for _ in range(2)
        ]
        self.num_rows = num_rows
        self._place = np.full(len(host_rows[0]), -1, np.int32)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="ess-staging")
        self._pending: tuple[int, Future[None]] | None = None  # (item, copy of its prefix rows)
        self._placed: Group | None = None
        self.groups: list[Group] = []

    @property
    def nbytes(self) -> int:
        """Device bytes: both buffers and the map."""
        return sum(buffer.nbytes for buffer in self._buffers) + self._place.nbytes

    def begin(
        self, spans: Sequence[tuple[int, int, int]], req_to_token: torch.Tensor
    ) -> list[Group]:
        """Group a batch's requests, and start to copy the first layer's prefix rows.

        spans: (row of req_to_token, prefix, new tokens) of each request, in query order
        Raises: ValueError if one request alone is longer than a buffer.
        """
        self._drop()
        self.groups = []
        self.groups = self._group(spans, req_to_token)
        if self.groups:
            self._pending = self._prefetch(0)
        return self.groups

    def rows(self, layer_index: int, index: int) -> torch.Tensor:
        """Return the rows [num_rows, width] of groups[index] in a layer.

        Effect: starts to copy the next group or layer into the other buffer.
        """
        item, group = layer_index * len(self.groups) + index, self.groups[index]
        if self._pending is None or self._pending[0] != item:
            self._drop()
            self._pending = self._prefetch(item)
        (_, copy), self._pending = self._pending, None
        copy.result()  # nothing is pending any more, so an exception is raised once
        buffer, host_rows = self._buffers[item % 2], self._host_rows[layer_index]
        first = len(group.prefix)
        copy_rows(host_rows, group.new, buffer[first : first + len(group.new)])
        if item + 1 < len(self._host_rows) * len(self.groups):
            self._pending = self._prefetch(item + 1)
        return buffer

    def places_of(self, index: int, topk: torch.Tensor) -> torch.Tensor:
        """Map slots [T, K] int32 of groups[index], -1 pads, to rows of its buffer."""
        self._put(self.groups[index])
        out = torch.empty_like(topk)
        _translate(topk.numpy(), self._place, out.numpy())
        return out

    def _group(
        self, spans: Sequence[tuple[int, int, int]], req_to_token: torch.Tensor
    ) -> list[Group]:
        starts = np.cumsum([0] + [tokens for _, _, tokens in spans])
        lengths, groups = [prefix + n for _, prefix, n in spans], []
        for members in split_requests(lengths, self.num_rows, len(self._place)):
            parts = [(req_to_token[spans[i][0]], spans[i][1], spans[i][2]) for i in members]
            new = torch.cat([table[prefix : prefix + n] for table, prefix, n in parts]).long()
            old = torch.cat([table[:prefix] for table, prefix, _ in parts]).long().unique()
            queries = slice(int(starts[members[0]]), int(starts[members[-1] + 1]))
            groups.append(Group(queries, old, new))
        return groups

    def _put(self, group: Group) -> None:
        """Fill the map for this group. Entries of other groups' slots may be stale."""
        if self._placed is not group:
            self._place[group.prefix] = np.arange(len(group.prefix))
            self._place[group.new] = len(group.prefix) + np.arange(len(group.new))
            self._placed = group

    def _prefetch(self, item: int) -> tuple[int, Future[None]]:
        """Start to copy an item's prefix rows. Returns the item and the copy."""
        layer, index = divmod(item, len(self.groups))
        prefix = self.groups[index].prefix
        target = self._buffers[item % 2][: len(prefix)]
        # One thread, no OpenMP: a second team would compete with attention's for the cores.
        copy = self._copier.submit(copy_rows, self._host_rows[layer], prefix, target)
        return item, copy

    def _drop(self) -> None:
        """Wait for the copy of an abandoned pass. Log its failure: it is not the next pass's."""
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending[1].exception()) is not None:
            logger.warning(
                "ESS: the copy of a prefill pass that was given up has failed: %s: %s",
                type(error).__name__, error,
            )  # fmt: skip
