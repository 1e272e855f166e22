"""rebuild_order: list a layer's used rows by last use, oldest first, when the list runs short.

    if NUM_FREE + VALID < need:  order = used rows by age, VALID = LENGTH = their number
    if TICK > EPOCH_TICKS:       the same, and subtract EPOCH_TICKS from TICK and the rows' stamps

It is a counting sort by age in ticks. Rows unused for MAX_AGE ticks or more count as equally old.
It runs between two plans of a layer, in three launches. The device decides: the launches return at
once while the list is long enough.

Bytes moved by a rebuild, per row: 8 read and 4 written, twice (stamps and ranks), and 4 scattered;
in an arena, 8 more read to find the layer's rows.

With `need` = the most lookups and installs before the next call, no plan runs out of rows, because
each lookup takes at most one row: it hits a row of the list or pops one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ess_kernels import hot_state
from ess_kernels.hot_state import HotState

MAX_AGE = 1024  # distinct ages; a hot tier of 6.5 K rows per request turns over in ~35 steps
MAX_PROGRAMS = 64  # few, so that one program can sum their counts
BLOCK = 1024
COUNTS_PER_STEP = 4096  # counts that _offset_kernel sums at once: 32 per thread

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

OWNED_ROW_BYTES = 4  # bytes of Owned per hot row
OWNED_LAYER_BYTES = 4 * MAX_AGE  # and per layer


@dataclass(frozen=True)
class OrderScratch:
    """Memory that the layers share, because they rebuild their lists one after another.

    rank    [rows of the largest layer] int32  rank of a row among its program's rows of its age
    counts  [MAX_PROGRAMS, ages] int32  rows of each program and age; then their first entries
    active  [1] int32  0 if this call does nothing, else 1 + the ticks that it subtracts
    """

    rank: torch.Tensor
    counts: torch.Tensor
    active: torch.Tensor

    @classmethod
    def new(cls, num_rows: int, device: torch.device | str, max_age: int = MAX_AGE) -> OrderScratch:
        """For layers of at most num_rows rows. Raises: ValueError unless max_age is 2^n."""
        if max_age < 1 or max_age & (max_age - 1):
            raise ValueError(f"max_age must be a power of two: got {max_age}.")

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(empty(num_rows), empty(MAX_PROGRAMS, max_age), empty(1))

    @staticmethod
    def bytes_for(num_rows: int, max_age: int = MAX_AGE) -> int:
        """Bytes of new(num_rows, max_age)."""
        return 4 * (num_rows + MAX_PROGRAMS * max_age + 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.rank.nbytes + self.counts.nbytes + self.active.nbytes)


@dataclass(frozen=True)
class Owned:
    """The rows of an arena by layer, and their ages; for all layers, or for one.

    rows  [rows] int32  the rows of all layers; a layer's part has words[ROWS] entries from
          words[START] on
    ages  [layers, ages] int32  rows of each age in ticks when the layer's list was made last, with
          all older rows in the last entry; -1 before the first list. The miss curve of the layer
          is computed from it (sglang_ess/tiers/balance/row_ages.py)
    """

    rows: torch.Tensor
    ages: torch.Tensor

    @classmethod
    def new(
        cls, layers: int, num_rows: int, device: torch.device | str, max_age: int = MAX_AGE
    ) -> Owned:
        """Layer i has num_rows rows from i * num_rows on, as after HotState.new."""
        rows = torch.arange(layers * num_rows, dtype=torch.int32, device=device)
        return cls(rows, torch.full((layers, max_age), -1, dtype=torch.int32, device=device))

    def layer(self, index: int) -> Owned:
        """The part of one layer: the same rows tensor, ages [ages]."""
        return Owned(self.rows, self.ages[index])

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.rows.nbytes + self.ages.nbytes)


@triton.jit
def _runs(words, need):
    """Whether this call does something: the list is short, or an epoch ends."""
    short = tl.load(words + NUM_FREE) + tl.load(words + VALID) < need
    return short | (tl.load(words + TICK) > EPOCH_TICKS)


@triton.jit
def _rows_by_age(
    owned, row_stamp, words, first, share, ticks_off, AGES: tl.constexpr, BLOCK: tl.constexpr,
    IN_ARENA: tl.constexpr,
):  # fmt: skip
    """A block of this program's share of the layer's rows.

    Returns (places among the layer's rows, row numbers, whether the list takes them, ages from 0,
    stamps after ticks_off is subtracted, whether the place is one of the layer's rows).
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
    """Turn counts into first entries: the oldest age first, within an age program by program."""
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
    """Make sure that the next plans and installs can take `need` rows.

    Call it after a plan that ended its tick, or before any plan: the list leaves out the rows of a
    tick in progress.
    need     if it is more than the tier has rows, every call rebuilds the list
    scratch  for at least the rows of the layer
    owned    the layer's part, if the layer has rows of an arena
    Effect: asynchronous on the current stream; three launches.
    """
    ages, in_arena = scratch.counts.shape[1], owned is not None
    rows = len(scratch.rank) if in_arena else state.num_rows
    programs = min(MAX_PROGRAMS, triton.cdiv(rows, BLOCK))
    tile = triton.next_power_of_2(programs)
    s, c = state, scratch
    # Without an arena the kernels do not read these two.
    own, seen = (s.order, c.counts) if owned is None else (owned.rows, owned.ages)
    options = {"AGES": ages, "BLOCK": BLOCK, "IN_ARENA": in_arena}
    grid = (programs,)
    _rank_kernel[grid](own, s.row_stamp, s.words, c.rank, c.counts, need, **options)
    _offset_kernel[(1,)](
        s.words, c.counts, c.active, seen, need, programs,
        AGES=ages, PROGRAMS=tile, STEP=min(ages, COUNTS_PER_STEP // tile), IN_ARENA=in_arena,
    )  # fmt: skip
    _list_kernel[grid](own, s.row_stamp, s.order, s.words, c.rank, c.counts, c.active, **options)


def rebuild_order_reference(
    state: HotState, need: int, owned: Owned | None = None, max_age: int = MAX_AGE
) -> None:
    """The same for one layer on the host. The kernels may order rows of equal age otherwise."""
    words = state.words
    tick, start, count = (int(words[i]) for i in (hot_state.TICK, hot_state.START, hot_state.ROWS))
    ends = tick > hot_state.EPOCH_TICKS
    if int(words[hot_state.NUM_FREE] + words[hot_state.VALID]) >= need and not ends:
        return
    rows = torch.arange(count) if owned is None else owned.rows[start : start + count].long()
    rows = rows[state.row_stamp[rows] != hot_state.FREE_STAMP]
    if ends:
        tick -= hot_state.EPOCH_TICKS
        stamps = state.row_stamp[rows] - hot_state.EPOCH_TICKS
        state.row_stamp[rows] = stamps.clamp(min=hot_state.OLDEST_STAMP)
    rows = rows[state.row_stamp[rows] < tick]
    ages = (tick - 1 - state.row_stamp[rows].long()).clamp(max=max_age - 1)
    state.order[start : start + len(rows)] = rows[(-ages).argsort(stable=True)].int()
    if owned is not None:
        owned.ages.copy_(ages.bincount(minlength=max_age))
    words[hot_state.TICK], words[hot_state.BUILT] = tick, tick - 1
    words[hot_state.EPOCH] += int(ends)
    words[hot_state.CURSOR] = 0
    words[hot_state.LENGTH] = words[hot_state.VALID] = len(rows)
