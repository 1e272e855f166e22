"""The copies of benchmarks/kernels.py: PCIe's peak, fetch and what fetch replaces, save.

What fetch replaces: a copy call a row (the loop is compiled, as a C++ runtime would issue it), one
cudaMemcpyBatchAsync, and torch's way: the miss list to the host, index_select into pinned
memory, one copy, index_copy_. Every one starts from the plan's miss list and ends with the rows
where attention reads them.
"""

from __future__ import annotations

import ctypes
import functools

import numba
import numpy as np
import torch

from benchmarks.kernels_points import POISON, Sizes, make_rows
from benchmarks.kernels_timing import EVENTS, WALL, Bench, Subject, require
from ess_kernels.fetch import fetch, fetch_reference
from ess_kernels.scatter import scatter_rows

OUR_FETCH = {"triton": fetch}
PROGRAMS = (4, 8, 12, 16, 24, 32, 48, 64, 96)  # of the sweep that says what limits fetch
MANY_ROWS = 1 << 16  # of 656 B: 43 MB, about the L2
HOST_TO_DEVICE = 1  # cudaMemcpyHostToDevice
LOCATION_DEVICE, LOCATION_HOST = 1, 2  # cudaMemLocationType
STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream


def row_bytes_of(rows: torch.Tensor) -> int:
    return rows.shape[1] * rows.itemsize


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """For comparing: NaN equals itself."""
    return rows.view(torch.uint8)


def measure_peak(bench: Bench, sizes: Sizes) -> None:
    """One large copy between pinned and device memory, each way: the roof of all the others."""
    host = torch.empty(sizes.peak_bytes, dtype=torch.uint8, pin_memory=bench.on_cuda)
    device = torch.randint(256, (sizes.peak_bytes,), dtype=torch.uint8, device=bench.device)
    host.copy_(device)
    for direction, target, source in (("h2d", device, host), ("d2h", host, device)):
        subject = Subject(
            [lambda t=target, s=source: t.copy_(s, non_blocking=True)],
            num_bytes=sizes.peak_bytes,
        )
        config = {"direction": direction, "bytes": sizes.peak_bytes}
        bench.time("pcie_peak", config, lambda s=subject: s, EVENTS)


class Fetches:
    """`sets` miss lists of batch x misses random rows, with room for a plan of all misses."""

    def __init__(self, host_rows, sizes: Sizes, batch: int, misses: int, device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.host, self.count = host_rows, batch * misses
        self.sets = sizes.sets if self.count < MANY_ROWS else 2
        num_rows, num_slots = batch * sizes.buffer, batch * sizes.context
        self.hot = torch.empty(num_rows, host_rows.shape[1], dtype=host_rows.dtype, device=device)

        def lists(limit):
            picks = [
                torch.randperm(limit, generator=generator, device=device)[: batch * sizes.topk]
                for _ in range(self.sets)
            ]
            return torch.stack(picks).int()

        self.slots, self.rows = lists(num_slots), lists(num_rows)
        self.num_misses = torch.tensor([self.count], dtype=torch.int32, device=device)

    def arguments(self, index: int) -> tuple:
        return self.host, self.hot, self.slots[index], self.rows[index], self.num_misses

    def poison(self) -> None:
        as_bytes(self.hot).fill_(POISON)

    def check(self, last: int) -> None:
        """Hot rows after sets 0 to `last`, whole: rows that no list names are still poison."""
        got, self.hot = self.hot, torch.empty_like(self.hot)
        self.poison()
        for index in range(last + 1):
            fetch_reference(*self.arguments(index))
        got, self.hot = self.hot, got
        require(torch.equal(as_bytes(got), as_bytes(self.hot)),
                "fetched rows differ from their host rows, or others changed")  # fmt: skip

    def subject(self, call) -> Subject:
        """call(host, hot, slots, rows, count) for each set."""
        ops = [lambda i=i: call(*self.arguments(i)) for i in range(self.sets)]
        num_bytes = self.count * row_bytes_of(self.host)
        return Subject(ops, self.poison, self.check, num_bytes)


@functools.cache
def cudart() -> ctypes.CDLL:
    """The CUDA runtime that torch loaded. Raises: OSError, or RuntimeError without CUDA."""
    if torch.version.cuda is None:
        raise RuntimeError("torch was built without CUDA")
    return ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")


@functools.cache
def row_copier(on_cuda: bool):
    """Compiled loop(to, from, bytes, stream) -> status: a copy call for each pair of addresses."""
    if not on_cuda:
        memcpy = ctypes.CDLL(None).memcpy
        memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        memcpy.restype = ctypes.c_void_p

        @numba.njit
        def loop(targets, sources, num_bytes, stream):
            for i in range(len(targets)):
                memcpy(targets[i], sources[i], num_bytes)
            return 0

        return loop
    copy = cudart().cudaMemcpyAsync
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
                     ctypes.c_void_p]  # fmt: skip
    copy.restype = ctypes.c_int

    @numba.njit
    def loop(targets, sources, num_bytes, stream):
        status = 0
        for i in range(len(targets)):
            status |= copy(targets[i], sources[i], num_bytes, HOST_TO_DEVICE, stream)
        return status

    return loop


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes: order, location and id of source and of target, flags."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("order", "source_type", "source_id", "target_type", "target_id", "flags")
    ]


def batch_copy(targets: np.ndarray, sources: np.ndarray, num_bytes: int, stream: int) -> int:
    """cudaMemcpyBatchAsync of rows; stream must not be the legacy default one."""
    count = len(targets)
    sizes, first = np.full(count, num_bytes, np.uint64), ctypes.c_size_t(0)
    attributes = _Attributes(STREAM_ORDER, LOCATION_HOST, 0, LOCATION_DEVICE, 0, 0)
    version = ctypes.c_int()
    cudart().cudaRuntimeGetVersion(ctypes.byref(version))
    failed = [ctypes.byref(ctypes.c_size_t())] if version.value < 13000 else []
    return cudart().cudaMemcpyBatchAsync(
        ctypes.c_void_p(targets.ctypes.data), ctypes.c_void_p(sources.ctypes.data),
        ctypes.c_void_p(sizes.ctypes.data), ctypes.c_size_t(count), ctypes.byref(attributes),
        ctypes.byref(first), ctypes.c_size_t(1), *failed, ctypes.c_void_p(stream),
    )  # fmt: skip


class AddressCopies:
    """Copies by address, which the host makes from lists that it already has (in its favour)."""

    def __init__(self, case: Fetches, bench: Bench, batched: bool):
        if batched and not bench.on_cuda:
            raise RuntimeError("cudaMemcpyBatchAsync needs a CUDA device")
        size = row_bytes_of(case.host)
        self._size, self._on_cuda = size, bench.on_cuda
        self._copy = batch_copy if batched else row_copier(bench.on_cuda)
        self._stream = torch.cuda.Stream() if bench.on_cuda else None

        def addresses(rows, places):
            places = places[:, : case.count].cpu().numpy().astype(np.uint64)
            return np.ascontiguousarray(rows.data_ptr() + places * size)

        self._targets = addresses(case.hot, case.rows)
        self._sources = addresses(case.host, case.slots)

    def copy(self, index: int) -> None:
        handle = 0
        if self._on_cuda:
            self._stream.wait_stream(torch.cuda.current_stream())
            handle = self._stream.cuda_stream
        status = self._copy(self._targets[index], self._sources[index], self._size, handle)
        if status:
            raise RuntimeError(f"the CUDA runtime returned error {status}")
        if self._on_cuda:
            torch.cuda.current_stream().wait_stream(self._stream)


def _address_subject(case: Fetches, bench: Bench, batched: bool) -> Subject:
    copies = AddressCopies(case, bench, batched)
    subject = case.subject(None)
    return Subject([lambda: copies.copy(0)], subject.before, subject.check, subject.num_bytes)


def _index_select_subject(case: Fetches, bench: Bench) -> Subject:
    shape = case.count, case.host.shape[1]
    gathered = torch.empty(shape, dtype=case.host.dtype, pin_memory=bench.on_cuda)
    staged = torch.empty(shape, dtype=case.host.dtype, device=bench.device)

    def call(host, hot, slots, rows, num_misses):
        count = int(num_misses)
        torch.index_select(host, 0, slots[:count].cpu(), out=gathered)
        staged.copy_(gathered, non_blocking=True)
        hot.index_copy_(0, rows[:count].long(), staged)

    subject = case.subject(call)
    return Subject(subject.ops[:1], subject.before, subject.check, subject.num_bytes)


def fetch_points(sizes: Sizes) -> list[tuple[int, int]]:
    return [(batch, misses) for batch in sizes.batches for misses in sizes.misses]


def measure_fetch(bench: Bench, host_rows, sizes: Sizes, points, seed: int) -> None:
    """Our fetch at the points (batch, misses)."""
    for batch, misses in points:
        config = {"batch": batch, "misses": misses, "row_bytes": row_bytes_of(host_rows)}
        bench.check_time()
        bench.progress(f"fetch {config}")
        case = Fetches(host_rows, sizes, batch, misses, bench.device, seed)
        for system, call in OUR_FETCH.items():
            bench.time("fetch", {"system": system} | config, lambda f=case, c=call: f.subject(c))


def measure_programs(bench: Bench, host_rows, sizes: Sizes, point, seed: int) -> None:
    """fetch by how many programs (SMs) it may take: is the link full, or not enough in flight?"""
    batch, misses = point
    case = Fetches(host_rows, sizes, batch, misses, bench.device, seed)
    for system, call in OUR_FETCH.items():
        for programs in PROGRAMS[:2] if bench.quick else PROGRAMS:
            config = {"system": system, "batch": batch, "misses": misses, "programs": programs}
            bench.time(
                "fetch_programs",
                config | {"row_bytes": row_bytes_of(host_rows)},
                lambda c=call, n=programs: case.subject(lambda *a: c(*a, n)),
            )


def measure_replaced(bench: Bench, host_rows, sizes: Sizes, points, seed: int) -> None:
    """What fetch replaces, at the same points."""
    for batch, misses in points:
        config = {"batch": batch, "misses": misses, "row_bytes": row_bytes_of(host_rows)}
        bench.check_time()
        bench.progress(f"copies that fetch replaces {config}")
        case = Fetches(host_rows, sizes, batch, misses, bench.device, seed)
        for system, make, timer in (
            ("memcpy_per_row", lambda c=case: _address_subject(c, bench, False), EVENTS),
            ("memcpy_batch", lambda c=case: _address_subject(c, bench, True), EVENTS),
            ("index_select", lambda c=case: _index_select_subject(c, bench), WALL),
        ):
            bench.time("fetch", {"system": system} | config, make, timer)


class Saves:
    """A decode step's new rows of every layer, and where in the host tier they go."""

    def __init__(self, host_rows, sizes: Sizes, batch: int, device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.layers, self.batch = sizes.layers, batch
        per_layer = len(host_rows) // sizes.layers
        self.host = [host_rows[i * per_layer : (i + 1) * per_layer] for i in range(sizes.layers)]
        row_bytes = row_bytes_of(host_rows)
        self.new = make_rows(sizes.layers * batch, row_bytes, device, generator)
        self.new = self.new.view(sizes.layers, batch, -1)
        self.slots = torch.randperm(per_layer, generator=generator, device=device)[:batch]
        self.num_bytes = sizes.layers * batch * row_bytes

    def poison(self) -> None:
        slots = self.slots.cpu()
        for host in self.host:
            as_bytes(host)[slots] = POISON

    def check(self, _last: int) -> None:
        slots = self.slots.cpu()
        for host, new in zip(self.host, self.new.cpu(), strict=True):
            require(torch.equal(as_bytes(host[slots]), as_bytes(new)), "a saved row differs")

    def direct(self, call) -> Subject:
        def save_all():
            for host, new in zip(self.host, self.new, strict=True):
                call(new, self.slots, host)

        return Subject([save_all], self.poison, self.check, self.num_bytes)


def measure_save(bench: Bench, host_rows, sizes: Sizes, seed: int) -> None:
    """Direct stores into the host tier, in a graph."""
    for batch in sizes.batches:
        config = {"batch": batch, "layers": sizes.layers, "row_bytes": row_bytes_of(host_rows)}
        bench.check_time()
        bench.progress(f"save {config}")
        case = Saves(host_rows, sizes, batch, bench.device, seed)
        bench.time("save", {"system": "triton"} | config, lambda f=case: f.direct(scatter_rows))
