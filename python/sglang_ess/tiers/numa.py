"""NUMA nodes: which one a GPU is attached to, what is free there, and binding memory to it.

Source: mbind(2), numa(7); kernel docs ABI/testing/sysfs-bus-pci (`numa_node`, -1 if unknown) and
ABI/stable/sysfs-devices-node (`meminfo` of a node).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

PCI_DEVICES = Path("/sys/bus/pci/devices")
NODES = Path("/sys/devices/system/node")
MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE = 1, 2, 3  # linux/mempolicy.h


def node_of_gpu(device: int | None = None) -> int | None:
    """The NUMA node of a CUDA device; None if the kernel names none.

    device: index among the visible devices; None: the current one
    """
    index = torch.cuda.current_device() if device is None else device
    found: Any = torch.cuda.get_device_properties(index)
    # Function 0 is the GPU; cudaDeviceProp has no function number.
    name = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    try:
        node = int((PCI_DEVICES / name / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def num_nodes() -> int:
    """NUMA nodes of this machine; 1 without NUMA."""
    return max(1, sum(1 for _ in NODES.glob("node[0-9]*")))


def free_bytes(node: int) -> int:
    """Bytes of a node that are free, or hold file pages that the kernel can drop; 0 if unknown."""
    try:
        lines = (NODES / f"node{node}" / "meminfo").read_text().splitlines()
    except OSError:
        return 0
    values = {line.split()[2].rstrip(":"): int(line.split()[3]) * 1024 for line in lines}
    return sum(values.get(key, 0) for key in ("MemFree", "Active(file)", "Inactive(file)"))


def bind(address: int, num_bytes: int, nodes: Sequence[int], strict: bool) -> str | None:
    """Have the kernel take these pages from a node when they are touched first.

    address: of the start of a page
    nodes: one, or several that take turns, a (huge) page each; then others help where one is full
    strict: from no other node, if there is one; else from it while it has any
    Returns why it cannot be done; None if it is.
    """
    library = _libnuma()
    if library is None:
        return "libnuma is not installed"
    words = (ctypes.c_ulong * (max(nodes) // 64 + 1))()
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    mode = MPOL_BIND if strict else MPOL_PREFERRED
    if len(nodes) > 1:
        mode = MPOL_INTERLEAVE
    maxnode = len(words) * 64 + 1  # mbind reads one bit less than maxnode says
    if library.mbind(address, num_bytes, mode, words, maxnode, 0):
        error = ctypes.get_errno()
        return f"mbind: {errno.errorcode.get(error, error)} ({os.strerror(error)})"
    return None


@cache
def _libnuma() -> Any:
    try:
        library = ctypes.CDLL("libnuma.so.1", use_errno=True)
    except OSError:
        return None
    number = ctypes.c_ulong
    library.mbind.argtypes = (
        ctypes.c_void_p, number, ctypes.c_int, ctypes.POINTER(number), number, ctypes.c_uint,
    )  # fmt: skip
    return library
