"""resize_layers: which rows of an arena change their layer, and what every state says then."""

import pytest
import torch

from ess_kernels import hot_state
from ess_kernels.hot_state import HotState
from ess_kernels.invalidate import invalidate
from ess_kernels.plan import PlanBuffers, plan
from ess_kernels.rebuild_order import OrderScratch, Owned, rebuild_order
from ess_kernels.resize_layers import resize_layers, resize_table
from tests.support.hot_state import check_state, rebuild_checked

AGES = 64
QUERIES, WIDTH = 2, 6
LOOKUPS = QUERIES * WIDTH


class Arena:
    """Layers that share one arena."""

    def __init__(self, device, layers, even, slots, seed=0):
        self.device, self.sizes, self.slots = device, [even] * layers, slots
        self.state = HotState.new(layers, slots, even, device, shared=True)
        self.owned = Owned.new(layers, even, device, AGES)
        self.scratch = OrderScratch.new(layers * even, device, AGES)
        self.generator = torch.Generator().manual_seed(seed)
        self.buffers = PlanBuffers.new(QUERIES, WIDTH, device)

    def draw(self, high):
        return torch.randint(0, high, (QUERIES, WIDTH), generator=self.generator).int()

    def step(self, layer, universe):
        state = self.state.layer(layer)
        topk = self.draw(universe).to(self.device)
        plan(state, topk, self.buffers)
        assert torch.equal(state.row_slot[self.buffers.rows.long()], topk)
        rebuild_checked(state, LOOKUPS, self.scratch, self.owned.layer(layer))
        self.check()

    def resize(self, sizes):
        table = resize_table(self.sizes, sizes).to(self.device)
        resize_layers(self.state, self.owned, self.scratch, table, max(sizes))
        self.sizes = list(sizes)
        self.check()

    def check(self):
        """Check each layer's state, and that each row belongs to one layer."""
        for layer, size in enumerate(self.sizes):
            check_state(self.state.layer(layer), self.owned)
            assert self.state.words[layer, hot_state.ROWS] == size
        assert torch.equal(
            self.owned.rows.cpu().sort().values, torch.arange(sum(self.sizes), dtype=torch.int32)
        )

    def hot(self, layer):
        """The hot slots of a layer: slot -> (row, stamp)."""
        state = self.state.layer(layer).cpu()
        slots = (state.slot_row >= 0).nonzero().flatten().tolist()
        rows = state.slot_row[slots].tolist()
        stamps = state.row_stamp[rows].tolist()
        return dict(zip(slots, zip(rows, stamps, strict=True), strict=True))

    def random_sizes(self, least):
        """Random sizes with the same sum, at least `least` each."""
        weights = torch.rand(len(self.sizes), generator=self.generator) ** 3
        spread = sum(self.sizes) - least * len(self.sizes)
        rows = least + (weights / weights.sum() * spread).int()
        rows[0] += sum(self.sizes) - rows.sum()
        return rows.tolist()


def check_moved(arena, before, sizes_before):
    """A slot that stayed hot kept its row and stamp, and no younger slot left in its place."""
    for layer, (old, new) in enumerate(zip(sizes_before, arena.sizes, strict=True)):
        was, now = before[layer], arena.hot(layer)
        assert now.items() <= was.items()
        gone = [was[slot][1] for slot in was.keys() - now.keys()]
        assert len(now) == min(len(was), new)  # free rows go first
        assert not gone or new < old
        if gone and now:
            assert max(gone) <= min(stamp for _, stamp in now.values())


@pytest.mark.parametrize("seed", range(3))
def test_rows_move_between_plans(device, seed):
    layers, even = (3, 40) if seed else (4, 17)
    arena = Arena(device, layers, even, slots=120, seed=seed)
    for number in range(4):
        for layer in range(layers):
            if (layer + number) % 3:  # some layers are full, some have rows to spare
                arena.step(layer, (20, 120)[layer % 2])
        if number % 2:
            slots = torch.randint(0, 120, (30,), generator=arena.generator).to(device)
            invalidate(arena.state, slots)
            arena.check()
        before, sizes = [arena.hot(layer) for layer in range(layers)], arena.sizes
        arena.resize(arena.random_sizes(LOOKUPS))
        check_moved(arena, before, sizes)
    for layer in range(layers):
        arena.step(layer, 120)
    assert (arena.state.counters[:, hot_state.SHORT] == 0).all()


def test_a_layer_may_give_all_but_one_row_and_get_them_back(device):
    arena = Arena(device, 2, 20, slots=60)
    arena.step(0, 60)
    arena.step(1, 60)
    arena.resize([39, 1])
    assert len(arena.hot(0)) > 1 and len(arena.hot(1)) == 1
    arena.resize([1, 39])
    assert len(arena.hot(0)) == 1 and len(arena.hot(1)) == 1
    arena.step(1, 60)


def test_more_rows_than_a_program_takes(device):
    """A layer takes several programs, of which the last is not full."""
    arena = Arena(device, 2, 1500, slots=2000)
    free = arena.state.words[:, hot_state.NUM_FREE]
    arena.step(0, 2000)
    arena.resize([2300, 700])
    assert free.tolist() == [2300 - len(arena.hot(0)), 700]
    arena.resize([200, 2800])
    assert free.tolist() == [200 - len(arena.hot(0)), 2800]


def test_ages_of_a_layers_rows(device):
    arena = Arena(device, 2, 30, slots=40)
    state, owned = arena.state.layer(1), arena.owned.layer(1)
    assert (owned.ages == -1).all()
    for first in (0, 6, 0, 12):
        topk = torch.arange(first, first + 6, dtype=torch.int32, device=device).view(1, 6)
        plan(state, topk, PlanBuffers.new(1, 6, device))
        rebuild_order(state, 30, arena.scratch, owned)
    assert owned.ages[:5].tolist() == [6, 6, 6, 0, 0] and owned.ages[5:].sum() == 0
    assert (arena.owned.ages[0] == -1).all()
    for _ in range(AGES):  # all older ones together
        plan(state, topk, PlanBuffers.new(1, 6, device))
    rebuild_order(state, 31, arena.scratch, owned)
    assert owned.ages[0] == 6 and owned.ages[-1] == 12


def test_a_plan_that_never_ended_loses_no_row(device):
    """The lists contain the rows of a step that stopped between reserve and plan."""
    arena = Arena(device, 2, 20, slots=60)
    topk = torch.arange(12, dtype=torch.int32, device=device).view(2, 6)
    plan(arena.state.layer(0), topk, arena.buffers, advance=False)
    arena.resize([30, 10])
    assert len(arena.hot(0)) == 12
    arena.resize([5, 35])
    assert len(arena.hot(0)) == 5


@pytest.mark.parametrize(
    ("before", "after"),
    [([5, 5], [5, 6]), ([5, 5], [10, 0]), ([5, 5], [4, 3, 3])],
)
def test_rows_must_be_there_to_move(before, after):
    with pytest.raises(ValueError, match="rows must be divided among the same layers"):
        resize_table(before, after)


def test_a_layer_may_not_outgrow_the_scratch(device):
    arena = Arena(device, 2, 20, slots=60)
    arena.scratch = OrderScratch.new(25, device, AGES)
    with pytest.raises(ValueError, match="at most 25 rows, those of the scratch: got 30"):
        arena.resize([30, 10])


def test_a_kept_map_entry_is_noticed(device):
    """The checks fail if the former owner still finds the row that it gave."""
    arena = Arena(device, 2, 20, slots=60)
    arena.step(0, 60)
    kept = arena.state.slot_row.clone()
    with pytest.raises(AssertionError):
        arena.resize([1, 39])
        arena.state.slot_row.copy_(kept)
        arena.check()
