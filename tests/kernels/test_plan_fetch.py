"""plan_fetch, fetch and install: every call is checked by tests/support/plan_check.py.

On the CUDA device where there is one, else as host code: in the fast mode, and under seeded
schedules (test_plan_fetch_faults.py shows that these find mistakes).
"""

import pytest
import torch

from ess_kernels import cuda_build, hot_state, plan_fetch
from ess_kernels.hot_state import TICK_MASK
from tests.support.cuda_host import host
from tests.support.plan_check import Tier

SEEDS = 6

# queries, width, slots, rows, slots in use at a time, steps
SHAPES = {
    "one query": (1, 61, 300, 90, 150, 6),
    "as many blocks as queries": (3, 40, 300, 130, 120, 6),
    "more queries than blocks": (7, 13, 300, 100, 70, 6),
    "four lookups a thread": (2, 211, 900, 470, 600, 4),
    "sixteen lookups a thread": (2, 700, 3000, 1500, 1600, 3),
    "sixteen lookups a thread, one query": (1, 900, 3000, 1000, 1600, 3),
    "all miss": (4, 20, 2000, 80, 2000, 4),
    "nearly all hit": (3, 30, 100, 95, 31, 4),
    "as many lookups as rows": (5, 9, 120, 45, 60, 8),
    "chunks that are a part of the rows": (6, 13, 2000, 700, 2000, 6),
}


def draw(generator, queries, width, universe, offset=0):
    """Top-k of a step: slots of a window, with some pads and some twice."""
    rows = [torch.randperm(universe, generator=generator)[:width] for _ in range(queries)]
    topk = torch.full((queries, width), -1, dtype=torch.int32)
    for row, slots in zip(topk, rows, strict=True):
        row[: len(slots)] = slots + offset
    chance = torch.rand(topk.shape, generator=generator)
    topk[chance > 0.95] = topk[0, 0]
    topk[chance < 0.1] = -1
    return topk


def drive(device, shape, seed):
    """Steps of a tier, one after another: new slots, plans, halves of plans, warm-ups."""
    queries, width, slots, rows, universe, steps = shape
    tier, generator = Tier(device, slots, rows), torch.Generator().manual_seed(seed)
    for step in range(steps):
        tier.state.words[hot_state.SPLIT] = (step + seed) % 3 != 1
        offset = int(torch.randint(0, slots - universe + 1, (), generator=generator))
        topk = draw(generator, queries, width, universe, offset)
        if (step + seed) % 4 == 3:
            tier.plan(topk[:1].contiguous(), advance=False)
            tier.plan(topk, warm=True, advance=False)
            tier.install(torch.randperm(slots, generator=generator)[:9].int(), min_age=2)
        else:
            spare = max(0, rows - queries * width)
            new = torch.randperm(slots, generator=generator)[: min(queries, spare)].int()
            if len(new):
                tier.install(new, reserve=True)
        tier.plan(topk, lists=(step + seed) % 2 == 0, advance=queries == 1)
        if queries > 1:  # the other half of the step, which may not evict what the first one used
            other = draw(generator, queries, 1, universe, offset)
            if rows > queries * (width + 2):
                tier.plan(other, advance=False, copy=False)
            tier.plan(topk, advance=True)
    return tier


@pytest.fixture
def kernels(device, monkeypatch):
    """The operations by a module whose `seed` is that of the next schedules; none on a GPU."""
    if device.type == "cuda":
        return None
    seeded = host.Seeded(host.load("plan_fetch"))
    monkeypatch.setattr(cuda_build, "load", lambda name: seeded)
    return seeded


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_steps_one_after_another(device, shape):
    for seed in range(SEEDS):
        tier = drive(device, shape, seed)
        assert int(tier.state.counters[hot_state.MISSES]) > 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_steps_under_seeded_schedules(device, kernels, shape):
    if kernels is None:
        pytest.skip("a GPU makes its own schedules")
    for seed in range(2 if shape[1] > 500 else SEEDS):
        kernels.seed = 100 * seed
        drive(device, shape, seed)


@pytest.mark.parametrize("shape", ["one query", "more queries than blocks", "all miss"])
def test_steps_have_no_race(device, monkeypatch, shape):
    """Words that several threads touch in a phase are touched atomically, in every schedule."""
    if device.type == "cuda":
        pytest.skip("compute-sanitizer looks for races on a GPU (tools/gpu_check.sh)")
    module = host.load("plan_fetch", flags=host.RACES)
    monkeypatch.setattr(cuda_build, "load", lambda name: module)
    drive(device, SHAPES[shape], seed=1)


def test_the_first_step_after_the_tier_has_filled(device):
    """The age limit has grown over free rows to far above any age: one step brings it down."""
    tier = Tier(device, 4000, 512)
    for first in range(0, 512, 4):
        tier.plan(torch.arange(first, first + 4, dtype=torch.int32)[None])
    assert int(tier.state.words[hot_state.OCCUPIED]) == 512
    before = int(tier.state.counters[hot_state.SCANS])
    buffers = tier.plan(torch.arange(1000, 1512, dtype=torch.int32).view(4, 128))
    assert int(buffers.num_misses) == 512
    assert int(tier.state.counters[hot_state.SCANS]) - before < 1024 * 512


def test_ticks_wrap_around(device):
    tier = Tier(device, 300, 60)
    tier.state.words[hot_state.TICK] = TICK_MASK - 2
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        tier.plan(draw(generator, 2, 20, 300))
    assert int(tier.state.words[hot_state.TICK]) == 5
    assert int(tier.state.counters[hot_state.EVICTED_AGE]) < 8 * 8 * 40


def test_a_warm_up_takes_no_row_of_this_step_or_the_one_before(device):
    tier = Tier(device, 300, 40)
    topk = torch.arange(40, dtype=torch.int32).view(2, 20)
    tier.plan(topk)
    buffers = tier.plan(topk + 100, warm=True, advance=False)
    assert int(buffers.num_misses) == 0 and (buffers.rows == -1).all()
    tier.plan(
        topk[:, :1].contiguous()
    )  # two of the rows are used again, the others are two ticks old then
    buffers = tier.plan(topk + 100, warm=True, advance=False)
    assert int(buffers.num_misses) == 38
    assert int(tier.state.counters[hot_state.SKIPPED]) == 42


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reserve", [True, False])
def test_install_for_several_groups(device, dtype, reserve):
    tier = Tier(device, 1200, 700, groups=3)
    tier.states.times[:] = torch.tensor([100, 250])
    generator = torch.Generator().manual_seed(5)
    for width in (40, 300, 600):  # the last is more than a block takes at once
        tier.plan(draw(generator, 2, 60, 1200), advance=False)
        tier.states.words[:, hot_state.TICK] += 1
        slots = torch.randperm(1200, generator=generator)[:width].to(dtype)
        rows = tier.install(slots, first_slot=64, reserve=reserve)
        assert not reserve or ((rows >= 0) | (slots < 64)).all()
    stalls = tier.states.counters[:, hot_state.STALL_NS].tolist()
    assert stalls[1:] == [150 * reserve] * 2


def test_install_keeps_rows_younger_than_the_least_age(device):
    tier = Tier(device, 300, 40)
    for first in range(0, 40, 10):
        tier.plan(torch.arange(first, first + 10, dtype=torch.int32)[None])
    rows = tier.install(torch.arange(100, 130, dtype=torch.int32), min_age=4)
    assert int((rows >= 0).sum()) == 10  # ages are 4, 3, 2 and 1


def test_a_slot_may_be_installed_twice(device):
    tier = Tier(device, 300, 40)
    slots = torch.tensor([7, 9, 7, 7, 11, 9], dtype=torch.int32)
    plan_fetch.install(tier.states, slots.to(device), reserve=True)
    assert int(tier.state.words[hot_state.OCCUPIED]) == 3
    rows = tier.state.slot_row[slots.long().to(device)]
    assert len(rows.unique()) == 3 and (rows >= 0).all()


# --- copies


@pytest.mark.parametrize("row_bytes", [16, 48, 656, 1152, 2304, 4624])
@pytest.mark.parametrize("entries", [0, 1, 5, 300])
def test_fetch(device, row_bytes, entries):
    generator = torch.Generator().manual_seed(entries)

    def rows(count):
        wide = torch.randint(
            0, 256, (count, row_bytes + 32), dtype=torch.uint8, generator=generator
        )
        return wide

    host_rows, hot = rows(97), rows(entries + 5)
    host_rows = host_rows.pin_memory() if device.type == "cuda" else host_rows
    slots = torch.randint(0, 97, (entries + 3,), generator=generator).int()
    targets = torch.randperm(entries + 5, generator=generator)[: entries + 3].int()
    targets[: entries // 7] = -1
    slots[entries // 7 : entries // 5] = -1
    slots[entries:] = 1 << 30  # entries past the count are not read
    expected = hot.clone()
    copied = (slots[:entries] >= 0) & (targets[:entries] >= 0)
    where = targets[:entries][copied].long()
    expected[where, :row_bytes] = host_rows[slots[:entries][copied].long(), :row_bytes].cpu()
    hot, times = hot.to(device), torch.zeros(3, 2, dtype=torch.int64, device=device)
    plan_fetch.fetch(
        host_rows[:, :row_bytes], hot[:, :row_bytes], slots.to(device), targets.to(device),
        torch.tensor([entries], dtype=torch.int32, device=device), times, layer=1, max_blocks=3,
    )  # fmt: skip
    assert torch.equal(hot.cpu(), expected)
    assert (times != 0).tolist() == [[False, False], [False, True], [False, False]]


@pytest.mark.parametrize("row_bytes", [656, 1152])
def test_plans_copy_rows_of_the_models(device, kernels, row_bytes):
    tier, generator = Tier(device, 400, 150, row_bytes=row_bytes), torch.Generator().manual_seed(2)
    for step in range(3):
        tier.plan(draw(generator, 3, 40, 300), max_blocks=1 + step)


# --- what is refused


def test_what_is_refused(device):
    tier = Tier(device, 300, 40)

    def plan(shape, **options):
        tier.plan(torch.zeros(shape, dtype=torch.int32), **options)

    with pytest.raises(
        ValueError, match="at most 40 lookups.*got shape .*Plan the batch in passes"
    ):
        plan((3, 20))
    with pytest.raises(ValueError, match="max_blocks must be 1 or more: got 0"):
        plan((1, 20), max_blocks=0)
    with pytest.raises(ValueError, match="at most 40, the hot rows of a group: got 41"):
        plan_fetch.install(tier.states, torch.zeros(41, device=device).int(), reserve=True)
    tier.hot = tier.hot[:, :32]
    with pytest.raises(ValueError, match="as long as one of hot_rows: got 48 and 32 bytes"):
        plan((1, 20))
    tier.host, tier.hot = tier.host[:, :8], tier.hot[:, :8]
    with pytest.raises(ValueError, match="a multiple of 16 bytes.*strides"):
        plan((1, 20))


def test_the_plans_of_a_step_are_one_step_and_as_many_ticks(device):
    """Each may evict what the one before used. plan_check counts steps and ages."""
    tier, generator = Tier(device, 400, 40), torch.Generator().manual_seed(3)
    for _ in range(4):
        for number in range(3):
            tier.plan(draw(generator, 2, 20, 400), step_pass=(number, 3))
    counters = tier.state.counters.tolist()
    assert counters[hot_state.STEPS] == 4 and int(tier.state.words[hot_state.TICK]) == 1 + 4 * 3
    assert 0 < counters[hot_state.EVICTED_AGE] < counters[hot_state.EVICTIONS]
    with pytest.raises(ValueError, match="below the step's passes: got 3 of 3"):
        tier.plan(draw(generator, 2, 20, 400), step_pass=(3, 3))


def test_more_lookups_than_rows_where_every_slot_has_one(device):
    tier, generator = Tier(device, 50, 50), torch.Generator().manual_seed(5)
    for _ in range(3):
        tier.plan(draw(generator, 6, 40, 50))


def test_the_widest_plan(device):
    width = plan_fetch.max_width()
    assert width >= 2048
    tier = Tier(device, 3 * width, 2 * width)
    tier.plan(torch.randperm(3 * width)[: 2 * width].int().view(2, width))
    wide = Tier(device, 3 * width, 2 * width)
    with pytest.raises(ValueError, match=f"1 to {width} columns"):
        wide.plan(torch.zeros(1, width + 1, dtype=torch.int32))


@pytest.mark.slow
def test_a_batch_of_512_requests_with_four_queries_each(device):
    """2,048 queries of 2,048 lookups: 4.2 million, of which the second step shares half."""
    lookups = 2048 * 2048
    tier = Tier(device, lookups + 2048 * 1024, lookups, row_bytes=16)
    topk = torch.randperm(lookups).int().view(2048, 2048)
    tier.plan(topk, lists=True)
    topk = topk.clone()
    topk[:, 1024:] = (lookups + torch.arange(2048 * 1024)).int().view(2048, 1024)
    tier.plan(topk, lists=True)
