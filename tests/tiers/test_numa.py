"""The node of a GPU, its free memory, and what is said where memory cannot be bound."""

import ctypes
import mmap
from types import SimpleNamespace

import pytest
import torch

from sglang_ess.tiers import numa


@pytest.mark.parametrize(
    ("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("", None), (None, None)]
)
def test_the_node_of_a_gpu(monkeypatch, tmp_path, text, node):
    gpus = [None, SimpleNamespace(pci_domain_id=0, pci_bus_id=0xAB, pci_device_id=0x1F)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(numa, "PCI_DEVICES", tmp_path)
    if text is not None:
        (tmp_path / "0000:ab:1f.0").mkdir()
        (tmp_path / "0000:ab:1f.0" / "numa_node").write_text(text)
    assert numa.node_of_gpu() == numa.node_of_gpu(1) == node


def test_what_a_node_has_free(monkeypatch, tmp_path):
    monkeypatch.setattr(numa, "NODES", tmp_path)
    assert numa.num_nodes() == 1 and numa.free_bytes(0) == 0
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
    values = {"MemTotal": 99, "MemFree": 5, "Active(file)": 3, "Inactive(file)": 2, "Dirty": 7}
    (tmp_path / "node1" / "meminfo").write_text(
        "".join(f"Node 1 {key}:   {value} kB\n" for key, value in values.items())
    )
    assert numa.num_nodes() == 2
    assert (numa.free_bytes(0), numa.free_bytes(1)) == (0, 10 * 1024)


def test_this_machine():
    assert numa.num_nodes() >= 1
    if (numa.NODES / "node0" / "meminfo").exists():
        assert 0 < numa.free_bytes(0) < 1 << 50


def test_without_libnuma(monkeypatch):
    monkeypatch.setattr(numa, "_libnuma", lambda: None)
    assert numa.bind(0, mmap.PAGESIZE, [0], strict=True) == "libnuma is not installed"


@pytest.mark.parametrize(
    ("nodes", "strict", "mode", "words"),
    [
        ([1], True, numa.MPOL_BIND, [2]),
        ([1], False, numa.MPOL_PREFERRED, [2]),
        ([0, 65], False, numa.MPOL_INTERLEAVE, [1, 2]),
    ],
)
def test_what_the_kernel_is_asked(monkeypatch, nodes, strict, mode, words):
    asked = []

    class Library:
        @staticmethod
        def mbind(address, num_bytes, mode, words, maxnode, flags):
            asked.append((address, num_bytes, mode, list(words), maxnode, flags))
            return 0

    monkeypatch.setattr(numa, "_libnuma", lambda: Library)
    assert numa.bind(4096, 8192, nodes, strict) is None
    assert asked == [(4096, 8192, mode, words, 64 * len(words) + 1, 0)]


@pytest.mark.skipif(numa._libnuma() is None, reason="no libnuma")
def test_a_node_that_is_not_there():
    pages = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    reason = numa.bind(address, mmap.PAGESIZE, [900], strict=True)
    assert reason and reason.startswith("mbind: E")
