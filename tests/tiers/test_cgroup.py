"""Memory limits of control groups, from trees as systemd, Slurm and container hosts build them."""

from dataclasses import dataclass, field

import pytest

from sglang_ess.tiers import cgroup

GIB = 1 << 30
UNLIMITED = 2**63 - 4096  # v1's


def v2(limit="max", current=0, inactive=0, high="max", active=0):
    stat = f"anon 1\nfile 7\ninactive_file {inactive}\nactive_file {active}"
    return {"memory.max": limit, "memory.high": high, "memory.current": current,
            "memory.stat": stat}  # fmt: skip


def v1(limit=UNLIMITED, usage=0, inactive=0):
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file 7"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


@dataclass
class Tree:
    """mounts: (mount point, root in the hierarchy, file system, its options)."""

    cgroup: str
    groups: dict[str, dict]
    limit: int | None
    free: int | None
    mounts: tuple = (("", "/", "cgroup2", "rw,nsdelegate"),)
    id: str = field(default="", kw_only=True)


V1_MOUNTS = (
    ("cpu", "/", "cgroup", "rw,cpu"),
    ("memory", "/", "cgroup", "rw,memory"),
    ("unified", "/", "cgroup2", "rw"),
)
SYSTEMD = "0::/user.slice/user-1000.slice/session-3.scope"
SLURM = "6:memory:/slurm/uid_9/job_7/step_0\n4:cpu:/slurm/uid_9\n1:name=systemd:/x\n0::/system"
JOB = "slurm/uid_9/job_7"
# The mount's root is the container's own group; the path in /proc is the host's.
CONTAINER = (("", "/kube/pod1/box", "cgroup2", "rw"),)
SLICE = "user.slice/user-1000.slice"

TREES = [
    Tree("0::/", {"": v2(GIB, GIB // 4)}, GIB, 3 * GIB // 4, id="namespaced container"),
    Tree("0::/", {"": v2(GIB, GIB // 4, inactive=1000, active=500)}, GIB, 3 * GIB // 4 + 1500,
         id="file pages"),
    Tree("0::/", {"": v2(GIB, 2 * GIB)}, GIB, 0, id="over its limit"),
    Tree("0::/", {}, None, None, id="no files"),
    Tree("0::/", {"": {"memory.max": GIB}}, GIB, None, id="no controller"),
    Tree("0::/a", {"a": v2("max", 5)}, None, None, id="no limit"),
    Tree(SYSTEMD, {SLICE: v2(GIB, 100)}, GIB, GIB - 100, id="systemd: at the user's slice"),
    Tree(SYSTEMD, {SLICE: v2(GIB, 700), f"{SLICE}/session-3.scope": v2(GIB // 2, 1)},
         GIB // 2, GIB // 2 - 1, id="systemd: the tightest"),
    Tree(SYSTEMD, {SLICE: v2(GIB, GIB - 9), f"{SLICE}/session-3.scope": v2(GIB // 2, 1)},
         GIB // 2, 9, id="systemd: others use the slice"),
    Tree(SYSTEMD, {SLICE: v2("max", 100, high=GIB)}, GIB, GIB - 100, id="systemd: MemoryHigh"),
    Tree(SYSTEMD, {"user.slice/user-1001.slice": v2(1, 0)}, None, None, id="systemd: a sibling's"),
    Tree(SLURM, {f"memory/{JOB}": v1(GIB, 100), f"memory/{JOB}/step_0": v1()}, GIB, GIB - 93,
         V1_MOUNTS, id="Slurm, v1: at the job"),
    Tree(SLURM, {f"memory/{JOB}": v1(GIB, 100, inactive=50)}, GIB, GIB - 43, V1_MOUNTS,
         id="Slurm, v1: file pages of all below"),
    Tree(SLURM, {f"cpu/{JOB}": v1(5, 1), "memory/slurm": v1()}, None, None, V1_MOUNTS,
         id="v1: no limit"),
    Tree("0::/job", {"unified/job": v2(GIB, 1)}, GIB, GIB - 1, V1_MOUNTS, id="hybrid: in v2"),
    Tree("0::/kube/pod1/box", {"": v2(GIB, 1)}, GIB, GIB - 1, CONTAINER, id="container: its root"),
    Tree("0::/kube/pod1/box/own", {"": v2(GIB, 1), "own": v2(9, 1)}, 9, 8, CONTAINER,
         id="container: a group within"),
    Tree("0::/kube/pod1/box", {"": v2(GIB, 1)}, GIB, GIB - 1, id="container: host path, no root"),
    Tree("0::/../../elsewhere", {"": v2(GIB, 1)}, GIB, GIB - 1, CONTAINER, id="outside the root"),
    Tree("3:cpu,memory:/job", {"memory/job": v1(7, 3)}, 7, 11,
         (("memory", "/", "cgroup", "rw,cpu,memory"),), id="v1: joined controllers"),
]  # fmt: skip


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.id)
def test_limit_and_free(tmp_path, tree):
    proc, base = tmp_path / "proc", tmp_path / "a mount"
    proc.mkdir()
    (proc / "cgroup").write_text(tree.cgroup + "\n")
    (proc / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        + "".join(
            f"{30 + i} 22 0:26 {root} {str(base / point).replace(' ', chr(92) + '040')} "
            f"rw,nosuid shared:{i} - {kind} cgroup {options}\n"
            for i, (point, root, kind, options) in enumerate(tree.mounts)
        )
    )
    for group, files in tree.groups.items():
        folder = base / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
    assert cgroup.limit_bytes(proc) == tree.limit
    assert cgroup.free_bytes(proc) == tree.free


def test_no_cgroup_at_all(tmp_path):
    assert cgroup.limit_bytes(tmp_path) is None and cgroup.free_bytes(tmp_path) is None


def test_this_machine():
    limit, free = cgroup.limit_bytes(), cgroup.free_bytes()
    assert limit is None or 0 < limit < cgroup.NO_LIMIT
    assert free is None or limit is not None and 0 <= free <= limit
