"""The CUDA C++ operations of csrc/, compiled when first used.

`load("plan_fetch")` compiles csrc/plan_fetch.cu (kernels and launch, by nvcc) and
csrc/plan_fetch_binding.cpp (checks of the tensors, by the host compiler), links them and loads the
module. The compiler runs once for a source, a device architecture and a machine: ninja sees from
the files' times whether anything changed, and a lock lets one process of several compile. The
results lie below TVM_FFI_CACHE_DIR, else ~/.cache/tvm-ffi.
"""

import functools
import importlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent / "csrc"
NAMES = ("plan_fetch",)
CXX_FLAGS = ("-O3", "-std=c++20", "-Wall", "-Werror")
NVCC_FLAGS = (
    "-O3",
    "-std=c++20",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Werror all-warnings",
    "-Xcompiler -Wall,-Wextra,-Werror",
)
DEFAULT_HOME = Path("/usr/local/cuda")
ARCHITECTURE_VARIABLE = "TVM_FFI_CUDA_ARCH_LIST"  # the only way to tell tvm-ffi
QUICK_SECONDS = 2.0  # ninja takes less where there is nothing to compile

_building = threading.Lock()


def nvcc() -> Path | None:
    """The compiler that tvm-ffi will use: CUDA_HOME's, else that of PATH, else /usr/local/cuda's.

    None if there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if home is None and on_path is not None:
        return Path(on_path)
    compiler = Path(home or DEFAULT_HOME) / "bin" / "nvcc"
    return compiler if compiler.exists() else None


def missing() -> str | None:
    """One line that says what building takes and this machine lacks; None if nothing."""
    if nvcc() is None:
        return (
            "nvcc must be there to compile plan_fetch: got none in CUDA_HOME, PATH or "
            f"{DEFAULT_HOME}. Install the CUDA 13 toolkit, or set CUDA_HOME to it."
        )
    if shutil.which("c++") is None and "CXX" not in os.environ:
        return "a C++ compiler must be there to compile plan_fetch: got no c++. Install g++."
    return None


def architecture(device: torch.device | int | None = None) -> str:
    """What nvcc calls the device's architecture: "9.0a" for an H100, "8.0" for an A100.

    Default: the current device. From 9.0 on the letter gives the architecture's own instructions.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


@contextmanager
def _environment(arch: str) -> Iterator[None]:
    """What tvm-ffi reads: the architecture; ninja, which lies beside Python in an environment."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    wanted = {ARCHITECTURE_VARIABLE: arch, "PATH": path}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def build(name: str, arch: str) -> str:
    """Compile and link one operation for an architecture like "9.0a"; returns the library's path.

    Logs one line if the compiler ran.
    Raises: ValueError for an unknown name; RuntimeError if a compiler is missing, or with its
    output if it fails.
    """
    if name not in NAMES:
        raise ValueError(f"a CUDA operation must be one of {', '.join(NAMES)}: got {name!r}.")
    if lacks := missing():
        raise RuntimeError(lacks)
    # By name: machines without a GPU need not have tvm-ffi.
    builder = importlib.import_module("tvm_ffi.cpp")
    # tvm-ffi links with the libraries beside nvcc, which may be a script somewhere else.
    libraries = DEFAULT_HOME / "lib64"
    start = time.perf_counter()
    with _building, _environment(arch):
        library = builder.build(
            # The name keeps architectures apart that share a cache.
            name=f"ess_{name}_sm{arch.replace('.', '')}",
            cpp_files=[str(SOURCE_DIR / f"{name}_binding.cpp")],
            cuda_files=[str(SOURCE_DIR / f"{name}.cu")],
            extra_cflags=list(CXX_FLAGS),
            extra_cuda_cflags=list(NVCC_FLAGS),
            extra_ldflags=[f"-L{libraries}"] if libraries.exists() else [],
            backend="cuda",
        )
    seconds = time.perf_counter() - start
    if seconds > QUICK_SECONDS:
        logger.info("Compiled %s for sm_%s in %.0f s.", name, arch.replace(".", ""), seconds)
    return str(library)


@functools.cache
def load(name: str, arch: str | None = None) -> Any:
    """The module of one operation, with the functions that its binding exports.

    Compiles if nobody has on this machine: call it before a CUDA graph is captured.
    arch: default that of the current CUDA device
    Raises: as build.
    """
    path = build(name, arch or architecture())
    return importlib.import_module("tvm_ffi").load_module(path)
