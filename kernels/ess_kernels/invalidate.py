"""invalidate: drop slots from the hot tier; their rows are free.

    for each slot s that has a row r:  slot_row[s] = -1, row_slot[r] = -1, row_stamp[r] = FREE

Bytes moved per slot and group: 4 to 8 of slots, 4 exchanged in the map, 8 written for a hot slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ess_kernels import hot_state
from ess_kernels.checks import check_tensor
from ess_kernels.hot_state import HotState

BLOCK = 256

OCCUPIED = tl.constexpr(hot_state.OCCUPIED)
NUM_WORDS = tl.constexpr(hot_state.NUM_WORDS)
FREE = tl.constexpr(hot_state.FREE)


@triton.jit
def _invalidate_kernel(
    slots,  # [n] int32 or int64; negative: skipped
    n,
    slot_row,  # [groups, num_slots] int32
    row_slot,  # [groups, num_rows] int32
    row_stamp,  # [groups, num_rows] int32
    words,  # [groups, NUM_WORDS] int32
    num_slots,
    num_rows,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)  # groups x slots exceeds 2^31
    slot_row += group * num_slots
    row_slot += group * num_rows
    row_stamp += group * num_rows

    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + i, mask=i < n, other=-1)
    # The exchange gives the row to one of several equal slots, which frees it.
    row = tl.atomic_xchg(slot_row + slot, -1, mask=slot >= 0, sem="relaxed")
    hot = (slot >= 0) & (row >= 0)
    count = tl.sum(hot.to(tl.int32), 0)
    if count > 0:
        tl.store(row_slot + row, -1, mask=hot)
        tl.store(row_stamp + row, FREE, mask=hot)
        tl.atomic_add(words + group * NUM_WORDS + OCCUPIED, -count, sem="relaxed")


def invalidate(state: HotState, slots: torch.Tensor) -> None:
    """Drop slots from one group's state, or from all groups' if the state holds all of them.

    slots  [n] int32 or int64; negative ones are skipped, a repeated one counts once
    Effect: asynchronous on the current stream; one launch.
    Raises: ValueError for another dtype or shape.
    """
    check_tensor("slots", slots, (torch.int32, torch.int64), (None,))
    if not len(slots):
        return
    groups = len(state.slot_row) if state.slot_row.dim() == 2 else 1
    _invalidate_kernel[(triton.cdiv(len(slots), BLOCK), groups)](
        slots.contiguous(), len(slots), state.slot_row, state.row_slot, state.row_stamp,
        state.words, state.num_slots, state.num_rows, BLOCK=BLOCK,
    )  # fmt: skip


def invalidate_reference(state: HotState, slots: torch.Tensor) -> None:
    """The same for one group on the host, slot by slot."""
    for slot in slots.tolist():
        if slot < 0 or (row := int(state.slot_row[slot])) < 0:
            continue
        state.slot_row[slot] = hot_state.NOT_HOT
        state.row_slot[row] = -1
        state.row_stamp[row] = hot_state.FREE
        state.words[hot_state.OCCUPIED] -= 1
