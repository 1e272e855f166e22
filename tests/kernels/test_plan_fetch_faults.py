"""The tests of plan_fetch can fail: barriers that do not wait, and broken sources, are noticed."""

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from ess_kernels import cuda_build
from tests.kernels.test_plan_fetch import SHAPES, drive
from tests.support.cuda_host import host
from tests.support.cuda_host.host import SKIP_BLOCK_BARRIER, SKIP_GRID_BARRIER, Seeded

CPU = torch.device("cpu")
SEEDS = 10
SECONDS = 120  # for a kernel that never ends; the tests of one fault take less than 20
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs broken kernels on the CPU")

ONE = ("one query", "nearly all hit")
SEVERAL = ("as many lookups as rows", "more queries than blocks", "all miss")


def noticed(module, shapes, seeds=SEEDS, fault=host.NO_FAULT, number=0):
    """Whether some schedule shows that the kernels are broken. In a child: they may do anything."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(SECONDS)
            torch.set_num_threads(1)  # the threads of the parent's OpenMP are not here
            kernels = Seeded(module, fault=fault, number=number)
            cuda_build.load = lambda name: kernels
            for seed in range(seeds):
                for shape in shapes:
                    kernels.seed = 100 * seed
                    drive(CPU, SHAPES[shape], seed)
            status = 0
        finally:  # whatever was raised
            os._exit(status)
    return os.waitpid(child, 0)[1] != 0


@pytest.fixture(scope="module")
def module():
    return host.load("plan_fetch")


def test_nothing_is_noticed_without_a_fault(module):
    assert not noticed(module, (*ONE, *SEVERAL), seeds=3)


@pytest.mark.parametrize("number", [0, 1])
def test_each_grid_barrier_is_needed(module, number):
    assert noticed(module, SEVERAL, fault=SKIP_GRID_BARRIER, number=number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_each_block_barrier_is_needed(module, number):
    assert noticed(module, (*ONE, *SEVERAL), fault=SKIP_BLOCK_BARRIER, number=number)


@dataclass(frozen=True)
class Mutant:
    name: str
    line: str  # of the source
    broken: str
    file: str = "plan_fetch.cu"
    shapes: tuple[str, ...] = SEVERAL


MUTANTS = [
    Mutant("a hit is not stamped",
           "if (x.row[i] >= 0) use_row(g, hand, x.row[i]);", ""),
    Mutant("a row in use is eligible",
           "const int oldest_kept = max(limit, hand.min_age - 1);",
           "const int oldest_kept = max(limit, hand.min_age - 2);"),
    Mutant("tickets begin at 1",
           "__shfl_sync(0xffffffffu, base, 0) + __popc(votes & ((1u << lane) - 1))",
           "__shfl_sync(0xffffffffu, base, 0) + __popc(votes & ((2u << lane) - 1))"),
    Mutant("a ticket too many",
           "eligible && ticket < wanted &&", "eligible && ticket <= wanted &&"),
    Mutant("every lookup of a slot has its claim",
           "mine[i] = x.row[i] == kPending && load_relaxed(g.slot_row + x.slot[i]) == claim;",
           "mine[i] = x.row[i] == kPending && claim != 0;"),
    Mutant("a lookup does not claim",
           "if (x.row[i] == kPending) atomicMin(g.slot_row + x.slot[i], kClaim + place);",
           "if (x.row[i] == kPending && place % 7) "
           "atomicMin(g.slot_row + x.slot[i], kClaim + place);"),
    Mutant("the old owner keeps its row",
           "store_relaxed(g.slot_row + g.row_slot[row[i]], kNone);", ""),
    Mutant("two blocks share a chunk",
           "s.position = atomicAdd(g.words + SCANNED, chunk);",
           "s.position = load_relaxed(g.words + SCANNED); "
           "store_relaxed(g.words + SCANNED, s.position + chunk);",
           shapes=("chunks that are a part of the rows",)),
    Mutant("two blocks take a row",
           "atomicCAS(g.row_stamp + row[i], stamp[i], hand.stamp) == stamp[i]",
           "(store_relaxed(g.row_stamp + row[i], hand.stamp), true)"),
    Mutant("two blocks share a part of the list",
           "s.position = atomicAdd(a.num_misses, got);",
           "s.position = load_relaxed(a.num_misses); "
           "store_relaxed(a.num_misses, s.position + got);"),
    Mutant("the lookups of another query",
           "    if (again) read_again(a, query, x);\n    assign",
           "    if (again && a.width < 0) read_again(a, query, x);\n    assign"),
    Mutant("the tick stands still",
           "g.words[TICK] = (tick + 1) & kTickMask;", "g.words[TICK] = tick;"),
    Mutant("a warm-up makes rows older",
           "if (age_of(hand, stamp) > age_of(hand, hand.stamp)) {", "if (stamp != kFree) {"),
    Mutant("a scan is not ended",
           "g.words[SCANNED] = g.words[SEEN] = g.words[CUT] = 0;", "g.words[SEEN] = 0;"),
    Mutant("some blocks do not copy",
           "copy_any(a.copy, first, copying);", "copy_any(a.copy, first, blocks);"),
    Mutant("a row's last words are not copied",
           "word < width &&", "word < width - 1 &&", "copy_rows.cuh"),
    Mutant("a row of the list twice",
           "const int slot = listed ? c.slots[first + lane] : -1;",
           "const int slot = listed ? c.slots[first] : -1;", "copy_rows.cuh"),
    Mutant("hits are listed late",
           "early[i] = split && x.row[i] >= 0;", "early[i] = split && x.row[i] > 1;"),
    Mutant("a barrier inside a plan of one query",
           "if constexpr (kSingle) {\n    __syncthreads();", "if constexpr (kSingle) {",
           shapes=ONE),
]  # fmt: skip


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """Host builds of all mutants, in processes of their own: mutant -> a call that waits for it."""
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(2) as threads:
        yield {m: threads.submit(_build, m, folder / str(i)).result for i, m in enumerate(MUTANTS)}


def _build(mutant, folder):
    shutil.copytree(cuda_build.SOURCE_DIR, folder)
    source = folder / mutant.file
    text = source.read_text()
    assert text.count(mutant.line) >= 1, "the source has changed: change the mutant"
    source.write_text(text.replace(mutant.line, mutant.broken))
    return host.load("plan_fetch", folder, ("-O0",))  # half the time to compile


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_broken_sources_are_noticed(builds, mutant):
    assert noticed(builds[mutant](), mutant.shapes)
