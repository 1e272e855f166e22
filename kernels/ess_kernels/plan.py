"""plan: give every slot of a batch's top-k a hot row, and list the rows that must be fetched.

    rows[q, k] = the row of slot topk[q, k] if it is hot, else a free row, else the least recently
                 used row; -1 for a pad

It takes three launches. No row may be evicted before every hit of the batch is stamped, or a plan
could evict a slot of its own top-k. No duplicate can be answered before its slot has a row.

    look up   stamps the hits; the first lookup of a slot that is not hot claims the slot
    assign    gives each claim the next row of the free stack or of the LRU list
    resolve   reads the rows of claimed slots, and lists the rows that attention must read late

Atomics are relaxed: the end of a launch orders what one step writes and the next one reads. One
query needs no other program's result, so it takes one launch, with barriers between the steps.

The host reads nothing. The result depends on timing only in which of the victims serves which slot:
the first lookup of a slot is charged with its miss, and the victims are the oldest rows.

Bytes moved per lookup: 4 read, 4 gathered from the map, 8 of stamps, 4 written.

`plan` does not run out of rows while NUM_FREE + VALID >= lookups; `rebuild_order` sees to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ess_kernels import hot_state
from ess_kernels.hot_state import HotState

# A claim is CLAIM + the lookup's place: below NOT_HOT and every row, and the first lookup wins.
CLAIM = tl.constexpr(-(2**31))
PENDING = tl.constexpr(-2)
NEVER = tl.constexpr(hot_state.FREE_STAMP)

TICK = tl.constexpr(hot_state.TICK)
BUILT = tl.constexpr(hot_state.BUILT)
NUM_FREE = tl.constexpr(hot_state.NUM_FREE)
VALID = tl.constexpr(hot_state.VALID)
CURSOR = tl.constexpr(hot_state.CURSOR)
LENGTH = tl.constexpr(hot_state.LENGTH)
POPS = tl.constexpr(hot_state.POPS)
SPLIT = tl.constexpr(hot_state.SPLIT)
START = tl.constexpr(hot_state.START)

LOOKUPS = tl.constexpr(hot_state.LOOKUPS)
MISSES = tl.constexpr(hot_state.MISSES)
EVICTIONS = tl.constexpr(hot_state.EVICTIONS)
EVICTED_AGE = tl.constexpr(hot_state.EVICTED_AGE)
INSTALLS = tl.constexpr(hot_state.INSTALLS)
SKIPPED = tl.constexpr(hot_state.SKIPPED)
SHORT = tl.constexpr(hot_state.SHORT)

# How the counters count the lookups.
DECODE, INSTALL, WARM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

LOOKUPS_PER_WARP = 256  # 8 per thread, so a query of 2,048 is one program of 8 warps
MAX_WIDTH = 8192  # lookups of one program, at most
INSTALL_WIDTH = 256  # slots of one program of install


class InstallLimits(NamedTuple):
    """What install leaves alone.

    min_age     rows whose last use is fewer ticks ago
    first_slot  slots below it
    """

    min_age: int = 0
    first_slot: int = 0


NO_LIMITS = InstallLimits()


@dataclass(frozen=True)
class PlanBuffers:
    """The results of one plan, at addresses that do not change, so that CUDA graphs can hold them.

    rows          [queries, K] int32   hot rows in the order of top-k, -1 for a pad
    hit_rows      [queries, K] int32   rows that attention may read before the fetch ends: the first
    hit_lengths   [queries] int32      hit_lengths[q] of row q
    late_rows     [queries, K] int32   rows that it must read after the fetch: the first
    late_lengths  [queries] int32      late_lengths[q] of row q; all rows if words[SPLIT] is 0
    query_misses  [queries] int32      misses charged to each query
    miss_slots    [queries * K] int32  the first num_misses: host rows to fetch, each once
    miss_rows     [queries * K] int32  the hot rows that they go to
    num_misses    [1] int32
    """

    rows: torch.Tensor
    hit_rows: torch.Tensor
    hit_lengths: torch.Tensor
    late_rows: torch.Tensor
    late_lengths: torch.Tensor
    query_misses: torch.Tensor
    miss_slots: torch.Tensor
    miss_rows: torch.Tensor
    num_misses: torch.Tensor

    @classmethod
    def new(cls, queries: int, width: int, device: torch.device | str) -> PlanBuffers:
        """Buffers of a plan of `queries` x `width` lookups."""

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            rows=empty(queries, width),
            hit_rows=empty(queries, width),
            hit_lengths=empty(queries),
            late_rows=empty(queries, width),
            late_lengths=empty(queries),
            query_misses=empty(queries),
            miss_slots=empty(queries * width),
            miss_rows=empty(queries * width),
            num_misses=torch.zeros(1, dtype=torch.int32, device=device),
        )

    @staticmethod
    def bytes_for(queries: int, width: int) -> int:
        """Bytes of new(queries, width)."""
        return 4 * (5 * queries * width + 3 * queries + 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.bytes_for(*self.rows.shape)


@triton.jit
def _look_up(
    q, topk, total, width, rows, hit_rows, hit_lengths, query_misses, num_misses,
    slot_row, row_stamp, words, counters, first_slot,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Look up places [q * width, (q + 1) * width) of topk: stamp hits, claim other slots."""
    k = tl.arange(0, BLOCK)
    place = q * width + k
    inside = (k < width) & (place < total)
    slot = tl.load(topk + place, mask=inside, other=-1)
    real = slot >= first_slot
    # The value may be another program's claim, which is negative: no hit either.
    row = tl.load(slot_row + slot, mask=real, other=-1)
    hit = real & (row >= 0)
    miss = real & (row < 0)
    tl.atomic_min(slot_row + slot, place + CLAIM, mask=miss, sem="relaxed")

    tick = tl.load(words + TICK)
    built = tl.load(words + BUILT)
    stamp = tl.load(row_stamp + row, mask=hit, other=NEVER)
    listed = hit & (stamp <= built)
    before = tl.atomic_max(row_stamp + row, tick, mask=listed, sem="relaxed")
    gone = tl.sum((listed & (before <= built)).to(tl.int32), 0)
    tl.store(row_stamp + row, tick, mask=hit & (stamp > built))
    if gone > 0:
        tl.atomic_add(words + VALID, -gone, sem="relaxed")

    tl.store(rows + place, tl.where(hit, row, tl.where(miss, PENDING, -1)), mask=inside)
    if KIND == DECODE:
        early = hit & (tl.load(words + SPLIT) != 0)
        before_me = tl.cumsum(early.to(tl.int32), 0) - 1
        tl.store(hit_rows + q * width + before_me, row, mask=early)
        tl.store(hit_lengths + q, tl.sum(early.to(tl.int32), 0))
        tl.atomic_add(counters + LOOKUPS, tl.sum(real.to(tl.int64), 0), sem="relaxed")
    if KIND == INSTALL:
        tl.atomic_add(counters + INSTALLS, tl.sum(hit.to(tl.int64), 0), sem="relaxed")
    if KIND != INSTALL:
        tl.store(query_misses + q, 0)
    if q == 0:
        tl.store(num_misses, 0)


@triton.jit
def _assign(
    q, topk, total, width, rows, query_misses, miss_slots, miss_rows, num_misses,
    slot_row, row_slot, row_stamp, free, order, words, counters, min_age,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give a row to each slot that program q claimed, and list it as a miss."""
    k = tl.arange(0, BLOCK)
    place = q * width + k
    inside = (k < width) & (place < total)
    pending = tl.load(rows + place, mask=inside, other=-1) == PENDING
    slot = tl.load(topk + place, mask=pending, other=0)
    mine = pending & (tl.load(slot_row + slot, mask=pending, other=0) == place + CLAIM)

    tick = tl.load(words + TICK)
    built = tl.load(words + BUILT)
    num_free = tl.load(words + NUM_FREE)
    cursor = tl.load(words + CURSOR)
    length = tl.load(words + LENGTH)
    youngest = tl.minimum(built, tick - min_age)
    start = tl.load(words + START)
    free += start
    order += start

    row = tl.full([BLOCK], -1, tl.int32)
    age = tl.zeros([BLOCK], tl.int32)
    evicts = tl.zeros([BLOCK], tl.int32) > 0
    used = tl.zeros([BLOCK], tl.int32)  # valid entries of the list that were consumed
    need = mine
    wanted = tl.sum(need.to(tl.int32), 0)
    while wanted > 0:
        first = tl.atomic_add(words + POPS, wanted, sem="relaxed")
        turn = first + tl.cumsum(need.to(tl.int32), 0) - 1
        is_free = need & (turn < num_free)
        entry = cursor + turn - num_free
        is_listed = need & (turn >= num_free) & (entry < length)
        from_stack = tl.load(free + num_free - 1 - turn, mask=is_free, other=-1)
        candidate = tl.load(order + entry, mask=is_listed, other=-1)
        stamp = tl.load(row_stamp + candidate, mask=is_listed, other=NEVER)
        takes = is_listed & (stamp <= youngest)
        # A row used since the list was made: try the next entry. Younger than min_age, or the end
        # of the list: the slot gets no row.
        again = is_listed & (stamp > built)
        used += (is_listed & (stamp <= built)).to(tl.int32)
        row = tl.where(is_free, from_stack, tl.where(takes, candidate, row))
        age = tl.where(takes, tick - stamp, age)
        evicts = evicts | takes
        need = again
        wanted = tl.sum(need.to(tl.int32), 0)

    got = mine & (row >= 0)
    owner = tl.load(row_slot + row, mask=evicts, other=0)
    tl.store(slot_row + owner, -1, mask=evicts)
    tl.store(row_slot + row, slot.to(tl.int32), mask=got)
    tl.store(row_stamp + row, tick, mask=got)
    tl.store(slot_row + slot, row, mask=mine)  # -1 where it got none

    count = tl.sum(got.to(tl.int32), 0)
    if KIND != INSTALL:
        tl.store(query_misses + q, count)
    failed = tl.sum(mine.to(tl.int32), 0) - count
    if count > 0:
        listed = tl.atomic_add(num_misses, count, sem="relaxed")
        index = listed + tl.cumsum(got.to(tl.int32), 0) - 1
        tl.store(miss_slots + index, slot.to(tl.int32), mask=got)
        tl.store(miss_rows + index, row, mask=got)
        tl.atomic_add(words + VALID, -tl.sum(used, 0), sem="relaxed")
        tl.atomic_add(counters + EVICTIONS, tl.sum(evicts.to(tl.int64), 0), sem="relaxed")
        tl.atomic_add(counters + EVICTED_AGE, tl.sum(age.to(tl.int64), 0), sem="relaxed")
        if KIND == DECODE:
            tl.atomic_add(counters + MISSES, count.to(tl.int64), sem="relaxed")
        if KIND == INSTALL:
            tl.atomic_add(counters + INSTALLS, count.to(tl.int64), sem="relaxed")
    if failed > 0:
        if count == 0:
            tl.atomic_add(words + VALID, -tl.sum(used, 0), sem="relaxed")
        failures = counters + (SKIPPED if KIND == INSTALL else SHORT)
        tl.atomic_add(failures, failed.to(tl.int64), sem="relaxed")


@triton.jit
def _resolve(
    q, topk, total, width, rows, late_rows, late_lengths, slot_row, words,
    KIND: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the rows of program q's other lookups; program 0 updates the shared words."""
    k = tl.arange(0, BLOCK)
    place = q * width + k
    inside = (k < width) & (place < total)
    row = tl.load(rows + place, mask=inside, other=-1)
    pending = row == PENDING
    slot = tl.load(topk + place, mask=pending, other=0)
    row = tl.where(pending, tl.load(slot_row + slot, mask=pending, other=-1), row)
    tl.store(rows + place, row, mask=pending)
    if KIND == DECODE:
        late = (pending | (tl.load(words + SPLIT) == 0)) & (row >= 0)
        before_me = tl.cumsum(late.to(tl.int32), 0) - 1
        tl.store(late_rows + q * width + before_me, row, mask=late)
        tl.store(late_lengths + q, tl.sum(late.to(tl.int32), 0))
    if q == 0:
        pops = tl.load(words + POPS)
        num_free = tl.load(words + NUM_FREE)
        spent = tl.maximum(pops - num_free, 0)
        cursor = tl.minimum(tl.load(words + CURSOR) + spent, tl.load(words + LENGTH))
        tl.store(words + NUM_FREE, tl.maximum(num_free - pops, 0))
        tl.store(words + CURSOR, cursor)
        tl.store(words + POPS, 0)
        if ADVANCE:
            tl.store(words + TICK, tl.load(words + TICK) + 1)


@triton.jit
def _look_up_kernel(
    topk, total, width, rows, hit_rows, hit_lengths, query_misses, num_misses,
    slot_row, row_stamp, words, counters, first_slot,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _look_up(
        tl.program_id(0), topk, total, width, rows, hit_rows, hit_lengths, query_misses,
        num_misses, slot_row, row_stamp, words, counters, first_slot, KIND, BLOCK,
    )  # fmt: skip


@triton.jit
def _assign_kernel(
    topk, total, width, rows, query_misses, miss_slots, miss_rows, num_misses,
    slot_row, row_slot, row_stamp, free, order, words, counters, min_age,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _assign(
        tl.program_id(0), topk, total, width, rows, query_misses, miss_slots, miss_rows,
        num_misses, slot_row, row_slot, row_stamp, free, order, words, counters, min_age,
        KIND, BLOCK,
    )  # fmt: skip


@triton.jit
def _resolve_kernel(
    topk, total, width, rows, late_rows, late_lengths, slot_row, words,
    KIND: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _resolve(
        tl.program_id(0), topk, total, width, rows, late_rows, late_lengths, slot_row,
        words, KIND, ADVANCE, BLOCK,
    )  # fmt: skip


@triton.jit
def _single_kernel(
    topk, total, width, rows, hit_rows, hit_lengths, late_rows, late_lengths, query_misses,
    miss_slots, miss_rows, num_misses,
    slot_row, row_slot, row_stamp, free, order, words, counters, min_age, first_slot,
    KIND: tl.constexpr, ADVANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All three steps in one program; the barriers order its threads' global accesses."""
    _look_up(
        0, topk, total, width, rows, hit_rows, hit_lengths, query_misses, num_misses,
        slot_row, row_stamp, words, counters, first_slot, KIND, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    _assign(
        0, topk, total, width, rows, query_misses, miss_slots, miss_rows, num_misses,
        slot_row, row_slot, row_stamp, free, order, words, counters, min_age, KIND, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    _resolve(
        0, topk, total, width, rows, late_rows, late_lengths, slot_row, words,
        KIND, ADVANCE, BLOCK,
    )  # fmt: skip


def run_plan(
    state: HotState,
    slots: torch.Tensor,
    width: int,
    buffers: PlanBuffers,
    kind: int,
    advance: bool,
    limits: InstallLimits = NO_LIMITS,
) -> None:
    """The three steps over all of `slots`, contiguous, with `width` of them per program."""
    total, (min_age, first_slot) = slots.numel(), limits
    b, programs, block = buffers, triton.cdiv(total, width), triton.next_power_of_2(width)
    options = {"BLOCK": block, "num_warps": min(8, max(1, block // LOOKUPS_PER_WARP))}
    s, looks = state, options | {"KIND": kind}
    if programs == 1:
        _single_kernel[(1,)](
            slots, total, width, b.rows, b.hit_rows, b.hit_lengths, b.late_rows,
            b.late_lengths, b.query_misses, b.miss_slots, b.miss_rows, b.num_misses,
            s.slot_row, s.row_slot, s.row_stamp, s.free, s.order, s.words, s.counters, min_age,
            first_slot, ADVANCE=advance, **looks,
        )  # fmt: skip
        return
    grid = (programs,)
    _look_up_kernel[grid](
        slots, total, width, b.rows, b.hit_rows, b.hit_lengths, b.query_misses, b.num_misses,
        s.slot_row, s.row_stamp, s.words, s.counters, first_slot, **looks,
    )  # fmt: skip
    _assign_kernel[grid](
        slots, total, width, b.rows, b.query_misses, b.miss_slots, b.miss_rows, b.num_misses,
        s.slot_row, s.row_slot, s.row_stamp, s.free, s.order, s.words, s.counters, min_age,
        KIND=kind, **options,
    )  # fmt: skip
    _resolve_kernel[grid](
        slots, total, width, b.rows, b.late_rows, b.late_lengths, s.slot_row, s.words,
        ADVANCE=advance, **looks,
    )  # fmt: skip


def plan(
    state: HotState,
    topk: torch.Tensor,
    buffers: PlanBuffers,
    advance: bool = True,
    kind: int = DECODE.value,
) -> None:
    """Write the hot rows for topk [queries, K] int32 slots, -1 pads, to buffers of that shape.

    advance  end the tick, so that the next plan may evict what this one used. Overlap mode DBA
             plans a batch in halves and ends the tick with the second one.
    kind     DECODE, or WARM for lookups that the counters leave out
    Effect: asynchronous on the current stream.
    Raises: ValueError for a wrong dtype or shape, or for more lookups than the tier has rows.
    """
    if topk.dtype != torch.int32 or topk.dim() != 2 or not topk.is_contiguous():
        raise ValueError(
            "topk must be contiguous int32 [queries, K]: got "
            f"{topk.dtype} {tuple(topk.shape)}, strides {topk.stride()}."
        )
    if topk.shape != buffers.rows.shape:
        raise ValueError(
            f"plan buffers must be {tuple(topk.shape)}: got {tuple(buffers.rows.shape)}."
        )
    if topk.shape[1] > MAX_WIDTH or topk.numel() > state.num_rows:
        raise ValueError(
            f"a plan must have at most {MAX_WIDTH} columns and {state.num_rows} lookups, one per "
            f"hot row: got {tuple(topk.shape)}. Plan the batch in blocks."
        )
    run_plan(state, topk, topk.shape[1], buffers, kind, advance)


def plan_reference(
    state: HotState,
    slots: torch.Tensor,
    advance: bool = True,
    min_age: int = 0,
    first_slot: int = 0,
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """plan or install for one layer on the host, lookup by lookup.

    Returns (rows in the shape of slots; the (slot, row) pairs of the misses, by first lookup).
    Effect: changes the state as plan does, except for the counters.
    """
    words, tick = state.words, int(state.words[hot_state.TICK])
    built = int(words[hot_state.BUILT])
    lookups = slots.flatten().tolist()
    missing: list[int] = []
    for slot in dict.fromkeys(slot for slot in lookups if slot >= first_slot):
        row = int(state.slot_row[slot])
        if row < 0:
            missing.append(slot)
            continue
        words[hot_state.VALID] -= int(state.row_stamp[row] <= built)
        state.row_stamp[row] = tick
    pairs = []
    for slot in missing:
        taken = _next_row(state, tick, min_age)
        if taken is None:
            continue
        row = taken
        owner = int(state.row_slot[row])
        if owner >= 0:
            state.slot_row[owner] = hot_state.NOT_HOT
        state.row_slot[row], state.slot_row[slot], state.row_stamp[row] = slot, row, tick
        pairs.append((slot, row))
    words[hot_state.TICK] += int(advance)
    rows = [int(state.slot_row[slot]) if slot >= first_slot else -1 for slot in lookups]
    return torch.tensor(rows, dtype=torch.int32).view(slots.shape), pairs


def _next_row(state: HotState, tick: int, min_age: int) -> int | None:
    """Take the next free row, else the least recently used one; None if that is too young."""
    words, start = state.words, int(state.words[hot_state.START])
    if words[hot_state.NUM_FREE] > 0:
        words[hot_state.NUM_FREE] -= 1
        return int(state.free[start + words[hot_state.NUM_FREE]])
    built = int(words[hot_state.BUILT])
    while words[hot_state.CURSOR] < words[hot_state.LENGTH]:
        row = int(state.order[start + words[hot_state.CURSOR]])
        words[hot_state.CURSOR] += 1
        if int(state.row_stamp[row]) <= built:
            words[hot_state.VALID] -= 1
            return row if int(state.row_stamp[row]) <= tick - min_age else None
    return None
