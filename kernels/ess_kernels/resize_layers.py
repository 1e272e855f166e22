"""resize_layers: move rows of an arena between layers, so that each layer has its new number.

    a layer that shrinks gives its free rows first, then the least recently used ones, evicted
    a layer that grows gets them as free rows

No row is copied: a row loses its slot before another layer can fill it. Addresses do not change,
and the numbers of rows are words on the device, so CUDA graphs captured before stay valid.

The host sets how many rows each layer has, so it knows these numbers; it never reads which rows
they are. After every list is rebuilt, a layer gives the first rows of

    free[NUM_FREE - 1], ..., free[0], order[0], order[1], ...

and the n-th row given is the n-th row taken. Four launches and those of the lists: the first ends
the tick, then `owned` is written from free and order, free and order from `owned`, then the words.

Bytes moved: about 24 per row of the arena.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ess_kernels import hot_state
from ess_kernels.hot_state import HotState
from ess_kernels.rebuild_order import OrderScratch, Owned, rebuild_order

BLOCK = 1024
ALL_ROWS = 2**31 - 1  # a need that no list meets, so the list is rebuilt

# Columns of resize_table's table.
FIRST = tl.constexpr(0)  # first entry of the layer's new part
COUNT = tl.constexpr(1)  # its new number of rows
GIVEN = tl.constexpr(2)  # rows that the layers before it give
TAKEN = tl.constexpr(3)  # rows that the layers before it take
COLUMNS = tl.constexpr(4)

TICK = tl.constexpr(hot_state.TICK)
NUM_FREE = tl.constexpr(hot_state.NUM_FREE)
VALID = tl.constexpr(hot_state.VALID)
CURSOR = tl.constexpr(hot_state.CURSOR)
LENGTH = tl.constexpr(hot_state.LENGTH)
START = tl.constexpr(hot_state.START)
ROWS = tl.constexpr(hot_state.ROWS)
NUM_WORDS = tl.constexpr(hot_state.NUM_WORDS)
FREE_STAMP = tl.constexpr(hot_state.FREE_STAMP)


@triton.jit
def _tick_kernel(words):
    """End each layer's tick, so that the lists contain the rows of a plan that did not end it."""
    tick = words + tl.program_id(0) * NUM_WORDS + TICK
    tl.store(tick, tl.load(tick) + 1)


@triton.jit
def _shares(words, table, layer):
    """Of one layer: (free rows that it keeps, rows that it takes, rows that it evicts)."""
    words += layer * NUM_WORDS
    more = tl.load(table + layer * COLUMNS + COUNT) - tl.load(words + ROWS)
    num_free = tl.load(words + NUM_FREE)
    gives = tl.maximum(-more, 0)
    kept = tl.maximum(num_free - gives, 0)
    return kept, tl.maximum(more, 0), gives - (num_free - kept)


@triton.jit
def _own_kernel(
    table,  # [layers, COLUMNS] int32
    slot_row,  # [layers, num_slots] int32
    row_slot,  # [rows] int32
    row_stamp,  # [rows] int32
    free,  # [rows] int32
    order,  # [rows] int32
    words,  # [layers, NUM_WORDS] int32
    owned,  # [rows] int32; written
    num_slots,
    layers,
    BLOCK: tl.constexpr,
):
    """Write each layer's new rows: free rows it keeps, rows it takes, then those of its list."""
    layer = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(table + layer * COLUMNS + COUNT)
    kept, takes, evicts = _shares(words, table, layer)
    start = tl.load(words + layer * NUM_WORDS + START)
    is_kept, is_taken = inside & (i < kept), inside & (i >= kept) & (i < kept + takes)
    is_listed = inside & (i >= kept + takes)

    # Find the layer that gives the n-th row taken.
    number = tl.load(table + layer * COLUMNS + TAKEN) + i - kept
    giver = tl.zeros([BLOCK], tl.int32)
    for other in range(0, layers):
        more = tl.load(table + other * COLUMNS + COUNT) - tl.load(words + other * NUM_WORDS + ROWS)
        giver += (number >= tl.load(table + other * COLUMNS + GIVEN) + tl.maximum(-more, 0)).to(
            tl.int32
        )
    turn = number - tl.load(table + giver * COLUMNS + GIVEN, mask=is_taken, other=0)
    its_words = words + giver * NUM_WORDS
    its_free = tl.load(its_words + NUM_FREE, mask=is_taken, other=0)
    its_start = tl.load(its_words + START, mask=is_taken, other=0)
    was_free = is_taken & (turn < its_free)
    was_hot = is_taken & (turn >= its_free)

    row = tl.load(free + start + i, mask=is_kept, other=0)
    listed = tl.load(order + start + evicts + i - kept - takes, mask=is_listed, other=0)
    row = tl.where(is_listed, listed, row)
    given = tl.load(free + its_start + its_free - 1 - turn, mask=was_free, other=0)
    row = tl.where(was_free, given, row)
    evicted = tl.load(order + its_start + turn - its_free, mask=was_hot, other=0)
    row = tl.where(was_hot, evicted, row)
    tl.store(owned + tl.load(table + layer * COLUMNS + FIRST) + i, row, mask=inside)

    slot = tl.load(row_slot + row, mask=was_hot, other=0)
    # int64: layers x slots exceeds 2^31
    tl.store(slot_row + giver.to(tl.int64) * num_slots + slot, -1, mask=was_hot)
    tl.store(row_slot + row, -1, mask=was_hot)
    tl.store(row_stamp + row, FREE_STAMP, mask=was_hot)


@triton.jit
def _list_kernel(
    table,  # [layers, COLUMNS] int32
    free,  # [rows] int32; written
    order,  # [rows] int32; written
    words,  # [layers, NUM_WORDS] int32
    owned,  # [rows] int32
    BLOCK: tl.constexpr,
):
    layer = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(table + layer * COLUMNS + COUNT)
    kept, takes, _ = _shares(words, table, layer)
    num_free = kept + takes
    start = tl.load(table + layer * COLUMNS + FIRST)
    row = tl.load(owned + start + i, mask=inside, other=0)
    tl.store(free + start + i, row, mask=inside & (i < num_free))
    tl.store(order + start + i - num_free, row, mask=inside & (i >= num_free))


@triton.jit
def _words_kernel(
    table,  # [layers, COLUMNS] int32
    words,  # [layers, NUM_WORDS] int32; written
):
    layer = tl.program_id(0)
    kept, takes, evicts = _shares(words, table, layer)
    words += layer * NUM_WORDS
    length = tl.load(words + LENGTH) - evicts
    tl.store(words + NUM_FREE, kept + takes)
    tl.store(words + CURSOR, 0)
    tl.store(words + LENGTH, length)
    tl.store(words + VALID, length)
    tl.store(words + START, tl.load(table + layer * COLUMNS + FIRST))
    tl.store(words + ROWS, tl.load(table + layer * COLUMNS + COUNT))


def resize_table(before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    """The table for resize_layers: [layers, COLUMNS] int32 on the host.

    before, after  the rows of each layer
    Raises: ValueError unless both have the same number of layers and of rows in total, with at
    least one row per layer.
    """
    if len(before) != len(after) or sum(before) != sum(after) or min(after) < 1:
        raise ValueError(
            "rows must be divided among the same layers, all of them and at least one each: got "
            f"{sum(before)} rows of {len(before)} layers to {sum(after)} of {len(after)}, at least "
            f"{min(after)}."
        )
    old, new = (torch.tensor(list(rows), dtype=torch.int64) for rows in (before, after))
    columns = (new, (old - new).clamp(min=0), (new - old).clamp(min=0))
    first, given, taken = (column.cumsum(0) - column for column in columns)
    return torch.stack([first, new, given, taken], 1).int()


def resize_layers(
    state: HotState, owned: Owned, scratch: OrderScratch, table: torch.Tensor, max_rows: int
) -> None:
    """Give each layer of an arena its new number of rows. Call it between steps.

    state, owned  of all layers
    table         resize_table's, on their device
    max_rows      rows of the largest layer after the change, at most those of the scratch
    Effect: asynchronous on the current stream; every layer's tick increases by one.
    Raises: ValueError for a layer larger than the scratch.
    """
    if max_rows > len(scratch.rank):
        raise ValueError(
            f"a layer must have at most {len(scratch.rank)} rows, those of the scratch: "
            f"got {max_rows}."
        )
    s, layers = state, len(state.words)
    _tick_kernel[(layers,)](s.words)
    for index in range(layers):
        rebuild_order(s.layer(index), ALL_ROWS, scratch, owned.layer(index))
    grid = (triton.cdiv(max_rows, BLOCK), layers)
    of_layer = s.layer(0)
    row_slot, row_stamp, free, order = (
        of_layer.row_slot, of_layer.row_stamp, of_layer.free, of_layer.order
    )  # fmt: skip
    _own_kernel[grid](
        table, s.slot_row, row_slot, row_stamp, free, order, s.words, owned.rows, s.num_slots,
        layers, BLOCK=BLOCK,
    )  # fmt: skip
    _list_kernel[grid](table, free, order, s.words, owned.rows, BLOCK=BLOCK)
    _words_kernel[(layers,)](table, s.words)
