"""plan_fetch, fetch and install, each call checked against what its result must be.

The clock hand may take any eligible row, and several blocks race for them, so there is no one right
result. What must hold is written down here from hot_state.py and plan_fetch.py, in torch, on copies
of the state before and after.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from ess_kernels import hot_state, plan_fetch
from ess_kernels.hot_state import FREE, MAX_AGE_LIMIT, TICK_MASK, HotState
from ess_kernels.plan_fetch import PlanBuffers
from tests.support.hot_state import check_state

POISON = -77
NEVER = 2**40  # the age of a free row


def age(tick: int, stamps: torch.Tensor) -> torch.Tensor:
    """Ages [n] int64 of rows with these stamps."""
    return torch.where(stamps == FREE, NEVER, (tick - stamps.long()) & TICK_MASK)


def limits_after(limit: int) -> set[int]:
    """What a step may make of the age limit: the same, an eighth more, or eighths less."""
    found = {limit, min(limit + max(2, limit // 8), MAX_AGE_LIMIT)}
    while limit > 0:
        limit -= max(1, limit // 8)
        found.add(limit)
    return found


@dataclass
class Taken:
    """Rows that an operation gave to slots, and what it cost their owners."""

    slots: torch.Tensor  # [n] int64
    rows: torch.Tensor  # [n] int64
    ages: torch.Tensor  # [n] int64 before, NEVER of free ones
    evicted: torch.Tensor  # [m] int64, the slots that lost theirs

    @classmethod
    def of(cls, before: HotState, slots: torch.Tensor, rows: torch.Tensor) -> Taken:
        tick = int(before.words[hot_state.TICK])
        owners = before.row_slot[rows].long()
        return cls(slots, rows, age(tick, before.row_stamp[rows]), owners[owners >= 0])

    @property
    def owned_ages(self) -> torch.Tensor:
        return self.ages[self.ages != NEVER]


def check_taken(before, after, taken: Taken, used: torch.Tensor, use_age: int, min_age: int):
    """The maps and stamps after an operation that used hot rows `used` and took others.

    use_age: the age of what it uses. 0: it finds rows for all, by the common age limit
    """
    tick = int(before.words[hot_state.TICK])
    stamp = (tick - use_age) & TICK_MASK
    assert len(taken.slots.unique()) == len(taken.slots), "a slot got two rows"
    assert len(taken.rows.unique()) == len(taken.rows), "two slots got one row"
    slot_row, row_slot, row_stamp = (
        getattr(before, name).clone() for name in ("slot_row", "row_slot", "row_stamp")
    )
    slot_row[taken.evicted] = hot_state.NOT_HOT
    slot_row[taken.slots] = taken.rows.int()
    row_slot[taken.rows] = taken.slots.int()
    older = used[age(tick, row_stamp[used]) > use_age]
    row_stamp[older] = row_stamp[taken.rows] = stamp
    assert torch.equal(after.slot_row, slot_row)
    assert torch.equal(after.row_slot, row_slot)
    assert torch.equal(after.row_stamp, row_stamp)
    assert (taken.ages >= max(min_age, use_age + 1)).all(), "a row in use was taken"
    limit, limit_after = (int(s.words[hot_state.AGE_LIMIT]) for s in (before, after))
    if use_age == 0:
        assert limit_after in limits_after(limit)
        assert (taken.owned_ages > min(limit, limit_after)).all(), "a young row was taken"
    else:
        assert limit_after == limit


def check_counters(before, after, expected: dict[str, int]) -> None:
    """expected: by how much counters have grown, the others not at all; the hand moved by scans."""
    grown = dict(zip(hot_state.COUNTERS, (after.counters - before.counters).tolist(), strict=True))
    scans = grown.pop("scans")
    assert grown == dict.fromkeys(grown, 0) | expected
    hand, hand_after = (int(s.words[hot_state.HAND]) for s in (before, after))
    assert hand_after == (hand + scans) % before.num_rows
    assert scans >= expected.get("evictions", 0)
    check_state(after)


def poisoned(queries: int, width: int, device: torch.device | str) -> PlanBuffers:
    buffers = PlanBuffers.new(queries, width, device)
    for field in fields(buffers):
        getattr(buffers, field.name).fill_(POISON)
    return buffers


def rows_before_hand(flags: torch.Tensor, rows: torch.Tensor) -> list[list[int]]:
    """Flagged rows of each query, in the order of its top-k."""
    return [row[flag].tolist() for flag, row in zip(flags, rows, strict=True)]


def listed(rows: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(rows.cpu(), lengths.tolist(), strict=True)]


class Tier:
    """Hot tiers of `groups` index groups of one layer each, with rows to copy."""

    def __init__(self, device, num_slots, num_rows, groups=1, row_bytes=48):
        self.states = HotState.new(groups, num_slots, num_rows, device)
        self.state = self.states.group(0)
        generator = torch.Generator().manual_seed(num_slots)
        host, hot = (
            torch.randint(0, 256, (n, row_bytes), dtype=torch.uint8, generator=generator)
            for n in (num_slots, num_rows)
        )
        self.host = host.pin_memory() if torch.device(device).type == "cuda" else host
        self.hot = hot.to(device)
        self.device = device

    def plan(
        self, topk, *, lists=False, advance=True, warm=False, copy=True, max_blocks=2,
        step_pass=(0, 1),
    ):  # fmt: skip
        """plan_fetch of topk [queries, K] int32 on the host, checked. Returns its buffers."""
        before, hot = self.state.cpu(), self.hot.cpu().clone()
        buffers = poisoned(*topk.shape, self.device)
        rows = (self.host, self.hot) if copy else (None, None)
        plan_fetch.plan_fetch(
            self.state, topk.to(self.device), buffers, *rows,
            lists=lists, advance=advance, warm=warm, max_blocks=max_blocks, step_pass=step_pass,
        )  # fmt: skip
        after = self.state.cpu()
        taken = self._check_plan(before, after, topk, buffers, warm)
        self._check_lists(before, after, topk, buffers, lists)
        tick = int(before.words[hot_state.TICK])
        assert int(after.words[hot_state.TICK]) == (tick + advance) & TICK_MASK
        number, passes = step_pass
        ages = int((taken.owned_ages // passes).sum())
        expected = {"evictions": len(taken.evicted), "evicted_age": ages}
        if advance:
            expected["steps"] = int(number == passes - 1)
        if warm:
            missed = (before.slot_row[topk[topk >= 0].long().unique()] < 0).sum()
            expected["skipped"] = int(missed) - len(taken.slots)
        else:
            expected |= {"lookups": int((topk >= 0).sum()), "misses": len(taken.slots)}
        check_counters(before, after, expected)
        if copy:
            hot[taken.rows] = self.host[taken.slots.to(self.host.device)].cpu()
            assert int(after.times[0, hot_state.FETCHED]) > 0
        assert torch.equal(self.hot.cpu(), hot)
        return buffers

    def _check_plan(self, before, after, topk, buffers, warm):
        count = int(buffers.num_misses)
        slots, rows = (
            part[:count].cpu().long() for part in (buffers.miss_slots, buffers.miss_rows)
        )
        asked = topk[topk >= 0].long().unique()
        is_hot = before.slot_row[asked] >= 0
        missed = asked[~is_hot]
        assert set(slots.tolist()) <= set(missed.tolist())
        assert warm or count == len(missed), "a lookup found no row"
        taken = Taken.of(before, slots, rows)
        use_age = int(warm)
        check_taken(before, after, taken, before.slot_row[asked[is_hot]].long(), use_age, 0)
        expected = torch.where(topk >= 0, after.slot_row[topk.clamp_min(0).long()], -1)
        assert torch.equal(buffers.rows.cpu(), expected)
        return taken

    def _check_lists(self, before, after, topk, buffers, lists):
        pairs = (buffers.hit_rows, buffers.hit_lengths), (buffers.late_rows, buffers.late_lengths)
        if not lists:
            assert all((part == POISON).all() for pair in pairs for part in pair)
            return
        slots, rows = topk.clamp_min(0).long(), buffers.rows.cpu()
        split = int(before.words[hot_state.SPLIT]) != 0
        early = (topk >= 0) & (before.slot_row[slots] >= 0) & split
        late = (rows >= 0) & ~early
        for flags, pair in zip((early, late), pairs, strict=True):
            assert listed(*pair) == rows_before_hand(flags, rows)

    def install(self, slots, *, first_slot=0, min_age=0, reserve=False):
        """install of distinct slots [n] for all groups, checked. Returns rows [groups, n]."""
        before = self.states.cpu()
        plan_fetch.install(self.states, slots.to(self.device), first_slot, min_age, reserve)
        after = self.states.cpu()
        asked = slots[slots >= first_slot].long()
        # A block takes its slots in turns, and one turn may evict rows of slots of a later one.
        check = self._check_install
        if len(slots) > plan_fetch.max_width() // 4:
            check = self._check_large_install
        for index in range(len(before.words)):
            b, a = before.group(index), after.group(index)
            check(b, a, asked, min_age, reserve)
        return after.slot_row[:, slots.long()]

    def _check_install(self, before, after, asked, min_age, reserve):
        is_hot = before.slot_row[asked] >= 0
        got = asked[~is_hot & (after.slot_row[asked] >= 0)]
        assert not reserve or len(got) == int((~is_hot).sum()), "a slot was not reserved"
        taken = Taken.of(before, got, after.slot_row[got].long())
        use_age = 0 if reserve else 2
        used = before.slot_row[asked[is_hot]].long()
        check_taken(before, after, taken, used, use_age, min_age)
        stall = (before.times[:, hot_state.FETCHED] - before.times[:, hot_state.MAIN_READY]).clamp(
            0
        )
        stalled = before.times[:, hot_state.MAIN_READY] > 0
        expected = {
            "evictions": len(taken.evicted),
            "evicted_age": int(taken.owned_ages.sum()),
            "installs": int(is_hot.sum()) + len(got),
            "skipped": int((~is_hot).sum()) - len(got),
            "stall_ns": int(stall[stalled].sum()) if reserve else 0,
        }
        check_counters(before, after, expected)
        assert torch.equal(after.times, before.times * (not reserve))

    def _check_large_install(self, before, after, asked, min_age, reserve):
        check_state(after)
        got = after.slot_row[asked][after.slot_row[asked] >= 0].long()
        assert not reserve or len(got) == len(asked), "a slot was not reserved"
        tick = int(before.words[hot_state.TICK])
        assert (age(tick, after.row_stamp[got]) <= (0 if reserve else 2)).all()
        grown = (after.counters - before.counters).tolist()
        assert grown[hot_state.INSTALLS] == len(got)
        assert grown[hot_state.SKIPPED] == len(asked) - len(got)
