"""The rooms of design.md: who may import what, and how large files and functions may be."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ROOTS = {
    "sglang_ess": REPO / "python" / "sglang_ess",
    "ess_kernels": REPO / "kernels" / "ess_kernels",
    "ess_patches": REPO / "patches" / "ess_patches",
}
FILES = sorted(file for root in ROOTS.values() for file in root.rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# Rooms of sglang_ess that may import SGLang; ess_patches may too.
SGLANG_ROOMS = {
    "pool", "allocator", "attention", "scheduling", "disagg", "cpu", "cuda", "capacity",
    "plugin", "launch_server", "doctor", "preflight", "startup", "retraction", "intake", "offline",
}  # fmt: skip
# Rooms that may import these and the standard library only.
CLOSED_ROOMS = {
    "config": set(),
    "tiers": {"torch", "numpy", "numba", "ess_kernels", "sglang_ess.tiers"},
    "admission": {"numpy", "sglang_ess.tiers"},  # which the simulator runs too,
    "admission_feed": {"numpy", "sglang_ess.tiers", "sglang_ess.admission.policy"},  # and this
    "sim": {
        "torch", "numpy", "numba", "sglang_ess.tiers", "sglang_ess.admission.policy",
        "sglang_ess.admission.feed", "sglang_ess.sim",
    },
    "ess_kernels": {"torch", "triton", "numpy", "numba", "tvm_ffi", "ess_kernels"},
}  # fmt: skip


def room(file):
    """The first name below a root: `sglang_ess/pool/x.py` is "pool"."""
    for name, root in ROOTS.items():
        if file.is_relative_to(root):
            first = Path(file.relative_to(root).parts[0]).stem
            return first if name == "sglang_ess" else name
    raise AssertionError(file)


def imports(source, package=""):
    """Every imported module in a source, at any depth; ours with two names, others with one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found.add(".".join(parts[:2]) if parts[0] == "sglang_ess" else parts[0])
    return found


def violations(name, found):
    """The imports that the room `name` must not have."""
    if name in CLOSED_ROOMS:
        allowed = CLOSED_ROOMS[name] | set(sys.stdlib_module_names)
        return sorted(found - allowed)
    return sorted(found & {"sglang"}) if name not in SGLANG_ROOMS | {"ess_patches"} else []


def identifier(file):
    return str(file.relative_to(REPO))


@pytest.mark.parametrize("file", FILES, ids=identifier)
def test_imports_stay_in_their_room(file):
    source = file.read_text()
    assert not any(
        isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(ast.parse(source))
    ), "imports must be absolute, so that this test can read them"
    assert violations(room(file), imports(source)) == []


@pytest.mark.parametrize("file", FILES, ids=identifier)
def test_sizes(file):
    source = file.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    if room(file) == "ess_kernels":
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("tiers", "def f():\n    import sglang.srt.utils", ["sglang"]),
        ("sim", "from sglang_ess.mem_cache.pool import x", ["sglang_ess.mem_cache.pool"]),
        ("config", "import torch, json", ["torch"]),
        ("ess_kernels", "import triton.language as tl\nimport sglang_ess", ["sglang_ess"]),
        ("metrics", "from sglang.srt import utils", ["sglang"]),
        ("pool", "from sglang.srt import utils", []),
        ("tiers", "from sglang_ess.tiers.host import HostTier\nimport numpy as np", []),
    ],
)
def test_the_rules_themselves(name, source, found):
    assert violations(name, imports(source)) == found


@pytest.mark.parametrize("name", ROOTS)
def test_the_three_roots_are_importable(name):
    module = importlib.import_module(name)
    assert Path(module.__file__).parent == ROOTS[name]


def test_cpu_ops_are_pure():
    """The CPU platform's operations are a reference for kernels: tensors in, tensors out."""
    for file in (ROOTS["sglang_ess"] / "cpu" / "ops").glob("*.py"):
        used = imports(file.read_text())
        assert used <= {"torch", "numpy", "numba", "sglang_ess.cpu"}, file.name
