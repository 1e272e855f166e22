"""The host tier: every slot's latent row of every layer, in pinned host memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
GIB = 1 << 30


class HostTier:
    """Rows [layers][slots][row_bytes], one tensor a layer; addressed by SGLang's slot.

    num_slots, num_layers: sizes
    row_shape, dtype: of one row, e.g. (1, 656) uint8
    Pinned where a CUDA device is there, so that the device can read it by address.
    Raises: ValueError if the rows would not fit into the host memory that is free.
    """

    def __init__(self, num_layers: int, num_slots: int, row_shape: tuple[int, ...], dtype):
        width = torch.Size(row_shape).numel() * dtype.itemsize
        need, free = num_layers * num_slots * width, free_host_bytes()
        if need > free:
            raise ValueError(
                f"host tier must fit into free host memory: got {need / GIB:.2f} GiB "
                f"({num_slots} slots x {num_layers} layers x {width} B), limit {free / GIB:.2f} "
                "GiB (MemAvailable and the cgroup's). Lower --ess-host-gib or "
                "--max-total-tokens."
            )
        pinned = torch.cuda.is_available()
        # zeros, not empty: the kernel hands the pages out as they are first written.
        self.rows = [
            torch.zeros(num_slots, *row_shape, dtype=dtype, pin_memory=pinned)
            for _ in range(num_layers)
        ]
        self.row_bytes = width

    @property
    def num_slots(self) -> int:
        return len(self.rows[0])

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)


def free_host_bytes() -> int:
    """Host memory this process may still take: MemAvailable, or less under a cgroup limit."""
    limits = [_meminfo("MemAvailable")]
    for limit, usage, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limits.append(_cgroup_free(CGROUP / limit, CGROUP / usage, CGROUP / stat))
    return min(value for value in limits if value is not None)


def _meminfo(key: str) -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_free(limit: Path, usage: Path, stat: Path) -> int | None:
    """Bytes left of a cgroup's limit, file pages it can drop included; None without a limit."""
    try:
        total, used = limit.read_text().strip(), int(usage.read_text())
        pairs = (line.split() for line in stat.read_text().splitlines())
        droppable = {key: int(value) for key, value in pairs}
    except OSError:
        return None
    if not total.isdigit():  # "max"
        return None
    file = droppable.get("total_inactive_file", droppable.get("inactive_file", 0))
    return max(0, int(total) - used + file)
