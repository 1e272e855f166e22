"""Servers over several hosts of tools/hosts.py, for tests and scripts/cluster.sh."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.support.pd import Node, PdCluster
from tools.hosts import Host, Hosts
from tools.processes import HttpProcess

INIT_PORT = 25_000  # the hosts' ports are their own
SCHEDULER = "sglang::scheduler"
# Seconds that each half of a request waits for the other host; SGLang's default is 300.
PD_WAIT = 20
PD_WAITS = dict.fromkeys(
    ("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT"),
    str(PD_WAIT),
)
BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def own_core(index: int) -> dict[str, str]:
    """Variables for a process of one rank: the hosts share the machine's cores."""
    cores = sorted(os.sched_getaffinity(0))
    return {BIND: str(cores[index % len(cores)]), "OMP_NUM_THREADS": "1"}


class NodeGroup:
    """One server with a node on each host; a context manager.

    directory: for the logs; flags: of every node; env: variables on top of this process's
    """

    def __init__(
        self,
        model,
        hosts: Sequence[Host],
        directory: Path,
        *flags: str,
        env: dict[str, str] | None = None,
    ):
        init = f"{hosts[0].address}:{INIT_PORT}"
        size = ("--nnodes", str(len(hosts)), "--dist-init-addr", init)
        self.nodes = [
            HttpProcess(
                "sglang_ess.launch_server",
                *("--model-path", str(model), *size, "--node-rank", str(rank), *flags),
                log=Path(directory) / f"node-{rank}.log",
                env={**own_core(rank), **(env or {})},
                host=host,
            )
            for rank, host in enumerate(hosts)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for node in self.nodes:  # one SIGTERM to node 0 would do; a hung one must end, too
            node.stop()

    def wait_ready(self, seconds: float = 300) -> None:
        """Return once node 0 answers. Raises: RuntimeError with a log's tail if a node ends."""
        first, *others = self.nodes

        def ready() -> bool:
            ended = next((one for one in others if one.process.poll() is not None), None)
            if ended is not None:
                raise RuntimeError(f"{ended.log.stem} ended:\n{ended.tail()}")
            return first.is_ready()

        first.wait_for(ready, seconds, "ready")

    def kill(self, rank: int, title: str | None = None) -> None:
        """SIGKILL to a node's launcher, or to its first process whose title begins so."""
        launcher = psutil.Process(self.nodes[rank].process.pid)
        titled = [one for one in launcher.children(recursive=True) if is_titled(one, title)]
        os.kill(titled[0].pid if title else launcher.pid, signal.SIGKILL)

    def seconds_to_end(self, since: float, limit: float) -> list[float]:
        """Seconds from since, a time.monotonic(), to the end of each node's launcher.

        Raises: RuntimeError with a log's tail if one still runs after limit seconds
        """
        ends: dict[int, float] = {}
        while len(ends) < len(self.nodes):
            for rank, node in enumerate(self.nodes):
                if rank not in ends and node.process.poll() is not None:
                    ends[rank] = time.monotonic() - since
                elif rank not in ends and time.monotonic() - since > limit:
                    raise RuntimeError(f"node {rank} runs after {limit} s:\n{node.tail()}")
            time.sleep(0.02)
        return [ends[rank] for rank in range(len(self.nodes))]

    def last_lines(self) -> list[str]:
        """Each node's line for the operator, empty without one."""
        texts = [node.log.read_text(errors="replace").splitlines() for node in self.nodes]
        ours = [[line for line in lines if line.startswith("sglang-ess: ")] for lines in texts]
        return [lines[-1] if lines else "" for lines in ours]


def is_titled(process: psutil.Process, title: str | None) -> bool:
    try:
        # SGLang adds the rank, as in sglang::scheduler_DP1_TP1.
        return title is not None and "".join(process.cmdline()[:1]).startswith(title)
    except psutil.Error:
        return False


FAULTS: dict[str, Callable[[Hosts, NodeGroup], None]] = {
    "cut": lambda hosts, group: hosts.cut(1),
    "launcher": lambda hosts, group: group.kill(1),
    "scheduler": lambda hosts, group: group.kill(1, SCHEDULER),
}


def pd_on_hosts(
    model, hosts: Sequence[Host], directory: Path, *flags: str, env: dict[str, str] | None = None
) -> PdCluster:
    """Prefill on the first host, decode on the second, on this machine a router that tries once.

    Mooncake takes SGLANG_HOST_IP, because the hosts have no route to the rest of the world.
    """

    def node(module: str, *flags: str, log: Path, env: dict[str, str] | None = None) -> Node:
        rank = int(log.stem == "decode")
        own = {"SGLANG_HOST_IP": hosts[rank].address, **own_core(rank)}
        return Node(module, *flags, log=log, env={**own, **(env or {})}, host=hosts[rank])

    return PdCluster(
        model, directory, flags, router_flags=("--mini-lb",), env={**PD_WAITS, **(env or {})},
        node=node,
    )  # fmt: skip
