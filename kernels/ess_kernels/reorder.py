"""reorder: list the owned rows by last use, oldest first, when the list runs short.

    if NUM_FREE + VALID < need:  order = owned rows by age, VALID = LENGTH = their number

A counting sort by age in ticks; rows unused for MAX_AGE ticks or more count as equally old.
Off the critical path: between one plan of a layer and the next. Three launches that return at
once while the list is long enough, which the device decides. Bytes when it is not: per row
4 + 4 read and 4 written twice (stamps, ranks), 4 scattered.

With `need` = the most lookups and installs that come before the next reorder, no plan can run
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
FREE_STAMP = tl.constexpr(hot_state.FREE_STAMP)


@dataclass(frozen=True)
class ReorderScratch:
    """Shared by the layers, which reorder one after another.

    rank    [rows] int32  a row's rank among the rows of its age and program
    counts  [MAX_PROGRAMS, ages] int32  rows of a program and age; then where they go
    active  [1] int32  whether this reorder runs
    """

    rank: torch.Tensor
    counts: torch.Tensor
    active: torch.Tensor

    @classmethod
    def new(cls, num_rows: int, device, max_age: int = MAX_AGE) -> ReorderScratch:
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


@triton.jit
def _age(row_stamp, row, inside, tick, AGES: tl.constexpr):
    """(whether the list takes the row, its age counted from 0) of a block of rows."""
    stamp = tl.load(row_stamp + row, mask=inside, other=FREE_STAMP)
    return stamp < tick, tl.minimum(tl.maximum(tick - 1 - stamp, 0), AGES - 1)


@triton.jit
def _rank_kernel(
    row_stamp,  # [num_rows] int32
    words,  # [NUM_WORDS] int32
    rank,  # [num_rows] int32
    counts,  # [programs, AGES] int32
    num_rows,
    rows_per_program,
    need,
    AGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(words + NUM_FREE) + tl.load(words + VALID) >= need:
        return
    program = tl.program_id(0)
    counts += program * AGES
    tl.store(counts + tl.arange(0, AGES), tl.zeros([AGES], tl.int32))
    tl.debug_barrier()
    tick = tl.load(words + TICK)
    for first in range(0, rows_per_program, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = program * rows_per_program + i
        inside = (i < rows_per_program) & (row < num_rows)
        listed, age = _age(row_stamp, row, inside, tick, AGES)
        place = tl.atomic_add(counts + age, 1, mask=listed, sem="relaxed")
        tl.store(rank + row, place, mask=listed)


@triton.jit
def _offset_kernel(
    words,  # [NUM_WORDS] int32
    counts,  # [programs, AGES] int32
    active,  # [1] int32
    need,
    programs,
    AGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Counts to places: the oldest age first, within an age program by program."""
    short = tl.load(words + NUM_FREE) + tl.load(words + VALID) < need
    tl.store(active, short.to(tl.int32))
    if not short:
        return
    program = tl.arange(0, PROGRAMS)[:, None]
    total = 0
    for step in range(0, AGES, STEP):
        age = AGES - 1 - step - tl.arange(0, STEP)[None, :]
        at = counts + program * AGES + age
        count = tl.load(at, mask=program < programs, other=0)
        column = tl.sum(count, 0)
        before_age = tl.cumsum(column, 0) - column
        before_program = tl.cumsum(count, 0) - count
        tl.store(at, total + before_age[None, :] + before_program, mask=program < programs)
        total += tl.sum(column, 0)
    tl.store(words + BUILT, tl.load(words + TICK) - 1)
    tl.store(words + CURSOR, 0)
    tl.store(words + LENGTH, total)
    tl.store(words + VALID, total)


@triton.jit
def _list_kernel(
    row_stamp,  # [num_rows] int32
    order,  # [num_rows] int32
    words,  # [NUM_WORDS] int32
    rank,  # [num_rows] int32
    counts,  # [programs, AGES] int32
    active,  # [1] int32
    num_rows,
    rows_per_program,
    AGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(active) == 0:
        return
    program = tl.program_id(0)
    tick = tl.load(words + TICK)
    for first in range(0, rows_per_program, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = program * rows_per_program + i
        inside = (i < rows_per_program) & (row < num_rows)
        listed, age = _age(row_stamp, row, inside, tick, AGES)
        start = tl.load(counts + program * AGES + age, mask=listed, other=0)
        place = start + tl.load(rank + row, mask=listed, other=0)
        tl.store(order + place, row, mask=listed)


def reorder(state: HotState, need: int, scratch: ReorderScratch) -> None:
    """Make sure that the next `need` rows asked for can be had.

    After a plan that advanced, or before any: a tick in progress protects its rows.
    need: no more than the tier has rows, else the list is made anew every time
    """
    ages, rows = scratch.counts.shape[1], state.num_rows
    programs = min(MAX_PROGRAMS, triton.cdiv(rows, BLOCK))
    per_program = triton.cdiv(rows, programs)
    programs = triton.cdiv(rows, per_program)
    tile = triton.next_power_of_2(programs)
    s, c = state, scratch
    _rank_kernel[(programs,)](
        s.row_stamp, s.words, c.rank, c.counts, rows, per_program, need, AGES=ages, BLOCK=BLOCK
    )
    _offset_kernel[(1,)](
        s.words, c.counts, c.active, need, programs,
        AGES=ages, PROGRAMS=tile, STEP=min(ages, COUNTS_PER_STEP // tile),
    )  # fmt: skip
    _list_kernel[(programs,)](
        s.row_stamp, s.order, s.words, c.rank, c.counts, c.active, rows, per_program,
        AGES=ages, BLOCK=BLOCK,
    )  # fmt: skip
