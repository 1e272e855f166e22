"""fetch: rows from the host tier into hot rows, beside PCIe's peak and what fetch replaces.

What it replaces: one copy call a row (the loop is compiled, as a C++ runtime would issue it), and
torch's way: the miss list to the host, index_select into pinned memory, one copy, index_copy_.
Each starts from the plan's miss list and ends with the rows where attention reads them.
"""

from __future__ import annotations

import ctypes
import functools

import numba
import numpy as np
import torch

from benchmarks.kernels.points import POISON, Run, Sizes, as_bytes, row_bytes_of
from benchmarks.kernels.timing import EVENTS, WALL, Bench, Subject, require
from ess_kernels.fetch import fetch, fetch_reference

PROGRAMS = (4, 8, 12, 16, 24, 32, 48, 64, 96)  # of the sweep that shows what limits fetch
MANY_ROWS = 1 << 16  # of 656 B: 43 MB, about the L2
HOST_TO_DEVICE = 1  # cudaMemcpyHostToDevice


def measure_peak(run: Run) -> None:
    """One large copy between pinned and device memory, each way: the limit of all the others."""
    bench, size = run.bench, run.sizes.peak_bytes
    host = torch.empty(size, dtype=torch.uint8, pin_memory=bench.on_cuda)
    device = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
    host.copy_(device)
    for direction, target, source in (("h2d", device, host), ("d2h", host, device)):
        copy = functools.partial(target.copy_, source, non_blocking=True)
        subject = Subject([copy], num_bytes=size)
        config = {"direction": direction, "bytes": size}
        bench.time("pcie_peak", config, lambda s=subject: s, EVENTS)


class Fetches:
    """`sets` miss lists of batch x misses random rows, with room for a plan of all misses."""

    def __init__(self, host_rows, sizes: Sizes, batch: int, misses: int, device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.host, self.count = host_rows, batch * misses
        self.sets = sizes.sets if self.count < MANY_ROWS else 2
        num_rows = batch * sizes.buffer
        self.hot = torch.empty(num_rows, host_rows.shape[1], dtype=host_rows.dtype, device=device)

        def lists(limit):
            picks = [torch.randperm(limit, generator=generator, device=device)[: batch * sizes.topk]
                     for _ in range(self.sets)]  # fmt: skip
            return torch.stack(picks).int()

        self.slots, self.rows = lists(batch * sizes.context), lists(num_rows)
        self.num_misses = torch.tensor([self.count], dtype=torch.int32, device=device)

    def arguments(self, index: int) -> tuple:
        return self.host, self.hot, self.slots[index], self.rows[index], self.num_misses

    def poison(self) -> None:
        as_bytes(self.hot).fill_(POISON)

    def check(self, last: int) -> None:
        """All hot rows after sets 0 to `last`: those that no list names are still poison."""
        got, self.hot = self.hot, torch.empty_like(self.hot)
        self.poison()
        for index in range(last + 1):
            fetch_reference(*self.arguments(index))
        got, self.hot = self.hot, got
        require(torch.equal(as_bytes(got), as_bytes(self.hot)),
                "fetched rows differ from their host rows, or others changed")  # fmt: skip

    def subject(self, call, sets: int | None = None) -> Subject:
        """call(host, hot, slots, rows, count) for each of the first `sets` sets, None: all."""
        ops = [lambda i=i: call(*self.arguments(i)) for i in range(sets or self.sets)]
        return Subject(ops, self.poison, self.check, self.count * row_bytes_of(self.host))


@functools.cache
def row_copier(on_cuda: bool):
    """Compiled loop(targets, sources, bytes, stream) -> status: a copy call for each address pair.

    Raises: OSError, or RuntimeError without CUDA, if on_cuda.
    """
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
    if torch.version.cuda is None:
        raise RuntimeError("torch was built without CUDA")
    copy = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}").cudaMemcpyAsync
    pointer = ctypes.c_void_p
    copy.argtypes = [pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer]
    copy.restype = ctypes.c_int

    @numba.njit
    def loop(targets, sources, num_bytes, stream):
        status = 0
        for i in range(len(targets)):
            status |= copy(targets[i], sources[i], num_bytes, HOST_TO_DEVICE, stream)
        return status

    return loop


def row_copies(case: Fetches, bench: Bench) -> Subject:
    """A copy call a row; the host has the addresses ready, which favours it."""
    size, copy = row_bytes_of(case.host), row_copier(bench.on_cuda)

    def addresses(rows, places):
        places = places[0, : case.count].cpu().numpy().astype(np.uint64)
        return np.ascontiguousarray(rows.data_ptr() + places * size)

    targets, sources = addresses(case.hot, case.rows), addresses(case.host, case.slots)

    def call(*_):
        stream = torch.cuda.current_stream().cuda_stream if bench.on_cuda else 0
        if status := copy(targets, sources, size, stream):
            raise RuntimeError(f"the CUDA runtime returned error {status}")

    return case.subject(call, 1)


def index_select(case: Fetches, bench: Bench) -> Subject:
    shape = case.count, case.host.shape[1]
    gathered = torch.empty(shape, dtype=case.host.dtype, pin_memory=bench.on_cuda)
    staged = torch.empty(shape, dtype=case.host.dtype, device=bench.device)

    def call(host, hot, slots, rows, num_misses):
        count = int(num_misses)
        torch.index_select(host, 0, slots[:count].cpu(), out=gathered)
        staged.copy_(gathered, non_blocking=True)
        hot.index_copy_(0, rows[:count].long(), staged)

    return case.subject(call, 1)


def _case(run: Run, what: str, point, host_rows) -> tuple[Fetches, dict]:
    batch, misses = point
    config = {"batch": batch, "misses": misses, "row_bytes": row_bytes_of(host_rows)}
    run.bench.begin(f"{what} {config}")
    return Fetches(host_rows, run.sizes, batch, misses, run.bench.device, run.seed), config


def measure_fetch(run: Run, points, host_rows) -> None:
    """Our fetch at the points (batch, misses)."""
    for point in points:
        case, config = _case(run, "fetch", point, host_rows)
        run.bench.time("fetch", {"system": "triton"} | config, lambda c=case: c.subject(fetch))


def measure_programs(run: Run, point) -> None:
    """fetch by how many programs (SMs) it may take: is the link full, or too little in flight?"""
    case, config = _case(run, "fetch by programs", point, run.host)
    for programs in PROGRAMS[:2] if run.bench.quick else PROGRAMS:
        run.bench.time(
            "fetch_programs", {"system": "triton", "programs": programs} | config,
            lambda n=programs: case.subject(lambda *a: fetch(*a, n)),
        )  # fmt: skip


def measure_replaced(run: Run, points) -> None:
    """What fetch replaces, at the same points."""
    for point in points:
        case, config = _case(run, "copies that fetch replaces", point, run.host)
        for system, make, timer in (("memcpy_per_row", row_copies, EVENTS),
                                    ("index_select", index_select, WALL)):  # fmt: skip
            run.bench.time("fetch", {"system": system} | config,
                           lambda m=make, c=case: m(c, run.bench), timer)  # fmt: skip
