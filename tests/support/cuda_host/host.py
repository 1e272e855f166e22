"""The CUDA C++ operations of csrc/ on CPU tensors: the same sources and the same bindings, built
by g++ over a shim that runs a grid's threads as fibers (cuda_shim.h).

    stand_in()                   ess_kernels.cuda_build.load gives host builds from now on
    Seeded(load("plan_fetch"))   the same module under seeded schedules

A build takes some seconds. It is kept in tvm-ffi's cache, under the hash of everything that goes
into it, so later processes load it in no time. Several may build at once: each writes files of its
own and renames them.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tvm_ffi
from tvm_ffi import libinfo

from ess_kernels import cuda_build

HERE = Path(__file__).parent
THREADS = 128  # of a block: four warps, so few fibers, and still 2,048 lookups a query
FLAGS = (
    "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-U_FORTIFY_SOURCE",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
    "-DESS_HOST_SHIM",
)  # fmt: skip
PLAN_FLAG = f"-DESS_PLAN_THREADS={THREADS}"
QUICK = ("-O2",)
RACES = ("-O1", "-fsanitize=thread", "-fno-threadsafe-statics")
BINDING_FLAGS = ("-O0",)  # half the time to compile tvm-ffi's headers
LIBRARY = Path(libinfo.find_libtvm_ffi())
NO_FAULT, SKIP_BLOCK_BARRIER, SKIP_GRID_BARRIER = range(3)
HEADERS = (".h", ".cuh")


def cache_folder() -> Path:
    """Where tvm-ffi keeps what it builds."""
    folder = os.environ.get("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi")
    return Path(folder).expanduser() / "ess_cuda_host"


@functools.cache
def _compiler() -> tuple[str, str]:
    """g++ and its version. Skips the test where there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to build the CUDA operations for the host")
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return compiler, said.stdout.splitlines()[0] + tvm_ffi.__version__


def _made(suffix: str, inputs: Iterable[Path], flags: Iterable[str], rest: Iterable[str]) -> Path:
    """The file that g++ makes of the inputs, from the cache if it made it before.

    rest: arguments that name files and folders. Not part of the key: the same sources in another
    folder give the same library.
    """
    compiler, version = _compiler()
    key = hashlib.sha256("\0".join([version, *flags]).encode())
    for file in inputs:
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = cache_folder()
    target = folder / (key.hexdigest()[:24] + suffix)
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / target.name
            command = [compiler, *flags, *rest, "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"g++ must build {target.name}: got\n{done.stderr}")
            os.replace(made, target)
    return target


def _object(
    source: Path, headers: Iterable[Path], folders: Iterable[Path], flags: Iterable[str]
) -> Path:
    places = [*folders, HERE, libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    rest = [*(f"-I{place}" for place in places), *language, str(source)]
    return _made(".o", [source, *headers], [*FLAGS, *flags, "-c"], rest)


def _headers(folders: Iterable[Path]) -> list[Path]:
    return sorted(file for folder in folders for file in folder.iterdir() if file.suffix in HEADERS)


def library(name: str, folder: Path = cuda_build.SOURCE_DIR, flags: Iterable[str] = QUICK) -> Path:
    """The host build of an operation: {name}.cu and {name}_binding.cpp of a folder.

    flags: of the kernels; with RACES a launch with a race is an error
    Raises: RuntimeError with the compiler's output if it does not build.
    """
    folders = list(dict.fromkeys([folder, cuda_build.SOURCE_DIR]))
    own, host = _headers([*folders, HERE]), _headers([HERE])
    sources = [
        (folder / f"{name}_binding.cpp", own, folders, BINDING_FLAGS),
        (HERE / "cuda_shim.cpp", host, folders, QUICK),
        (HERE / "races.cpp", host, folders, QUICK),
        (HERE / "host_binding.cpp", host, folders, BINDING_FLAGS),
        (folder / f"{name}.cu", own, folders, (*flags, PLAN_FLAG)),
    ]
    with ThreadPoolExecutor() as threads:
        objects = list(threads.map(lambda one: _object(*one), sources))
    rest = [*map(str, objects), str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}"]
    return _made(".so", objects, ["-shared", "-Wl,-Bsymbolic"], rest)


@functools.cache
def load(name: str, folder: Path = cuda_build.SOURCE_DIR, flags: Iterable[str] = QUICK) -> Any:
    """The host build as a module, like cuda_build.load's."""
    return tvm_ffi.load_module(str(library(name, folder, flags)))


def stand_in() -> None:
    """Have ess_kernels run its CUDA C++ operations on CPU tensors in this process, fast."""
    cuda_build.load = load


@dataclass
class Seeded:
    """The module of a host build whose next launches are interleaved by seeds, one after another.

    fault, number: which barrier of a thread does not wait
    """

    module: Any
    seed: int = 0
    fault: int = NO_FAULT
    number: int = 0

    def __getattr__(self, name: str):
        function = self.module[name]

        def call(*arguments):
            self.module["configure"](False, self.seed, self.fault, self.number)
            self.seed += 1
            try:
                return function(*arguments)
            finally:
                self.module["configure"](True, 0, NO_FAULT, 0)

        return call


def intercept(around, set_attribute=setattr) -> None:
    """around(name, operation, args) is called in place of each CUDA operation.

    set_attribute: pytest's monkeypatch.setattr where it has to end
    """
    load = cuda_build.load

    class Module:
        def __init__(self, name):
            self._module = load(name)

        def __getattr__(self, name):
            operation = getattr(self._module, name)
            return lambda *args: around(name, operation, args)

    set_attribute(cuda_build, "load", Module)
