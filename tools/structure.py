"""The structure of the source tree, measured from its import statements.

    python -m tools.structure        prints rooms, arrows, upward arrows, circles, lines by folder

tests/test_structure.py holds the tree to the order below. docs/structure.md explains the rooms.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SOURCES = {"sglang_ess": "python", "ess_kernels": "kernels", "ess_patches": "patches"}

# From top to bottom. A room imports only from rooms below it.
ABOVE = (
    "sglang_ess",
    "launch_server",
    "launch",
    "testing.topk_stream",
    "testing",
    "intake",
    "plugin",
    "scheduler_gate",
    "metrics",
    "platforms",
    "attention",
    "disagg",
    "mem_cache",
    "cpu",
    "cpu.ops",
)
# The line: nothing from here on imports SGLang. ess_patches names it in strings, and looks the
# strings up in a running SGLang.
BELOW = (
    "sim.cli",
    "sim.planning",
    "sim.engine",
    "sim.policies",
    "sim.model",
    "sim.inputs",
    "sim",
    "admission",
    "trace",
    "tiers.balance",
    "tiers",
    "store",
    "ess_patches",
    "ess_kernels",
    "errors",
    "layout",
    "config",
)
ORDER = (*ABOVE, *BELOW)

# The 17 large rooms: sub-rooms belong to their folder, single modules at the top to these.
LARGE = {
    "sglang_ess": "launch",
    "launch_server": "launch",
    "scheduler_gate": "scheduler",
    "metrics": "scheduler",
    "errors": "base",
    "layout": "base",
    "config": "base",
}


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the three source roots."""
    found = {}
    for package, root in SOURCES.items():
        for file in sorted((REPO / root / package).rglob("*.py")):
            parts = file.relative_to(REPO / root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def room(module: str) -> str:
    """The room of a module: the longest name in ORDER that its dotted name begins with.

    Raises: ValueError for a module in no room.
    """
    name = module.removeprefix("sglang_ess.")
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        if (candidate := ".".join(parts[:size])) in ORDER:
            return candidate
    raise ValueError(f"{module} must belong to a room of tools/structure.py: got none. Add it.")


def imported(source: str, known: Iterable[str] = ()) -> set[str]:
    """Dotted names that a source imports, at any depth and under TYPE_CHECKING too.

    known: modules; `from package import name` gives package.name if that is one of them
    """
    known, found = set(known), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found


@cache
def module_arrows() -> dict[str, set[str]]:
    """Module -> our modules that it imports."""
    known = modules()
    return {
        name: (imported(file.read_text(), known) & known.keys()) - {name}
        for name, file in known.items()
    }


def large_room(name: str) -> str:
    """The large room of a room of ORDER."""
    return LARGE.get(name, name.partition(".")[0])


def room_arrows() -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(room, room) -> the imports between them, for rooms that differ."""
    found = defaultdict(list)
    for name, targets in module_arrows().items():
        for target in targets:
            if room(name) != room(target):
                found[room(name), room(target)].append((name, target))
    return dict(found)


def upward(arrows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows (room, room) that do not point downward in ORDER."""
    rank = {name: place for place, name in enumerate(ORDER)}
    return sorted((a, b) for a, b in arrows if rank[a] >= rank[b])


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other (Tarjan's strongly connected components)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(arrows.get(name, ())):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return found


def sglang_importers() -> list[str]:
    """Modules below the line that import SGLang."""
    return [
        name
        for name, file in modules().items()
        if room(name) in BELOW
        and room(name) != "ess_patches"
        and any(target.split(".")[0] == "sglang" for target in imported(file.read_text()))
    ]


def top_modules() -> list[str]:
    """Files directly in python/sglang_ess."""
    return sorted(file.stem for file in (REPO / "python" / "sglang_ess").glob("*.py"))


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def base_names() -> list[str]:
    """File names within sglang_ess, but for __init__ and __main__."""
    files = [file for name, file in modules().items() if name.split(".")[0] == "sglang_ess"]
    return [file.stem for file in files if not file.stem.startswith("__")]


def class_names() -> list[str]:
    """Public classes of sglang_ess."""
    return [
        node.name
        for name, file in modules().items()
        if name.split(".")[0] == "sglang_ess"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]


def lines() -> Iterator[tuple[str, int]]:
    """(folder, lines of its Python and C++ files)."""
    folders = [REPO / "python" / "sglang_ess"]
    folders += sorted(path for path in folders[0].iterdir() if path.is_dir())
    folders += [
        REPO / name for name in ("kernels", "patches", "tests", "benchmarks", "scripts", "tools")
    ]
    for folder in folders:
        files = [
            file
            for suffix in ("py", "cu", "cuh", "cpp", "h", "sh")
            for file in folder.rglob(f"*.{suffix}")
        ]
        if files:
            yield (
                str(folder.relative_to(REPO)),
                sum(len(file.read_text().splitlines()) for file in files),
            )


def main() -> None:
    """Print the figures."""
    arrows = room_arrows()
    rooms = {name for arrow in arrows for name in arrow}
    by_room = defaultdict(set)
    for a, b in arrows:
        by_room[a].add(b)
    large = {(large_room(a), large_room(b)) for a, b in arrows}
    large = {(a, b) for a, b in large if a != b}
    print(f"large rooms {len({name for arrow in large for name in arrow})}, arrows {len(large)}")
    print(f"with sub-rooms {len(rooms)}, arrows {len(arrows)}, upward {len(upward(arrows))}")
    print(f"circles of rooms {len(circles(by_room))}, of modules {len(circles(module_arrows()))}")
    print(f"modules at the top {len(top_modules())}: {', '.join(top_modules())}")
    print(f"file names used twice {len(repeated(base_names()))}: {repeated(base_names())}")
    print(f"class names used twice {len(repeated(class_names()))}: {repeated(class_names())}")
    for a, b in upward(arrows):
        print(f"upward {a} -> {b}: {arrows[a, b]}")
    for group in circles(module_arrows()):
        print("circle", " ".join(group))
    print(f"below the line but importing SGLang: {sglang_importers()}")
    for folder, count in lines():
        print(f"{count:7,} {folder}")


if __name__ == "__main__":
    main()
