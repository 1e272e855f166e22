"""The host tier's sizes, and what it takes for free host memory."""

import pytest
import torch

from sglang_ess.tiers import HostTier, free_host_bytes, host_tier

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 8 GiB available and no cgroup; write(name, text) adds a file to it."""
    monkeypatch.setattr(host_tier, "CGROUP", tmp_path)
    monkeypatch.setattr(host_tier, "MEMINFO", tmp_path / "meminfo")

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


def test_more_than_is_free_is_refused_with_numbers(machine):
    machine("memory.max", GIB)
    machine("memory.current", GIB // 2)
    machine("memory.stat", "anon 5")
    slots = GIB // 2 // 656 // 2
    HostTier(2, slots, (656,), torch.uint8)  # just fits
    with pytest.raises(ValueError) as caught:
        HostTier(4, slots, (656,), torch.uint8)
    for part in ("1.00 GiB", f"{slots} slots x 4 layers x 656 B", "limit 0.50 GiB", "Lower"):
        assert part in str(caught.value)


def test_without_a_cgroup(machine):
    assert free_host_bytes() == 8 * GIB


def test_cgroup_v2(machine):
    machine("memory.max", 4 * GIB)
    machine("memory.current", 3 * GIB)
    machine("memory.stat", f"file 7\ninactive_file {GIB // 4}\nactive_file 9")
    assert free_host_bytes() == GIB + GIB // 4
    machine("memory.current", 5 * GIB)  # over its limit already: nothing, and not less
    assert free_host_bytes() == 0
    machine("memory.max", 99 * GIB)  # more than the machine has
    assert free_host_bytes() == 8 * GIB


def test_cgroup_v2_without_a_limit(machine):
    machine("memory.max", "max")
    machine("memory.current", 3 * GIB)
    machine("memory.stat", "inactive_file 1")
    assert free_host_bytes() == 8 * GIB


def test_cgroup_v1(machine):
    machine("memory/memory.limit_in_bytes", 2 * GIB)
    machine("memory/memory.usage_in_bytes", GIB)
    machine("memory/memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB // 2}")
    assert free_host_bytes() == GIB + GIB // 2
    machine("memory/memory.limit_in_bytes", 2**63 - 4096)  # v1's word for no limit
    assert free_host_bytes() == 8 * GIB


def test_a_cgroup_that_cannot_be_read_is_no_limit(machine):
    machine("memory.max", GIB)  # no memory.current: a hierarchy without the controller
    assert free_host_bytes() == 8 * GIB


def test_a_kernel_without_mem_available(machine):
    machine("meminfo", "MemTotal: 99 kB")
    assert 0 < free_host_bytes() < 1 << 50


def test_this_machine():
    assert 0 < free_host_bytes() < 1 << 50
