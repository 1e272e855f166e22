"""One server over the nodes of a Ray cluster: python deploy/ray/serve_nodes.py --nodes 2 -- FLAGS

FLAGS are those of `python -m sglang_ess.launch_server`, without the ones that differ between
nodes: this program adds them. It takes whole nodes, starts one launcher on each, and waits. When
one launcher ends, or at SIGTERM or SIGINT, it ends all of them: the first node's, which answers
the requests, gets SIGTERM and its grace period; then the others get theirs.

Only main() needs Ray. SGLang's own `--use-ray` makes Ray actors of the ranks instead; ESS has not
been tried with it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

DIST_PORT = 20000  # of the first node, where the ranks meet; the launchers use the one below
POLL_SECONDS = 1.0
END_SECONDS = 15.0  # a launcher's own end, after its grace period
PR_SET_PDEATHSIG = 1  # prctl(2)
# What this program sets; a node that had another value would join another server.
OWN = ("--nnodes", "--node-rank", "--dist-init-addr")


def command(flags: Sequence[str], rank: int, nodes: int, address: str) -> list[str]:
    """The launcher's command on one node.

    rank: of the node; address: IP address of the first node
    Raises: ValueError (one line) for a flag that this program sets.
    """
    for flag in flags:
        if flag.partition("=")[0] in OWN:
            raise ValueError(f"flags must not have {', '.join(OWN)}: got {flag}. Drop it.")
    made = [sys.executable, "-m", "sglang_ess.launch_server", *flags]
    if nodes > 1:
        made += [f"--nnodes={nodes}", f"--node-rank={rank}"]
        made += [f"--dist-init-addr={address}:{DIST_PORT}"]
    return made


def bundles(nodes: int, gpus: int, cpus: int) -> list[dict[str, float]]:
    """Resources of a placement group, one node each. Strategy STRICT_SPREAD."""
    return [{"GPU": float(gpus), "CPU": float(cpus)} for _ in range(nodes)]


class Launcher:
    """A launcher's process. As a Ray actor, it runs on the node of its bundle."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def address(self) -> str:
        """IP address of this node, for the other nodes."""
        import ray

        return str(ray.util.get_node_ip_address())

    def start(self, argv: Sequence[str]) -> None:
        # A session of its own: a signal to Ray's worker is not one to the server. But the server
        # ends with the worker, which Ray kills when this program is gone.
        self.process = subprocess.Popen(
            list(argv), start_new_session=True, preexec_fn=_end_with_parent
        )

    def status(self) -> int | None:
        """The exit status; None while the process runs."""
        assert self.process is not None
        return self.process.poll()

    def stop(self, seconds: float) -> int:
        """Send SIGTERM, and SIGKILL to all of the session after `seconds`. Returns the status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def wait(statuses: Any, is_asked: Any, poll_seconds: float = POLL_SECONDS) -> list[int | None]:
    """Wait until a launcher has ended or is_asked(). Returns statuses() of that moment."""
    while True:
        found = list(statuses())
        if is_asked() or any(status is not None for status in found):
            return found
        time.sleep(poll_seconds)


def grace_seconds(flags: Sequence[str]) -> float:
    """The grace period that the flags ask for."""
    from sglang_ess.launch_server import split_args

    return split_args(list(flags))[0].grace_seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that a node must have free [8]")
    parser.add_argument("--cpus", type=int, default=32, help="CPUs that a node must have free [32]")
    parser.add_argument("--ray-address", default="auto", help="of the cluster [auto]")
    parser.add_argument("flags", nargs="*", help="of the launcher, after --")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until asked to end. Returns 0, or the first launcher's status that is not 0."""
    options = _parser().parse_args(argv)
    grace = grace_seconds(options.flags)
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    asked: list[int] = []
    ray.init(address=options.ray_address)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    group = placement_group(
        bundles(options.nodes, options.gpus, options.cpus), strategy="STRICT_SPREAD"
    )
    try:
        ray.get(group.ready())
        made = ray.remote(num_gpus=options.gpus, num_cpus=options.cpus)(Launcher)
        nodes = [
            made.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)).remote()
            for rank in range(options.nodes)
        ]
        address = ray.get(nodes[0].address.remote())
        for rank, node in enumerate(nodes):
            ray.get(node.start.remote(command(options.flags, rank, options.nodes, address)))
        wait(lambda: ray.get([node.status.remote() for node in nodes]), lambda: asked)
        ends = [ray.get(nodes[0].stop.remote(grace + END_SECONDS))]
        ends += ray.get([node.stop.remote(END_SECONDS) for node in nodes[1:]])
    finally:
        remove_placement_group(group)
        ray.shutdown()
    return next((status for status in ends if status), 0)


if __name__ == "__main__":
    sys.exit(main())
