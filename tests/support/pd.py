"""A prefill server, a decode server and a router on this machine, for tests and scripts/pd.sh."""

import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import pd_cluster
from tools.hosts import LOOPBACK, Host
from tools.processes import HttpProcess

# A log line of a check of SGLang's own that failed, or of a scheduler that died.
BROKEN = ("leak detected", "Leak Detected", "double free", "use-after-free", "Scheduler hit an exc")
# /v1/loads: what a node still has to do, and the part of it that only disaggregation has.
BUSY = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
QUEUES = (
    *("prefill_bootstrap_queue_reqs", "prefill_inflight_queue_reqs"),
    *("decode_prealloc_queue_reqs", "decode_transfer_queue_reqs", "decode_retracted_queue_reqs"),
)
# SGLang's Rust gateway, and how it outlasts a node's restart: it tries again at every error but
# a 4xx, with a new bootstrap room. By its defaults it gives up after 5 tries in half a second, and
# 10 failures close its circuits to both nodes for a minute.
GATEWAY_FLAGS = (
    *("--disable-circuit-breaker", "--disable-health-check"),
    *("--retry-max-retries", "1000", "--retry-max-backoff-ms", "1000"),
    *("--worker-startup-check-interval", "1"),
)
# Below Linux's ephemeral ports, from which every connection takes one, and above Mooncake's
# (12001 to 17000): a node that is killed finds its port free again.
PORTS = range(20_000, 32_000)
ROOT = Path(__file__).parents[2]


def fixed_port() -> int:
    """A port that nobody uses, and that no outgoing connection will take by chance.

    Never one twice: who gets it may bind it later.
    """
    while True:
        port = random.choice([port for port in PORTS if port not in _given])
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port


_given: set[int] = set()


def faulty(directory: Path, fault: str) -> dict[str, str]:
    """Variables for a node that calls fault, "module:function", in each of its processes.

    SGLang calls its plugins, so it becomes one: of a distribution written to directory.
    """
    info = Path(directory) / "ess_test_fault-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ess-test-fault\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\ness_test_fault = {fault}\n")
    paths = [str(directory), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def end_if_imported(module: str) -> None:
    """End this process with status 1 if it has imported the module."""
    sys.exit(module in sys.modules)


def freed_slots_stay_hot() -> None:
    """Fault, invariant 3: whoever gets a freed slot finds the hot row of its last owner."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator as Plain

    from sglang_ess.mem_cache.allocator import EssPagedAllocator

    EssPagedAllocator._release_page_ids = Plain._release_page_ids


def a_page_is_lost() -> None:
    """Fault: of the pages that are freed first, one is never handed out again."""
    from sglang_ess.mem_cache.allocator import EssPagedAllocator

    release, lost = EssPagedAllocator._release_page_ids, []

    def leaky(allocator, *page_ids):
        if not lost and len(page_ids[0]):
            lost.append(page_ids[0][:1])
            page_ids = (page_ids[0][1:], *page_ids[1:])
        release(allocator, *page_ids)

    EssPagedAllocator._release_page_ids = leaky


SHARES = "ESS_TEST_SHARES"  # a variable: the file that shares_as_told reads


def shares_as_told() -> None:
    """Fault: ranks that share a host tier are sent what the file says; and what is sent is logged.

    The file: "shares" (no fault), "all" (every rank is sent all rows), or "lost" (the last rank is
    sent the first one's share in the place of its own).
    """
    from sglang.srt.distributed.device_communicators.mooncake_transfer_engine import (
        MooncakeTransferEngine,
    )

    from sglang_ess.disagg import mooncake

    share_of, transfer = mooncake.share_of, MooncakeTransferEngine.batch_transfer_sync

    def told(registration):
        fault, share = Path(os.environ[SHARES]).read_text(), share_of(registration)
        if fault == "all":
            return mooncake.Share()
        if fault == "lost" and share.part == share.parts - 1:
            return mooncake.Share(0, share.parts)
        return share

    def logged(engine, session, sources, targets, lengths):
        print(f"test: sent {sum(lengths)} bytes", flush=True)
        return transfer(engine, session, sources, targets, lengths)

    mooncake.share_of, MooncakeTransferEngine.batch_transfer_sync = told, logged


class Node(HttpProcess):
    """A process of a cluster: a module that serves HTTP, on a port that it finds free again.

    A node that was killed is started again with start(), on the same port.
    """

    last_loads: dict[str, int] | None = None  # at the last is_idle()

    def __init__(
        self,
        module: str,
        *flags: str,
        log: Path,
        env: dict[str, str] | None = None,
        host: Host = LOOPBACK,
    ):
        super().__init__(module, *flags, log=log, port=fixed_port(), env=env, host=host)

    def kill(self) -> None:
        """SIGKILL to the process and its children at once, as when a host is lost."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def loads(self) -> dict[str, int]:
        """{field of BUSY and QUEUES: now, summed over the node's ranks}."""
        found = dict.fromkeys((*BUSY, *QUEUES), 0)
        for load in self.get("/v1/loads?include=all")["loads"]:
            for name in found:
                found[name] += (load | load["disaggregation"])[name]
        return found

    def is_idle(self) -> bool:
        """Whether nothing runs or waits and every slot is free. Effect: no cached prefix."""
        try:
            # SGLang refuses to flush while a request is anywhere in the node.
            flushed = self.post("/flush_cache", b"")[0] == 200
            self.last_loads = self.loads()
        except OSError:  # it died, or died and is not yet back
            return False
        return flushed and not any(self.last_loads.values())

    def complaints(self) -> list[str]:
        """Lines, cut, in which SGLang found its own books wrong or died, since the last start."""
        lines = self.log.read_bytes()[self.log_start :].decode(errors="replace").splitlines()
        return [line[:300] for line in lines if any(words in line for words in BROKEN)]

    def generate(
        self, input_ids, max_new_tokens: int, seconds: float = 300, **more
    ) -> tuple[int, dict]:
        """(status, answer) of one greedy request to /generate, given up after seconds.

        more: further fields of the body. An answer that is not JSON comes as {"text": it}.
        Raises: OSError if the server is not there, hangs up or takes too long.
        """
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        body = {"input_ids": input_ids, "sampling_params": sampling, **more}
        status, text = self.post("/generate", body, seconds)
        try:
            return status, json.loads(text)
        except ValueError:
            return status, {"text": text}


class PdCluster:
    """Prefill, decode (two-tier) and a router in front; a context manager.

    The launcher serves prefill one-tier, and lets it send warm-up ids.

    model: checkpoint directory; directory: for the logs
    flags: of both nodes; "--disable-ess" among prefill_flags makes a plain node, that sends none
    router_flags: of sglang-router, the Rust gateway; its "--mini-lb" never tries again
    env: variables on top of this process's, for both nodes
    node: what starts both nodes: a class, or a function with the class's arguments
    """

    def __init__(
        self,
        model,
        directory: Path,
        flags: tuple[str, ...] = (),
        prefill_flags: tuple[str, ...] = (),
        decode_flags: tuple[str, ...] = ("--ess-hot-ratio", "0.2"),
        router_flags: tuple[str, ...] = GATEWAY_FLAGS,
        env: dict[str, str] | None = None,
        node: Callable[..., Node] = Node,
    ):
        launcher, bootstrap = "sglang_ess.launch_server", fixed_port()
        # The nodes import SGLang and load the model at the same time.
        self.prefill = node(
            launcher,
            *(*pd_cluster.prefill_flags(model, bootstrap), *flags, *prefill_flags),
            log=Path(directory) / "prefill.log",
            env=env,
        )
        self.decode = node(
            launcher,
            *(*pd_cluster.decode_flags(model), *flags, *decode_flags),
            log=Path(directory) / "decode.log",
            env=env,
        )
        pair = pd_cluster.router_flags(self.prefill.url, bootstrap, self.decode.url)
        metrics = ("--prometheus-port", str(fixed_port()))  # 29000 for every gateway otherwise
        self.router = Node(
            "sglang_router.launch_router",
            *(*router_flags, *metrics, *pair),
            log=Path(directory) / "router.log",
        )
        self.router.ready_path = "/health" if "--mini-lb" in router_flags else "/readiness"
        self.url = self.router.url

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.prefill, self.decode

    def wait_ready(self, seconds: float = 300) -> None:
        """Return once a request to the router would be served.

        Raises: RuntimeError with the log's tail of the process that ended or is not ready.
        """
        for node in (*self.nodes, self.router):
            node.wait_ready(seconds)

    def generate(self, input_ids, max_new_tokens: int, **more) -> tuple[int, dict]:
        """Node.generate() through the router."""
        return self.router.generate(input_ids, max_new_tokens, **more)

    def settle(self, seconds: float = 120) -> None:
        """Wait until both nodes are idle, with every slot and every request row free.

        Effect: both radix caches are emptied, so that no slot is in use for their sake. SGLang
        counts slots and rows itself when it falls idle, and its scheduler dies of a leak.
        Raises: RuntimeError saying what is in use, or with the log's tail of a node that ended.
        """
        for node in self.nodes:
            try:
                node.wait_for(node.is_idle, seconds, "idle")
            except RuntimeError as error:
                raise RuntimeError(f"{node.log.stem}: {node.last_loads}\n{error}") from None
            if lines := node.complaints():
                raise RuntimeError(f"{node.log.stem}: " + "\n".join(lines))

    def restart(self, node: Node) -> None:
        """Kill a node and start it again on its port; returns once it is ready."""
        if node.process.poll() is None:
            node.kill()
        node.start()
        node.wait_ready()

    def stop(self) -> list[int]:
        """Exit status of router, decode and prefill, all asked to end at once."""
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(Node.stop, (self.router, self.decode, self.prefill)))
