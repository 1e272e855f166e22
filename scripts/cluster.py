"""Serves a tiny model on two hosts in network namespaces and asks it once: scripts/cluster.sh.

tp: one server, a TP rank on each host; dp: the same with DP attention; pd: prefill on one host,
decode on the other, the router on this machine. --fault then does what happens to clusters and
says how long the rest takes to end: it cuts the second host off, or kills its launcher or its
scheduler, while a request runs or with --idle. All processes and namespaces end with this one.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from tests.support.nodes import FAULTS, NodeGroup, pd_on_hosts
from tools import hosts as network

OUT = Path("out/cluster")
FLAGS = ("--max-total-tokens", "4096", "--ess-hot-ratio", "0.3", "--dtype", "float32")
MODES = {
    "tp": ("--tp-size", "2"),
    "dp": ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention"),
    "pd": (),
}
PROMPT, TOKENS, LONG = list(range(10, 310)), 16, 3000
START_SECONDS = 600
END_SECONDS = 60  # in which both nodes must end after a fault


def say(line: str) -> None:
    print(line, flush=True)


def ask(server, tokens: int) -> str:
    """What came of one request of so many tokens, in words, whatever came."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    since = time.monotonic()
    try:
        status, text = server.post(
            "/generate", {"input_ids": PROMPT, "sampling_params": sampling}, START_SECONDS
        )
        found = f"{status} {json.loads(text).get('output_ids', text)}"[:200]
    except (OSError, ValueError) as error:
        found = f"{type(error).__name__} ({error})"
    return f"{found} after {time.monotonic() - since:.1f} s"


def serve_nodes(hosts: network.Hosts, model: str, flags: list[str], args) -> None:
    with NodeGroup(model, hosts.hosts, OUT, *MODES[args.mode], *FLAGS, *flags) as group:
        group.wait_ready(START_SECONDS)
        first = group.nodes[0]
        say(f"{first.url} serves; a request: {ask(first, TOKENS)}")
        if not args.fault:
            since = time.monotonic()
            first.process.send_signal(signal.SIGTERM)
            ends = group.seconds_to_end(since, END_SECONDS)
            status = [node.process.returncode for node in group.nodes]
            say(f"SIGTERM to node 0: the nodes ended after {ends[0]:.1f} and {ends[1]:.1f} s, "
                f"with {status[0]} and {status[1]}")  # fmt: skip
            return
        with ThreadPoolExecutor(1) as pool:
            if not args.idle:
                asked = pool.submit(ask, first, LONG)
                time.sleep(2)  # it runs
            since = time.monotonic()
            FAULTS[args.fault](hosts, group)
            ends = group.seconds_to_end(since, END_SECONDS)
            say(f"{args.fault}: the nodes ended after {ends[0]:.1f} and {ends[1]:.1f} s")
            if not args.idle:
                say(f"the request that ran got {asked.result()}")
        for rank, line in enumerate(group.last_lines()):
            say(f"node {rank}: {line}")


def serve_pd(hosts: network.Hosts, model: str, flags: list[str], args) -> None:
    with pd_on_hosts(model, hosts.hosts, OUT, *FLAGS[:2], *flags) as cluster:
        cluster.wait_ready(START_SECONDS)
        say(f"{cluster.url} serves; a request: {ask(cluster.router, TOKENS)}")
        if args.fault == "cut":
            hosts.cut(0)
            say(f"prefill cut off; a request: {ask(cluster.router, TOKENS)}")
            hosts.mend(0)
            say(f"mended; a request: {ask(cluster.router, TOKENS)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/cluster.sh", description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--fault", choices=FAULTS, help="with pd: cut only")
    parser.add_argument("--idle", action="store_true", help="no request runs at the fault")
    parser.add_argument("--model-path", help="checkpoint; default: a tiny one, in out/cluster")
    args, flags = parser.parse_known_args()
    if why := network.unavailable():
        raise SystemExit(f"cluster: {why}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a plain kill cleans up, too
    OUT.mkdir(parents=True, exist_ok=True)
    model = args.model_path or str(write_tiny_model(OUT / "tiny", TinyModelConfig()))
    serve = serve_pd if args.mode == "pd" else serve_nodes
    try:
        with network.Hosts(2) as hosts:
            say(f"hosts {', '.join(host.address for host in hosts.hosts)}; logs: {OUT}/*.log")
            serve(hosts, model, flags, args)
    except KeyboardInterrupt:
        say("\nended")
    except RuntimeError as error:
        raise SystemExit(f"cluster: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
