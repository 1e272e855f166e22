"""The hot tier on a CUDA device: rows and state of index groups, and a DeviceHotCache for each.

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
from ess_kernels.gather_rows import gather_rows
from ess_kernels.hot_state import HotState
from ess_kernels.install import install
from ess_kernels.invalidate import invalidate
from ess_kernels.plan import WARM, PlanBuffers, plan
from ess_kernels.rebuild_order import OrderScratch, Owned, rebuild_order
from ess_kernels.resize_layers import resize_layers, resize_table
from ess_kernels.scatter import scatter_rows
from sglang_ess.layout import PAGE_SLOTS
from sglang_ess.tiers.batch_passes import Pass, passes
from sglang_ess.tiers.contract import AgeSnapshot, Device, HotTier, HotTiers, RowCorruption

MAX_LAYER_SHARE = 8  # an index group may grow to 8x its equal share; the scratch is sized for it


def whole_pages(num_rows: int) -> int:
    """num_rows rounded up to whole pages of rows."""
    return -(-num_rows // PAGE_SLOTS) * PAGE_SLOTS


@dataclass(frozen=True)
class TierScratch:
    """Memory that index groups use one after another.

    plan        of a batch; both halves of a two-batch overlap are live at once
    reserved    the step's written rows; they are filled after the plan has used `plan`
    num_misses  [HALVES] int32
    order       of rebuild_order
    """

    HALVES = 2

    plan: PlanBuffers
    reserved: PlanBuffers
    num_misses: torch.Tensor
    order: OrderScratch

    @classmethod
    def new(cls, topk: int, max_queries: int, largest_rows: int, device: Device) -> TierScratch:
        """topk, max_queries: of the largest plan; largest_rows: that a group may have."""
        return cls(
            PlanBuffers.new(max_queries, topk, device),
            PlanBuffers.new(1, max_queries, device),
            torch.zeros(cls.HALVES, dtype=torch.int32, device=device),
            OrderScratch.new(largest_rows, device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        plans = self.plan.nbytes + self.reserved.nbytes + self.num_misses.nbytes
        return plans + self.order.nbytes


class DeviceTier:
    """Hot rows and state of index groups that have as many layers each. Implements HotTiers.

    host_rows  per group: [slots, ...] of each of its layers, or of its only one. The host tier,
               pinned where the device is a GPU
    num_rows   hot rows of each group at the start; batches are cut by it at any time
    topk, max_queries: width and queries of the largest plan
    moves      all rows are in one arena, and resize may move them between groups
    scratch    shared with other tiers; None: its own
    rows       per layer [num_rows rounded up to a page, ...] on the device; if moves, the arena's
               for each position in a group
    sizes      hot rows of each group now; their sum never changes
    caches     by group
    A step may only be planned while each group has demand() rows, so resize must leave as many.
    Raises: ValueError for a num_rows outside [1, slots].
    """

    def __init__(
        self,
        host_rows: Sequence[torch.Tensor | Sequence[torch.Tensor]],
        num_rows: int,
        topk: int,
        max_queries: int,
        device: Device,
        moves: bool = False,
        scratch: TierScratch | None = None,
    ):
        members = [(one,) if isinstance(one, torch.Tensor) else tuple(one) for one in host_rows]
        first, groups = members[0][0], len(members)
        self.num_layers = len(members[0])
        self.num_rows, self.num_slots, self.topk = num_rows, len(first), topk
        self.max_queries = max_queries
        self.sizes = (num_rows,) * groups
        # Rows taken at most before the next rebuild_order: a plan's, and one written row per query.
        self.need = min(num_rows, max_queries * (topk + 1))
        self.state = HotState.new(groups, self.num_slots, num_rows, device, shared=moves)
        self.owned = Owned.new(groups, num_rows, device) if moves else None
        paged = whole_pages(num_rows)

        def zeros(count: int) -> torch.Tensor:
            return torch.zeros(count, *first.shape[1:], dtype=first.dtype, device=device)

        if moves:
            self.rows = [zeros(groups * paged) for _ in members[0]]
            hot_rows = [self.rows] * groups
        else:
            hot_rows = [[zeros(paged) for _ in layers] for layers in members]
            self.rows = [rows for layers in hot_rows for rows in layers]
        self._own_scratch = scratch is None
        if scratch is None:
            scratch = TierScratch.new(topk, max_queries, largest_group(num_rows, moves), device)
        self.scratch = scratch
        pairs = zip(members, hot_rows, strict=True)
        self.caches = [DeviceHotCache(self, i, *pair) for i, pair in enumerate(pairs)]
        self._pinned = torch.device(device).type == "cuda"
        self._split = np.ones(groups, bool)  # what the groups' words[SPLIT] say
        self._mirror: tuple[torch.Tensor, ...] | None = None
        self._copied: torch.cuda.Event | None = None
        self._snapshot_given = False
        if self.owned is not None:
            self.resize(self.sizes)  # compiles the kernels of later calls
            self.owned.ages.fill_(-1)

    def buffers_for(self, queries: int, width: int, first: int = 0, half: int = 0) -> PlanBuffers:
        """Buffers for a plan [queries, width] that starts at query `first` of the batch."""
        start, stop = first * self.topk, first * self.topk + queries * width
        b, rows = self.scratch.plan, slice(first, first + queries)

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
            num_misses=self.scratch.num_misses[half : half + 1],
        )

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64 in every layer."""
        invalidate(self.state, slots)

    def set_split(self, split: np.ndarray) -> None:
        """Set whether each group lists hits and misses apart, from its next plan on.

        split: [groups] bool
        """
        if np.array_equal(split, self._split):
            return
        self._split = split.copy()
        host = torch.from_numpy(split.astype(np.int32))
        if self._pinned:
            host = host.pin_memory()
        self.state.words[:, hot_state.SPLIT].copy_(host, non_blocking=True)

    # --- rows by group --------------------------------------------------------------------

    @property
    def max_rows(self) -> int:
        """Hot rows that one group may have at most."""
        return min(self.num_slots, len(self.scratch.order.rank))

    def demand(self, num_queries: int) -> int:
        """Hot rows of one group that a pass of a decode step may need at once.

        More queries may need fewer rows: when their writes find no room, they take none.
        """
        first = passes(num_queries, self.topk, self.num_rows, self.max_queries)[:1]
        lookups = sum(part.lookups for part in first)
        return lookups + num_queries if self.has_room(lookups, num_queries) else lookups

    def has_room(self, lookups: int, writes: int) -> bool:
        """Return whether a pass of `lookups` leaves room for the `writes` of its step."""
        return writes <= self.max_queries and lookups + writes <= self.num_rows

    def resize(self, sizes: Sequence[int]) -> int:
        """Give each group sizes[group] hot rows. Returns the rows that moved.

        A group that shrinks gives up free rows first, then its least recently used ones. Call it
        between steps, on the transfer stream.
        Raises: ValueError unless sizes has a row for each group and the same sum as before.
        """
        if self.owned is None:
            raise ValueError("rows must be in one arena to move: got a DeviceTier without `moves`.")
        table = resize_table(self.sizes, sizes)
        if self._pinned:
            table = table.pin_memory()
        table = table.to(self.state.words.device, non_blocking=True)
        resize_layers(self.state, self.owned, self.scratch.order, table, max(sizes))
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
        """Wait for the last mirror(). Returns counters [groups, NUM_COUNTERS] int64 and words
        [groups, NUM_WORDS] int32.
        """
        if self._mirror is None:
            self.mirror()
        assert self._mirror is not None
        if self._copied is not None:
            self._copied.synchronize()
        counters, words = self._mirror[:2]
        return counters.numpy().copy(), words.numpy().copy()

    def totals(self) -> tuple[int, int, int] | None:
        """misses, evictions and evicted_age in rows of all layers, as of the last mirror().

        None while the copy is under way; nobody waits for it.
        """
        if self._mirror is None or not self.is_mirrored():
            return None
        counters = self._mirror[0].numpy().sum(axis=0)
        misses, evictions, evicted_age = (
            int(counters[figure]) * self.num_layers
            for figure in (hot_state.MISSES, hot_state.EVICTIONS, hot_state.EVICTED_AGE)
        )
        return misses, evictions, evicted_age

    def figures(self) -> list[dict[str, int]]:
        """For each group, as of the last mirror(): its counters, "steps", "occupied", "rows" and
        "layers".
        """
        counters, words = self.read()
        return [
            {
                **dict(zip(hot_state.COUNTERS, group.tolist(), strict=True)),
                "steps": int(hot_state.steps(word.astype(np.int64))),
                "occupied": int(word[hot_state.ROWS] - word[hot_state.NUM_FREE]),
                "rows": int(word[hot_state.ROWS]),
                "layers": self.num_layers,
            }
            for group, word in zip(counters, words, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Device bytes of all groups, and the scratch unless it is shared."""
        owned = 0 if self.owned is None else self.owned.nbytes
        scratch = self.scratch.nbytes if self._own_scratch else 0
        return sum(rows.nbytes for rows in self.rows) + owned + self.state.nbytes + scratch


def largest_group(num_rows: int, moves: bool) -> int:
    """Hot rows that a group may have at most, of num_rows at the start."""
    return num_rows * (MAX_LAYER_SHARE if moves else 1)


class DeviceHotCache:
    """One index group of a DeviceTier. Implements contract.HotTier.

    host_layers, hot_layers: rows of each of its layers; host_rows, rows: of the first

    The caller orders a step on one stream, or by events: reserve or invalidate, then for each
    pass plan, fetch, attention, rebuild_order. The group's first layer does all of it; the others
    write their new rows into the reserved ones, then fetch and attend, pass by pass.
    """

    def __init__(
        self,
        tier: DeviceTier,
        index: int,
        host_layers: Sequence[torch.Tensor],
        hot_layers: Sequence[torch.Tensor],
    ):
        self._tier, self._index = tier, index
        self.host_layers, self.hot_layers = tuple(host_layers), tuple(hot_layers)
        self.host_rows, self.rows = host_layers[0], hot_layers[0]
        self.state, self.num_slots = tier.state.layer(index), tier.num_slots
        self._owned = None if tier.owned is None else tier.owned.layer(index)

    @property
    def num_layers(self) -> int:
        """Layers of the group."""
        return len(self.host_layers)

    @property
    def num_rows(self) -> int:
        """Hot rows that the group has now, in each of its layers."""
        return self._tier.sizes[self._index]

    def buffers_for(self, queries: int, width: int, first: int = 0, half: int = 0) -> PlanBuffers:
        """DeviceTier.buffers_for."""
        return self._tier.buffers_for(queries, width, first, half)

    def passes(self, num_queries: int, width: int) -> list[Pass]:
        """The passes of a decode step.

        The tier's num_rows decides and not the group's present size, so that the passes of a
        captured graph stay valid when rows move.
        """
        return passes(num_queries, width, self._tier.num_rows, self._tier.max_queries)

    def plan(
        self,
        topk: torch.Tensor,
        first: int = 0,
        half: int = 0,
        advance: bool = True,
    ) -> PlanBuffers:
        """Give the slots of topk [queries, K] int32 hot rows.

        first: first query of the pass in the batch
        half: 0 or 1, which half of a batch planned in two; advance: whether the step's tick ends
        Effect: overwrites the buffers of an earlier plan of these queries.
        """
        buffers = self.buffers_for(topk.shape[0], topk.shape[1], first, half)
        plan(self.state, topk.contiguous(), buffers, advance)
        return buffers

    def fetch(self, planned: PlanBuffers, layer: int = 0) -> None:
        """Copy the plan's missed rows of one layer from the host tier to the device."""
        host, hot = self.host_layers[layer], self.hot_layers[layer]
        fetch(host, hot, planned.miss_slots, planned.miss_rows, planned.num_misses)

    def rebuild_order(self) -> None:
        """Have rows ready for the next plan and its writes. Call it after each advancing plan."""
        rebuild_order(self.state, self._tier.need, self._tier.scratch.order, self._owned)

    def has_room_for_writes(self, num_queries: int, width: int) -> bool:
        """Return whether a step may reserve a row per query and its first plan still fits.

        If not, the caller invalidates the written slots, and plan fetches them like others.
        """
        first = self.passes(num_queries, width)[0]
        return self._tier.has_room(first.lookups, num_queries)

    def reserve(self, slots: torch.Tensor, first_slot: int = 0) -> torch.Tensor:
        """Give hot rows to slots [n], which a decode step writes, one per query.

        The step's plan does not evict them. Returns targets [n] int32, the rows that scatter_rows
        fills; -1 for slots below first_slot (padding). Valid until any group's next reserve.
        """
        return install(self.state, slots, self._tier.scratch.reserved, first_slot=first_slot)

    def install(
        self,
        slots: torch.Tensor,
        rows: torch.Tensor | Sequence[torch.Tensor],
        min_age: int = 0,
        first_slot: int = 0,
    ) -> None:
        """Make slots [n] int64, just written, hot where there is room.

        rows [n, ...]: their values in the first layer, or a sequence of those in each layer
        written so far; call update for the others. A slot takes the least recently used row only
        if that is at least min_age steps old; slots below first_slot (padding) are left out.
        """
        buffers = self._tier.scratch.plan
        values = [rows] if isinstance(rows, torch.Tensor) else rows
        limit = min(buffers.rows.numel(), self.num_rows)
        for start in range(0, len(slots), limit):
            part = slice(start, start + limit)
            targets = install(self.state, slots[part], buffers, min_age, True, first_slot)
            for written, hot in zip(values, self.hot_layers, strict=False):
                scatter_rows(written[part], targets, hot)
            self.rebuild_order()

    def update(self, layer: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows [n, ...] to the hot rows, in one layer, of those slots [n] that are hot."""
        targets = gather_rows(slots.int(), self.state.slot_row)
        scatter_rows(rows, targets, self.hot_layers[layer])

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64."""
        invalidate(self.state, slots)

    def warm(self, topk: torch.Tensor) -> None:
        """Make the slots of topk [queries, K] int32 hot, the last query's most recently used."""
        for part in passes(len(topk), topk.shape[1], self.num_rows, self._tier.max_queries):
            lookups = topk[part.queries, part.columns].contiguous()
            buffers = self.buffers_for(*lookups.shape)
            plan(self.state, lookups, buffers, advance=True, kind=WARM.value)
            for layer in range(self.num_layers):
                self.fetch(buffers, layer)
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

    def check_rows(self, picks: np.ndarray, name: str, first_slot: int = 0, layer: int = 0) -> None:
        """Compare a sample of one layer's hot rows with their host rows.

        picks [n] int: rows of the group, each taken modulo num_rows; free rows pass
        name: of the layer, for the message; first_slot: lower slots take padding's writes and pass
        Raises: RowCorruption with the slot and both checksums.
        """
        rows = torch.from_numpy(np.unique(np.asarray(picks) % self.num_rows))
        if self._owned is not None:
            start = int(self.state.words[hot_state.START])
            rows = self._owned.rows.cpu()[start + rows].long()
        slots = self.state.row_slot.cpu()[rows].long()
        rows, slots = rows[slots >= first_slot], slots[slots >= first_slot]
        hot_rows, host_rows = self.hot_layers[layer], self.host_layers[layer]
        hot = hot_rows[rows.to(hot_rows.device)].cpu().flatten(1).view(torch.uint8)
        host = host_rows[slots].flatten(1).view(torch.uint8)
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
