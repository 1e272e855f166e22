"""fetch: hot_rows[miss_rows[i]] = host_rows[miss_slots[i]] for i < num_misses[0].

The GPU reads the missed rows from pinned host memory by address and stores them in their hot rows.
There is no copy call per row and no staging buffer, and the host never reads the number of misses.

Bytes moved: num_misses x row bytes over PCIe and as many into device memory; 8 bytes of the miss
list per entry. The number of programs follows from the bytes in flight. PCIe 5.0 x16 at 55 GB/s,
with about 2 us from load to data, needs 55e9 x 2e-6 = 110 KB in flight: 168 rows of 656 B or 96 of
1152 B. A program has 16 rows of 656 B (10.5 KB) or 8 of 1152 B (9.2 KB) in flight, so 11 or 12
programs fill the link. MAX_PROGRAMS is twice that, because a program has nothing in flight while it
stores rows and reads its next indices. Source: ESS section 3.1 (FlashTrans, 37 GB/s) and
SparseServe's FlashH2D.
"""

import torch
import triton
import triton.language as tl

from ess_kernels.checks import (
    COPY_WARPS,
    LINE_WORDS,
    check_on_device,
    check_programs,
    check_reachable,
    check_same_format,
    check_tensor,
    copy_step,
    copy_tile,
    line_lead,
    words,
)

MAX_PROGRAMS = 24  # by the arithmetic above, not by a sweep; each takes one SM at most


@triton.jit(do_not_specialize=["capacity", "lead"])
def _fetch_kernel(
    host_ptr,  # [slots, HOST_STRIDE] int64, host memory
    hot_ptr,  # [rows, HOT_STRIDE] int64
    miss_slots_ptr,  # [capacity] int32
    miss_rows_ptr,  # [capacity] int32
    num_misses_ptr,  # [1] int32
    capacity,
    lead,  # line_lead(host rows)
    HOST_STRIDE: tl.constexpr,
    HOT_STRIDE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROWS_PER_STEP: tl.constexpr,
):
    count = tl.minimum(tl.load(num_misses_ptr), capacity)
    share = tl.cdiv(count, tl.num_programs(0))
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, count)
    for base in range(first, end, ROWS_PER_STEP):
        miss = base + tl.arange(0, ROWS_PER_STEP)
        listed = miss < end
        # int64: a slot or row times the words of a row exceeds 2^31
        slot = tl.load(miss_slots_ptr + miss, mask=listed, other=0).to(tl.int64)
        row = tl.load(miss_rows_ptr + miss, mask=listed, other=-1).to(tl.int64)
        shift = (slot * HOST_STRIDE + lead) % LINE_WORDS
        copy_step(
            host_ptr, slot, hot_ptr, row, row >= 0, shift,
            HOST_STRIDE, HOT_STRIDE, ROW_WORDS, BLOCK_WORDS,
        )  # fmt: skip


def fetch_reference(
    host_rows: torch.Tensor,
    hot_rows: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_rows: torch.Tensor,
    num_misses: torch.Tensor,
) -> None:
    """The same in torch; it reads num_misses on the host."""
    count = min(int(num_misses), len(miss_slots))
    kept = miss_rows[:count] >= 0
    slots, rows = miss_slots[:count][kept].long(), miss_rows[:count][kept].long()
    hot_rows[rows] = host_rows[slots.to(host_rows.device)].to(hot_rows.device)


def _check(
    host_rows: torch.Tensor,
    hot_rows: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_rows: torch.Tensor,
    num_misses: torch.Tensor,
    max_programs: int,
) -> None:
    check_on_device("hot_rows", hot_rows)
    check_reachable("host_rows", host_rows)
    check_same_format("hot_rows", hot_rows, "host_rows", host_rows)
    check_tensor("miss_slots", miss_slots, torch.int32, (None,), hot_rows.device)
    check_tensor("miss_rows", miss_rows, torch.int32, (len(miss_slots),), hot_rows.device)
    check_tensor("num_misses", num_misses, torch.int32, (1,), hot_rows.device)
    check_programs(max_programs)


def fetch(
    host_rows: torch.Tensor,
    hot_rows: torch.Tensor,
    miss_slots: torch.Tensor,
    miss_rows: torch.Tensor,
    num_misses: torch.Tensor,
    max_programs: int = MAX_PROGRAMS,
) -> None:
    """hot_rows[miss_rows[i]] = host_rows[miss_slots[i]] for i < num_misses[0].

    host_rows   [slots, ...] any dtype, pinned host memory (or device memory)
    hot_rows    [rows, ...] same row format, on the device; written
    miss_slots  [capacity] int32, on the device; each inside host_rows
    miss_rows   [capacity] int32, on the device; distinct and inside hot_rows, negative: skipped
    num_misses  [1] int32, on the device; entries from num_misses[0] on are not read
    max_programs  programs of the grid: the most SMs that fetch takes from other kernels

    The size and the address of a row must be multiples of 16 bytes, as those of latent rows (656
    and 1152 bytes) are. Rows may lie apart in either tensor.
    Effect: asynchronous on the current stream. The one launch has a shape that does not depend on
    data. host_rows must not be written until it ends.
    Raises: ValueError for a wrong dtype, shape, device or row format, or pageable host memory.
    """
    _check(host_rows, hot_rows, miss_slots, miss_rows, num_misses, max_programs)
    host_words, hot_words = words(host_rows, "host_rows"), words(hot_rows, "hot_rows")
    capacity = len(miss_slots)
    if capacity == 0:
        return
    with torch.cuda.device_of(hot_rows):
        _fetch_kernel[(min(max_programs, capacity),)](
            host_words,
            hot_words,
            miss_slots,
            miss_rows,
            num_misses,
            capacity,
            line_lead(host_words),
            HOST_STRIDE=host_words.stride(0),
            HOT_STRIDE=hot_words.stride(0),
            **copy_tile(host_words.shape[1]),
            num_warps=COPY_WARPS,
        )
