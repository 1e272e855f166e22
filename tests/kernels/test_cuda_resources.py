"""What each CUDA kernel takes: no spilled registers, and as many blocks on an SM as is meant."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from ess_kernels import cuda_build

SM_REGISTERS = 65536
SM_SHARED_BYTES = 233472  # of an H100 and an H200
SYSTEM_SHARED_BYTES = 1024  # of every block
THREADS = 512  # kThreads of plan_fetch.cu
BLOCKS = {"plan_fetch_kernel<4, false>": 2, "plan_fetch_kernel<1, false>": 2, "fetch_kernel": 2}

needs_nvcc = pytest.mark.skipif(cuda_build.nvcc() is None, reason="needs nvcc")


@functools.cache  # one run of the compiler gives the machine code's figures and the PTX
def compiled(arch):
    """kernel -> (registers, shared bytes, spilled bytes) in the code for an architecture; PTX."""
    source = cuda_build.SOURCE_DIR / "plan_fetch.cu"
    flags = " ".join(cuda_build.NVCC_FLAGS).split()
    command = [cuda_build.nvcc(), *flags, "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin", source]
    with tempfile.TemporaryDirectory() as folder:
        kept = ["--keep", "--keep-dir", folder, "-o", f"{folder}/plan_fetch.cubin"]
        done = subprocess.run([*command, *kept], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ptx = Path(folder, "plan_fetch.ptx").read_text()
    found = {}
    for part in done.stderr.split("Compiling entry function '")[1:]:
        numbers = [figure(rf"(\d+) {what}", part) for what in ("registers", "bytes smem")]
        spilled = figure(r"(\d+) bytes spill stores", part) + figure(r"(\d+) bytes spill l", part)
        found[name(part[: part.index("'")])] = (*numbers, spilled)
    return found, ptx


def figure(pattern, text):
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def name(mangled):
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    return re.match(r"(?:void )?ess::(.*)\(", text)[1].replace("(bool)", "")


@needs_nvcc
@pytest.mark.parametrize("arch", ["90a", pytest.param("100a", marks=pytest.mark.slow)])
def test_kernels_do_not_spill(arch):
    found, _ = compiled(arch)
    for kernel, (registers, shared, spilled) in sorted(found.items()):
        print(f"sm_{arch} {kernel}: {registers} registers, {shared} B shared, {spilled} B spilled")
    assert len(found) == 9
    assert [kernel for kernel, (_, _, spilled) in found.items() if spilled] == []
    for kernel, blocks in BLOCKS.items():
        registers, shared, _ = found[kernel]
        assert registers * THREADS * blocks <= SM_REGISTERS
        assert (shared + SYSTEM_SHARED_BYTES) * blocks <= SM_SHARED_BYTES


@needs_nvcc
def test_host_rows_are_read_by_loads_of_the_memory_model():
    """Other devices write them: the model leaves ld.global.nc out."""
    _, ptx = compiled("90a")
    assert "ld.global.L1::no_allocate.v4" in ptx and "ld.global.nc" not in ptx
