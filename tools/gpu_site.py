"""A virtual environment on a GPU host: the host's packages, then ours, and this checkout.

    python tools/gpu_site.py host VENV      before wheels are installed; by the host's Python
    python tools/gpu_site.py finish VENV    after the last one; by VENV's Python

A virtual environment of a virtual environment sees the packages of neither, so a .pth file names
the host's folders, behind VENV's own: what a wheel brought hides what the host has. It names our
source roots too, and metadata beside it tells SGLang of our entry points; nothing is built. Wheels
find CUDA's libraries by paths relative to their own, so links stand where the host's would be.

`finish` prints a line for each thing that tools/gpu_wheels.txt names and VENV lacks or cannot
import; exit status 1 if there was one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
import shutil
import site
import sys
import sysconfig
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PTH = "_ess_gpu_host.pth"
# Of the processes in VENV, where the caller has not set them.
ENVIRONMENT = {
    "CUDA_HOME": "/usr/local/cuda",
    # cuDNN is the host's, older than the one our torch was compiled with; nothing of DSA uses it.
    "PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK": "1",
    # DSA's dense prefill of short prompts runs FlashAttention 3, which did not travel.
    "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0",
    # Else DeepGEMM's kernels for every row count from 1 to 16384 are compiled at start.
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0",
    # There is no network: nothing should wait for one.
    "HF_HUB_OFFLINE": "1",
}


def packages(venv: Path) -> Path:
    """VENV's folder of packages.  Raises: FileNotFoundError if VENV is no environment."""
    return next(venv.glob("lib/python3.*/site-packages")).resolve()


def link_host(venv: Path) -> None:
    """VENV sees the packages of the Python that runs this. Links into the host's CUDA are removed,
    so that no wheel is installed through one.
    """
    folder = packages(venv)
    hosts = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    variables = {name: value for name, value in ENVIRONMENT.items() if name != "CUDA_HOME"}
    if Path(ENVIRONMENT["CUDA_HOME"]).is_dir():
        variables["CUDA_HOME"] = ENVIRONMENT["CUDA_HOME"]
    path = f"{venv.resolve()}/bin:{ENVIRONMENT['CUDA_HOME']}/bin"
    lines = [
        *(str(REPO / root) for root in roots()),
        *(f"import site; site.addsitedir({host!r})" for host in sorted(hosts)),
        *(f"import os; os.environ.setdefault({k!r}, {v!r})" for k, v in variables.items()),
        f"import os; p = os.environ.get('PATH', ''); os.environ['PATH'] = "
        f"p if p.startswith({path!r}) else {path + ':'!r} + p",
    ]
    (folder / PTH).write_text("\n".join(lines) + "\n")
    for link in (folder / "nvidia").glob("*"):
        if link.is_symlink():
            link.unlink()


def link_cuda(folder: Path) -> None:
    """folder/nvidia/<library> -> the host's, for those that no wheel brought."""
    for host in map(Path, sys.path):
        for library in (host / "nvidia").glob("*") if host != folder else ():
            ours = folder / "nvidia" / library.name
            if library.is_dir() and not ours.exists():
                ours.parent.mkdir(exist_ok=True)
                ours.symlink_to(library)


def roots() -> list[str]:
    return _pyproject()["tool"]["setuptools"]["packages"]["find"]["where"]


def register_checkout(folder: Path) -> None:
    """Metadata of this checkout in `folder`: its name, version and entry points."""
    project = _pyproject()["project"]
    stem = f"{_normal(project['name']).replace('-', '_')}-{project['version']}.dist-info"
    shutil.rmtree(folder / stem, ignore_errors=True)
    (folder / stem).mkdir()
    (folder / stem / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (folder / stem / "entry_points.txt").write_text("\n\n".join(groups) + "\n")


def missing(listed: Path) -> list[str]:
    """One line for each distribution of `listed` that is not there, has another version than
    constraints.txt says, or does not import.
    """
    lines = []
    for row in listed.read_text().splitlines():
        origin, name, *modules = row.split("#")[0].split() or ("", "")
        if name:
            line = _absence(origin, name) or _failure(modules)
            lines += [f"{name}: {line}"] if line else []
    return lines


def _absence(origin: str, name: str) -> str | None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if origin == "host":
        if version is None:
            return f"expected of the host. Bring it: tools/gpu_bundle.sh --for serving {name}"
        return None
    pin = _pins().get(_normal(name), version)
    if version is None or version != pin:
        return f"must be {pin or 'there'}: got {version}. Carry the part that has it"
    return None


def _failure(modules: list[str]) -> str | None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # a library that does not load is what this looks for
            return f"import {module} fails: {' '.join(str(error).split())[:300]}"
    return None


@functools.cache
def _pins() -> dict[str, str]:
    rows = (REPO / "constraints.txt").read_text().splitlines()
    pairs = (row.split("==") for row in rows if "==" in row)
    return {_normal(name): version.strip() for name, version in pairs}


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def _pyproject() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text())


def main(action: str, venv: Path) -> int:
    if action == "host":
        link_host(venv)
        return 0
    link_cuda(packages(venv))
    register_checkout(packages(venv))
    importlib.invalidate_caches()
    listed = Path(os.environ.get("LISTED", REPO / "tools" / "gpu_wheels.txt"))
    lines = missing(listed)
    for line in lines:
        print(f"gpu_install: {line}", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
