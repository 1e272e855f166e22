"""plan_fetch: give every slot of a batch's top-k a hot row, and copy the rows that are missing.

    rows[q, k] = the row of slot topk[q, k] if it is hot, else one that the hand finds; -1 for a pad

csrc/plan_fetch.cu does it in one launch, copies included, and hot_state.py says which rows are
taken. The host reads nothing. The result depends on timing only in which eligible row serves which
slot, and in which of several lookups of a missed slot is the one that misses.

`fetch` copies the same rows in another layer of the index group. `install` gives rows to
slots that a pass is about to write: one launch for all groups.

Estimate for an H200 at 160 x 2,048 lookups of 61 groups that pass through L2 between uses, none
missing: the map and the stamps are two random sectors of 32 B a lookup, 21 MB or 4.4 us at 4.8
TB/s; the chain is a load of top-k, of the map and of a stamp and a store, four latencies of 0.7 us,
and two grid barriers of 1.2 us: 8 to 10 us. At batch 1: the same chain and block barriers, 4 us.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch

from ess_kernels import cuda_build
from ess_kernels.checks import check_reachable, check_tensor
from ess_kernels.hot_state import HotState

COPY_BLOCKS = 16  # of 16 warps; csrc/copy_rows.cuh has the arithmetic. Not by a sweep

_NOTHING = torch.empty(0, 1, dtype=torch.int32)


@dataclass(frozen=True)
class PlanBuffers:
    """The results of one plan, at addresses that do not change, so that CUDA graphs can hold them.

    rows          [queries, K] int32   hot rows in the order of top-k, -1 for a pad
    hit_rows      [queries, K] int32   rows that attention may read before the fetch ends: the first
    hit_lengths   [queries] int32      hit_lengths[q] of row q
    late_rows     [queries, K] int32   rows that it must read after the fetch: the first
    late_lengths  [queries] int32      late_lengths[q] of row q; all rows if words[SPLIT] is 0
    miss_slots    [queries * K] int32  the first num_misses: host rows to fetch, each once
    miss_rows     [queries * K] int32  the hot rows that they go to
    num_misses    [1] int32
    """

    rows: torch.Tensor
    hit_rows: torch.Tensor
    hit_lengths: torch.Tensor
    late_rows: torch.Tensor
    late_lengths: torch.Tensor
    miss_slots: torch.Tensor
    miss_rows: torch.Tensor
    num_misses: torch.Tensor

    @classmethod
    def new(cls, queries: int, width: int, device: torch.device | str) -> PlanBuffers:
        """Buffers of a plan of `queries` x `width` lookups."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            rows=empty(queries, width),
            hit_rows=empty(queries, width),
            hit_lengths=empty(queries),
            late_rows=empty(queries, width),
            late_lengths=empty(queries),
            miss_slots=empty(queries * width),
            miss_rows=empty(queries * width),
            num_misses=torch.zeros(1, dtype=torch.int32, device=device),
        )

    @staticmethod
    def bytes_for(queries: int, width: int) -> int:
        """Bytes of new(queries, width)."""
        return 4 * (5 * queries * width + 2 * queries + 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.bytes_for(*self.rows.shape)


class PlanOptions(TypedDict, total=False):
    """What plan_fetch may be given besides.

    lists      write hits and misses apart; without it (the default) those four buffers stay as
               they are
    advance    end the tick (the default), so that the next plan may evict what this one used.
               Overlap mode DBA plans a batch in halves and ends the tick with the second one
    warm       lookups that no step makes: they count as used one tick ago, are not counted, and
               find no row (-1) where every other row was used as recently; False by default
    step_pass  (i, n): plan i of the n that the step takes, (0, 1) by default. Each of them is a
               tick, so that it may evict what the one before used; n of them count as one step,
               in which the ages of what they evict are counted
    max_blocks blocks that copy, COPY_BLOCKS by default; the others end before the copies do
    """

    lists: bool
    advance: bool
    warm: bool
    step_pass: tuple[int, int]
    max_blocks: int


def plan_fetch(
    state: HotState,
    topk: torch.Tensor,
    buffers: PlanBuffers,
    host_rows: torch.Tensor | None = None,
    hot_rows: torch.Tensor | None = None,
    **options: Unpack[PlanOptions],
) -> None:
    """Plan topk [queries, K] int32 slots, -1 pads; results go to buffers of that shape.

    state      of one index group
    host_rows  [slots, ...] of the group's first layer, pinned; hot_rows [rows, ...] of the same
               row format, on the device. None: nothing is copied, and fetch must follow
    Effect: asynchronous on the current stream, one launch. host_rows must not be written until it
    ends.
    Raises: ValueError for a wrong dtype, shape, device or row format, for pageable host memory, and
    for more lookups than there are rows, unless there is a row for every slot.
    """
    check_tensor("topk", topk, torch.int32, (None, None))
    host, hot = _copied(host_rows, hot_rows)
    b, s = buffers, state
    hits = (_NOTHING,) * 4
    if options.get("lists", False):
        hits = b.hit_rows, b.hit_lengths, b.late_rows, b.late_lengths
    cuda_build.load("plan_fetch").plan_fetch(
        topk, b.rows, *hits, b.miss_slots, b.miss_rows, b.num_misses,
        s.slot_row, s.row_slot, s.row_stamp, s.words, s.counters, s.times,
        host, hot, options.get("warm", False), options.get("advance", True),
        *options.get("step_pass", (0, 1)), options.get("max_blocks", COPY_BLOCKS),
    )  # fmt: skip


def fetch(
    host_rows: torch.Tensor,
    hot_rows: torch.Tensor,
    slots: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    times: torch.Tensor | None = None,
    layer: int = 0,
    max_blocks: int = COPY_BLOCKS,
) -> None:
    """hot_rows[rows[i]] = host_rows[slots[i]] for i < count[0].

    host_rows  [slots, ...] any dtype, pinned host memory
    hot_rows   [rows, ...] same row format, on the device; written
    slots      [capacity] int32, on the device; negative: skipped
    rows       [capacity] int32, on the device; distinct; negative: skipped
    count      [1] int32, on the device, at most capacity
    times      [layers, NUM_TIMES] int64 of an index group: when `layer` has its rows
    max_blocks blocks of the grid: the most SMs that it takes from other kernels
    The size and the address of a row must be multiples of 16 bytes, as those of latent rows (656
    and 1152 bytes) are. Rows may lie apart in either tensor.
    Effect: asynchronous on the current stream, one launch of a shape that does not depend on data.
    host_rows must not be written until it ends.
    Raises: ValueError for a wrong dtype, shape, device or row format, or pageable host memory.
    Source: ESS section 3.1 (FlashTrans) and SparseServe's FlashH2D.
    """
    host, hot = _copied(host_rows, hot_rows)
    cuda_build.load("plan_fetch").fetch(
        host, hot, slots, rows, count, _NOTHING if times is None else times, layer, max_blocks
    )


def _copied(
    host_rows: torch.Tensor | None, hot_rows: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if host_rows is None or hot_rows is None:
        return _NOTHING, _NOTHING
    check_reachable("host_rows", host_rows)
    return host_rows, hot_rows


def install(
    state: HotState,
    slots: torch.Tensor,
    first_slot: int = 0,
    min_age: int = 0,
    reserve: bool = False,
) -> None:
    """Give hot rows, in each group, to slots [n] int32 or int64 that the coming pass will write.

    state       of all groups: [groups, ...]
    first_slot  lower slots are left out. SGLang points the padding of a batch at its first page,
                which nobody reads
    min_age     a slot may take only a free row, or one whose last use is at least so many ticks ago
    reserve     for a decode step: every slot gets a row, which counts as used in this step, so that
                its plans do not evict it. Else slots count as used two ticks ago, so that a warm-up
                may take their rows, and some may get no row. It also adds the step before's stall
                to the counters
    Effect: asynchronous on the current stream, one launch. Who writes a slot's host row looks its
    hot row up in slot_row (pack_write), so rows that are installed must be written in this pass.
    Raises: ValueError for a wrong dtype or shape, or for more slots to reserve than there are rows.
    """
    check_tensor("slots", slots, (torch.int32, torch.int64), (None,))
    s = state
    cuda_build.load("plan_fetch").install(
        slots, s.slot_row, s.row_slot, s.row_stamp, s.words, s.counters, s.times,
        first_slot, min_age, reserve,
    )  # fmt: skip


def max_width() -> int:
    """The widest top-k of one plan."""
    return int(cuda_build.load("plan_fetch").max_width())
