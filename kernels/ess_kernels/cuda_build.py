"""CUDA C++ operations of csrc/, compiled when first used.

`load("fetch")` compiles csrc/fetch.cu (kernels and launch, by nvcc) and csrc/fetch_binding.cpp
(checks of the tensors, by the host compiler), links them and loads the module. The compiler runs
once for a source, a device architecture and a machine: ninja sees from the files' times whether
anything changed. Where the result lies: TVM_FFI_CACHE_DIR, else ~/.cache/tvm-ffi.
"""

import functools
import os
import threading
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).parent / "csrc"
NAMES = ("fetch", "save", "plan")
CXX_FLAGS = ("-O3", "-std=c++20", "-Wall", "-Werror")
NVCC_FLAGS = (
    "-O3",
    "-std=c++20",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Werror all-warnings",
    "-Xcompiler -Wall,-Wextra,-Werror",
)
# tvm-ffi looks beside the nvcc on the path, which may be a script of one line.
LIBRARY_DIR = Path("/usr/local/cuda/lib64")
ARCHITECTURE_VARIABLE = "TVM_FFI_CUDA_ARCH_LIST"  # the only way to tell tvm-ffi

_environment = threading.Lock()


def architecture(device: torch.device | int | None = None) -> str:
    """What nvcc calls the device's architecture: "9.0a" for an H100, "8.0" for an A100.

    Default: the current device. From 9.0 on the letter gives the architecture's own instructions.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}{'a' if major >= 9 else ''}"


def build(name: str, arch: str) -> str:
    """Compile and link one operation for an architecture like "9.0a"; returns the library's path.

    Raises: ValueError for an unknown name, RuntimeError with the compiler's output if it fails.
    """
    if name not in NAMES:
        raise ValueError(f"a CUDA operation must be one of {', '.join(NAMES)}: got {name!r}.")
    import tvm_ffi.cpp  # not at the top: machines without it run the Triton kernels

    with _environment:
        before = os.environ.get(ARCHITECTURE_VARIABLE)
        os.environ[ARCHITECTURE_VARIABLE] = arch
        try:
            return tvm_ffi.cpp.build(
                # The name keeps architectures apart that share a cache.
                name=f"ess_{name}_sm{arch.replace('.', '')}",
                cpp_files=[str(SOURCE_DIR / f"{name}_binding.cpp")],
                cuda_files=[str(SOURCE_DIR / f"{name}.cu")],
                extra_cflags=list(CXX_FLAGS),
                extra_cuda_cflags=list(NVCC_FLAGS),
                extra_ldflags=[f"-L{LIBRARY_DIR}"] if LIBRARY_DIR.exists() else [],
                backend="cuda",
            )
        finally:
            if before is None:
                del os.environ[ARCHITECTURE_VARIABLE]
            else:
                os.environ[ARCHITECTURE_VARIABLE] = before


@functools.cache
def load(name: str, arch: str | None = None):
    """The module of one operation, whose function bears the operation's name.

    arch: default that of the current CUDA device
    Raises: as build.
    """
    import tvm_ffi

    return tvm_ffi.load_module(build(name, arch or architecture()))
