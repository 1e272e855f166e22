"""The stand-in for a GPU that runs CUDA C++ on the CPU: it makes races and deadlocks visible."""

import pytest
import torch

from tests.support.cuda_host import host
from tests.support.cuda_host.host import Seeded

SEEDS = 12
(
    RACE, ATOMIC, LANE_AWAY, TWO_OPERATIONS, SPIN, GRID_BARRIER, ORDERED, UNORDERED, UNCOOPERATIVE,
) = range(9)  # fmt: skip


@pytest.fixture(scope="module")
def module():
    return host.load("probe", host.HERE)


def words(number=1):
    return torch.zeros(number, dtype=torch.int32)


def total(kernels, kind, blocks=2, threads=64):
    result = words()
    kernels.probe(kind, result, blocks, threads)
    return int(result)


def test_seeds_make_races_visible(module):
    kernels = Seeded(module)
    assert {total(kernels, ATOMIC) for _ in range(SEEDS)} == {128}
    kernels.seed = 0
    sums = {total(kernels, RACE) for _ in range(SEEDS)}
    assert len(sums) > 1 and min(sums) < 64


def test_a_seed_repeats_its_interleaving(module):
    def sums():
        kernels = Seeded(module)
        return [total(kernels, RACE) for _ in range(SEEDS)]

    assert sums() == sums()


@pytest.mark.parametrize("fast", [True, False])
def test_a_lane_that_stays_away_is_a_deadlock(module, fast):
    kernels = module if fast else Seeded(module)
    with pytest.raises(RuntimeError, match="deadlock: 31 threads"):
        kernels.probe(LANE_AWAY, words(), 1, 32)
    assert total(kernels, ATOMIC) == 128  # the next launch finds no trace of it


def test_lanes_in_different_operations_are_an_error(module):
    with pytest.raises(RuntimeError, match="different warp operations"):
        module.probe(TWO_OPERATIONS, words(), 1, 32)


@pytest.mark.parametrize("fast", [True, False])
def test_a_block_may_wait_for_a_word_of_another(module, fast):
    kernels, result = module if fast else Seeded(module), words(2)
    kernels.probe(SPIN, result, 3, 64)
    assert result.tolist() == [1, 192]


@pytest.mark.parametrize("fast", [True, False])
def test_grid_barrier(module, fast):
    kernels, result = module if fast else Seeded(module), words(193)
    kernels.probe(GRID_BARRIER, result, 3, 64)
    assert result.tolist() == [192] * 193


def test_a_fault_lets_threads_past_a_barrier(module):
    kernels = Seeded(module, fault=host.SKIP_GRID_BARRIER)
    seen = set()
    for _ in range(SEEDS):
        result = words(193)
        kernels.probe(GRID_BARRIER, result, 3, 64)
        seen |= set(result.tolist())
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("kind", "blocks", "threads", "message"),
    [
        (UNCOOPERATIVE, 3, 64, "not cooperative"),
        (GRID_BARRIER, 4, 64, "too many blocks"),
        (ATOMIC, 0, 64, "invalid configuration"),
        (ATOMIC, 1, 1025, "invalid configuration"),
    ],
)
def test_it_launches_what_a_device_would(module, kind, blocks, threads, message):
    with pytest.raises(RuntimeError, match=f"probe was not launched: .*{message}"):
        module.probe(kind, words(4096), blocks, threads)


def test_races_are_found_in_every_schedule():
    kernels = host.load("probe", host.HERE, host.RACES)
    for kind in (ATOMIC, RACE, SPIN):  # by atomic operations and relaxed accesses alone
        kernels.probe(kind, words(2), 2, 64)
    kernels.probe(GRID_BARRIER, words(193), 3, 64)
    kernels.probe(ORDERED, words(128), 1, 64)
    for kind, blocks in ((UNORDERED, 1), (ORDERED, 2)):  # a block barrier orders one block
        with pytest.raises(RuntimeError, match="race: a .* by thread"):
            kernels.probe(kind, words(128), blocks, 64)
