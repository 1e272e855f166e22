"""CUDA C++ sources: they build for Hopper, and they are right.

On the CUDA device where there is one, else compiled as host code under a shim of threads (host.py).
"""

import ctypes
import importlib
import os
import re
from dataclasses import dataclass, fields
from types import SimpleNamespace

import pytest
import torch

from ess_kernels import cuda_build, cuda_ops, hot_state
from ess_kernels.fetch import fetch_reference
from ess_kernels.hot_state import HotState
from ess_kernels.install import install
from ess_kernels.plan import MAX_WIDTH, PlanBuffers, plan
from ess_kernels.rebuild_order import ReorderScratch, reorder
from ess_kernels.scatter import scatter_rows_reference
from tests.kernels import test_plan
from tests.kernels.cuda_host import host, resources
from tests.kernels.cuda_host.host import HostKernels, KernelError
from tests.kernels.test_plan import Pair, draw, poisoned
from tests.support.hot_state import check_state, victims

plan_module, install_module = (
    importlib.import_module(f"ess_kernels.{name}") for name in ("plan", "install")
)
SEEDS = 12
CPU = torch.device("cpu")
HAS_CUDA = torch.cuda.is_available()
needs_nvcc = pytest.mark.skipif(resources.compiler_release() is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def cuda_cache(request):
    """Built libraries, kept from run to run; ninja builds again what has changed."""
    before = os.environ.get("TVM_FFI_CACHE_DIR")
    os.environ["TVM_FFI_CACHE_DIR"] = str(request.config.cache.mkdir("cuda_build"))
    yield
    if before is None:
        del os.environ["TVM_FFI_CACHE_DIR"]
    else:
        os.environ["TVM_FFI_CACHE_DIR"] = before


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return host.build_shim(tmp_path_factory.mktemp("cuda_shim"))


@pytest.fixture(scope="module")
def library(tmp_path_factory, shim):
    return host.build(tmp_path_factory.mktemp("cuda_host"), shim=shim)


@pytest.fixture
def shim_kernels(request):
    """The kernels as host code. Their tests also run Triton kernels on the CPU: no interpreter."""
    if HAS_CUDA:
        pytest.skip("the shim stands in for a GPU, and there is one")
    return HostKernels.load(request.getfixturevalue("library"))


@pytest.fixture
def kernels(request):
    """fetch, save and run_plan; `seed` is of no effect on a GPU."""
    if HAS_CUDA:
        operations = {name: getattr(cuda_ops, name) for name in ("fetch", "save", "run_plan")}
        return SimpleNamespace(seed=0, **operations)
    return request.getfixturevalue("shim_kernels")


def pinned(rows):
    return rows.pin_memory() if HAS_CUDA else rows


# --- for the device


@needs_nvcc
def test_kernels_build_without_spills_and_as_recorded(cuda_cache):
    found = resources.measure()
    assert len(found) == 12
    assert [entry.kernel for entry in found if entry.local_bytes] == []
    table = resources.TABLE.read_text()
    if resources.compiler_release() not in table:
        pytest.skip(f"{resources.TABLE.name} is of another compiler, no spills either way")
    assert resources.render(found) == table, "stale: see the table's own words"


@needs_nvcc
@pytest.mark.parametrize("name", ["fetch", "save"])
def test_a_warp_has_all_its_loads_in_flight_before_it_stores(cuda_cache, name):
    loads = int(re.search(r"kLoads = (\d+)", (cuda_build.SOURCE_DIR / "rows.cuh").read_text())[1])
    found = resources.wide_accesses(cuda_build.build(name, resources.ARCH))
    assert len(found) == 3
    for kernel, accesses in found.items():
        assert accesses.startswith("L" * loads + "S"), (kernel, accesses)


@needs_nvcc
@pytest.mark.parametrize("name", cuda_build.NAMES)
def test_libraries_load_and_export_the_operation(cuda_cache, name):
    module = cuda_build.load(name, resources.ARCH)
    assert cuda_build.load(name, resources.ARCH) is module
    assert callable(getattr(module, name))


@needs_nvcc
def test_bindings_refuse_what_the_kernels_cannot_take(cuda_cache):
    fetch = cuda_build.load("fetch", resources.ARCH).fetch
    save = cuda_build.load("save", resources.ARCH).save
    rows, index = torch.zeros(8, 656, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32)
    rest = (index, index, index[:1], 4)
    with pytest.raises(ValueError, match="hot_rows must be a CUDA tensor"):
        fetch(rows, rows, *rest)
    with pytest.raises(ValueError, match="a multiple of 16 bytes.*strides"):
        fetch(rows[:, :8], rows[:, :8], *rest)
    with pytest.raises(ValueError, match="host_rows must be \\[rows, ...\\]"):
        fetch(rows, rows[0], *rest)
    with pytest.raises(ValueError, match="as long as one of hot_rows: got 640 and 656"):
        fetch(rows, rows[:, :640], *rest)
    with pytest.raises(ValueError, match="start at a multiple of 16"):
        save(rows.flatten()[8:-648].view(7, 656), index, rows, 4)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="must be one of fetch, save, plan: got 'load'"):
        cuda_build.build("load", "9.0a")


def test_names_and_limits_are_those_of_the_python_side():
    source = (cuda_build.SOURCE_DIR / "plan.cu").read_text()

    def names(kind):
        return re.search(rf"enum {kind} {{ (.*) }};", source)[1].split(", ")

    for module, kind in ((hot_state, "Word"), (hot_state, "Counter"), (plan_module, "Kind")):
        for number, name in enumerate(names(kind)):
            value = getattr(module, name)
            assert getattr(value, "value", value) == number, name
    assert len(names("Word")) == hot_state.NUM_WORDS
    assert len(names("Counter")) == hot_state.NUM_COUNTERS
    limits = (cuda_build.SOURCE_DIR / "ops.h").read_text()
    assert int(re.search(r"kPlanMaxWidth = (\d+)", limits)[1]) == MAX_WIDTH


# --- the shim itself


def test_the_scheduler_makes_races_visible(shim_kernels):
    sums = {True: set(), False: set()}
    for seed in range(SEEDS):
        for atomically in sums:
            shim_kernels.seed = seed
            total = torch.zeros(1, dtype=torch.int32)
            shim_kernels.call("add_one", ctypes.c_void_p(total.data_ptr()), atomically, 2, 64)
            sums[atomically].add(int(total))
    assert sums[True] == {128}
    assert len(sums[False]) > 1 and min(sums[False]) < 64


def test_a_seed_repeats_its_interleaving(shim_kernels):
    def run(seed):
        shim_kernels.seed = seed
        total = torch.zeros(1, dtype=torch.int32)
        shim_kernels.call("add_one", ctypes.c_void_p(total.data_ptr()), False, 2, 64)
        return int(total)

    assert [run(seed) for seed in range(SEEDS)] == [run(seed) for seed in range(SEEDS)]


def test_a_lane_that_stays_away_is_a_deadlock(shim_kernels):
    total = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelError, match="deadlock: 31 threads"):
        shim_kernels.call("one_lane_stays_away", ctypes.c_void_p(total.data_ptr()))


# --- fetch and save


@dataclass(frozen=True)
class Copy:
    name: str
    row_bytes: int = 656
    entries: int = 41
    count: int = 29
    skipped: int = 3
    blocks: int = 2
    apart_bytes: int = 0  # between one row and the next

    def rows(self, wide):
        return wide[:, : self.row_bytes]


COPIES = [
    Copy("fp8"),
    Copy("bf16", row_bytes=1152),
    Copy("fp8, groups of seven", entries=260, count=251, blocks=2),
    Copy("bf16, several rounds", row_bytes=1152, entries=130, count=129, blocks=1),
    Copy("one access a row", row_bytes=16, entries=300, count=290, blocks=1),
    Copy("three accesses a row", row_bytes=48),
    Copy("two rows a group", row_bytes=2304, entries=37, count=37, blocks=1),
    Copy("longer than a group", row_bytes=4624, entries=11, count=10),
    Copy("rows apart", apart_bytes=32),
    Copy("no entry", count=0, skipped=0),
    Copy("one entry", entries=1, count=1, skipped=0),
    Copy("empty list", entries=0, count=0, skipped=0),
    Copy("all skipped", skipped=29),
    Copy("count beyond the list", count=1000),
]


def random_rows(count, case, generator):
    shape = (count, case.row_bytes + case.apart_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("case", COPIES, ids=lambda case: case.name)
def test_fetch(kernels, device, case):
    check_fetch(kernels, device, case)


def check_fetch(kernels, device, case):
    for seed in range(3):
        generator, kernels.seed = torch.Generator().manual_seed(seed), seed
        host_rows = pinned(random_rows(97, case, generator))
        wide = random_rows(case.entries + 5, case, generator)
        slots = torch.randint(0, 97, (case.entries,), generator=generator).int()
        slots[:1] = 96
        rows = torch.randperm(len(wide), generator=generator)[: case.entries].int()
        inside = min(case.count, case.entries)
        skipped = torch.randperm(inside, generator=generator)[: case.skipped]
        rows[skipped[::2]] = -1
        slots[skipped[1::2]] = -1
        slots[inside:] = 1 << 30  # entries past the count are not read
        expected, wide, count = wide.clone(), wide.to(device), torch.tensor([case.count]).int()
        misses = [part.to(device) for part in (slots, rows, count)]
        kernels.fetch(case.rows(host_rows), case.rows(wide), *misses, case.blocks)
        rows[slots < 0] = -1  # the reference skips by row only
        fetch_reference(case.rows(host_rows), case.rows(expected), slots, rows, count)
        assert torch.equal(wide.cpu(), expected)


@pytest.mark.parametrize("case", COPIES[:-1], ids=lambda case: case.name)
def test_save(kernels, device, case):
    for seed in range(3):
        generator, kernels.seed = torch.Generator().manual_seed(seed), seed
        rows = random_rows(case.count, case, generator)
        wide = pinned(random_rows(case.count + 9, case, generator))
        slots = torch.randperm(len(wide), generator=generator)[: case.count]
        slots[: case.skipped] = -1
        expected = wide.clone()
        kernels.save(case.rows(rows.to(device)), slots.to(device), case.rows(wide), case.blocks)
        if HAS_CUDA:
            torch.cuda.synchronize()
        scatter_rows_reference(case.rows(rows), slots, case.rows(expected))
        assert torch.equal(wide, expected)


# --- plan


def plan_by(kernels, monkeypatch):
    """ess_kernels.plan and .install by these kernels."""
    for module in (plan_module, install_module):
        monkeypatch.setattr(module, "run_plan", kernels.run_plan)


@pytest.fixture
def planner(kernels, monkeypatch):
    plan_by(kernels, monkeypatch)
    return kernels


def check_counters(before, after, topk, misses):
    grown = dict(zip(hot_state.COUNTERS, (after.counters - before.counters).tolist(), strict=True))
    gone = victims(before, after)
    expected = dict.fromkeys(hot_state.COUNTERS, 0) | {
        "lookups": int((topk >= 0).sum()),
        "misses": misses,
        "evictions": len(gone),
        "evicted_age": int((before.words[hot_state.TICK] - before.row_stamp[gone]).sum()),
    }
    assert grown == expected


def drive(device, queries, width, slots, rows, universe, steps, seed):
    """Plans of one tier one after another, each checked against the reference and definition."""
    tier, generator = Pair(device, slots, rows), torch.Generator().manual_seed(seed)
    for step in range(steps):
        tier.state.words[hot_state.SPLIT] = (step + seed) % 3 != 1
        topk = draw(generator, queries, width, universe)
        before = tier.state.cpu()
        buffers = tier.plan(topk)
        check_counters(before, tier.state.cpu(), topk, int(buffers.num_misses))
        if sum(tier.state.words[hot_state.NUM_FREE : hot_state.VALID + 1]) < queries * width:
            tier.reorder(queries * width)
    return tier


PLANS = {
    "one query": (1, 61, 300, 90, 150, 3),
    "as many blocks as queries": (3, 40, 300, 130, 120, 3),
    "more queries than blocks": (7, 13, 300, 100, 70, 3),
    "four lookups a thread": (2, 211, 900, 470, 600, 2),
    "sixteen lookups a thread": (2, 700, 3000, 1500, 1600, 2),
    "sixteen lookups a thread, one query": (1, 900, 3000, 1000, 1600, 2),
    "all miss": (4, 20, 2000, 80, 2000, 3),
    "nearly all hit": (3, 30, 100, 95, 31, 3),
    "several plans a list": (5, 6, 500, 90, 150, 6),
}


@pytest.mark.parametrize("shape", PLANS.values(), ids=PLANS.keys())
def test_plans_one_after_another(planner, device, shape):
    misses = 0
    for seed in range(2 if shape[1] > 500 else SEEDS // 2):
        planner.seed = 100 * seed
        tier = drive(device, *shape, seed=seed)
        counters = dict(zip(hot_state.COUNTERS, tier.state.counters.tolist(), strict=True))
        assert counters["lookups"] > 0 and counters["short"] == 0
        misses += counters["misses"]
    assert misses > 0


def test_interleavings_of_a_plan_full_of_duplicates(planner, device):
    for seed in range(2 * SEEDS):
        planner.seed = 100 * seed
        drive(device, 5, 9, 120, 45, 60, 4, seed=seed)


def test_what_is_counted_equals_the_triton_plan(kernels, device, monkeypatch):
    """From equal states: lookups, hits, evictions, installs, refused and warm ones, shortage."""
    generator = torch.Generator().manual_seed(8)
    state = HotState.new(1, 200, 40, device).layer(0)

    def both(step):
        nonlocal state
        twin = HotState(**{f.name: getattr(state, f.name).clone() for f in fields(state)})
        step(state)
        with monkeypatch.context() as patch:
            plan_by(kernels, patch)
            step(twin)
        assert torch.equal(twin.counters, state.counters)
        assert torch.equal(twin.words, state.words)
        check_state(twin)
        state = twin

    for number in range(12):
        buffers = PlanBuffers.new(2, 15, device)
        topk = draw(generator, 2, 15, 80).to(device)
        kind = (plan_module.DECODE, plan_module.WARM)[number % 4 == 3].value
        both(lambda s, t=topk, k=kind, b=buffers: plan(s, t, b, kind=k))
        written = torch.randint(0, 120, (9,), generator=generator).unique().to(device)
        age = 3 * (number % 2)
        both(lambda s, w=written, a=age, b=buffers: install(s, w, b, min_age=a, first_slot=4))
        if number % 3 == 2:
            reorder(state, 40, ReorderScratch.new(40, device, 64))
    assert (state.counters > 0).all()


def test_rows_that_are_being_written_are_read_late(planner, device):
    for queries in (1, 4):
        test_plan.test_a_row_that_is_being_written_is_read_late(device, queries, True)
        test_plan.test_a_row_that_is_being_written_is_read_late(device, queries, False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_install_over_several_blocks(planner, device, monkeypatch, dtype):
    monkeypatch.setattr(install_module, "INSTALL_WIDTH", 16)
    for seed in range(SEEDS):
        planner.seed = 10 * seed
        state = HotState.new(1, 300, 90, device).layer(0)
        buffers = poisoned(3, 30, device)
        slots = torch.randint(0, 300, (75,), generator=torch.Generator().manual_seed(seed))
        given = slots.to(device, dtype)
        targets = install(state, given, buffers, first_slot=20, advance=True).cpu()
        row_slot = state.row_slot.cpu().long()
        assert torch.equal(targets >= 0, slots >= 20)
        kept = targets >= 0
        assert torch.equal(row_slot[targets[kept].long()], slots[kept])
        assert int(buffers.num_misses) == len(slots[kept].unique())
        check_state(state)


# --- the tests can fail


def fails(kernels, monkeypatch, shape, fault=host.NO_FAULT, number=0):
    """Whether some seed shows that the kernel is broken. In a child: it may write anywhere."""
    plan_by(kernels, monkeypatch)
    child = os.fork()
    if child == 0:
        noticed = 1
        try:
            kernels.fault, kernels.number = fault, number
            for seed in range(2 * SEEDS):
                kernels.seed = 100 * seed
                drive(CPU, *shape, seed=seed)
            noticed = 0
        finally:  # whatever was raised
            os._exit(noticed)
    return os.waitpid(child, 0)[1] != 0


def test_nothing_fails_without_a_fault(shim_kernels, monkeypatch):
    assert not fails(shim_kernels, monkeypatch, PLANS["one query"])


@pytest.mark.parametrize("number", [0, 1])
def test_each_grid_barrier_is_needed(shim_kernels, monkeypatch, number):
    assert fails(
        shim_kernels,
        monkeypatch,
        PLANS["as many blocks as queries"],
        host.SKIP_GRID_BARRIER,
        number,
    )


# 4 is the one between the first two steps, behind look up's own barriers in one block's plan.
@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 6, 7, 8])
def test_each_block_barrier_is_needed(shim_kernels, monkeypatch, number):
    assert fails(shim_kernels, monkeypatch, PLANS["one query"], host.SKIP_BLOCK_BARRIER, number)


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("plan.cu", "const int claim = kClaim + place_of(a, query, i);",
         "const int claim = load_relaxed(a.slot_row + max(0, x.slot[i]));"),
        ("plan.cu", "need[i] = stamp > built;", "need[i] = false;"),
        ("plan.cu", "gone += atomicMax(a.row_stamp + x.row[i], tick) <= built;",
         "gone += atomicMax(a.row_stamp + x.row[i], tick) <= tick;"),
        ("rows.cuh", "const int row = min(word / width, rows - 1);", "const int row = 0;"),
    ],
)  # fmt: skip
@pytest.mark.skipif(HAS_CUDA, reason="runs broken sources as host code")
def test_broken_sources_are_noticed(tmp_path, shim, monkeypatch, file, line, broken):
    for source in cuda_build.SOURCE_DIR.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    text = (tmp_path / file).read_text()
    assert line in text
    (tmp_path / file).write_text(text.replace(line, broken))
    kernels = HostKernels.load(host.build(tmp_path, tmp_path, shim))
    if file == "plan.cu":
        shapes = ("several plans a list", "nearly all hit")
        assert any(fails(kernels, monkeypatch, PLANS[shape]) for shape in shapes)
    else:
        with pytest.raises(AssertionError):
            check_fetch(kernels, CPU, COPIES[0])


def test_the_state_has_the_fields_that_the_driver_passes():
    assert [f.name for f in fields(HotState)] == host.STATE.split()
    assert [f.name for f in fields(PlanBuffers)] == host.LISTS.split()
