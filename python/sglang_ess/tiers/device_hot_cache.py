"""The hot tier on a CUDA device: all layers' rows and state, one DeviceHotCache a layer.

The same tier as hot_cache.py's, with the same verbs, for callers that may not ask the device
anything: shapes are static, counts stay on the device, and a batch that one plan cannot hold
is cut into passes beforehand (invariants 5 and 7). Kernels: ess_kernels. They also run on CPU
tensors under Triton's interpreter, which is how they are tested without a GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ess_kernels import hot_state
from ess_kernels.fetch import fetch
from ess_kernels.hot_state import HotState
from ess_kernels.install import install
from ess_kernels.invalidate import invalidate
from ess_kernels.plan import MAX_WIDTH, WARM, PlanBuffers, plan
from ess_kernels.reorder import ReorderScratch, reorder
from ess_kernels.scatter import scatter_rows
from sglang_ess.tiers.hot_cache import RowCorruption

PAGE_ROWS = 64  # FlashMLA reads its cache in pages; rows are allocated in whole ones


def whole_pages(num_rows: int) -> int:
    """Rows to allocate for num_rows."""
    return -(-num_rows // PAGE_ROWS) * PAGE_ROWS


@dataclass(frozen=True)
class Pass:
    """Lookups of one plan: rows and columns of a batch's top-k."""

    queries: slice
    columns: slice


def passes(num_queries: int, width: int, num_rows: int, max_queries: int) -> list[Pass]:
    """Cut top-k [num_queries, width] into plans that a tier of num_rows can always hold.

    The union of a pass is at most its lookups, so shapes decide and nothing is asked of the
    device. A query wider than the tier is cut by columns, its parts merged by log-sum-exp.
    """
    columns = min(width, num_rows, MAX_WIDTH)
    queries = 1 if columns < width else min(max_queries, num_rows // columns)
    return [
        Pass(slice(q, min(q + queries, num_queries)), slice(k, min(k + columns, width)))
        for q in range(0, num_queries, queries)
        for k in range(0, width, columns)
    ]


class DeviceTier:
    """Hot rows, state and scratch of every layer.

    host_rows  per layer [slots, ...]: the host tier, pinned where the device is a GPU
    num_rows   hot rows a layer; max_queries, topk: the largest plan
    rows       per layer [num_rows rounded up to a page, ...] on the device
    Layers use the scratch one after another; both halves of a DBA batch are live at a time.
    Raises: ValueError for a num_rows outside [1, slots].
    """

    HALVES = 2

    def __init__(self, host_rows: Sequence[torch.Tensor], num_rows: int, topk: int,
                 max_queries: int, device) -> None:  # fmt: skip
        first = host_rows[0]
        self.num_rows, self.num_slots, self.topk = num_rows, len(first), topk
        self.max_queries = max_queries
        # What may be asked for before the next reorder: a plan and one written row a query.
        self.need = min(num_rows, max_queries * (topk + 1))
        self.state = HotState.new(len(host_rows), self.num_slots, num_rows, device)
        self.rows = [
            torch.zeros(whole_pages(num_rows), *first.shape[1:], dtype=first.dtype, device=device)
            for _ in host_rows
        ]
        self.buffers = PlanBuffers.new(max_queries, topk, device)
        # Of the step's writes, whose rows are filled after the plan has used the ones above.
        self.claims = PlanBuffers.new(1, max_queries, device)
        self._num_misses = torch.zeros(self.HALVES, dtype=torch.int32, device=device)
        self.scratch = ReorderScratch.new(num_rows, device)
        self.caches = [
            DeviceHotCache(self, rows, self.rows[i], self.state.layer(i))
            for i, rows in enumerate(host_rows)
        ]
        self._pinned = torch.device(device).type == "cuda"
        self._split = np.ones(len(host_rows), bool)  # what the layers' words[SPLIT] say
        self._mirror: tuple[torch.Tensor, torch.Tensor] | None = None
        self._copied: torch.cuda.Event | None = None

    def part(self, queries: int, width: int, first: int = 0, half: int = 0) -> PlanBuffers:
        """Buffers of a plan [queries, width] that starts at query `first` of the batch."""
        start, stop = first * self.topk, first * self.topk + queries * width
        b, rows = self.buffers, slice(first, first + queries)

        def grid(tensor):
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
        """The slots [n] are hot in no layer any more."""
        invalidate(self.state, slots)

    def set_split(self, split: np.ndarray) -> None:
        """Whether each layer [layers] bool lists hits and misses apart, from its next plan on."""
        if np.array_equal(split, self._split):
            return
        self._split = split.copy()
        host = torch.from_numpy(split.astype(np.int32))
        if self._pinned:
            host = host.pin_memory()
        self.state.words[:, hot_state.SPLIT].copy_(host, non_blocking=True)

    def mirror(self) -> None:
        """Start a copy of counters and words to the host; what read() gives is the last done."""
        if self._copied is not None and not self._copied.query():
            return  # the one before is under way
        if self._mirror is None:
            self._mirror = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=self._pinned)
                for t in (self.state.counters, self.state.words)
            )
        for host, device in zip(self._mirror, (self.state.counters, self.state.words), strict=True):
            host.copy_(device, non_blocking=True)
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(counters [layers, NUM_COUNTERS], words [layers, NUM_WORDS]) of the last mirror()."""
        if self._mirror is None:
            self.mirror()
        if self._copied is not None:
            self._copied.synchronize()
        return tuple(tensor.numpy().copy() for tensor in self._mirror)

    def totals(self) -> tuple[int, int, int] | None:
        """misses, evictions and evicted_age of all layers, as of the last mirror(); None while
        that is under way: nobody waits.
        """
        if self._mirror is None or (self._copied is not None and not self._copied.query()):
            return None
        counters = self._mirror[0].numpy().sum(axis=0)
        return tuple(
            int(counters[hot_state.COUNTERS.index(name)])
            for name in ("misses", "evictions", "evicted_age")
        )

    def figures(self) -> list[dict[str, int]]:
        """Each layer's counters, steps and rows in use, as of the last mirror()."""
        counters, words = self.read()
        return [
            {
                **dict(zip(hot_state.COUNTERS, layer.tolist(), strict=True)),
                "steps": int(word[hot_state.TICK]) - 1,
                "occupied": self.num_rows - int(word[hot_state.NUM_FREE]),
            }
            for layer, word in zip(counters, words, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Device bytes of all layers, scratch included."""
        rows = sum(rows.nbytes for rows in self.rows)
        shared = self.buffers.nbytes + self._num_misses.nbytes + self.scratch.nbytes
        shared += self.claims.nbytes
        return rows + self.state.nbytes + shared


class DeviceHotCache:
    """One layer of a DeviceTier; see HotCache for what the verbs promise.

    The caller keeps the order of a step on one stream, or by events: claim or invalidate,
    then for each pass plan, fetch, [attention], reorder.
    """

    def __init__(self, tier: DeviceTier, host_rows, rows, state: HotState):
        self._tier, self.state = tier, state
        self.host_rows, self.rows = host_rows, rows
        self.num_rows, self.num_slots = tier.num_rows, tier.num_slots

    def passes(self, num_queries: int, width: int) -> list[Pass]:
        return passes(num_queries, width, self.num_rows, self._tier.max_queries)

    def plan(
        self,
        topk: torch.Tensor,
        first: int = 0,
        half: int = 0,
        advance: bool = True,
        written: torch.Tensor | None = None,
    ) -> PlanBuffers:
        """Hot rows for topk [queries, K] int32; see ess_kernels.plan for written.

        first: the pass's first query in the batch; half, advance: of a batch in two halves
        Effect: what an earlier plan of these queries handed out is overwritten.
        """
        buffers = self._tier.part(*topk.shape, first=first, half=half)
        plan(self.state, topk.contiguous(), buffers, advance, written=written)
        return buffers

    def fetch(self, planned: PlanBuffers) -> None:
        """Copy the plan's missed rows from the host tier."""
        fetch(self.host_rows, self.rows, planned.miss_slots, planned.miss_rows, planned.num_misses)

    def reorder(self) -> None:
        """After each plan that advanced: the installs and the plan to come will find rows."""
        reorder(self.state, self._tier.need, self._tier.scratch)

    def has_room_for_writes(self, num_queries: int, width: int) -> bool:
        """Whether a step may claim a row a query and still be sure of its first plan.

        Where it may not, the new rows are invalidated and fetched like any other.
        """
        if num_queries > self._tier.max_queries:
            return False
        first = self.passes(num_queries, width)[0]
        lookups = (first.queries.stop - first.queries.start) * min(width, first.columns.stop)
        return lookups + num_queries <= self.num_rows

    def claim(self, slots: torch.Tensor, first_slot: int = 0) -> torch.Tensor:
        """Rows for the slots [n] that a decode step writes, one a query, safe from its plan.

        Returns targets [n] int32, -1 for slots below first_slot (a batch's padding), where
        scatter_rows has to put the values; valid until the next claim of any layer.
        """
        return install(self.state, slots, self._tier.claims, first_slot=first_slot)

    def install(
        self, slots: torch.Tensor, rows: torch.Tensor, min_age: int = 0, first_slot: int = 0
    ) -> None:
        """Make slots [n] of a prompt hot where there is room; rows [n, ...] are their values."""
        most = min(self._tier.buffers.rows.numel(), self.num_rows)
        for start in range(0, len(slots), most):
            part = slice(start, start + most)
            targets = install(
                self.state, slots[part], self._tier.buffers, min_age, True, first_slot
            )
            scatter_rows(rows[part], targets, self.rows)
            self.reorder()

    def invalidate(self, slots: torch.Tensor) -> None:
        invalidate(self.state, slots)

    def warm(self, topk: torch.Tensor) -> None:
        """Make the slots of topk [queries, K] hot, the last query's the most recently used."""
        for part in self.passes(*topk.shape):
            lookups = topk[part.queries, part.columns].contiguous()
            buffers = self._tier.part(*lookups.shape)
            plan(self.state, lookups, buffers, advance=True, kind=WARM.value)
            self.fetch(buffers)
            self.reorder()

    # --- figures and checks: these wait for the device ------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """As HotCache's, and "short": lookups that found no row, which must stay 0."""
        return dict(zip(hot_state.COUNTERS, self.state.counters.tolist(), strict=True))

    @property
    def steps(self) -> int:
        return int(self.state.words[hot_state.TICK]) - 1

    @property
    def occupied(self) -> int:
        return self.num_rows - int(self.state.words[hot_state.NUM_FREE])

    def check_rows(self, picks: np.ndarray, name: str, first_slot: int = 0) -> None:
        """Compare hot rows, picked by number modulo num_rows, with their host rows.

        first_slot: slots below it take the writes of padding and are not compared
        Raises: RowCorruption with the slot and both checksums.
        """
        rows = torch.from_numpy(np.unique(np.asarray(picks) % self.num_rows))
        slots = self.state.row_slot.cpu()[rows].long()
        rows, slots = rows[slots >= first_slot], slots[slots >= first_slot]
        hot = self.rows[rows.to(self.rows.device)].cpu().flatten(1).view(torch.uint8)
        host = self.host_rows[slots].flatten(1).view(torch.uint8)
        differ = (hot != host).any(1).nonzero().flatten()
        if not len(differ):
            return
        i = int(differ[0])
        sums = [zlib.crc32(part[i].numpy().tobytes()) for part in (hot, host)]
        raise RowCorruption(
            f"hot row must equal its host row (invariant 2): got {name}, slot {int(slots[i])}, "
            f"hot row {int(rows[i])}: crc32 {sums[0]:08x}, host row crc32 {sums[1]:08x}. Stop "
            "this server, keep its log and report it; --disable-ess serves without hot rows."
        )
