"""gather_rows: out = table[slots], -1 for pads: a prefill's top-k to rows of its staging buffer.

Bytes: 4 read, 4 gathered and 4 written a lookup.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _gather_rows_kernel(
    slots,  # [n] int32, negative: pad
    table,  # [num_slots] int32
    out,  # [n] int32
    n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # tokens x top-k is large
    slot = tl.load(slots + i, mask=i < n, other=-1)
    row = tl.load(table + slot, mask=slot >= 0, other=-1)
    tl.store(out + i, row, mask=i < n)


def gather_rows(slots: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """slots [...] int32 with -1 pads, table [num_slots] int32. Returns rows, shaped as slots.

    Raises: ValueError for other dtypes.
    """
    if slots.dtype != torch.int32 or table.dtype != torch.int32:
        raise ValueError(f"slots and table must be int32: got {slots.dtype} and {table.dtype}.")
    slots = slots.contiguous()
    out = torch.empty_like(slots)
    if n := slots.numel():
        _gather_rows_kernel[(triton.cdiv(n, BLOCK),)](slots, table, out, n, BLOCK=BLOCK)
    return out


def gather_rows_reference(slots: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The same in torch."""
    return torch.where(slots >= 0, table[slots.clamp(min=0).long()], -1)
