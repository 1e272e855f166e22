"""Prefill's rows on a CUDA device, one layer of the batch at a time.

Two buffers as in staging.py. The fetch kernel copies prefix rows from the host tier on the
transfer stream while attention reads the other buffer; the forward pass itself has the new rows.
The host knows all sizes (prefix and new tokens of each request), so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ess_kernels.gather_rows import gather_rows
from ess_kernels.plan_fetch import fetch
from sglang_ess.tiers.contract import Device
from sglang_ess.tiers.hot_cache_cuda import whole_pages
from sglang_ess.tiers.staging import split_requests
from sglang_ess.tiers.transfer_stream import TransferStream, wait

# Prefill copies much more than a decode step does, so its fetch may use more blocks.
PREFILL_BLOCKS = 32


@dataclass(frozen=True)
class DeviceGroup:
    """Requests of a batch whose rows fit into a buffer together.

    queries  the group's queries in the batch
    prefix   [p] int32 slots in buffer rows 0, 1, ...; a prefix shared by two requests comes twice
    slots    [p + n] int64: these, then those of the new tokens, in the rows after them
    places   [p + n] int32: 0, 1, ...
    count    [1] int32: p
    """

    queries: slice
    prefix: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    count: torch.Tensor


class DeviceStaging:
    """Two buffers of num_rows rows, filled in the order (layer, group) of one prefill pass.

    host_rows: [slots, ...] of each layer. Call begin() once a pass; then rows() layer by layer
    and group by group, with the layer's new rows.
    """

    def __init__(
        self,
        host_rows: Sequence[torch.Tensor],
        num_rows: int,
        device: Device,
        transfer: TransferStream,
    ):
        first = host_rows[0]
        padded = whole_pages(num_rows)
        self._host_rows, self._transfer = host_rows, transfer
        self._buffers = [
            torch.zeros(padded, *first.shape[1:], dtype=first.dtype, device=device)
            for _ in range(2)
        ]
        self.num_rows = num_rows
        self._place = torch.full((len(first),), -1, dtype=torch.int32, device=device)
        self._pending: tuple[int, torch.cuda.Event | None] | None = None
        self._placed: DeviceGroup | None = None
        self.groups: list[DeviceGroup] = []

    @property
    def nbytes(self) -> int:
        """Device bytes: both buffers and the map."""
        return sum(buffer.nbytes for buffer in self._buffers) + self._place.nbytes

    def begin(
        self,
        prefix_tokens: Sequence[int],
        new_tokens: Sequence[int],
        tables: torch.Tensor,
        new_slots: torch.Tensor,
    ) -> None:
        """Group a batch's requests, and start to copy the first layer's prefix rows.

        prefix_tokens, new_tokens: of each request
        tables: [requests, context] int32, the slots of each request
        new_slots: [sum(new_tokens)] int64, in query order
        Raises: ValueError if one request alone is longer than a buffer.
        """
        self._pending = self._placed = None
        lengths = [old + new for old, new in zip(prefix_tokens, new_tokens, strict=True)]
        starts = [0]
        for tokens in new_tokens:
            starts.append(starts[-1] + tokens)
        self.groups = []
        for run in split_requests(lengths, self.num_rows, len(self._place)):
            queries = slice(starts[run.start], starts[run.stop])
            prefix = torch.cat([tables[i, : prefix_tokens[i]] for i in run]).int()
            slots, device = torch.cat([prefix, new_slots[queries]]), tables.device
            places = torch.arange(len(slots), dtype=torch.int32, device=device)
            count = torch.full((1,), len(prefix), dtype=torch.int32, device=device)
            self.groups.append(DeviceGroup(queries, prefix, slots, places, count))
        if self.groups:
            self._pending = self._prefetch(0)

    def place_for(self, layer_index: int, num_tokens: int) -> torch.Tensor | None:
        """Where a layer's new rows [num_tokens, ...] may be packed, so that rows() copies none.

        num_tokens: of the batch, its padding included
        Returns the rows of the layer's buffer, which two layers on gets other rows: only what the
        current stream does until this layer's attention may read them. None where the batch takes
        several groups: the rows of all of them fit into no buffer.
        """
        if len(self.groups) != 1:
            return None
        first, buffer = len(self.groups[0].prefix), self._buffers[layer_index % 2]
        return buffer[first : first + num_tokens] if first + num_tokens <= len(buffer) else None

    def rows(self, layer_index: int, index: int, new_rows: torch.Tensor) -> torch.Tensor:
        """Return the rows [num_rows, ...] of groups[index] in a layer.

        new_rows: [tokens of the batch, ...] of this layer, packed
        Effect: starts to copy the next group or layer into the other buffer.
        """
        item, group = layer_index * len(self.groups) + index, self.groups[index]
        if self._pending is None or self._pending[0] != item:
            # A pass that began in the middle, or a layer that is repeated.
            self._pending = self._prefetch(item)
        wait(self._pending[1])
        buffer = self._buffers[item % 2]
        staged = buffer[len(group.prefix) : len(group.slots)]
        if staged.data_ptr() != new_rows.data_ptr():  # else they were packed in place_for()
            staged.copy_(new_rows[group.queries])
        if item + 1 < len(self._host_rows) * len(self.groups):
            self._pending = self._prefetch(item + 1)
        return buffer

    def translate(self, index: int, topk: torch.Tensor) -> torch.Tensor:
        """Map a whole batch's slots [T, K] int32, -1 pads, to rows of groups[index]'s buffer.

        0 where a query is another group's.
        """
        group = self.groups[index]
        if self._placed is not group:  # entries of other groups' slots may be stale
            self._place[group.slots] = group.places
            self._placed = group
        return gather_rows(topk, self._place, group.queries)

    def _prefetch(self, item: int) -> tuple[int, torch.cuda.Event | None]:
        """Start the copy for an item. Returns the item and the event at the copy's end, if any."""
        layer, index = divmod(item, len(self.groups))
        group = self.groups[index]
        if not len(group.prefix):
            return item, None
        with self._transfer.on_transfer_stream():  # after the attention that reads this buffer
            fetch(
                self._host_rows[layer],
                self._buffers[item % 2],
                group.prefix,
                group.places[: len(group.prefix)],
                group.count,
                max_blocks=PREFILL_BLOCKS,
            )
            self._transfer.record_stream(group.prefix, group.places, group.count)
            return item, self._transfer.event()
