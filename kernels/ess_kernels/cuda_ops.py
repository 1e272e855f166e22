"""The CUDA C++ operations under the signatures of their Triton twins.

Each takes what the twin takes and leaves what the twin leaves; csrc/<name>.cu says how. The first
call compiles (cuda_build): make it before a CUDA graph is captured. After that a call is one
launch on the current stream, which a graph can hold.
"""

from __future__ import annotations

import torch

from ess_kernels import cuda_build
from ess_kernels.checks import check_reachable
from ess_kernels.hot_state import HotState
from ess_kernels.plan import PlanBuffers

# Blocks of fetch and save. 55 GB/s x 2 us = 110 KB under way is 3 blocks of 8 warps x 4,608 B;
# more, so that indices, stores and uneven latency have cover. Arithmetic, not a sweep.
MAX_BLOCKS = 16


def fetch(
    host_rows: torch.Tensor,
    hot_rows: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_rows: torch.Tensor,
    num_misses: torch.Tensor,
    max_blocks: int = MAX_BLOCKS,
) -> None:
    """hot_rows[miss_rows[i]] = host_rows[miss_slots[i]] for i < num_misses[0].

    host_rows   [slots, ...] any dtype, pinned host memory
    hot_rows    [rows, ...] same row format, on the device; written
    miss_slots  [capacity] int32, on the device; negative: skipped
    miss_rows   [capacity] int32, on the device; distinct; negative: skipped
    num_misses  [1] int32, on the device
    max_blocks  blocks of the grid, of 8 warps
    Effect: asynchronous on the current stream; host_rows must not be written until it ends.
    Raises: ValueError for a wrong dtype, shape, row format, device, for pageable host memory.
    """
    check_reachable("host_rows", host_rows)
    module = cuda_build.load("fetch")
    module.fetch(hot_rows, host_rows, miss_slots, miss_rows, num_misses, max_blocks)


def save(
    rows: torch.Tensor,
    slots: torch.Tensor,
    host_rows: torch.Tensor,
    max_blocks: int = MAX_BLOCKS,
) -> None:
    """host_rows[slots[i]] = rows[i] for every i with slots[i] >= 0: FlashD2H by direct stores.

    rows       [n, ...] any dtype, on the device
    slots      [n] int64, on the device; distinct; negative: skipped
    host_rows  [slots, ...] same row format, pinned host memory; written
    max_blocks  blocks of the grid, of 8 warps
    Effect: asynchronous on the current stream; the host may read after an event behind it.
    Raises: ValueError as fetch.
    """
    check_reachable("host_rows", host_rows)
    cuda_build.load("save").save(rows, slots, host_rows, max_blocks)


def run_plan(
    state: HotState,
    slots: torch.Tensor,
    total: int,
    width: int,
    buffers: PlanBuffers,
    kind: int,
    advance: bool,
    min_age: int = 0,
    first_slot: int = 0,
    written: torch.Tensor | None = None,
) -> None:
    """ess_kernels.plan.run_plan in one launch, cooperative where there are two queries or more.

    Raises: ValueError for a wrong dtype, shape or device, or more lookups than places or rows.
    """
    b, s = buffers, state
    cuda_build.load("plan").plan(
        slots, slots if written is None else written, written is not None, total, width,
        b.rows, b.hit_rows, b.hit_lengths, b.late_rows, b.late_lengths,
        b.query_misses, b.miss_slots, b.miss_rows, b.num_misses,
        s.slot_row, s.row_slot, s.row_stamp, s.free, s.order, s.words, s.counters, min_age,
        first_slot, kind, advance,
    )  # fmt: skip
