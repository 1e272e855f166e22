"""gather_rows: out[i] = table[slots[i]], or -1 where slots[i] is a pad.

Prefill uses it to turn the slots of its top-k into rows of the staging buffer, for some queries of
a batch: the rows of the others are 0.

Bytes moved per lookup: 4 read, 4 gathered and 4 written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["first", "last"])
def _gather_rows_kernel(
    slots,  # [n] int32, negative: pad
    table,  # [num_slots] int32
    out,  # [n] int32
    n,
    first,
    last,  # entries from first to last are looked up
    BLOCK: tl.constexpr,
):
    # int64: tokens x top-k may exceed 2^31
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = (i >= first) & (i < last)
    slot = tl.load(slots + i, mask=wanted, other=-1)
    row = tl.load(table + slot, mask=slot >= 0, other=-1)
    tl.store(out + i, tl.where(wanted, row, 0), mask=i < n)


def gather_rows(
    slots: torch.Tensor, table: torch.Tensor, queries: slice | None = None
) -> torch.Tensor:
    """table[slots], -1 where a slot is negative: int32, in the shape of slots.

    slots [...] int32, each below num_slots or negative; table [num_slots] int32
    queries: the part of slots [T, K] to look up; the others are not read and become 0
    Raises: ValueError for other dtypes.
    """
    if slots.dtype != torch.int32 or table.dtype != torch.int32:
        raise ValueError(f"slots and table must be int32: got {slots.dtype} and {table.dtype}.")
    slots = slots.contiguous()
    out = torch.empty_like(slots)
    if n := slots.numel():
        width = n // len(slots) if queries else n
        first, last, _ = (queries or slice(1)).indices(len(slots))
        grid = (triton.cdiv(n, BLOCK),)
        _gather_rows_kernel[grid](slots, table, out, n, first * width, last * width, BLOCK=BLOCK)
    return out


def gather_rows_reference(
    slots: torch.Tensor, table: torch.Tensor, queries: slice | None = None
) -> torch.Tensor:
    """The same in torch."""
    rows = torch.where(slots >= 0, table[slots.clamp(min=0).long()], -1)
    if queries is None:
        return rows
    out = torch.zeros_like(rows)
    out[queries] = rows[queries]
    return out
