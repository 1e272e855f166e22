"""In which order test files run, and which of them in one process where there are several.

Files of a group run in one process, one after the other: they share a server, which starts while
the first of them run. Any other file is a group of its own.
"""

# The longest come first, so that the processes end at about the same time.
GROUPS = {
    "server": (
        "tests/kernels/", "tests/intake/", "tests/test_metrics", "tests/docs/",
        "tests/launch/test_startup.py", "tests/serving/test_users.py",
    ),
    "pair": ("tests/sim/", "tests/launch/test_shutdown_server.py"),
    "cluster": ("tests/disagg/",),
    "engines": ("tests/serving/test_two_tier.py",),
    "parity": ("tests/serving/test_parity.py",),
    "kernels": ("tests/attention/", "tests/cpu/"),
}  # fmt: skip


def of(nodeid: str) -> str:
    """The group of a test, or of a module."""
    file = nodeid.partition("::")[0]
    for name, members in GROUPS.items():
        if file.startswith(members):
            return name
    return file


def order(nodeid: str) -> tuple[int, int]:
    """Key for a stable sort: groups in their order, and in each its members in theirs."""
    file, group = nodeid.partition("::")[0], of(nodeid)
    if group not in GROUPS:
        return len(GROUPS), 0
    members = GROUPS[group]
    return [*GROUPS].index(group), next(i for i, m in enumerate(members) if file.startswith(m))


def scheduler(config, log):
    """pytest-xdist's, by groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return of(nodeid)

    config.option.loadscopereorder = False  # or the groups of most tests would come first
    return Groups(config, log)
