"""Compiles the fake CUDA libraries and gives the environment in which processes load them."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = sorted((HERE / "csrc").glob("*.cpp"))
CORE = "libcudart.so.13"  # holds everything; the others are names for it
OTHERS = ("libcuda.so.1", "libcublas.so.13", "libcublasLt.so.13", "libnccl.so.2",
          "libnvidia-ml.so.1")  # fmt: skip
# Imported by these; found here and nowhere else.
IMPORTERS = {"torch": "lib/*.so", "sgl_kernel": "**/*.so", "flash_mla": "*.so", "deep_gemm": "*.so"}
IMPORTED = re.compile(r"(cuda[A-Z]|cu[A-Z]|__cuda|nccl[A-Z]|cublas[A-Z])\w*")
# Looked up by name while they run, so no file imports them.
LOOKED_UP = {"nvmlInit", "nvmlInit_v2", "nvmlInitWithFlags", "nvmlShutdown", "cuMulticastAddDevice"}
TRACEBACK_SIGNAL = 50  # a real-time signal that nothing else here uses
# SGLang asks this program for the memory, and its kernels' builds for the architecture.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
*memory.total*) echo 81559 ;;
*compute_cap*) echo 9.0 ;;
*) echo "NVIDIA H100 80GB HBM3" ;;
esac
"""


def cuda_home() -> Path | None:
    """The CUDA 13 toolkit with headers and nvcc: CUDA_HOME, nvcc's, or the usual place."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    for place in (*places, "/usr/local/cuda"):
        if place and (Path(place) / "include/cuda.h").exists():
            if (Path(place) / "bin/nvcc").exists():
                return Path(place)
    return None


def missing() -> str:
    """List what this machine lacks, in words; empty if nothing."""
    lacks = [] if cuda_home() else ["a CUDA toolkit (nvcc and headers)"]
    return ", ".join(lacks + [name for name in ("g++", "nm") if not shutil.which(name)])


def build(folder: Path) -> Path:
    """Compile the libraries below `folder` if a source or torch is newer; return their folder.

    Raises: CalledProcessError; the compiler has written its errors to stderr
    """
    out = folder / "lib"
    inputs = [*SOURCES, *(HERE / "csrc").glob("*.h"), Path(__file__), *_importers()]
    newest = max(path.stat().st_mtime for path in inputs)
    if (out / OTHERS[-1]).exists() and (out / OTHERS[-1]).stat().st_mtime >= newest:
        return out
    out.mkdir(parents=True, exist_ok=True)
    include = cuda_home() / "include"
    compile_ = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{include}",
                f"-I{out}", "-Wno-deprecated-declarations", "-c"]  # fmt: skip
    objects = {source: out / f"{source.stem}.o" for source in SOURCES}
    stubs = next(source for source in SOURCES if source.stem == "stubs")
    ours = [source for source in SOURCES if source != stubs]
    running = [subprocess.Popen([*compile_, source, "-o", objects[source]]) for source in ours]
    if any([process.wait() for process in running]):
        raise RuntimeError("the fake CUDA libraries must compile: see g++'s errors above.")
    defined = _names("--defined-only", *(objects[source] for source in ours))
    wanted = _wanted(include) - defined
    (out / "stubs.inc").write_text("".join(f"STUB({name})\n" for name in sorted(wanted)))
    subprocess.run([*compile_, stubs, "-o", objects[stubs]], check=True)
    link = ["g++", "-shared", "-static-libstdc++", "-static-libgcc"]
    subprocess.run([*link, *objects.values(), "-o", out / CORE, f"-Wl,-soname,{CORE}"], check=True)
    for name in OTHERS:
        to_core = ["-Wl,--no-as-needed", f"-L{out}", f"-l:{CORE}", "-Wl,-rpath,$ORIGIN"]
        subprocess.run([*link, "-o", out / name, f"-Wl,-soname,{name}", *to_core], check=True)
    return out


def environment(folder: Path, log: Path) -> dict[str, str]:
    """Variables for a process over the fake libraries; builds them below `folder`.

    folder: for the libraries and for what the process compiles with nvcc and Triton; kept, it
    saves minutes. log: gets a line for each report (csrc/runtime.h).
    """
    library, programs = build(folder), folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "nvidia-smi").write_text(NVIDIA_SMI)
    (programs / "nvidia-smi").chmod(0o755)
    path = [str(HERE / "preloaded"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "FAKE_CUDA_LIB": str(library),
        "FAKE_CUDA_LOG": str(log),
        "FAKE_CUDA_SIGNAL": str(TRACEBACK_SIGNAL),
        "PYTHONPATH": os.pathsep.join(path),
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "CUDA_HOME": str(cuda_home()),
        "TRITON_LIBCUDA_PATH": str(library),
        "TRITON_INTERPRET": "0",  # tests/conftest.py: 1 where there is no device
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "SGLANG_CACHE_DIR": str(folder / "sglang"),
    }


def _importers() -> list[Path]:
    found = []
    for package, pattern in IMPORTERS.items():
        if spec := find_spec(package):
            found += Path(spec.origin).parent.glob(pattern)
    return found


def _names(*arguments: str | Path) -> set[str]:
    """Names of an object's or library's symbols, as nm lists them."""
    listed = subprocess.run(["nm", *arguments], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in listed.splitlines() if " " in line}


def _wanted(include: Path) -> set[str]:
    """Every name that an importer, or a caller that asks the driver by name, can need."""
    names = set()
    for file in _importers():
        names |= _names("-D", "--undefined-only", file)
    packages = Path(find_spec("torch").origin).parents[1]
    for library in OTHERS[1:4]:
        for file in packages.glob(f"nvidia/*/lib/{library}"):
            names |= _names("-D", "--defined-only", file)
    names = {name for name in names if IMPORTED.fullmatch(name) and not name.startswith("cuFile")}
    declared = re.findall(r"\bcu[A-Z]\w+(?=\()", (include / "cuda.h").read_text())
    return names | set(declared) | LOOKED_UP
