"""The host tier's sizes, how a CUDA host locks it, and what it takes for free host memory."""

import gc
import logging
import mmap
import os
import re
import resource
import time
from functools import partial

import pytest
import torch

from sglang_ess.tiers import HostTier, cgroup, free_host_bytes, host_memory, host_tier, numa
from sglang_ess.tiers.host_memory import HostMemoryError

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB available and no cgroup; write(name, text) adds a file to it."""
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(cgroup, "free_bytes", partial(cgroup.free_bytes, tmp_path / "proc"))

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{text}\n")

    write("meminfo", "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:  8388608 kB")
    return write


@pytest.mark.parametrize(
    "shape, dtype, row_bytes",
    [((1, 656), torch.uint8, 656), ((1, 576), torch.bfloat16, 1152), ((576,), torch.float32, 2304)],
)
def test_sizes(shape, dtype, row_bytes):
    tier = HostTier(3, 50, shape, dtype)
    assert tier.row_bytes == row_bytes and tier.num_slots == 50
    assert tier.nbytes == 3 * 50 * row_bytes
    assert [rows.shape for rows in tier.rows] == [(50, *shape)] * 3
    assert all(rows.dtype == dtype and rows.is_contiguous() for rows in tier.rows)
    assert not any(rows.view(torch.uint8).any() for rows in tier.rows)
    assert len({rows.data_ptr() for rows in tier.rows}) == 3
    assert all(rows.is_pinned() == torch.cuda.is_available() for rows in tier.rows)


def test_more_than_is_free_is_refused_with_numbers(machine, tmp_path):
    machine("proc/cgroup", "0::/job")
    machine("proc/mountinfo", f"30 23 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw")
    machine("memory.max", GIB)
    machine("memory.current", GIB // 2)
    machine("memory.stat", "anon 5")
    slots = GIB // 2 // 656 // 2
    HostTier(2, slots, (656,), torch.uint8)  # just fits
    with pytest.raises(HostMemoryError) as caught:
        HostTier(4, slots, (656,), torch.uint8)
    for part in ("1.00 GiB", f"{slots} slots x 4 layers x 656 B", "limit 0.50 GiB", "Lower"):
        assert part in str(caught.value)


def test_without_a_cgroup(machine):
    assert free_host_bytes() == 8 * GIB


def test_the_lesser_of_the_machine_and_the_cgroup(machine, monkeypatch):
    for free, expected in ((2 * GIB, 2 * GIB), (0, 0), (99 * GIB, 8 * GIB)):
        monkeypatch.setattr(cgroup, "free_bytes", lambda free=free: free)
        assert free_host_bytes() == expected


def test_a_kernel_without_mem_available(machine):
    machine("meminfo", "MemTotal: 99 kB")
    assert 0 < free_host_bytes() < 1 << 50


def test_this_machine():
    assert 0 < free_host_bytes() < 1 << 50


class Cudart:
    """torch.cuda.cudart(), which no machine without a GPU has: it records what is locked.

    fails_at: the registration that gives CUDA's error 2, counted from 0
    """

    def __init__(self, fails_at=None):
        self.fails_at, self.calls, self.locked, self.unlocked = fails_at, 0, {}, []

    def cudaHostRegister(self, address, num_bytes, flags):
        assert flags == 0
        self.calls += 1
        if self.calls - 1 == self.fails_at:
            return 2
        page = mmap.PAGESIZE
        assert address % page == 0, "a page would be shared with what lies before"
        pages = range(address // page, -(-(address + num_bytes) // page))
        assert all(pages.start >= r.stop or pages.stop <= r.start for r in self.locked.values())
        self.locked[address] = pages
        return 0

    def cudaHostUnregister(self, address):
        if address not in self.locked:
            return 713
        self.unlocked.append(self.locked.pop(address))
        return 0

    def cudaGetErrorString(self, error):
        return {2: "out of memory"}[error]


@pytest.fixture
def cuda_host(monkeypatch):
    def give(fails_at=None):
        cudart = Cudart(fails_at)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(numa, "node_of_gpu", lambda: None)
        return cudart

    return give


needs_a_fake = pytest.mark.skipif(torch.cuda.is_available(), reason="has a cudart of its own")


@needs_a_fake
def test_every_layer_is_locked_in_whole_pages_and_once(cuda_host):
    cudart = cuda_host()
    tier = HostTier(3, 50, (1, 656), torch.uint8)  # 8 pages and 32 bytes
    assert list(cudart.locked) == [rows.data_ptr() for rows in tier.rows]
    assert [len(pages) for pages in cudart.locked.values()] == [-(-50 * 656 // mmap.PAGESIZE)] * 3
    assert tier.nbytes == 3 * 50 * 656
    for i, rows in enumerate(tier.rows):
        assert rows.shape == (50, 1, 656) and rows.is_contiguous() and not rows.any()
        rows.fill_(i + 1)
    assert [int(rows.min()) for rows in tier.rows] == [1, 2, 3]
    tier.close()
    assert not cudart.locked and len(cudart.unlocked) == 3
    tier.close()  # and at exit
    assert cudart.calls == 3 and len(cudart.unlocked) == 3


@needs_a_fake
def test_rows_that_outlive_the_tier_are_unlocked_before_their_memory_goes(cuda_host):
    cudart = cuda_host()
    tier = HostTier(2, 10, (576,), torch.bfloat16)
    rows = tier.rows[1]
    del tier
    gc.collect()
    assert not cudart.locked
    assert rows.fill_(1).min() == 1


@needs_a_fake
@pytest.mark.parametrize(
    ("limit", "is_to_blame"), [(2 << 10, True), (8 << 10, False), (resource.RLIM_INFINITY, False)]
)
def test_a_lock_that_fails_says_how_far_it_got_and_leaves_nothing_locked(
    cuda_host, monkeypatch, limit, is_to_blame
):
    """limit: on locked memory, beside a host tier of "4 GiB": by it the advice goes."""
    cudart = cuda_host(fails_at=2)
    monkeypatch.setattr(host_tier, "GIB", 1 << 10)
    monkeypatch.setattr(host_tier.resource, "getrlimit", lambda _: (limit, limit))
    with pytest.raises(HostMemoryError) as caught:
        HostTier(4, 64, (16,), torch.uint8)
    for part in ("out of memory", "error 2", "2.00 of 4.00", "layer 2 of 4", "--ess-host-gib"):
        assert part in str(caught.value)
    assert f"memory {'unlimited' if limit < 0 else f'{limit >> 10}.00 GiB'}" in str(caught.value)
    assert ("--ulimit memlock=-1" in str(caught.value)) == is_to_blame
    assert ("Give the container more memory" in str(caught.value)) != is_to_blame
    assert "\n" not in str(caught.value)
    assert not cudart.locked and len(cudart.unlocked) == 2


@needs_a_fake
def test_a_start_tells_its_progress_and_what_it_got(cuda_host, monkeypatch, caplog):
    cuda_host()
    monkeypatch.setattr(host_tier, "LOG_SECONDS", 0)
    with caplog.at_level(logging.INFO, host_tier.__name__):
        tier = HostTier(3, 50, (656,), torch.uint8)
    *progress, last = (record.getMessage() for record in caplog.records)
    done, total = (n * 9 * mmap.PAGESIZE / GIB for n in (1, 3))
    rate = r"GiB populated and locked, \d+\.\d\d GiB/s by \d+ threads"
    assert re.fullmatch(rf"ESS: host tier: {done:.2f} of {total:.2f} {rate}", progress[0])
    assert len(progress) == 3
    assert re.match(rf"ESS: host tier ready: {total:.2f} of {total:.2f} {rate}; ", last)
    assert last.endswith(tier.residence.text)
    caplog.clear()
    monkeypatch.setattr(host_tier, "LOG_SECONDS", 10)
    with caplog.at_level(logging.INFO, host_tier.__name__):
        HostTier(3, 50, (656,), torch.uint8)
    assert len(caplog.records) == 1


@needs_a_fake
def test_the_rows_are_bound_to_the_gpus_node(cuda_host, monkeypatch, caplog):
    cuda_host()
    bound = []
    monkeypatch.setattr(numa, "node_of_gpu", lambda: 3)
    monkeypatch.setattr(numa, "bind", lambda *call, strict: bound.append(call))
    tier = HostTier(3, 50, (656,), torch.uint8)
    assert [call[0] for call in sorted(bound)] == [rows.data_ptr() for rows in tier.rows]
    assert {call[1:] for call in bound} == {(9 * mmap.PAGESIZE, (3,))}
    monkeypatch.setattr(numa, "bind", lambda *_, strict: "mbind: EPERM")
    with caplog.at_level(logging.INFO, host_tier.__name__):
        assert HostTier(3, 50, (656,), torch.uint8).residence.num_bytes == 27 * mmap.PAGESIZE
    assert caplog.records[-1].getMessage().endswith(", not bound to NUMA node 3: mbind: EPERM")


@needs_a_fake
def test_the_next_layers_are_populated_while_one_is_locked(cuda_host, monkeypatch):
    """Locking the first layer takes until the last one is populated."""
    cudart = cuda_host()
    memories, lock = [], cudart.cudaHostRegister

    class Memory(host_memory.HostMemory):
        def __init__(self, *args):
            super().__init__(*args)
            memories.append(self)

    def slow_lock(address, num_bytes, flags):
        until = time.monotonic() + 20
        while sum(memories[0].residence().node_bytes.values()) < memories[0].num_bytes:
            assert time.monotonic() < until, "nobody populates meanwhile"
        return lock(address, num_bytes, flags)

    monkeypatch.setattr(host_tier, "HostMemory", Memory)
    monkeypatch.setattr(cudart, "cudaHostRegister", slow_lock)
    assert len(HostTier(4, 5000, (656,), torch.uint8).rows) == len(cudart.locked) == 4


@needs_a_fake
def test_memory_that_runs_out_meanwhile_is_one_line_and_leaves_nothing_locked(
    cuda_host, monkeypatch
):
    cudart, left = cuda_host(), iter([GIB, GIB, 7 * mmap.PAGESIZE])
    monkeypatch.setattr(host_memory, "MAX_THREADS", 1)
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: next(left, 0))
    with pytest.raises(HostMemoryError) as caught:
        HostTier(4, 50, (640,), torch.uint8)
    for part in ("while it is populated: got 0.00 GiB left", "--ess-host-gib", "Free memory"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not cudart.locked and len(cudart.unlocked) == 2


@needs_a_fake
def test_a_child_gets_no_copy_of_locked_pages(cuda_host):
    """fork() copies locked pages at once; these are not in the child at all."""
    cuda_host()
    tier = HostTier(1, 50, (656,), torch.uint8)
    address, child = tier.rows[0].data_ptr(), os.fork()
    if child == 0:
        spans = [line.split()[0].split("-") for line in open("/proc/self/maps")]
        mapped = any(int(first, 16) <= address < int(end, 16) for first, end in spans)
        os._exit(1 if mapped else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert int(tier.rows[0].sum()) == 0
