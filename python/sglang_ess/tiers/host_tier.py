"""The host tier: every slot's latent row of every layer, in page-locked host memory."""

from __future__ import annotations

import logging
import mmap
import os
import resource
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sglang_ess.layout import GIB
from sglang_ess.tiers import cgroup

logger = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
LOG_SECONDS = 10  # between two lines of progress


class HostTier:
    """Rows [layers][slots][row_bytes], one tensor a layer, addressed by SGLang's slot.

    row_shape, dtype: of one row, e.g. (1, 656) uint8
    With a CUDA device the rows are page-locked, so that the device reads them by address; all
    their memory is taken and zeroed at the start. Without one, a page is taken at its first write.
    Raises: ValueError if the rows do not fit into the free host memory, RuntimeError if CUDA
    cannot lock them.
    """

    def __init__(
        self, num_layers: int, num_slots: int, row_shape: tuple[int, ...], dtype: torch.dtype
    ):
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
        self.row_bytes = width
        self._unlock: Callable[[], object] | None = None
        if torch.cuda.is_available():
            self.rows = [_pages(shape, dtype) for _ in range(num_layers)]
            cudart: Any = torch.cuda.cudart()
            locked: list[torch.Tensor] = []
            # Runs at exit too. It keeps the rows alive: locked memory must not be given back.
            self._unlock = weakref.finalize(self, _unlock, cudart, locked)
            try:
                _lock(cudart, self.rows, locked)
            except RuntimeError:
                self.close()
                raise
        else:
            # zeros, not empty: the kernel provides zeroed pages at their first write.
            self.rows = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]

    @property
    def num_slots(self) -> int:
        """Slots, which is rows per layer."""
        return len(self.rows[0])

    @property
    def nbytes(self) -> int:
        """Host bytes of all layers."""
        return sum(rows.nbytes for rows in self.rows)

    def close(self) -> None:
        """Unlock the rows; the device must not use them any more. A second call does nothing."""
        if self._unlock is not None:
            self._unlock()


def _pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros in memory pages of their own.

    torch's pinned allocator rounds sizes up to a power of two. Its plain allocator lets two
    tensors share a page, which CUDA would have to lock twice.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Without it, fork() copies all locked pages for the child (from Linux 5.12 on).
    pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=dtype).view(shape)  # keeps the pages


def _lock(cudart: Any, layers: list[torch.Tensor], locked: list[torch.Tensor]) -> None:
    """Page-lock the layers in order, and append each locked one to `locked`.

    Raises: RuntimeError with sizes at the first layer that CUDA cannot lock.
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
        # Flags 0: with unified addressing (any 64-bit host) the rows are mapped for all devices.
        error = cudart.cudaHostRegister(rows.data_ptr(), rows.nbytes, 0)
        if int(error) != 0:
            bound = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            is_limited = bound != resource.RLIM_INFINITY and bound < total
            limit = "unlimited" if bound == resource.RLIM_INFINITY else f"{bound / GIB:.2f} GiB"
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


def _unlock(cudart: Any, locked: list[torch.Tensor]) -> None:
    while locked:
        error = cudart.cudaHostUnregister(locked[-1].data_ptr())
        if int(error) != 0:  # at exit the driver may be gone already
            logger.debug("cudaHostUnregister: CUDA error %d", int(error))
        locked.pop()


def free_host_bytes() -> int:
    """Host bytes that this process may still take: MemAvailable, or less under a cgroup limit."""
    return min(
        value for value in (_meminfo("MemAvailable"), cgroup.free_bytes()) if value is not None
    )


def _meminfo(key: str) -> int:
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
