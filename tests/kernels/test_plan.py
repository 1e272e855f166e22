"""plan, install, invalidate and rebuild_order against the sequential reference."""

import dataclasses
import importlib
import inspect

import pytest
import torch

from ess_kernels import hot_state
from ess_kernels.hot_state import HotState
from ess_kernels.install import install
from ess_kernels.invalidate import invalidate, invalidate_reference
from ess_kernels.plan import PlanBuffers, plan, plan_reference
from ess_kernels.rebuild_order import OrderScratch, rebuild_order
from tests.support.hot_state import check_state, rebuild_checked, victims
from tests.support.triton_compile import compile_for_hopper

# Functions of the same names hide these modules, so they are imported by name.
plan_module, order_module, invalidate_module, resize_module = (
    importlib.import_module(f"ess_kernels.{name}")
    for name in ("plan", "rebuild_order", "invalidate", "resize_layers")
)
AGES = 64


def words(state):
    return state.words.tolist()


def poisoned(queries, width, device):
    buffers = PlanBuffers.new(queries, width, device)
    for field in dataclasses.fields(buffers):
        getattr(buffers, field.name).fill_(-77)
    return buffers


def draw(generator, queries, width, universe, pads=0.2):
    """Top-k lists like an indexer's: distinct within a query, partly shared between queries."""
    lists = [torch.randperm(universe, generator=generator)[:width] for _ in range(queries)]
    topk = torch.stack(lists).int()
    topk[torch.rand(queries, width, generator=generator) < pads] = -1
    return topk


class Pair:
    """A tier on the device and its reference on the host; both get the same operations."""

    def __init__(self, device, slots, rows, max_age=AGES):
        self.device = device
        self.state = HotState.new(1, slots, rows, device).layer(0)
        self.model = HotState.new(1, slots, rows, "cpu").layer(0)
        self.scratch = OrderScratch.new(rows, device, max_age)

    def plan(self, topk, advance=True):
        before = self.state.cpu()
        buffers = poisoned(*topk.shape, self.device)
        plan(self.state, topk.to(self.device), buffers, advance)
        self.model = before.cpu()  # rows of equal age stand in the device's order
        rows, pairs = plan_reference(self.model, topk, advance)
        after = self.state.cpu()
        self.check_plan(topk, buffers, before, after, rows, pairs)
        return buffers

    def check_plan(self, topk, buffers, before, after, rows, pairs):
        got, real = buffers.rows.cpu(), topk >= 0
        was_hot = real & (before.slot_row[topk.clamp(min=0).long()] >= 0)
        assert torch.equal(got[was_hot], rows[was_hot])
        assert torch.equal(got < 0, ~real)
        assert torch.equal(after.row_slot[got[real].long()], topk[real])
        misses = int(buffers.num_misses)
        slots = buffers.miss_slots[:misses].cpu()
        assert sorted(slots.tolist()) == sorted(slot for slot, _ in pairs)
        assert torch.equal(after.slot_row[slots.long()], buffers.miss_rows[:misses].cpu())
        assert (buffers.miss_slots[misses:] == -77).all()
        taken = {row for _, row in pairs}
        assert set(buffers.miss_rows[:misses].tolist()) == taken  # free first, then LRU
        assert torch.equal(after.row_stamp, self.model.row_stamp)
        assert words(after)[: hot_state.VALID] == words(self.model)[: hot_state.VALID]
        assert words(after)[hot_state.VALID] == words(self.model)[hot_state.VALID]
        self.check_oldest(before, after)
        self.check_lists(topk, buffers, was_hot, got, words(before)[hot_state.SPLIT])
        check_state(self.state)

    @staticmethod
    def check_oldest(before, after):
        """By definition, without the list: no row that stayed unused is older than a victim."""
        gone = victims(before, after)
        unused = (before.row_slot >= 0) & (after.row_stamp == before.row_stamp)
        if len(gone) and unused.any():
            assert before.row_stamp[gone].max() <= before.row_stamp[unused].min()

    @staticmethod
    def check_lists(topk, buffers, was_hot, got, split):
        first = {}
        for q in range(len(topk)):
            hits = got[q][was_hot[q]]
            late = got[q][(topk[q] >= 0) & ~was_hot[q]]
            if not split:
                hits, late = hits[:0], got[q][topk[q] >= 0]
            assert torch.equal(buffers.hit_rows[q, : buffers.hit_lengths[q]].cpu(), hits)
            assert torch.equal(buffers.late_rows[q, : buffers.late_lengths[q]].cpu(), late)
            for slot in topk[q][(topk[q] >= 0) & ~was_hot[q]].tolist():
                first.setdefault(slot, q)
        charged = torch.tensor([list(first.values()).count(q) for q in range(len(topk))])
        assert torch.equal(buffers.query_misses.cpu().long(), charged)

    def rebuild_order(self, need):
        rebuild_checked(self.state, need, self.scratch)
        check_state(self.state)
        assert words(self.state)[hot_state.NUM_FREE] + words(self.state)[hot_state.VALID] >= need


@pytest.mark.parametrize(
    ("queries", "width", "slots", "rows", "universe", "steps"),
    [
        pytest.param(1, 16, 200, 40, 90, 12, id="one query"),
        pytest.param(1, 61, 61, 61, 61, 4, id="one query, every slot has a row"),
        pytest.param(5, 7, 300, 50, 70, 6, id="duplicates across queries"),
        pytest.param(6, 8, 400, 48, 400, 10, id="all miss, the union may fill the tier"),
        pytest.param(160, 3, 900, 480, 600, 2, id="160 requests", marks=pytest.mark.slow),
        pytest.param(3, 20, 100, 60, 25, 10, id="nearly all hit"),
    ],
)
def test_plans_one_after_another(device, queries, width, slots, rows, universe, steps):
    tier = Pair(device, slots, rows)
    generator = torch.Generator().manual_seed(queries * width)
    for step in range(steps):
        tier.state.words[hot_state.SPLIT] = step % 3 != 1
        tier.plan(draw(generator, queries, width, universe))
        tier.rebuild_order(queries * width)
    counters = dict(zip(hot_state.COUNTERS, tier.state.counters.tolist(), strict=True))
    assert counters["lookups"] > 0 and counters["misses"] > 0 and counters["short"] == 0


def test_the_list_serves_many_plans_without_a_reorder(device):
    """Plans skip entries used since the list was made; the others stay in LRU order."""
    tier = Pair(device, 500, 60)
    generator = torch.Generator().manual_seed(3)
    for _ in range(12):
        tier.plan(draw(generator, 1, 10, 150, pads=0))
        if sum(words(tier.state)[hot_state.NUM_FREE : hot_state.VALID + 1]) < 10:
            tier.rebuild_order(10)
    assert words(tier.state)[hot_state.BUILT] < words(tier.state)[hot_state.TICK] - 1


@pytest.mark.parametrize(("queries", "width"), [(1, 8), (4, 8)])
def test_empty_lists_and_one_slot_in_every_lookup(device, queries, width):
    tier = Pair(device, 50, 40)
    assert int(tier.plan(torch.full((queries, width), -1, dtype=torch.int32)).num_misses) == 0
    same = torch.full((queries, width), 7, dtype=torch.int32)
    assert int(tier.plan(same).num_misses) == 1
    assert int(tier.plan(same).num_misses) == 0


def test_halves_of_a_tick_do_not_evict_each_others_rows(device):
    """Overlap mode DBA plans the second half of a batch while the first half's rows arrive."""
    tier = Pair(device, 100, 16)
    tier.plan(torch.arange(16, dtype=torch.int32).view(2, 8))
    tier.rebuild_order(16)
    first = torch.arange(20, 28, dtype=torch.int32).view(1, 8)
    tier.plan(first, advance=False)
    tier.plan(torch.arange(30, 38, dtype=torch.int32).view(1, 8), advance=True)
    rows = tier.state.cpu().slot_row
    assert (rows[20:28] >= 0).all() and (rows[30:38] >= 0).all() and (rows[:16] < 0).all()
    assert tier.state.counters[hot_state.SHORT] == 0


def test_running_short_is_counted_not_hidden(device):
    """Two plans without a rebuild_order between them give rows -1 and count as short."""
    state = HotState.new(1, 100, 8, device).layer(0)
    for first in (0, 10):
        buffers = PlanBuffers.new(1, 8, device)
        topk = torch.arange(first, first + 8, dtype=torch.int32, device=device).view(1, 8)
        plan(state, topk, buffers)
    assert (buffers.rows == -1).all() and state.counters[hot_state.SHORT] == 8
    check_state(state)


def test_install_prefers_free_rows_and_spares_young_ones(device):
    state = HotState.new(1, 200, 12, device).layer(0)
    scratch = OrderScratch.new(12, device, AGES)
    buffers = poisoned(3, 4, device)
    generator = torch.Generator().manual_seed(5)
    for step in range(14):
        min_age = (0, 0, 3)[step % 3]
        slots = torch.randint(0, 90, (5,), generator=generator)
        slots[step % 5] = -1
        before = state.cpu()
        advance = step % 2 == 0
        targets = install(
            state, slots.to(device), buffers, min_age, advance=advance, first_slot=4
        ).cpu()
        model = before.cpu()
        rows, pairs = plan_reference(model, slots, advance, min_age, first_slot=4)
        after = state.cpu()
        assert ((targets >= 0) == (rows >= 0)).all()
        hot = (slots >= 4) & (before.slot_row[slots.clamp(min=0)] >= 0)
        assert torch.equal(targets[hot], rows[hot])
        assert torch.equal(after.row_slot[targets[targets >= 0].long()].long(),
                           slots[targets >= 0])  # fmt: skip
        assert sorted(row for _, row in pairs) == sorted(
            set(targets[(targets >= 0) & ~hot].tolist())
        )
        check_state(state)
        rebuild_order(state, 8, scratch)
        check_state(state)
    assert state.counters[hot_state.INSTALLS] > 0 and state.counters[hot_state.SKIPPED] > 0


def test_decode_writes_are_safe_from_the_plan_of_their_step(device):
    state = HotState.new(1, 50, 8, device).layer(0)
    scratch = OrderScratch.new(8, device, AGES)
    buffers = PlanBuffers.new(1, 6, device)

    def step(topk, written):
        targets = install(state, torch.tensor(written, device=device), buffers).clone()
        plan(state, torch.tensor([topk], dtype=torch.int32, device=device), buffers)
        rebuild_order(state, 8, scratch)
        return targets

    step([1, 2, 3, 4, 5, 6], [10, 11])
    targets = step([20, 21, 22, 23, 24, 25], [12, 13])
    assert state.slot_row[12] == targets[0] and state.slot_row[13] == targets[1]
    assert state.counters[hot_state.SHORT] == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_invalidate_matches_the_reference(device, dtype):
    states = HotState.new(3, 120, 40, device)
    for layer in range(3):
        buffers = PlanBuffers.new(2, 15, device)
        topk = draw(torch.Generator().manual_seed(layer), 2, 15, 60)
        plan(states.layer(layer), topk.to(device), buffers)
        if layer:
            rebuild_order(states.layer(layer), 40, OrderScratch.new(40, device, AGES))
    slots = torch.randint(-5, 120, (300,), generator=torch.Generator().manual_seed(9)).to(dtype)
    slots[:8] = slots[20:28]
    before = states.cpu()
    invalidate(states, slots.to(device))
    for layer in range(3):
        check_state(states.layer(layer))
        model, got = before.layer(layer), states.layer(layer).cpu()
        invalidate_reference(model, slots)
        assert torch.equal(got.words, model.words)
        for name in ("slot_row", "row_slot", "row_stamp", "order"):
            assert torch.equal(getattr(got, name), getattr(model, name)), name
        count = words(model)[hot_state.NUM_FREE]
        assert set(got.free[:count].tolist()) == set(model.free[:count].tolist())


def test_reorder_is_a_sort_by_age_and_runs_only_when_short(device):
    rows = 2500  # more than one program, the last one ragged
    state = HotState.new(1, 3000, rows, device).layer(0)
    generator = torch.Generator().manual_seed(1)
    state.words[hot_state.TICK] = 1000
    stamps = torch.randint(900, 1000, (rows,), generator=generator, dtype=torch.int32)
    stamps[::7] = hot_state.FREE_STAMP
    state.row_stamp.copy_(stamps)
    free = (stamps == hot_state.FREE_STAMP).nonzero().flatten().int()
    state.free[: len(free)] = free.to(device)
    state.words[hot_state.NUM_FREE] = len(free)
    owned = (stamps != hot_state.FREE_STAMP).nonzero().flatten()
    state.row_slot[owned.to(device)] = owned.int().to(device)
    state.slot_row[owned.to(device)] = owned.int().to(device)
    scratch = OrderScratch.new(rows, device, AGES)
    rebuild_order(state, len(free), scratch)
    assert words(state)[hot_state.LENGTH] == 0, "long enough: nothing to do"
    rebuild_order(state, len(free) + 1, scratch)
    got = state.order[: words(state)[hot_state.LENGTH]].cpu().long()
    assert torch.equal(got.sort().values, owned)
    clamped = stamps[got].clamp(min=1000 - AGES)  # older rows count as equally old
    assert torch.equal(clamped, clamped.sort().values)
    assert words(state)[hot_state.BUILT] == 999 and words(state)[hot_state.VALID] == len(owned)


def test_a_plan_refuses_what_it_cannot_hold(device):
    state = HotState.new(1, 50, 8, device).layer(0)
    topk = torch.zeros(3, 4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="at most 8192 columns and 8 lookups"):
        plan(state, topk, PlanBuffers.new(3, 4, device))
    with pytest.raises(ValueError, match="plan buffers must be"):
        plan(state, topk[:2], PlanBuffers.new(3, 4, device))
    with pytest.raises(ValueError, match="contiguous int32"):
        plan(state, topk.long(), PlanBuffers.new(3, 4, device))
    with pytest.raises(ValueError, match="at most 8 slots"):
        install(state, torch.zeros(9, dtype=torch.int64), PlanBuffers.new(3, 4, device))
    with pytest.raises(ValueError, match="hot rows must be 1 to 50"):
        HotState.new(1, 50, 51, device)


def test_a_lost_claim_is_noticed(device):
    """check_state fails on a map entry that points to another slot's row."""
    tier = Pair(device, 60, 20)
    tier.plan(torch.arange(12, dtype=torch.int32).view(2, 6))
    tier.state.slot_row[3] = tier.state.slot_row[4]
    with pytest.raises(AssertionError, match="map to each other"):
        check_state(tier.state)


POINTERS = {
    "*i32": "topk slots rows hit_rows hit_lengths late_rows late_lengths query_misses miss_slots "
    "miss_rows num_misses slot_row row_slot row_stamp free order words rank counts active owned "
    "ages table",
    "*i64": "counters",
    "i32": "total width min_age first_slot n num_slots row_stride need programs layers",
}
KINDS = {name: kind for kind, names in POINTERS.items() for name in names.split()}
NARROW = {"KIND": 0, "BLOCK": 2048}


@pytest.mark.parametrize(
    ("kernel", "constexprs", "num_warps"),
    [
        (plan_module._look_up_kernel, NARROW, 8),
        pytest.param(plan_module._assign_kernel, NARROW, 8, marks=pytest.mark.slow),
        pytest.param(
            plan_module._resolve_kernel, NARROW | {"ADVANCE": True}, 8, marks=pytest.mark.slow
        ),
        (plan_module._single_kernel, NARROW | {"ADVANCE": True}, 8),
        pytest.param(
            order_module._rank_kernel,
            {"AGES": 1024, "BLOCK": 1024, "IN_ARENA": True},
            4,
            marks=pytest.mark.slow,
        ),
        (
            order_module._offset_kernel,
            {"AGES": 1024, "PROGRAMS": 64, "STEP": 64, "IN_ARENA": True},
            4,
        ),
        pytest.param(
            order_module._list_kernel,
            {"AGES": 1024, "BLOCK": 1024, "IN_ARENA": True},
            4,
            marks=pytest.mark.slow,
        ),
        (resize_module._own_kernel, {"BLOCK": 1024}, 4),
        pytest.param(resize_module._list_kernel, {"BLOCK": 1024}, 4, marks=pytest.mark.slow),
        pytest.param(resize_module._words_kernel, {}, 4, marks=pytest.mark.slow),
        pytest.param(resize_module._tick_kernel, {}, 4, marks=pytest.mark.slow),
        pytest.param(
            invalidate_module._invalidate_kernel, {"BLOCK": 256}, 4, marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: getattr(getattr(value, "fn", None), "__name__", ""),
)
def test_compiles_for_hopper_without_spills(kernel, constexprs, num_warps):
    names = [name for name in inspect.signature(kernel.fn).parameters if name not in constexprs]
    signature = {name: KINDS[name] for name in names}
    compiled = compile_for_hopper(kernel, signature, constexprs, num_warps=num_warps)
    assert compiled["spill_bytes"] == 0, compiled["ptxas_log"]
