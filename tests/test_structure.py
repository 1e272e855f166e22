"""The rules of docs/structure.md: who imports what, where names may stand, how large things are."""

import ast
import importlib
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from ess_kernels import cuda_build
from sglang_ess import layout
from tools import structure
from tools.structure import BELOW, ORDER, REPO, SOURCES

MAX_TOP_MODULES = 8
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 8
MAX_BENCHMARK_LINES = 8400  # 480 of them for serving/recall.py, 310 for serving/third_tier.py

FILES = sorted(structure.modules().values())
DEVICES = re.compile(r"(^|_)(cpu|cuda|gpu|rocm|npu|xpu)($|_)")
DEVICE_FOLDERS = {"platforms", "cpu"}
# What the rooms below the line import beside the standard library and each other.
LIBRARIES = {
    "torch", "numpy", "numba", "triton", "matplotlib", "rich", "safetensors", "tqdm", "xxhash"
}  # fmt: skip

# A comment or docstring cites only what is in the repository, or a paper by name and section.
NOT_HERE = re.compile(r"papers\.md|house\.md|anchors|gpu-review|\binvariants? \d|\.\./shared")
ROW_SIZES = {656, 1152, 2304, 8448}
LAYOUT_NAMES = {name for name in vars(layout) if name.isupper()}


def identifier(file):
    return str(file.relative_to(REPO))


def functions(source):
    return [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def is_kernel(function):
    """Whether Triton or numba compiles it: their arguments cannot be bundled for free."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def num_arguments(function):
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def words(source):
    """The comments and docstrings of a source."""
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n".join([*comments, *(ast.get_docstring(node) or "" for node in nodes)])


def byte_constants(source):
    """Module constants that layout.py defines, by their name or by their number of bytes."""
    return [
        ast.unparse(node)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and (
            {name.id for target in node.targets for name in ast.walk(target)
             if isinstance(name, ast.Name)} & LAYOUT_NAMES
            or isinstance(node.value, ast.Constant) and node.value.value in ROW_SIZES
        )
    ]  # fmt: skip


def takes_its_signature_from_sglang(name):
    return name.startswith("forward_")


# Imports.


def test_every_module_has_a_room():
    assert {structure.room(name) for name in structure.modules()} <= set(ORDER)


def test_imports_point_downward():
    assert structure.upward(structure.room_arrows()) == []


def test_no_circle():
    rooms = {}
    for a, b in structure.room_arrows():
        rooms.setdefault(a, set()).add(b)
    assert structure.circles(rooms) == []
    assert structure.circles(structure.module_arrows()) == []


def test_below_the_line_nothing_imports_sglang():
    assert structure.sglang_importers() == []


def test_below_the_line_few_libraries():
    for name, file in structure.modules().items():
        if structure.room(name) not in BELOW:
            continue
        found = structure.imported(file.read_text())
        roots = {target.split(".")[0] for target in found} - sys.stdlib_module_names
        if structure.room(name) == "ess_patches":  # asks a running SGLang for its version
            roots -= {"sglang"}
        assert roots - LIBRARIES - set(SOURCES) == set(), name
        if name.split(".")[-1] in ("config", "layout"):
            assert roots == set(), name


def test_imports_are_absolute_and_serve():
    for file in FILES:
        source = file.read_text()
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        # structure.py reads absolute imports only.
        assert not any(node.level for node in imports), identifier(file)
        roots = {name.split(".")[0] for name in structure.imported(source)}
        assert not roots & {"tests", "benchmarks", "tools", "scripts"}, identifier(file)


def test_cpu_ops_are_pure():
    """The CPU platform's operations are a reference for kernels: tensors in, tensors out."""
    for name, file in structure.modules().items():
        if structure.room(name) == "cpu.ops":
            found = structure.imported(file.read_text(), structure.modules())
            ours = {target for target in found if target.split(".")[0] == "sglang_ess"}
            assert all(structure.room(target) in ("cpu.ops", "layout") for target in ours), name
            assert {target.split(".")[0] for target in found - ours} <= {"torch", "numpy", "numba"}


@pytest.mark.parametrize("name", SOURCES)
def test_the_three_roots_are_importable(name):
    module = importlib.import_module(name)
    assert Path(module.__file__).parent == REPO / SOURCES[name] / name


def test_the_measure_sees_lazy_and_typing_imports():
    known = {"sglang_ess.a", "sglang_ess.b.c"}
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from sglang_ess.b import c\n"
        "def f():\n    import sglang_ess.a\n"
    )
    assert structure.imported(source, known) == {"typing", "sglang_ess.a", "sglang_ess.b.c"}


def test_the_measure_sees_an_upward_arrow_and_a_circle():
    assert structure.upward([("tiers", "mem_cache"), ("mem_cache", "tiers")]) == [
        ("tiers", "mem_cache")
    ]
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert structure.circles(arrows) == [["a", "b", "c"]]
    assert structure.circles({"a": {"b"}, "b": {"c"}}) == []
    with pytest.raises(ValueError, match="must belong to a room"):
        structure.room("sglang_ess.kitchen")


# Names.


def test_few_modules_at_the_top():
    assert len(structure.top_modules()) <= MAX_TOP_MODULES


def test_file_names_are_unique():
    assert structure.repeated(structure.base_names()) == []
    assert structure.repeated(["pool", "plan", "pool"]) == ["pool"]


def test_class_names_are_unique():
    assert structure.repeated(structure.class_names()) == []


def test_the_device_comes_last():
    """No folder but two is named after a device; a file has the device as its suffix."""
    package = REPO / "python" / "sglang_ess"
    folders = {path for path in package.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    assert {path.name for path in folders if DEVICES.search(path.name)} <= DEVICE_FOLDERS
    for file in package.rglob("*.py"):
        if file.parent.name not in DEVICE_FOLDERS and (found := DEVICES.search(file.stem)):
            assert file.stem.endswith(found[2]), file


# Sizes.


def test_sizes():
    for file in FILES:
        source = file.read_text()
        assert len(source.splitlines()) <= MAX_FILE_LINES, identifier(file)
        for function in functions(source):
            where = f"{identifier(file)}::{function.name}"
            if not is_kernel(function) and "ess_kernels" not in file.parts:
                lines = function.end_lineno - function.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, where
            if not is_kernel(function) and not takes_its_signature_from_sglang(function.name):
                assert num_arguments(function) <= MAX_ARGUMENTS, where


def test_benchmarks_stay_small():
    files = (REPO / "benchmarks").rglob("*.py")
    assert sum(len(file.read_text().splitlines()) for file in files) <= MAX_BENCHMARK_LINES


# Facts.


def test_comments_cite_what_is_here():
    found = {identifier(file): NOT_HERE.findall(words(file.read_text())) for file in FILES}
    assert {file: cited for file, cited in found.items() if cited} == {}


def test_byte_sizes_have_one_home():
    files = [file for file in FILES if file.stem != "layout"]
    found = {identifier(file): byte_constants(file.read_text()) for file in files}
    assert {file: names for file, names in found.items() if names} == {}


def test_a_second_home_would_be_seen():
    assert byte_constants("ROW = 656\nGIB = 1 << 30\nSTEPS = 3") == ["ROW = 656", "GIB = 1 << 30"]
    assert NOT_HERE.search(words("x = 1  # see papers.md 1.6"))
    assert NOT_HERE.search(words('"""Holds invariant 3."""'))
    assert not NOT_HERE.search(words('"""ESS section 3.3."""'))


def unknown_operations(sources, names):
    """CUDA C++ sources that cuda_build does not build."""
    return sorted(set(sources) - set(names))


def test_cuda_sources_are_built():
    folder = REPO / "kernels" / "ess_kernels" / "csrc"
    sources = [file.stem for file in folder.glob("*.cu")]
    assert unknown_operations(sources, cuda_build.NAMES) == []
    assert unknown_operations(["plan"], ["fetch"]) == ["plan"]
