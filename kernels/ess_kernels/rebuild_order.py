"""rebuild_order: list the owned rows by last use, oldest first, when the list runs short.

    if NUM_FREE + VALID < need:  order = owned rows by age, VALID = LENGTH = their number
    if TICK > EPOCH_TICKS:       the same, and TICK and the rows' stamps less EPOCH_TICKS

A counting sort by age in ticks; rows unused for MAX_AGE ticks or more count as equally old.
Off the critical path: between one plan of a layer and the next. Three launches that return at
once while the list is long enough, which the device decides. Bytes when it is not: per row
4 + 4 read and 4 written twice (stamps, ranks), 4 scattered; 8 more read in an arena, whose layers
look up which rows are theirs.

With `need` = the most lookups and installs that come before the next call, no plan can run
out of rows: each lookup takes at most one row, by hitting one of the list or by popping it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ess_kernels import hot_state
from ess_kernels.hot_state import HotState

MAX_AGE = 1024  # ages told apart; a hot tier of 6.5 K rows a request turns over in ~35 steps
MAX_PROGRAMS = 64  # few, so that one program can add up their counts
BLOCK = 1024
COUNTS_PER_STEP = 4096  # of _offset_kernel: 32 a thread

TICK = tl.constexpr(hot_state.TICK)
BUILT = tl.constexpr(hot_state.BUILT)
NUM_FREE = tl.constexpr(hot_state.NUM_FREE)
VALID = tl.constexpr(hot_state.VALID)
CURSOR = tl.constexpr(hot_state.CURSOR)
LENGTH = tl.constexpr(hot_state.LENGTH)
START = tl.constexpr(hot_state.START)
ROWS = tl.constexpr(hot_state.ROWS)
FREE_STAMP = tl.constexpr(hot_state.FREE_STAMP)
EPOCH = tl.constexpr(hot_state.EPOCH)
EPOCH_TICKS = tl.constexpr(hot_state.EPOCH_TICKS)
OLDEST_STAMP = tl.constexpr(hot_state.OLDEST_STAMP)

OWNED_ROW_BYTES = 4  # Owned's, of a hot row
OWNED_LAYER_BYTES = 4 * MAX_AGE


@dataclass(frozen=True)
class OrderScratch:
    """Shared by the layers, which rebuild their lists one after another.

    rank    [rows] int32  a row's rank among the rows of its age and program; of the largest layer
    counts  [MAX_PROGRAMS, ages] int32  rows of a program and age; then where they go
    active  [1] int32  0 where this call does nothing; else 1 and the ticks it takes off
    """

    rank: torch.Tensor
    counts: torch.Tensor
    active: torch.Tensor

    @classmethod
    def new(cls, num_rows: int, device, max_age: int = MAX_AGE) -> OrderScratch:
        if max_age < 1 or max_age & (max_age - 1):
            raise ValueError(f"max_age must be a power of two: got {max_age}.")

        def empty(*shape):
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(empty(num_rows), empty(MAX_PROGRAMS, max_age), empty(1))

    @staticmethod
    def bytes_for(num_rows: int, max_age: int = MAX_AGE) -> int:
        return 4 * (num_rows + MAX_PROGRAMS * max_age + 1)

    @property
    def nbytes(self) -> int:
        return self.rank.nbytes + self.counts.nbytes + self.active.nbytes


@dataclass(frozen=True)
class Owned:
    """Which rows of an arena are whose, and how old they are; of all layers, or of one.

    rows  [rows] int32  every layer's rows, its own from words[START] on; one tensor for all
    ages  [layers, ages] int32  rows of each age in ticks when the layer's list was made last, the
          oldest together; -1 before. What a hot tier of another size would miss shows in it
    """

    rows: torch.Tensor
    ages: torch.Tensor

    @classmethod
    def new(cls, layers: int, num_rows: int, device, max_age: int = MAX_AGE) -> Owned:
        """Layer i's rows are the num_rows from i * num_rows on, as HotState.new has them."""
        rows = torch.arange(layers * num_rows, dtype=torch.int32, device=device)
        return cls(rows, torch.full((layers, max_age), -1, dtype=torch.int32, device=device))

    def layer(self, index: int) -> Owned:
        return Owned(self.rows, self.ages[index])

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.ages.nbytes


@triton.jit
def _runs(words, need):
    """Whether the list is short, or an epoch ends."""
    short = tl.load(words + NUM_FREE) + tl.load(words + VALID) < need
    return short | (tl.load(words + TICK) > EPOCH_TICKS)


@triton.jit
def _rows_by_age(
    owned, row_stamp, words, first, share, ticks_off, AGES: tl.constexpr, BLOCK: tl.constexpr,
    IN_ARENA: tl.constexpr,
):  # fmt: skip
    """A block of a program's share of the layer's rows: (which of them, numbers, whether the list
    takes them, ages counted from 0, stamps less ticks_off, whether they are rows of the layer).
    """
    i = first + tl.arange(0, BLOCK)
    place = tl.program_id(0) * share + i
    inside = (i < share) & (place < tl.load(words + ROWS))
    row = place
    if IN_ARENA:
        row = tl.load(owned + tl.load(words + START) + place, mask=inside, other=0)
    tick = tl.load(words + TICK)
    stamp = tl.load(row_stamp + row, mask=inside, other=FREE_STAMP)
    stamp = tl.where(stamp == FREE_STAMP, stamp, tl.maximum(stamp - ticks_off, OLDEST_STAMP))
    age = tl.minimum(tl.maximum(tick - 1 - stamp, 0), AGES - 1)
    return place, row, stamp < tick, age, stamp, inside


@triton.jit
def _rank_kernel(
    owned,  # [arena rows] int32
    row_stamp,  # [rows] int32
    words,  # [NUM_WORDS] int32
    rank,  # [rows of the largest layer] int32
    counts,  # [programs, AGES] int32
    need,
    AGES: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_ARENA: tl.constexpr,
):
    if not _runs(words, need):
        return
    counts += tl.program_id(0) * AGES
    tl.store(counts + tl.arange(0, AGES), tl.zeros([AGES], tl.int32))
    tl.debug_barrier()
    share = tl.cdiv(tl.load(words + ROWS), tl.num_programs(0))
    for first in range(0, share, BLOCK):
        place, row, listed, age, stamp, inside = _rows_by_age(
            owned, row_stamp, words, first, share, 0, AGES, BLOCK, IN_ARENA
        )
        before = tl.atomic_add(counts + age, 1, mask=listed, sem="relaxed")
        tl.store(rank + place, before, mask=listed)


@triton.jit
def _offset_kernel(
    words,  # [NUM_WORDS] int32
    counts,  # [programs, AGES] int32
    active,  # [1] int32
    ages,  # [AGES] int32
    need,
    programs,
    AGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STEP: tl.constexpr,
    IN_ARENA: tl.constexpr,
):
    """Counts to places: the oldest age first, within an age program by program."""
    runs = _runs(words, need)
    tick = tl.load(words + TICK)
    ends = tick > EPOCH_TICKS
    ticks_off = tl.where(ends, EPOCH_TICKS, 0)
    tl.store(active, tl.where(runs, 1 + ticks_off, 0))
    if not runs:
        return
    program = tl.arange(0, PROGRAMS)[:, None]
    total = 0
    for step in range(0, AGES, STEP):
        age = AGES - 1 - step - tl.arange(0, STEP)[None, :]
        at = counts + program * AGES + age
        count = tl.load(at, mask=program < programs, other=0)
        column = tl.sum(count, 0)
        if IN_ARENA:
            tl.store(ages + AGES - 1 - step - tl.arange(0, STEP), column)
        before_age = tl.cumsum(column, 0) - column
        before_program = tl.cumsum(count, 0) - count
        tl.store(at, total + before_age[None, :] + before_program, mask=program < programs)
        total += tl.sum(column, 0)
    tl.store(words + TICK, tick - ticks_off)
    tl.store(words + BUILT, tick - ticks_off - 1)
    tl.store(words + EPOCH, tl.load(words + EPOCH) + ends.to(tl.int32))
    tl.store(words + CURSOR, 0)
    tl.store(words + LENGTH, total)
    tl.store(words + VALID, total)


@triton.jit
def _list_kernel(
    owned,  # [arena rows] int32
    row_stamp,  # [rows] int32; written where an epoch ends
    order,  # [rows] int32
    words,  # [NUM_WORDS] int32
    rank,  # [rows of the largest layer] int32
    counts,  # [programs, AGES] int32
    active,  # [1] int32
    AGES: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_ARENA: tl.constexpr,
):
    ticks_off = tl.load(active) - 1
    if ticks_off < 0:
        return
    counts += tl.program_id(0) * AGES
    order += tl.load(words + START)
    share = tl.cdiv(tl.load(words + ROWS), tl.num_programs(0))
    for first in range(0, share, BLOCK):
        place, row, listed, age, stamp, inside = _rows_by_age(
            owned, row_stamp, words, first, share, ticks_off, AGES, BLOCK, IN_ARENA
        )
        tl.store(row_stamp + row, stamp, mask=inside & (ticks_off > 0))
        begin = tl.load(counts + age, mask=listed, other=0)
        entry = begin + tl.load(rank + place, mask=listed, other=0)
        tl.store(order + entry, row, mask=listed)


def rebuild_order(
    state: HotState, need: int, scratch: OrderScratch, owned: Owned | None = None
) -> None:
    """Make sure that the next `need` rows asked for can be had.

    After a plan that advanced, or before any: a tick in progress protects its rows.
    need: no more than the tier has rows, else the list is made anew every time
    owned: the layer's, where it has rows of an arena
    """
    ages, in_arena = scratch.counts.shape[1], owned is not None
    rows = len(scratch.rank) if in_arena else state.num_rows
    programs = min(MAX_PROGRAMS, triton.cdiv(rows, BLOCK))
    tile = triton.next_power_of_2(programs)
    s, c = state, scratch
    own, seen = (owned.rows, owned.ages) if in_arena else (s.order, c.counts)
    options = {"AGES": ages, "BLOCK": BLOCK, "IN_ARENA": in_arena}
    grid = (programs,)
    _rank_kernel[grid](own, s.row_stamp, s.words, c.rank, c.counts, need, **options)
    _offset_kernel[(1,)](
        s.words, c.counts, c.active, seen, need, programs,
        AGES=ages, PROGRAMS=tile, STEP=min(ages, COUNTS_PER_STEP // tile), IN_ARENA=in_arena,
    )  # fmt: skip
    _list_kernel[grid](own, s.row_stamp, s.order, s.words, c.rank, c.counts, c.active, **options)
