"""Benchmarks measure production through its public names: they touch no insides."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def imported_names(tree: ast.AST) -> set[str]:
    """Names that an import statement binds, anywhere in the file."""
    return {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def root_of(node: ast.AST) -> str | None:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def is_own(node: ast.AST) -> bool:
    """self, cls, or super()."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def targets_of(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Assign | ast.Delete):
        found = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For):
        found = [node.target]
    else:
        return []
    return [leaf for target in found for leaf in getattr(target, "elts", [target])]


def insides(source: str) -> list[str]:
    """A line for each private attribute, private import, and attribute set on an imported name."""
    tree = ast.parse(source)
    imported, found = imported_names(tree), []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            found.append(f"{line}: {ast.unparse(node)}")
        if isinstance(node, ast.ImportFrom):
            found += [f"{line}: import {a.name}" for a in node.names if is_private(a.name)]
        for target in targets_of(node):
            if isinstance(target, ast.Attribute) and root_of(target) in imported:
                found.append(f"{line}: {ast.unparse(target)} = ...")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            sets = node.func.id in ("setattr", "delattr")
            if sets and node.args and root_of(node.args[0]) in imported:
                found.append(f"{line}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_benchmark_touches_no_insides(path):
    assert insides(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from a import B\nB.f = g",
        "from a import B\nx, B.f = g, h",
        "import a.b\na.b.C.f = g",
        "from a import B\nsetattr(B, name, g)",
        "import a\ndel a.f",
        "from a import _b",
        "x = make()\nx._hidden()",
        "import a\na._hidden",
    ],
)
def test_insides_are_found(source):
    assert len(insides(source)) == 1


def test_own_attributes_are_no_insides():
    source = "from a import B\nclass C(B):\n def f(self):\n  self._x = super()._y\n  self.__dict__"
    assert insides(source) == []
    assert insides("from a import B\nb = B()\nb.figure = 1") == []
