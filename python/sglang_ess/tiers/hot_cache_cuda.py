"""The hot tier on a CUDA device: rows and state of all layers, and one DeviceHotCache a layer.

Shapes are static, counts stay on the device, and a batch that one plan cannot hold is cut into
passes beforehand, so that decode never waits for the device and can be captured. The kernels
(ess_kernels) also run on CPU tensors under Triton's interpreter; the tests use that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ess_kernels import hot_state
from ess_kernels.fetch import fetch
from ess_kernels.hot_state import HotState
from ess_kernels.install import install
from ess_kernels.invalidate import invalidate
from ess_kernels.plan import MAX_WIDTH, WARM, PlanBuffers, plan
from ess_kernels.rebuild_order import OrderScratch, Owned, rebuild_order
from ess_kernels.resize_layers import resize_layers, resize_table
from ess_kernels.scatter import scatter_rows
from sglang_ess.layout import PAGE_SLOTS
from sglang_ess.tiers.contract import AgeSnapshot, Device, HotTier, HotTiers, RowCorruption

MAX_LAYER_SHARE = 8  # a layer may grow to 8x its equal share; the scratch is sized for it


def whole_pages(num_rows: int) -> int:
    """num_rows rounded up to whole pages of rows."""
    return -(-num_rows // PAGE_SLOTS) * PAGE_SLOTS


@dataclass(frozen=True)
class Pass:
    """The part of a batch's top-k that one plan resolves."""

    queries: slice
    columns: slice


def passes(num_queries: int, width: int, num_rows: int, max_queries: int) -> list[Pass]:
    """Cut a top-k [num_queries, width] into plans that num_rows hot rows can always hold.

    max_queries: of one plan
    A pass selects at most as many slots as it has lookups, so shapes alone decide. A query wider
    than the tier is cut by columns; attention merges its parts by log-sum-exp.
    """
    columns = min(width, num_rows, MAX_WIDTH)
    queries = 1 if columns < width else min(max_queries, num_rows // columns)
    return [
        Pass(slice(q, min(q + queries, num_queries)), slice(k, min(k + columns, width)))
        for q in range(0, num_queries, queries)
        for k in range(0, width, columns)
    ]


class DeviceTier:
    """Hot rows, state and scratch of every layer. Implements contract.HotTiers.

    host_rows  per layer [slots, ...]: the host tier, pinned where the device is a GPU
    num_rows   hot rows of each layer at the start; batches are cut by it at any time
    topk, max_queries: width and queries of the largest plan
    moves      all rows are in one arena, and resize may move them between layers
    rows       per layer [num_rows rounded up to a page, ...] on the device; the arena if moves
    sizes      hot rows of each layer now; their sum never changes
    caches     by layer_index
    Layers use the scratch one after another; both halves of a two-batch overlap are live at once.
    A step may only be planned while each layer has demand() rows, so resize must leave as many.
    Raises: ValueError for a num_rows outside [1, slots].
    """

    HALVES = 2

    def __init__(self, host_rows: Sequence[torch.Tensor], num_rows: int, topk: int,
                 max_queries: int, device: Device, moves: bool = False) -> None:  # fmt: skip
        first, layers = host_rows[0], len(host_rows)
        self.num_rows, self.num_slots, self.topk = num_rows, len(first), topk
        self.max_queries = max_queries
        self.sizes = (num_rows,) * layers
        # Rows taken at most before the next rebuild_order: a plan's, and one written row per query.
        self.need = min(num_rows, max_queries * (topk + 1))
        self.state = HotState.new(layers, self.num_slots, num_rows, device, shared=moves)
        self.owned = Owned.new(layers, num_rows, device) if moves else None
        paged = whole_pages(num_rows)

        def zeros(count: int) -> torch.Tensor:
            return torch.zeros(count, *first.shape[1:], dtype=first.dtype, device=device)

        self.rows = [zeros(layers * paged)] * layers if moves else [zeros(paged) for _ in host_rows]
        self.buffers = PlanBuffers.new(max_queries, topk, device)
        # The step's written rows; they are filled after the plan has used the buffers above.
        self.reserved = PlanBuffers.new(1, max_queries, device)
        self._num_misses = torch.zeros(self.HALVES, dtype=torch.int32, device=device)
        self.scratch = OrderScratch.new(num_rows * (MAX_LAYER_SHARE if moves else 1), device)
        self.caches = [DeviceHotCache(self, i, rows) for i, rows in enumerate(host_rows)]
        self._pinned = torch.device(device).type == "cuda"
        self._split = np.ones(len(host_rows), bool)  # what the layers' words[SPLIT] say
        self._mirror: tuple[torch.Tensor, ...] | None = None
        self._copied: torch.cuda.Event | None = None
        self._snapshot_given = False
        if self.owned is not None:
            self.resize(self.sizes)  # compiles the kernels of later calls
            self.owned.ages.fill_(-1)

    def buffers_for(self, queries: int, width: int, first: int = 0, half: int = 0) -> PlanBuffers:
        """Buffers for a plan [queries, width] that starts at query `first` of the batch."""
        start, stop = first * self.topk, first * self.topk + queries * width
        b, rows = self.buffers, slice(first, first + queries)

        def grid(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(-1)[start:stop].view(queries, width)

        return PlanBuffers(
            rows=grid(b.rows),
            hit_rows=grid(b.hit_rows),
            hit_lengths=b.hit_lengths[rows],
            late_rows=grid(b.late_rows),
            late_lengths=b.late_lengths[rows],
            query_misses=b.query_misses[rows],
            miss_slots=b.miss_slots[start:stop],
            miss_rows=b.miss_rows[start:stop],
            num_misses=self._num_misses[half : half + 1],
        )

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64 in every layer."""
        invalidate(self.state, slots)

    def set_split(self, split: np.ndarray) -> None:
        """Set whether each layer lists hits and misses apart, from its next plan on.

        split: [layers] bool
        """
        if np.array_equal(split, self._split):
            return
        self._split = split.copy()
        host = torch.from_numpy(split.astype(np.int32))
        if self._pinned:
            host = host.pin_memory()
        self.state.words[:, hot_state.SPLIT].copy_(host, non_blocking=True)

    # --- rows by layer --------------------------------------------------------------------

    @property
    def max_rows(self) -> int:
        """Hot rows that one layer may have at most."""
        return min(self.num_slots, len(self.scratch.rank))

    def demand(self, num_queries: int) -> int:
        """Hot rows of one layer that a pass of a decode step may need at once.

        More queries may need fewer rows: when their writes find no room, they take none.
        """
        first = passes(num_queries, self.topk, self.num_rows, self.max_queries)[:1]
        lookups = sum(_lookups(part) for part in first)
        return lookups + num_queries if self.has_room(lookups, num_queries) else lookups

    def has_room(self, lookups: int, writes: int) -> bool:
        """Return whether a pass of `lookups` leaves room for the `writes` of its step."""
        return writes <= self.max_queries and lookups + writes <= self.num_rows

    def resize(self, sizes: Sequence[int]) -> int:
        """Give each layer sizes[layer_index] hot rows. Returns the rows that moved.

        A layer that shrinks gives up free rows first, then its least recently used ones. Call it
        between steps, on the transfer stream.
        Raises: ValueError unless sizes has a row for each layer and the same sum as before.
        """
        if self.owned is None:
            raise ValueError("rows must be in one arena to move: got a DeviceTier without `moves`.")
        table = resize_table(self.sizes, sizes)
        if self._pinned:
            table = table.pin_memory()
        table = table.to(self.state.words.device, non_blocking=True)
        resize_layers(self.state, self.owned, self.scratch, table, max(sizes))
        moved = sum(max(0, new - old) for new, old in zip(sizes, self.sizes, strict=True))
        self.sizes = tuple(sizes)
        return moved

    def age_snapshot(self) -> AgeSnapshot | None:
        """Return the ages as of the last mirror(), valid until the next one.

        None if the copy is still under way, was returned before, or precedes every plan.
        """
        if self._snapshot_given or self._mirror is None or not self.is_mirrored():
            return None
        self._snapshot_given = True
        counters, words, ages = (tensor.numpy() for tensor in self._mirror)
        if (ages < 0).any():
            return None
        evictions = counters[:, hot_state.EVICTIONS].copy()
        return AgeSnapshot(ages, evictions, hot_state.steps(words.astype(np.int64)))

    # --- figures --------------------------------------------------------------------------

    def _figures_on_device(self) -> tuple[torch.Tensor, ...]:
        ages: tuple[torch.Tensor, ...] = () if self.owned is None else (self.owned.ages,)
        return self.state.counters, self.state.words, *ages

    def is_mirrored(self) -> bool:
        """Return whether the copy of the last mirror() is complete."""
        return self._mirror is not None and (self._copied is None or self._copied.query())

    def mirror(self) -> None:
        """Start a copy of counters, words and ages to the host, unless one is under way."""
        if self._copied is not None and not self._copied.query():
            return
        figures = self._figures_on_device()
        if self._mirror is None:
            self._mirror = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=self._pinned) for t in figures
            )
        for host, device in zip(self._mirror, figures, strict=True):
            host.copy_(device, non_blocking=True)
        self._snapshot_given = False
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the last mirror(). Returns counters [layers, NUM_COUNTERS] int64 and words
        [layers, NUM_WORDS] int32.
        """
        if self._mirror is None:
            self.mirror()
        assert self._mirror is not None
        if self._copied is not None:
            self._copied.synchronize()
        counters, words = self._mirror[:2]
        return counters.numpy().copy(), words.numpy().copy()

    def totals(self) -> tuple[int, int, int] | None:
        """misses, evictions and evicted_age of all layers, as of the last mirror().

        None while the copy is under way; nobody waits for it.
        """
        if self._mirror is None or not self.is_mirrored():
            return None
        counters = self._mirror[0].numpy().sum(axis=0)
        misses, evictions, evicted_age = (
            int(counters[figure])
            for figure in (hot_state.MISSES, hot_state.EVICTIONS, hot_state.EVICTED_AGE)
        )
        return misses, evictions, evicted_age

    def figures(self) -> list[dict[str, int]]:
        """For each layer, as of the last mirror(): its counters, "steps", "occupied", "rows"."""
        counters, words = self.read()
        return [
            {
                **dict(zip(hot_state.COUNTERS, layer.tolist(), strict=True)),
                "steps": int(hot_state.steps(word.astype(np.int64))),
                "occupied": int(word[hot_state.ROWS] - word[hot_state.NUM_FREE]),
                "rows": int(word[hot_state.ROWS]),
            }
            for layer, word in zip(counters, words, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Device bytes of all layers, including scratch."""
        rows = self.rows[0].nbytes + self.owned.nbytes if self.owned is not None else sum(
            rows.nbytes for rows in self.rows
        )  # fmt: skip
        shared = self.buffers.nbytes + self._num_misses.nbytes + self.scratch.nbytes
        shared += self.reserved.nbytes
        return rows + self.state.nbytes + shared


def _lookups(part: Pass) -> int:
    queries: int = part.queries.stop - part.queries.start
    columns: int = part.columns.stop - part.columns.start
    return queries * columns


class DeviceHotCache:
    """One layer of a DeviceTier. Implements contract.HotTier.

    The caller orders a step on one stream, or by events: reserve or invalidate, then for each
    pass plan, fetch, attention, rebuild_order.
    """

    def __init__(self, tier: DeviceTier, index: int, host_rows: torch.Tensor):
        self._tier, self._index = tier, index
        self.host_rows, self.rows = host_rows, tier.rows[index]
        self.state, self.num_slots = tier.state.layer(index), tier.num_slots
        self._owned = None if tier.owned is None else tier.owned.layer(index)

    @property
    def num_rows(self) -> int:
        """Hot rows that the layer has now."""
        return self._tier.sizes[self._index]

    def passes(self, num_queries: int, width: int) -> list[Pass]:
        """The passes of a decode step.

        The tier's num_rows decides and not the layer's present size, so that the passes of a
        captured graph stay valid when rows move.
        """
        return passes(num_queries, width, self._tier.num_rows, self._tier.max_queries)

    def plan(
        self,
        topk: torch.Tensor,
        first: int = 0,
        half: int = 0,
        advance: bool = True,
        written: torch.Tensor | None = None,
    ) -> PlanBuffers:
        """Give the slots of topk [queries, K] int32 hot rows; ess_kernels.plan describes written.

        first: first query of the pass in the batch
        half: 0 or 1, which half of a batch planned in two; advance: whether the step's tick ends
        Effect: overwrites the buffers of an earlier plan of these queries.
        """
        buffers = self._tier.buffers_for(topk.shape[0], topk.shape[1], first, half)
        plan(self.state, topk.contiguous(), buffers, advance, written=written)
        return buffers

    def fetch(self, planned: PlanBuffers) -> None:
        """Copy the plan's missed rows from the host tier to the device."""
        fetch(self.host_rows, self.rows, planned.miss_slots, planned.miss_rows, planned.num_misses)

    def rebuild_order(self) -> None:
        """Have rows ready for the next plan and its writes. Call it after each advancing plan."""
        rebuild_order(self.state, self._tier.need, self._tier.scratch, self._owned)

    def has_room_for_writes(self, num_queries: int, width: int) -> bool:
        """Return whether a step may reserve a row per query and its first plan still fits.

        If not, the caller invalidates the written slots, and plan fetches them like others.
        """
        first = self.passes(num_queries, width)[0]
        return self._tier.has_room(_lookups(first), num_queries)

    def reserve(self, slots: torch.Tensor, first_slot: int = 0) -> torch.Tensor:
        """Give hot rows to slots [n], which a decode step writes, one per query.

        The step's plan does not evict them. Returns targets [n] int32, the rows that scatter_rows
        fills; -1 for slots below first_slot (padding). Valid until any layer's next reserve.
        """
        return install(self.state, slots, self._tier.reserved, first_slot=first_slot)

    def install(
        self, slots: torch.Tensor, rows: torch.Tensor, min_age: int = 0, first_slot: int = 0
    ) -> None:
        """Make slots [n] int64, just written, hot where there is room.

        rows [n, ...]: their values; a slot takes the least recently used row only if that is at
        least min_age steps old; slots below first_slot (padding) are left out
        """
        limit = min(self._tier.buffers.rows.numel(), self.num_rows)
        for start in range(0, len(slots), limit):
            part = slice(start, start + limit)
            targets = install(
                self.state, slots[part], self._tier.buffers, min_age, True, first_slot
            )
            scatter_rows(rows[part], targets, self.rows)
            self.rebuild_order()

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64."""
        invalidate(self.state, slots)

    def warm(self, topk: torch.Tensor) -> None:
        """Make the slots of topk [queries, K] int32 hot, the last query's most recently used."""
        for part in passes(len(topk), topk.shape[1], self.num_rows, self._tier.max_queries):
            lookups = topk[part.queries, part.columns].contiguous()
            buffers = self._tier.buffers_for(*lookups.shape)
            plan(self.state, lookups, buffers, advance=True, kind=WARM.value)
            self.fetch(buffers)
            self.rebuild_order()

    # --- figures and checks; they wait for the device ---------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """contract.COUNTERS and "short": lookups that found no row, which must stay 0."""
        return dict(zip(hot_state.COUNTERS, self.state.counters.tolist(), strict=True))

    @property
    def steps(self) -> int:
        return int(hot_state.steps(self.state.words.cpu().long()))

    @property
    def occupied(self) -> int:
        return self.num_rows - int(self.state.words[hot_state.NUM_FREE])

    def check_rows(self, picks: np.ndarray, name: str, first_slot: int = 0) -> None:
        """Compare a sample of hot rows with their host rows.

        picks [n] int: rows of the layer, each taken modulo num_rows; free rows pass
        name: of the layer, for the message; first_slot: lower slots take padding's writes and pass
        Raises: RowCorruption with the slot and both checksums.
        """
        rows = torch.from_numpy(np.unique(np.asarray(picks) % self.num_rows))
        if self._owned is not None:
            start = int(self.state.words[hot_state.START])
            rows = self._owned.rows.cpu()[start + rows].long()
        slots = self.state.row_slot.cpu()[rows].long()
        rows, slots = rows[slots >= first_slot], slots[slots >= first_slot]
        hot = self.rows[rows.to(self.rows.device)].cpu().flatten(1).view(torch.uint8)
        host = self.host_rows[slots].flatten(1).view(torch.uint8)
        differ = (hot != host).any(1).nonzero().flatten()
        if not len(differ):
            return
        i = int(differ[0])
        raise RowCorruption.of(name, int(slots[i]), int(rows[i]), hot[i].numpy(), host[i].numpy())


if TYPE_CHECKING:

    def _is_hot_tier(cache: DeviceHotCache) -> HotTier[PlanBuffers]:
        return cache

    def _is_hot_tiers(tier: DeviceTier) -> HotTiers:
        return tier
