"""Host memory that a GPU will read: in huge pages, near the GPU, populated by several threads.

cudaHostRegister would touch the pages one after another, 4 KiB each, in the calling thread. With
pages of 2 MiB the GPU also needs 512 times fewer translations for scattered rows. Whatever the
host lacks (huge pages, MADV_POPULATE_WRITE, NUMA) is left out.
Source: madvise(2); kernel docs, admin-guide/mm/transhuge; proc(5) on smaps and numa_maps.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_ess.errors import Refusal
from sglang_ess.layout import GIB, MIB
from sglang_ess.tiers import cgroup, numa

logger = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
THP = Path("/sys/kernel/mm/transparent_hugepage")
PROC = Path("/proc/self")
MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap module has no name for it
# Kernels without MADV_POPULATE_WRITE answer EINVAL, sandboxes EPERM or ENOSYS.
NOT_SUPPORTED = (errno.EINVAL, errno.EPERM, errno.ENOSYS)
CHUNK_BYTES = 64 * MIB  # what one thread populates at a time
MAX_THREADS = 8  # of a rank; a node has up to 8 ranks
# A node must have this much left to be the only source of a chunk: 8 ranks x 8 threads x CHUNK.
NODE_SPARE_BYTES = 4 * GIB


class HostMemoryError(Refusal):
    """One line for the operator: host memory that cannot be had."""


@dataclass(frozen=True)
class Residence:
    """Where the pages of a mapping lie.

    huge_bytes: in huge pages; node_bytes: {NUMA node: bytes}, empty on a kernel without NUMA
    """

    num_bytes: int
    huge_bytes: int
    node_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def huge_share(self) -> float:
        return min(1.0, self.huge_bytes / max(1, self.num_bytes))

    @property
    def text(self) -> str:
        """For example "100% in huge pages, all on NUMA node 1"."""
        parts = [f"{n / GIB:.2f} GiB on NUMA node {node}" for node, n in self.node_bytes.items()]
        if len(parts) == 1:
            parts = [f"all on NUMA node {node}" for node in self.node_bytes]
        return ", ".join([f"{self.huge_share:.0%} in huge pages", *parts])


class HostMemory:
    """Zeroed memory of this process alone or of several, not touched yet.

    num_bytes: whole pages of 4 KiB (mmap.PAGESIZE)
    nodes: NUMA nodes to take it from, in turns if there are several; none: the kernel's choice
    threads: that populate it; None: one for each usable core, at most MAX_THREADS
    shared: descriptor of the memory that several processes map (shared_memory.py); the caller may
        close it. None: memory of this process alone
    unbound: why it is not bound to the nodes; empty if it is, or if none were named
    Raises: HostMemoryError if the kernel gives no addresses.
    """

    def __init__(
        self,
        num_bytes: int,
        nodes: Sequence[int] = (),
        threads: int | None = None,
        shared: int | None = None,
    ):
        self.num_bytes, self.nodes, self.unbound = num_bytes, tuple(nodes), ""
        self.threads = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))
        huge = huge_page_bytes(is_shared=shared is not None)
        # A mapping smaller than a huge page would grow to one.
        self._is_huge = 0 < huge <= num_bytes
        align = huge if self._is_huge and shared is None else mmap.PAGESIZE
        # Byte 0 of shared memory is byte 0 on every rank. Where it may have huge pages the kernel
        # itself begins it at one (shmem_get_unmapped_area in mm/shmem.c).
        length = num_bytes + align if shared is None else num_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if shared is None else mmap.MAP_SHARED
        try:
            self._map = mmap.mmap(-1 if shared is None else shared, length, flags=flags)
        except OSError as error:
            raise HostMemoryError(
                f"host memory must have addresses: got {os.strerror(error.errno or 0)} for "
                f"{num_bytes / GIB:.2f} GiB. Raise ulimit -v, or set vm.overcommit_memory to 0."
            ) from error
        start = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        self.address = -(-start // align) * align  # only whole huge pages are huge
        self._offset = self.address - start
        # Without it, fork() copies all locked pages for the child (from Linux 5.12 on).
        # A child that outlives this process would keep shared memory, too.
        _madvise(start, length, mmap.MADV_DONTFORK)
        if shared is not None and huge == 0 and torch.cuda.is_available():
            logger.warning(
                "ESS: host memory that ranks share must have huge pages to be fast on a GPU: got "
                "%s in %s. Set it to advise.",
                shared_huge_pages() or "nothing", THP / "shmem_enabled",
            )  # fmt: skip
        if self._is_huge and (code := _madvise(self.address, num_bytes, mmap.MADV_HUGEPAGE)):
            logger.info("ESS: no huge pages for host memory: madvise: %s", os.strerror(code))
        self._can_populate = True

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over these bytes, which keeps the memory. offset: in bytes"""
        count = torch.Size(shape).numel()
        data = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._offset + offset)
        return data.view(tuple(shape))

    def populate(self, parts: Sequence[range]) -> Iterator[range]:
        """Touch the parts in order; yield each as soon as all its pages are there.

        parts: ranges of bytes, each from the start of a page
        The threads go on with later parts while the caller uses one.
        Raises: HostMemoryError, before the machine or the cgroup runs out of memory if it can.
        """
        errors: list[HostMemoryError] = []

        def work_on(chunk: range) -> None:
            if errors:  # there is no memory for this chunk either
                raise errors[0]
            try:
                self._populate(chunk)
            except HostMemoryError as error:
                errors.append(error)
                raise

        with ThreadPoolExecutor(self.threads, "ess-populate") as pool:
            work: list[list[Future[None]]] = [
                [pool.submit(work_on, chunk) for chunk in _chunks(part)] for part in parts
            ]
            try:
                for part, futures in zip(parts, work, strict=True):
                    for future in futures:
                        future.result()
                    yield part
            finally:  # after an error, and if the caller stops early
                pool.shutdown(wait=False, cancel_futures=True)

    def residence(self) -> Residence:
        """Where the pages lie now. Walks the whole process's page tables: seconds for a TiB."""
        span = range(self.address, self.address + self.num_bytes)
        return Residence(self.num_bytes, _huge_bytes(span), _node_bytes(span))

    def _populate(self, chunk: range) -> None:
        address, num_bytes = self.address + chunk.start, len(chunk)
        self._check_room(num_bytes)
        self._bind(address, num_bytes)
        if self._can_populate:
            error = _madvise(address, num_bytes, MADV_POPULATE_WRITE)
            if error == 0:
                return
            if error not in NOT_SUPPORTED:
                raise self._error(f"{os.strerror(error)} from the kernel", chunk)
            self._can_populate = False
        ctypes.memset(address, 0, num_bytes)  # ctypes lets other threads run meanwhile

    def _check_room(self, num_bytes: int) -> None:
        """Refuse what the kernel would answer by killing a process."""
        if (free := free_host_bytes()) < num_bytes:
            raise self._error(f"{free / GIB:.2f} GiB left (MemAvailable and the cgroup's)")

    def _bind(self, address: int, num_bytes: int) -> None:
        """Bind a chunk to the nodes; if there is one, strictly while it has room.

        A strict policy makes the kernel drop the node's file pages, of which there are many once
        the weights are read. On a node that is full it would kill a process instead.
        """
        if not self.nodes or self.unbound:
            return
        has_room = len(self.nodes) == 1 and numa.free_bytes(self.nodes[0]) > NODE_SPARE_BYTES
        if reason := numa.bind(address, num_bytes, self.nodes, strict=has_room):
            self.unbound = reason

    def _error(self, found: str, chunk: range | None = None) -> HostMemoryError:
        where = f" at {chunk.start / GIB:.2f} GiB" if chunk else ""
        return HostMemoryError(
            f"host tier of {self.num_bytes / GIB:.2f} GiB must fit into free host memory while it "
            f"is populated: got {found}{where}. Free memory, or lower --ess-host-gib or "
            "--max-total-tokens."
        )


def huge_page_bytes(is_shared: bool = False) -> int:
    """Bytes of a transparent huge page; 0 if the kernel has none or never uses them.

    is_shared: of memory that several processes map (memfd, shmem), which has a switch of its own
    """
    try:
        chosen = shared_huge_pages() if is_shared else _chosen(THP / "enabled")
        if chosen in ("never", "deny", ""):
            return 0
        return int((THP / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def shared_huge_pages() -> str:
    """When the kernel gives huge pages to memory that processes share; "" if it knows none.

    One of always, within_size, advise, never, deny, force. Source: admin-guide/mm/transhuge.
    """
    try:
        return _chosen(THP / "shmem_enabled")
    except OSError:
        return ""


def _chosen(file: Path) -> str:
    """The word in brackets, as in "always [madvise] never"."""
    return file.read_text().partition("[")[2].partition("]")[0]


def free_host_bytes() -> int:
    """Host bytes that this process may still take: MemAvailable, or less under a cgroup limit."""
    available = meminfo_bytes("MemAvailable")
    if available is None:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limited = cgroup.free_bytes()
    return available if limited is None else min(available, limited)


def meminfo_bytes(key: str) -> int | None:
    """A line of /proc/meminfo in bytes; None on a kernel without it."""
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _chunks(part: range) -> Iterator[range]:
    """The part in chunks that end at multiples of CHUNK_BYTES, so that none splits a huge page."""
    step = max(CHUNK_BYTES, huge_page_bytes())
    edges = range(part.start // step * step + step, part.stop, step)
    for start, stop in zip([part.start, *edges], [*edges, part.stop], strict=True):
        yield range(start, stop)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _madvise(address: int, num_bytes: int, advice: int) -> int:
    """madvise(2), which lets other threads run meanwhile; returns errno, 0 if it worked."""
    return ctypes.get_errno() if _libc.madvise(address, num_bytes, advice) else 0


def _huge_bytes(span: range) -> int:
    """Bytes in huge pages of the mappings in a span of addresses, from smaps."""
    total, inside = 0, False
    for line in _lines("smaps"):
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):  # "7f0000000000-7f0000200000 rw-p ..."
            start, _, stop = name.partition("-")
            inside = int(start, 16) < span.stop and span.start < int(stop, 16)
        elif inside and name in ("AnonHugePages:", "ShmemPmdMapped:"):
            total += int(rest.split()[0]) * 1024
    return total


def _node_bytes(span: range) -> dict[int, int]:
    """{NUMA node: bytes} of the mappings in a span of addresses, from numa_maps."""
    found: dict[int, int] = {}
    for line in _lines("numa_maps"):
        start, *fields = line.split()
        if int(start, 16) not in span:
            continue
        pairs = dict(field.split("=", 1) for field in fields if "=" in field)
        page = int(pairs.get("kernelpagesize_kB", 4)) * 1024
        for key, value in pairs.items():
            if key[0] == "N" and key[1:].isdigit():
                node = int(key[1:])
                found[node] = found.get(node, 0) + int(value) * page
    return found


def _lines(name: str) -> Iterator[str]:
    try:
        with (PROC / name).open() as file:
            yield from file
    except OSError:  # a kernel without it
        return
