"""Memory limits of this process's control groups, v1 and v2.

Any level may have a limit: a systemd slice, a Slurm job or step, a container. So this module
follows the process's own group (/proc/self/cgroup) upward as far as its hierarchy is mounted
(/proc/self/mountinfo). A container without a cgroup namespace reads its host's path, of which only
the part below the mount's root exists.
Source: kernel docs, cgroup-v2 `memory.max`, `memory.high` and `memory.current`; cgroup-v1
`memory.limit_in_bytes` (a value near 2^63 is none) and `memory.usage_in_bytes`; proc(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Level:
    """A control group or a group above it: its folder, and its version's file names.

    limits     `memory.high` counts too: beyond it, pages that cannot be dropped stall the process
    droppable  memory.stat's names for file pages, which the kernel drops before it kills. Weights
               that several ranks map are among the active ones. MemAvailable counts both, too
    """

    folder: Path
    limits: tuple[str, ...]
    usage: str
    droppable: tuple[str, ...]

    def limit(self) -> int | None:
        """The limit in bytes; None without one."""
        texts = (_read(self.folder / name).strip() for name in self.limits)
        numbers = [int(text) for text in texts if text.isdigit()]  # not "max"
        return min((number for number in numbers if number < NO_LIMIT), default=None)

    def free(self) -> int | None:
        """Bytes left of the limit, file pages that can be dropped included; None without one."""
        limit, used = self.limit(), _read(self.folder / self.usage).strip()
        if limit is None or not used.isdigit():
            return None
        pairs = (line.split() for line in _read(self.folder / "memory.stat").splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
        return max(0, limit - int(used) + sum(stat.get(name, 0) for name in self.droppable))


V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes",
      ("total_inactive_file", "total_active_file"))  # fmt: skip
V2 = (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def limit_bytes(proc: Path = PROC) -> int | None:
    """The lowest limit of all levels in bytes; None without one."""
    limits = [level.limit() for level in levels(proc)]
    return min((limit for limit in limits if limit is not None), default=None)


def free_bytes(proc: Path = PROC) -> int | None:
    """Bytes that this process may still take under all limits; None without one.

    The level with the fewest free bytes need not have the lowest limit: other processes use it too.
    """
    frees = [level.free() for level in levels(proc)]
    return min((free for free in frees if free is not None), default=None)


def levels(proc: Path = PROC) -> Iterator[Level]:
    """This process's group and the groups above it, in each hierarchy that limits memory."""
    mounts = list(_mounts(proc))
    for line in _read(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        for has_v1, root, point in mounts:
            if has_v1 == bool(controllers):
                yield from _upward(point, os.path.relpath(path, root), V1 if has_v1 else V2)


def _mounts(proc: Path) -> Iterator[tuple[bool, str, Path]]:
    """(whether v1, root of the mount in its hierarchy, mount point) of each with memory files."""
    for line in _read(proc / "mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        fields, (kind, *_, options) = mount.split(), system.split()
        if kind == "cgroup2" or kind == "cgroup" and "memory" in options.split(","):
            root, point = (field.replace("\\040", " ") for field in fields[3:5])
            yield kind == "cgroup", root, Path(point)


def _upward(
    point: Path, below: str, names: tuple[tuple[str, ...], str, tuple[str, ...]]
) -> Iterator[Level]:
    parts = [part for part in Path(below).parts if part != "."]
    if ".." in parts:  # outside the mounted part: only its root exists
        parts = []
    group = point.joinpath(*parts)
    for folder in (group, *group.parents):
        if folder.is_relative_to(point):
            yield Level(folder, *names)


def _read(file: Path) -> str:
    """The file's text; empty if it does not exist or may not be read."""
    try:
        return file.read_text()
    except OSError:
        return ""
