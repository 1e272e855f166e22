"""csrc/*.cu as host code: built once, called with CPU tensors under a scheduler seed."""

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ess_kernels.cuda_build import SOURCE_DIR

HERE = Path(__file__).parent
PLAN_THREADS = 96  # three warps: few fibers, and counts that fill no warp evenly
FLAGS = (
    "-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-DESS_HOST_SHIM", f"-DESS_PLAN_THREADS={PLAN_THREADS}",
)  # fmt: skip

NO_FAULT, SKIP_BLOCK_BARRIER, SKIP_GRID_BARRIER = range(3)


class KernelError(RuntimeError):
    """What the shim noticed: a deadlock, a misuse of a warp operation, a kernel without end."""


def fields(text: str, kind) -> list:
    return [(name, kind) for name in text.split()]


POINTER, INT = ctypes.c_void_p, ctypes.c_int


class RowFormat(ctypes.Structure):
    _fields_ = fields("row_words from_stride to_stride", INT)


class FetchArguments(ctypes.Structure):
    _fields_ = (
        fields("host_rows hot_rows miss_slots miss_rows num_misses", POINTER)
        + fields("capacity", INT)
        + [("format", RowFormat)]
        + fields("max_blocks", INT)
    )


class SaveArguments(ctypes.Structure):
    _fields_ = (
        fields("rows slots host_rows", POINTER)
        + fields("num_rows", INT)
        + [("format", RowFormat)]
        + fields("max_blocks", INT)
    )


STATE = "slot_row row_slot row_stamp free order words counters"
LISTS = (
    "rows hit_rows hit_lengths late_rows late_lengths query_misses miss_slots miss_rows num_misses"
)


class PlanArguments(ctypes.Structure):
    _fields_ = (
        fields("topk", POINTER)
        + fields("wide_slots", ctypes.c_bool)
        + fields("written", POINTER)
        + fields("wide_written", ctypes.c_bool)
        + fields("total width", INT)
        + fields(LISTS, POINTER)
        + fields(STATE, POINTER)
        + fields("min_age first_slot kind", INT)
        + fields("advance", ctypes.c_bool)
    )


def row_format(source: torch.Tensor, target: torch.Tensor) -> RowFormat:
    def accesses(items, rows):
        assert items * rows.itemsize % 16 == 0
        return items * rows.itemsize // 16

    return RowFormat(
        accesses(source.shape[1], source),
        accesses(source.stride(0), source),
        accesses(target.stride(0), target),
    )


def compiled(source: Path, target: Path, *more: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernels for the host")
    command = [compiler, *FLAGS, f"-I{HERE}", *more, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def build(directory: Path, sources: Path = SOURCE_DIR, shim: Path | None = None) -> Path:
    """The shared library of driver.cpp over the kernels in `sources`.

    shim: cuda_shim.cpp compiled before; default: compile it
    """
    if shim is None:
        shim = build_shim(directory)
    more = ("-shared", f"-I{sources}", str(shim))
    return compiled(HERE / "driver.cpp", directory / "cuda_host.so", *more)


def build_shim(directory: Path) -> Path:
    return compiled(HERE / "cuda_shim.cpp", directory / "cuda_shim.o", "-c")


@dataclass
class HostKernels:
    """The operations with the arguments of ess_kernels.cuda_ops, on CPU tensors.

    seed: of the next launches' interleaving. fault, number: which barrier of a thread does not wait
    """

    library: ctypes.CDLL
    seed: int = 0
    fault: int = NO_FAULT
    number: int = 0

    @classmethod
    def load(cls, path: Path) -> "HostKernels":
        library = ctypes.CDLL(str(path))
        for name in ("fetch", "save", "plan", "add_one", "one_lane_stays_away"):
            getattr(library, f"ess_host_{name}").restype = ctypes.c_char_p
        return cls(library)

    def call(self, name: str, *arguments) -> None:
        self.library.ess_host_configure(ctypes.c_uint64(self.seed), self.fault, self.number)
        self.seed += 1
        error = getattr(self.library, f"ess_host_{name}")(*arguments)
        if error is not None:
            raise KernelError(error.decode())

    def fetch(self, host_rows, hot_rows, miss_slots, miss_rows, num_misses, max_blocks) -> None:
        arguments = FetchArguments(
            host_rows.data_ptr(), hot_rows.data_ptr(), miss_slots.data_ptr(),
            miss_rows.data_ptr(), num_misses.data_ptr(), len(miss_slots),
            row_format(host_rows, hot_rows), max_blocks,
        )  # fmt: skip
        self.call("fetch", ctypes.byref(arguments))

    def save(self, rows, slots, host_rows, max_blocks) -> None:
        arguments = SaveArguments(
            rows.data_ptr(), slots.data_ptr(), host_rows.data_ptr(), len(rows),
            row_format(rows, host_rows), max_blocks,
        )  # fmt: skip
        self.call("save", ctypes.byref(arguments))

    def run_plan(
        self, state, slots, total, width, buffers, kind, advance, min_age=0, first_slot=0,
        written=None,
    ) -> None:  # fmt: skip
        lists = [getattr(buffers, name).data_ptr() for name in LISTS.split()]
        words = [getattr(state, name).data_ptr() for name in STATE.split()]
        arguments = PlanArguments(
            slots.data_ptr(), slots.dtype == torch.int64,
            None if written is None else written.data_ptr(),
            written is not None and written.dtype == torch.int64,
            total, width, *lists, *words, min_age, first_slot, kind, advance,
        )  # fmt: skip
        self.call("plan", ctypes.byref(arguments))
