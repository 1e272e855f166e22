"""invalidate: drop slots from the hot tier; their rows go to the free stack.

    for each slot s that has a row r:  slot_row[s] = -1, row_slot[r] = -1, r is free

Bytes moved per slot and layer: 4 to 8 of slots, 4 exchanged in the map, 16 written for a hot slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ess_kernels import hot_state
from ess_kernels.checks import check_tensor
from ess_kernels.hot_state import HotState

BLOCK = 256

BUILT = tl.constexpr(hot_state.BUILT)
NUM_FREE = tl.constexpr(hot_state.NUM_FREE)
VALID = tl.constexpr(hot_state.VALID)
START = tl.constexpr(hot_state.START)
NUM_WORDS = tl.constexpr(hot_state.NUM_WORDS)
FREE_STAMP = tl.constexpr(hot_state.FREE_STAMP)


@triton.jit
def _invalidate_kernel(
    slots,  # [n] int32 or int64; negative: skipped
    n,
    slot_row,  # [layers, num_slots] int32
    row_slot,  # [layers, rows] int32
    row_stamp,  # [layers, rows] int32
    free,  # [layers, rows] int32
    words,  # [layers, NUM_WORDS] int32
    num_slots,
    row_stride,  # entries from a layer's rows to those of the next layer; 0 in an arena
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(1).to(tl.int64)  # layers x slots exceeds 2^31
    slot_row += layer * num_slots
    row_slot += layer * row_stride
    row_stamp += layer * row_stride
    words += layer * NUM_WORDS
    free += layer * row_stride + tl.load(words + START)

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + i, mask=i < n, other=-1)
    # The exchange gives the row to one of several equal slots, which frees it.
    row = tl.atomic_xchg(slot_row + slot, -1, mask=slot >= 0, sem="relaxed")
    hot = (slot >= 0) & (row >= 0)
    count = tl.sum(hot.to(tl.int32), 0)
    if count > 0:
        stamp = tl.load(row_stamp + row, mask=hot, other=FREE_STAMP)
        listed = tl.sum((hot & (stamp <= tl.load(words + BUILT))).to(tl.int32), 0)
        tl.store(row_slot + row, -1, mask=hot)
        tl.store(row_stamp + row, FREE_STAMP, mask=hot)
        first = tl.atomic_add(words + NUM_FREE, count, sem="relaxed")
        tl.store(free + first + tl.cumsum(hot.to(tl.int32), 0) - 1, row, mask=hot)
        tl.atomic_add(words + VALID, -listed, sem="relaxed")


def invalidate(state: HotState, slots: torch.Tensor) -> None:
    """Drop slots from one layer's state, or from all layers' if the state holds all of them.

    slots  [n] int32 or int64; negative ones are skipped, a repeated one counts once
    Effect: asynchronous on the current stream.
    Raises: ValueError for another dtype or shape.
    """
    check_tensor("slots", slots, (torch.int32, torch.int64), (None,))
    if not len(slots):
        return
    layers, row_stride = 1, 0
    if state.slot_row.dim() == 2:
        layers, row_stride = len(state.slot_row), state.row_slot.stride(0)
    _invalidate_kernel[(triton.cdiv(len(slots), BLOCK), layers)](
        slots.contiguous(), len(slots), state.slot_row, state.row_slot, state.row_stamp,
        state.free, state.words, state.num_slots, row_stride, BLOCK=BLOCK,
    )  # fmt: skip


def invalidate_reference(state: HotState, slots: torch.Tensor) -> None:
    """The same for one layer on the host, slot by slot."""
    for slot in slots.tolist():
        if slot < 0 or (row := int(state.slot_row[slot])) < 0:
            continue
        if int(state.row_stamp[row]) <= int(state.words[hot_state.BUILT]):
            state.words[hot_state.VALID] -= 1
        state.slot_row[slot] = hot_state.NOT_HOT
        state.row_slot[row] = -1
        state.row_stamp[row] = hot_state.FREE_STAMP
        top = state.words[hot_state.START] + state.words[hot_state.NUM_FREE]
        state.free[int(top)] = row
        state.words[hot_state.NUM_FREE] += 1
