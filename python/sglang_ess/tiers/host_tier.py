"""The host tier: every slot's latent row of every layer, in page-locked host memory."""

from __future__ import annotations

import logging
import mmap
import os
import resource
import time
import weakref
from pathlib import Path

import torch

from sglang_ess.layout import GIB
from sglang_ess.tiers import cgroup

logger = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
LOG_SECONDS = 10  # between two lines of progress


class HostTier:
    """Rows [layers][slots][row_bytes], one tensor a layer; addressed by SGLang's slot.

    num_slots, num_layers: sizes
    row_shape, dtype: of one row, e.g. (1, 656) uint8
    Where a CUDA device is there the rows are page-locked, so that it can read them by address:
    all their memory is taken and zeroed at the start, which takes as long as the kernel needs
    for so many pages. Elsewhere a page is taken when it is first written.
    Raises: ValueError if the rows would not fit into the host memory that is free;
    RuntimeError if CUDA cannot lock them.
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
        shape = (num_slots, *row_shape)
        self.row_bytes, self._unlock = width, None
        if torch.cuda.is_available():
            self.rows = [_pages(shape, dtype) for _ in range(num_layers)]
            cudart, locked = torch.cuda.cudart(), []
            # At exit too. It holds the rows: memory must not be given back while it is locked.
            self._unlock = weakref.finalize(self, _unlock, cudart, locked)
            try:
                _lock(cudart, self.rows, locked)
            except RuntimeError:
                self.close()
                raise
        else:
            # zeros, not empty: the kernel hands the pages out as they are first written.
            self.rows = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]

    @property
    def num_slots(self) -> int:
        return len(self.rows[0])

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows)

    def close(self) -> None:
        """Unlock the rows, which the device must not use any more. Again: nothing."""
        if self._unlock is not None:
            self._unlock()


def _pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory pages of their own.

    torch's pinned allocator rounds a size up to a power of two, up to twice the memory; its
    plain one lets two tensors share a page, which CUDA would have to lock twice.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # fork() would copy locked pages, all of them, for the child (Linux 5.12 on).
    pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=dtype).view(shape)  # keeps the pages


def _lock(cudart, layers: list[torch.Tensor], locked: list[torch.Tensor]) -> None:
    """Page-lock the layers, in order; those that are go to `locked`.

    Raises: RuntimeError with sizes at the first that cannot be.
    """
    total = sum(rows.nbytes for rows in layers)
    logged = time.monotonic()
    for layer, rows in enumerate(layers):
        done = sum(one.nbytes for one in locked)
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            logger.info(
                "ESS: %.2f of %.2f GiB of host tier locked, %d of %d layers",
                done / GIB, total / GIB, layer, len(layers),
            )  # fmt: skip
        # 0: with unified addressing, which every 64-bit host has, mapped and for all devices.
        error = cudart.cudaHostRegister(rows.data_ptr(), rows.nbytes, 0)
        if int(error) != 0:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            is_limited = limit != resource.RLIM_INFINITY and limit < total
            limit = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / GIB:.2f} GiB"
            advice = "Give the container more memory"
            if is_limited:
                advice = (
                    "Raise that limit (ulimit -l unlimited; docker run --ulimit memlock=-1), and "
                    "the container's memory if it is less than the host tier"
                )
            raise RuntimeError(
                f"host tier must be page-locked: got {cudart.cudaGetErrorString(error)} (CUDA "
                f"error {int(error)}) after {done / GIB:.2f} of {total / GIB:.2f} GiB, layer "
                f"{layer} of {len(layers)}, limit on locked memory {limit}. {advice}, "
                "or lower --ess-host-gib."
            )
        locked.append(rows)


def _unlock(cudart, locked: list[torch.Tensor]) -> None:
    while locked:
        error = cudart.cudaHostUnregister(locked[-1].data_ptr())
        if int(error) != 0:  # at exit the driver may be gone, and the lock with it
            logger.debug("cudaHostUnregister: CUDA error %d", int(error))
        locked.pop()


def free_host_bytes() -> int:
    """Host memory this process may still take: MemAvailable, or less under a cgroup's limit."""
    return min(
        value for value in (_meminfo("MemAvailable"), cgroup.free_bytes()) if value is not None
    )


def _meminfo(key: str) -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
