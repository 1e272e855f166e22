"""The model notices when an invariant of tiers/contract.py is broken: one step is done wrong.

A mutation replaces one function of lru, or one step of the driver, by a wrong one. Mutated
kernels run as Python: numba would not see a changed helper.
"""

import types

import numpy as np
import pytest

from sglang_ess.tiers import HotCache, lru
from tests.tiers.model import Driver, random_step

NOTICED = (AssertionError, RuntimeError)
KERNELS = [name for name, value in vars(lru).items() if hasattr(value, "py_func")]
NUM_STEPS = 150


def script(driver_class=Driver) -> None:
    """A fixed sequence of every operation, on hot tiers that evict much, little and nothing."""
    driver, rng = driver_class(30, [5, 12, 30]), np.random.default_rng(7)
    for _ in range(NUM_STEPS):
        random_step(driver, rng)


def mutate(monkeypatch, **changes) -> None:
    """Every kernel as plain Python that calls the changed ones. A change takes the original."""
    space = dict(vars(lru))
    for name in KERNELS:
        space[name] = types.FunctionType(vars(lru)[name].py_func.__code__, space, name)
    for name, change in changes.items():
        space[name] = change(space[name])
    for name in KERNELS:
        monkeypatch.setattr(lru, name, space[name])


def test_the_script_passes_as_it_is(monkeypatch):
    script()
    mutate(monkeypatch)
    script()


class InstallWithoutHost(Driver):
    """Host first: hot copies of rows that the host tier never got."""

    def write(self, slots, min_ages):
        before = [rows.clone() for rows in self.host.rows]
        super().write(slots, min_ages)
        for rows, old in zip(self.host.rows, before, strict=True):
            rows.copy_(old)


class WriteBehindTheCache(Driver):
    """No stale copy: a path that writes slots without a call to any hot tier."""

    def write(self, slots, min_ages):
        for layer, rows in enumerate(self.host.rows):
            values = self._values(layer, len(slots))
            rows[slots] = values
            self.content[layer][slots] = values


class OneLayerForgotten(Driver):
    """No stale copy: updated in every layer but one."""

    def write(self, slots, min_ages):
        last = self.caches[-1]
        last.invalidate = last.install = lambda *_: 0
        super().write(slots, min_ages)
        del last.invalidate, last.install


@pytest.mark.parametrize("faulty", [InstallWithoutHost, WriteBehindTheCache, OneLayerForgotten])
def test_a_faulty_writer_is_noticed(faulty):
    with pytest.raises(NOTICED):
        script(faulty)


def no_check(monkeypatch):
    monkeypatch.setattr(HotCache, "check_integrity", lambda self: None)


@pytest.mark.parametrize("faulty", [InstallWithoutHost, WriteBehindTheCache, OneLayerForgotten])
def test_a_faulty_writer_is_noticed_without_check_integrity(faulty, monkeypatch):
    """By what attention reads, and by comparison with what was written."""
    no_check(monkeypatch)
    with pytest.raises(AssertionError):
        script(faulty)


def lose_last(kernel):
    """A copy that leaves out its last row."""
    return lambda source, target, rows, places, count: kernel(
        source, target, rows, places, count - 1
    )


def wrong_source(kernel):
    return lambda source, target, rows, places, count: kernel(
        source, target, (rows + 1) % len(source), places, count
    )


def keep_victim(kernel):
    """A take that leaves the victim's slot mapped: one row, two slots."""

    def take(slot_row, *args):
        before = slot_row.copy()
        row = kernel(slot_row, *args)
        slot_row[:] = before
        return row

    return take


def forget_invalidate(kernel):
    return lambda *args: None


def keep_place(kernel):
    """An invalidate that leaves the free row in the queue."""

    def invalidate(slots, slot_row, row_slot, row_place, free, state):
        before = row_place.copy()
        kernel(slots, slot_row, row_slot, row_place, free, state)
        row_place[:] = before

    return invalidate


GUARD_OF_TAKE, MIN_AGE_OF_TAKE, STATE_OF_TAKE = 7, 8, 6


def guard_ignored(kernel):
    """One plan, one row each: rows that this pass already uses are evicted too."""

    def take(*args):
        args = list(args)
        args[GUARD_OF_TAKE] = len(args[3])
        return kernel(*args)

    return take


def most_recent_first(kernel):
    """The youngest row before guard, not the oldest."""

    def take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, min_age):
        if state[lru.FREE] == 0:
            places = [p for p in range(guard - 1, -1, -1) if row_place[queue[p]] == p]
            if places and places[0] != places[-1]:
                young, old = queue[places[0]], queue[places[-1]]
                queue[places[0]], queue[places[-1]] = old, young
                row_place[young], row_place[old] = places[-1], places[0]
        return kernel(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, min_age)

    return take


def any_age(kernel):
    return lambda *args: kernel(*args[:MIN_AGE_OF_TAKE], 0)


def not_free_first(kernel):
    """Evicts while there are free rows."""

    def take(*args):
        state = args[STATE_OF_TAKE]
        free, state[lru.FREE] = state[lru.FREE], 0
        row = kernel(*args)
        state[lru.FREE] = free
        return row if row >= 0 else kernel(*args)

    return take


def out_of_order(kernel):
    """A compaction that turns the queue round."""

    def compact(row_place, queue, queue_step, state):
        kernel(row_place, queue, queue_step, state)
        tail = state[lru.TAIL]
        queue[:tail] = queue[:tail][::-1].copy()
        row_place[queue[:tail]] = np.arange(tail)

    return compact


def ages_lost(kernel):
    def compact(row_place, queue, queue_step, state):
        kernel(row_place, queue, queue_step, state)
        queue_step[: state[lru.TAIL]] = state[lru.STEP]

    return compact


def hits_not_counted(kernel):
    return lambda *args: (0, kernel(*args)[1])


def handed_over_as_it_is(kernel):
    """A release that leaves the rows mapped to their slots."""

    def release(slot_row, row_slot, *args):
        before = slot_row.copy(), row_slot.copy()
        kernel(slot_row, row_slot, *args)
        slot_row[:], row_slot[:] = before

    return release


def no_room_made(kernel):
    return lambda row_place, queue, queue_step, state, num_uses: state[lru.TAIL]


MUTATIONS = {
    "a fetch that leaves out a row": {"copy_rows": lose_last},
    "a fetch from the wrong slot": {"copy_rows": wrong_source},
    "an eviction that leaves the slot mapped": {"_take": keep_victim},
    "an invalidate that does nothing": {"invalidate": forget_invalidate},
    "an invalidate that leaves the place": {"invalidate": keep_place},
    "an eviction of the same pass": {"_take": guard_ignored},
    "most recently used first": {"_take": most_recent_first},
    "min_age ignored": {"_take": any_age},
    "eviction before free rows": {"_take": not_free_first},
    "a compaction out of order": {"_compact": out_of_order},
    "a compaction that loses ages": {"_compact": ages_lost},
    "hits not counted": {"_use_hits": hits_not_counted},
    "no room made in the queue": {"_begin": no_room_made},
    "a row handed over as it is": {"release": handed_over_as_it_is},
    "fills of evicted rows kept": {"_still_mapped": lambda kernel: lambda *args: args[-1]},
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_kernel_is_noticed(name, monkeypatch):
    mutate(monkeypatch, **MUTATIONS[name])
    errors = (*NOTICED, IndexError) if name == "no room made in the queue" else NOTICED
    with pytest.raises(errors):
        script()
