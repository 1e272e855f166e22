"""The host tier: every slot's latent row of every layer, in page-locked host memory."""

from __future__ import annotations

import logging
import mmap
import os
import resource
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sglang_ess.layout import GIB
from sglang_ess.tiers import numa, rank_order
from sglang_ess.tiers.host_memory import (
    HostMemory,
    HostMemoryError,
    Residence,
    free_host_bytes,
    huge_page_bytes,
)
from sglang_ess.tiers.rank_order import RankOrder
from sglang_ess.tiers.shared_memory import shared_descriptor
from sglang_ess.tiers.tier_group import TierGroup

logger = logging.getLogger(__name__)

LOG_SECONDS = 10  # between two lines of progress


class HostTier:
    """Rows [layers][slots][row_bytes], one tensor a layer, addressed by SGLang's slot.

    row_shape, dtype: of one row, e.g. (1, 656) uint8
    group: ranks of this node that have the same rows. With several, all construct the tier
        together and get the same memory; rank 0 writes it (`order` says when)
    With a CUDA device the rows are page-locked, so that the device reads them by address; all
    their memory is taken and zeroed at the start. Without one, a page is taken at its first write
    (or, of shared memory, its first read).
    residence: where the pages lie; None without a CUDA device
    Raises: HostMemoryError if the rows do not fit into the free host memory, or if CUDA cannot
    lock them; PeerRefusal if another rank of the group raises.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        row_shape: tuple[int, ...],
        dtype: torch.dtype,
        group: TierGroup | None = None,
    ):
        self.group = group = group or TierGroup()
        shape = (num_slots, *row_shape)
        self.row_bytes = torch.Size(row_shape).numel() * dtype.itemsize
        self.residence: Residence | None = None
        self._unlock: Callable[[], object] | None = None
        with group.together():
            if group.is_writer:  # before any of the ranks takes a page
                _check_room(num_layers, num_slots, self.row_bytes)
        # A layer starts at a page, because CUDA would have to lock a shared page twice.
        stride = _whole_pages(num_slots * self.row_bytes)
        memory: HostMemory | None = None
        if torch.cuda.is_available() or group.size > 1:
            memory = self._map(num_layers * stride)
            self.rows = [memory.view(i * stride, shape, dtype) for i in range(num_layers)]
        else:
            # zeros, not empty: the kernel provides zeroed pages at their first write.
            self.rows = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self.order = RankOrder(group, self._counters(memory, num_layers * stride))
        if torch.cuda.is_available() and memory is not None:
            with group.together():
                self._lock(memory, stride)

    def _map(self, num_bytes: int) -> HostMemory:
        """Memory for the rows, and behind them for the counters of several ranks."""
        own = numa.node_of_gpu() if torch.cuda.is_available() else None
        nodes = sorted({node for node in self.group.exchange(own) if node is not None})
        if self.group.size == 1:
            return HostMemory(num_bytes, nodes)
        num_bytes += _whole_pages(RankOrder.num_bytes(self.group.size))
        descriptor = shared_descriptor(self.group, num_bytes)
        try:
            with self.group.together():
                return HostMemory(num_bytes, nodes, shared=descriptor)
        finally:
            os.close(descriptor)

    def _counters(self, memory: HostMemory | None, offset: int) -> np.ndarray | None:
        if memory is None or self.group.size == 1:
            return None
        lines = 1 + self.group.size
        return memory.view(offset, (lines, rank_order.LINE), torch.int64).numpy()

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

    def _lock(self, memory: HostMemory, stride: int) -> None:
        """Populate and lock all layers, one after another. stride: bytes from one to the next"""
        cudart: Any = torch.cuda.cudart()
        locked: list[torch.Tensor] = []
        # Runs at exit too. It keeps the rows alive: locked memory must not be given back.
        self._unlock = weakref.finalize(self, _unlock, cudart, locked)
        try:
            self.residence = _populate_and_lock(
                self.group, memory, stride, cudart, self.rows, locked
            )
        except HostMemoryError:
            self.close()
            raise


def _share(group: TierGroup, num_bytes: int) -> range:
    """The bytes that this rank populates: whole pages, and huge ones if there are any."""
    page = huge_page_bytes(is_shared=True) or mmap.PAGESIZE
    edges = [num_bytes * i // group.size // page * page for i in range(group.size)] + [num_bytes]
    return range(edges[group.rank], edges[group.rank + 1])


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _check_room(num_layers: int, num_slots: int, row_bytes: int) -> None:
    need, free = num_layers * num_slots * row_bytes, free_host_bytes()
    if need > free:
        raise HostMemoryError(
            f"host tier must fit into free host memory: got {need / GIB:.2f} GiB "
            f"({num_slots} slots x {num_layers} layers x {row_bytes} B), limit {free / GIB:.2f} "
            "GiB (MemAvailable and the cgroup's). Lower --ess-host-gib or "
            "--max-total-tokens."
        )


def _populate_and_lock(
    group: TierGroup,
    memory: HostMemory,
    stride: int,
    cudart: Any,
    layers: Sequence[torch.Tensor],
    locked: list[torch.Tensor],
) -> Residence:
    """Page-lock the layers in order while threads populate the next; append each to `locked`.

    Of several ranks each populates its share, and then each locks all layers for its own device.
    stride: bytes from a layer to the next
    This cannot run beside the loading of the weights: SGLang builds its pools after them
    (Scheduler.init_model_worker), by the device memory that they leave
    (KVCacheConfigurator._profile_available_bytes).
    Raises: HostMemoryError, also at the first layer that CUDA cannot lock.
    """
    parts = [range(i * stride, (i + 1) * stride) for i in range(len(layers))]
    since = logged = time.monotonic()
    populated = memory.populate(parts)
    if group.size > 1:
        with group.together():  # CUDA would touch one page after the other that is not there
            list(memory.populate([_share(group, len(layers) * stride)]))
        populated = iter(parts)
    for rows, part in zip(layers, populated, strict=True):
        # Flags 0: with unified addressing (any 64-bit host) the rows are mapped for all devices.
        error = int(cudart.cudaHostRegister(rows.data_ptr(), rows.nbytes, 0))
        if error != 0:
            raise _lock_error(cudart, error, locked, layers)
        locked.append(rows)
        if time.monotonic() - logged > LOG_SECONDS:
            logged = time.monotonic()
            logger.info("ESS: host tier: %s", _progress(part.stop, memory, logged - since))
    progress = _progress(memory.num_bytes, memory, time.monotonic() - since)
    residence = memory.residence()
    nodes = ", ".join(map(str, memory.nodes))
    unbound = f", not bound to NUMA node {nodes}: {memory.unbound}" if memory.unbound else ""
    logger.info("ESS: host tier ready: %s; %s%s", progress, residence.text, unbound)
    return residence


def _progress(done: int, memory: HostMemory, seconds: float) -> str:
    return (
        f"{done / GIB:.2f} of {memory.num_bytes / GIB:.2f} GiB populated and locked, "
        f"{done / GIB / max(seconds, 1e-9):.2f} GiB/s by {memory.threads} threads"
    )


def _lock_error(
    cudart: Any, error: int, locked: Sequence[torch.Tensor], layers: Sequence[torch.Tensor]
) -> HostMemoryError:
    done, total = (sum(rows.nbytes for rows in some) for some in (locked, layers))
    bound = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    is_limited = bound != resource.RLIM_INFINITY and bound < total
    limit = "unlimited" if bound == resource.RLIM_INFINITY else f"{bound / GIB:.2f} GiB"
    advice = "Give the container more memory"
    if is_limited:
        advice = (
            "Raise that limit (ulimit -l unlimited; docker run --ulimit memlock=-1), and "
            "the container's memory if it is less than the host tier"
        )
    return HostMemoryError(
        f"host tier must be page-locked: got {cudart.cudaGetErrorString(error)} (CUDA "
        f"error {error}) after {done / GIB:.2f} of {total / GIB:.2f} GiB, layer "
        f"{len(locked)} of {len(layers)}, limit on locked memory {limit}. {advice}, "
        "or lower --ess-host-gib."
    )


def _unlock(cudart: Any, locked: list[torch.Tensor]) -> None:
    while locked:
        error = cudart.cudaHostUnregister(locked[-1].data_ptr())
        if int(error) != 0:  # at exit the driver may be gone already
            logger.debug("cudaHostUnregister: CUDA error %d", int(error))
        locked.pop()
