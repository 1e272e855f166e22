"""A prefill server, a decode server and a router on this machine: their flags, and on own cores.

The flags are those of every cluster here (tests/support/pd.py, scripts/pd.sh). The classes are for
measurements. In production prefill and decode are different machines, so the decode server gets a
core to itself, and everything else shares the others: SGLang's schedulers poll without pause while
a request waits for its transfer, and a shared core would charge decode for prefill's waiting.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.processes import HttpProcess, free_port

START_SECONDS = 600
WAIT_SECONDS = 1800  # the router's own limit
# Below the client and the router: their clock readings must not wait for a polling scheduler.
PREFILL_NICE = 5
DECODE_LOG_INTERVAL = 4  # steps between two of the decode server's log lines
COMMON = (
    *("--kv-cache-dtype", "fp8_e4m3", "--chunked-prefill-size", "2048"),
    *("--skip-tokenizer-init", "--incremental-streaming-output", "--skip-server-warmup"),
)
BATCH = re.compile(r"Decode batch.*?#running-req: (\d+)")
COUNTER = re.compile(r"sglang:ess_(\w+?)_total\{[^}]*\} (\S+)")


def prefill_flags(model: str, bootstrap: int) -> tuple[str, ...]:
    """bootstrap: port at which the decode server and the router ask for this server"""
    own = ("--disaggregation-bootstrap-port", str(bootstrap))
    return (*_node_flags(model, "prefill"), *own)


def decode_flags(model: str) -> tuple[str, ...]:
    return _node_flags(model, "decode")


def _node_flags(model: str, mode: str) -> tuple[str, ...]:
    transfer = ("--disaggregation-transfer-backend", "mooncake")
    return "--model-path", str(model), "--disaggregation-mode", mode, *transfer


def router_flags(prefill_url: str, bootstrap: int, decode_url: str) -> tuple[str, ...]:
    nodes = ("--prefill", prefill_url, str(bootstrap), "--decode", decode_url)
    return "--pd-disaggregation", *nodes


@dataclass(frozen=True)
class Cores:
    """front: of the prefill server, the router and the client; decode: the decode server's."""

    front: tuple[int, ...]
    decode: tuple[int, ...]

    @classmethod
    def of_machine(cls) -> Cores:
        """The last usable core decodes. On a machine with one core everything shares it."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(tuple(usable[:-1] or usable), (usable[-1],))


def node_env(threads: int) -> dict[str, str]:
    """As many threads as cores in torch and in numba; no network; long waits.

    A request that is sent at saturation waits for minutes before its transfer begins, which
    SGLang would take for a lost peer.
    """
    names = ("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "SGLANG_DISAGGREGATION_WAITING_TIMEOUT")
    waits = dict.fromkeys(names, str(WAIT_SECONDS))
    counts = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    return {"HF_HUB_OFFLINE": "1", **counts, **waits}


class Node(HttpProcess):
    """A process that serves HTTP, on its cores; its exit as a context manager stops it.

    nice: added to the process's and its children's own
    """

    def __init__(self, module: str, *flags: str, log: Path, cores: Sequence[int], nice: int = 0):
        self.cores = tuple(cores)
        settle = functools.partial(_settle, self.cores, nice)
        env = node_env(len(self.cores))
        super().__init__(module, *flags, log=log, env=env, settle=settle)

    def _family(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """CPU time of the node's processes so far."""
        times = [process.cpu_times() for process in self._family()]
        return sum(one.user + one.system for one in times)

    def check_cores(self) -> None:
        """Raises: RuntimeError if a process of the node may run elsewhere."""
        for process in self._family():
            found = set(process.cpu_affinity())
            if found != set(self.cores):
                raise RuntimeError(
                    f"{process.name()} must run on cores {self.cores} alone: got {found}"
                )


def _settle(cores: Sequence[int], nice: int) -> None:
    os.sched_setaffinity(0, cores)
    os.nice(nice)


class Prefill(Node):
    """A prefill server, one-tier: it keeps rows until they are sent, or in its radix cache."""

    def __init__(self, model: str, *flags: str, log: Path, cores: Sequence[int]):
        self.bootstrap = free_port()
        own = (*prefill_flags(model, self.bootstrap), *COMMON)
        super().__init__(
            "sglang_ess.launch_server", *own, *flags, log=log, cores=cores, nice=PREFILL_NICE
        )


class Decode(Node):
    """A decode server. Its log has the batch of every DECODE_LOG_INTERVAL-th step."""

    def __init__(self, model: str, *flags: str, log: Path, cores: Sequence[int]):
        own = (*decode_flags(model), "--enable-metrics", *COMMON)
        own += ("--decode-log-interval", str(DECODE_LOG_INTERVAL))
        super().__init__("sglang_ess.launch_server", *own, *flags, log=log, cores=cores)

    def facts(self) -> dict:
        """What the running pool says of itself: slots, hot rows, device and host bytes."""
        return self.get("/server_info")["ess"]

    def log_offset(self) -> int:
        return self.log.stat().st_size

    def batches(self, since: int) -> list[int]:
        """Requests in the steps logged after this offset."""
        with self.log.open("rb") as file:
            file.seek(since)
            text = file.read().decode(errors="replace")
        return logged_batches(text)

    def counters(self) -> dict[str, float]:
        """ESS's Prometheus counters, summed over the layers; empty one-tier."""
        with self.open("/metrics") as response:
            return summed_counters(response.read().decode())


def logged_batches(text: str) -> list[int]:
    return [int(found) for found in BATCH.findall(text)]


def summed_counters(text: str) -> dict[str, float]:
    """{name: sum over the layers} of the lines `sglang:ess_NAME_total{...} VALUE`."""
    found: dict[str, float] = {}
    for name, value in COUNTER.findall(text):
        found[name] = found.get(name, 0.0) + float(value)
    return found


class Router(Node):
    ready_path = "/health"

    def __init__(self, prefill: Prefill, decode: Decode, log: Path, cores: Sequence[int]):
        flags = ("--mini-lb", *router_flags(prefill.url, prefill.bootstrap, decode.url))
        super().__init__("sglang_router.launch_router", *flags, log=log, cores=cores)


@contextmanager
def decoding(
    prefill: Prefill, model: str, flags: Sequence[str], directory: Path, cores: Cores
) -> Iterator[tuple[Decode, Router]]:
    """A decode server and a router in front of it and of a prefill server that runs already.

    Raises: RuntimeError with a log's tail if one of them does not start.
    """
    log = directory / f"decode-{free_port()}.log"
    with Decode(model, *flags, log=log, cores=cores.decode) as decode:
        with Router(prefill, decode, log.with_suffix(".router"), cores.front) as router:
            for node in (prefill, decode, router):
                node.wait_ready(START_SECONDS)
                node.check_cores()
            yield decode, router
