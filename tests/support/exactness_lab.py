"""Runs the engines of tests/gpu: several at a time, none beyond the time there is."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.support import exactness
from tests.support.engine import EngineProcess
from tests.support.exactness import Load
from tests.support.parity import write_model
from tests.support.server import free_port
from tests.support.spawned_engine import SpawnedEngine

PATCH = "tests.support.exactness_patches:"
GATHER, COUNTERS = "tests.support.gather:install", "tests.support.tiers:expose"
DEVICE = "tests.support.device_tier:"
CALLS = DEVICE + "_count_calls"
ROWS = {"bf16": "bfloat16", "fp8": "fp8_e4m3"}
GRAPH_BATCHES = [1, 2, 4]  # larger decode batches run without a graph
GRAPHS = {
    "graphs": {"cuda_graph_bs_decode": GRAPH_BATCHES, "disable_prefill_cuda_graph": True},
    "all graphs": {"cuda_graph_bs_decode": GRAPH_BATCHES, "cuda_graph_bs_prefill": [256, 2048]},
    "eager": {"disable_cuda_graph": True},
}
ONE_TIER = "one-tier"
# Of the slots, but for "passes": see Host.
RATIO = 0.4
SYSTEMS = {
    ONE_TIER: {"enabled": False},
    "ess off": {"overlap": "off", "hot_ratio": RATIO},
    "ess da": {"overlap": "da", "hot_ratio": RATIO},
    "ess dba": {"overlap": "dba", "hot_ratio": RATIO},
    "ess passes": {"overlap": "dba"},
    "ess resident": {"overlap": "off", "hot_ratio": 1.0},
}
ENDS_VAR = "ESS_GPU_ENDS"  # seconds since 1970 when all engines have to have ended, if it is set
MIN_SECONDS = 30  # to start an engine at all
HOPELESS = 4  # engines that failed while none has given outputs: then no more are started
LOG_LINES, LOG_COLUMNS = 25, 240  # of an engine that failed; SGLang's lines can be 30 KB


@dataclass(frozen=True)
class Case:
    """One engine. rows: of ROWS; graphs: of GRAPHS; patch: "module:function" beside the
    host's, or none
    """

    system: str
    rows: str = "fp8"
    graphs: str = "graphs"
    patch: str = ""
    canary_rate: float = 1.0

    @property
    def name(self) -> str:
        parts = [self.system, self.rows, self.graphs, self.patch.rpartition(":")[2]]
        return ", ".join(part for part in parts if part)

    @property
    def baseline(self) -> "Case":
        return Case(ONE_TIER, self.rows, self.graphs)

    @property
    def is_exact(self) -> bool:
        """Whether SGLang's own kernels read all rows of a step at once, as one-tier."""
        return SYSTEMS[self.system].get("overlap") == "off"


@dataclass(frozen=True)
class Host:
    """Where cases run and how large they are.

    shape: of the tiny model; passes_ratio: a hot tier that a batch of six cannot use at once
    start: (model, log, deadline, ess, patches, server_args) -> engine
    server_args: of a case, beside those that all hosts have
    patches, ess_patches: of every engine, and of those with two tiers
    overlaps: whether decode can; workers: engines at a time; seconds: for all of them
    """

    name: str
    dtype: str
    shape: dict
    load: Load
    slots: int
    chunk: int
    passes_ratio: float
    start: Callable
    server_args: Callable[[Case], dict] = lambda case: {}
    patches: tuple[str, ...] = ()
    ess_patches: tuple[str, ...] = ()
    ess: dict = field(default_factory=dict)
    overlaps: bool = True
    workers: int = 1
    seconds: float = 900


def _forked(model, log, deadline, ess, patches, **server_args):
    return EngineProcess(model, ess, patches, **server_args)


def _spawned(model, log, deadline, ess, patches, **server_args):
    # Prompts up to the threshold would take dense MHA one-tier, which two tiers do without a
    # prefix only: other kernels for the same prompt (tiny V heads have none at all on sm_90).
    env = {"SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0"}
    port = {"port": free_port(), "nccl_port": free_port()}
    return SpawnedEngine(model, log, deadline, ess, patches, env, **server_args | port)


def _cuda_args(case: Case) -> dict:
    # The kernels that both systems can run; the head in float32, since logits in bfloat16 would
    # hide what is less than their spacing of 1/32. Several engines share the card.
    kernel = "flashmla_kv" if case.rows == "fp8" else "flashmla_sparse"
    args = dict(dsa_prefill_backend=kernel, dsa_decode_backend=kernel)
    return args | GRAPHS[case.graphs] | dict(enable_fp32_lm_head=True, mem_fraction_static=0.5)


_SMALL = Host(
    name="cpu",
    dtype="float32",
    shape=dict(arch="v32", layers=2, heads=2, hidden=64, index_topk=16, context=512),
    load=Load(long=300, medium=150, six=(90, 70, 60, 40, 33, 12), new=4),
    slots=1024,
    chunk=128,
    passes_ratio=0.0625,
    start=_forked,
    ess={"index_dtype": "float32"},
    overlaps=False,
)
HOSTS = {
    host.name: host
    for host in (
        Host(
            name="cuda",
            dtype="bfloat16",
            # What SGLang's kernels take: 32 indexer heads and top-k 2048 (DeepGEMM and
            # sgl_kernel's legacy transform assert them), hidden 1024 (its fused QKV-A kernel).
            shape=dict(
                arch="v32",
                layers=3,
                heads=16,
                hidden=1024,
                index_heads=32,
                index_topk=2048,
                q_lora_rank=256,
                nope_dim=128,
                v_dim=128,
            ),
            load=Load(long=5000, medium=3000, six=(2900, 2600, 2300, 900, 300, 40), new=12),
            slots=32_768,
            chunk=2048,
            passes_ratio=0.1875,
            start=_spawned,
            server_args=_cuda_args,
            patches=(PATCH + "sorted_topk",),
            ess_patches=(CALLS,),
            workers=4,
        ),
        _SMALL,
        replace(_SMALL, name="spawned", start=_spawned),
        replace(_SMALL, name="interpreted", ess_patches=(DEVICE + "install_late",), overlaps=True),
    )
}


@dataclass
class Result:
    """What a case gave. error: why it gave nothing, with the end of its log."""

    case: Case
    outputs: dict = field(default_factory=dict)
    counters: list[dict] = field(default_factory=list)
    layers: list[tuple] = field(default_factory=list)
    start_seconds: float = 0.0
    script_seconds: float = 0.0
    error: str = ""

    def total(self, counter: str) -> int:
        return sum(layer.get(counter, 0) for layer in self.counters)

    def __str__(self) -> str:
        line = f"{self.case.name:34} start {self.start_seconds:5.1f} s"
        line += f", script {self.script_seconds:5.1f} s"
        for counter in ("lookups", "misses", "evictions", "short") if self.counters else ():
            line += f", {counter} {self.total(counter)}"
        return line + (f"; {self.error.splitlines()[0]}" if self.error else "")


class Lab:
    """The cases of one host, each run once; the first alone, since it compiles kernels.

    folder: for the model and the engines' logs
    """

    def __init__(self, host: Host, folder: Path, cases: Iterable[Case]):
        self.host, self._folder = host, folder
        left = float(os.environ.get(ENDS_VAR, "inf")) - time.time()
        self._deadline = time.monotonic() + min(host.seconds, left)
        self._model = write_model(folder / "model", **host.shape)
        self._compiled = threading.Event()
        self._failed = self._answered = 0
        self._pool = ThreadPoolExecutor(host.workers)
        self._futures: dict[Case, Future] = {}
        for case in dict.fromkeys(cases):
            self._futures[case] = self._pool.submit(self._run, case, not self._futures)

    def result(self, case: Case) -> Result:
        return self._futures[case].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _run(self, case: Case, is_first: bool) -> Result:
        if not is_first:
            self._compiled.wait()
        result = Result(case)
        log = self._folder / (case.name.replace(", ", "-").replace(" ", "-") + ".log")
        since = time.monotonic()
        try:
            with self._start(case, log) as served:
                ready = time.monotonic()
                result.start_seconds = ready - since
                result.outputs = exactness.script(served, self.host.load)
                result.script_seconds = time.monotonic() - ready
                if case.system != ONE_TIER:
                    result.counters = served.call("_hot_counters")
                result.layers = exactness.recorded_layers(served._record)
            self._answered += 1
        except Exception as error:
            self._failed += 1
            result.error = f"{type(error).__name__}: {error}{_tail(log)}"
        finally:
            self._compiled.set()
        print(f"{self.host.name}: {result}", file=sys.__stdout__, flush=True)
        return result

    @contextmanager
    def _start(self, case: Case, log: Path):
        left = self._deadline - time.monotonic()
        if left < MIN_SECONDS:
            raise TimeoutError(f"an engine must have {MIN_SECONDS} s: got {left:.0f} s")
        if self._failed >= HOPELESS and not self._answered:
            raise RuntimeError(f"an engine must have worked by now: got {self._failed} failures")
        host, has_two = self.host, case.system != ONE_TIER
        ess = host.ess | SYSTEMS[case.system] | {"admission": "off"}
        if has_two:
            ess = {"hot_ratio": host.passes_ratio, "canary_rate": case.canary_rate} | ess
            if not host.overlaps:
                del ess["overlap"]
        patches = [GATHER, *host.patches, *[PATCH + "layers"] * (case.graphs == "eager")]
        if has_two:
            patches += [*host.ess_patches, COUNTERS, PATCH + "retract_group"]
            patches += [case.patch] * bool(case.patch)
        args = dict(
            dtype=host.dtype,
            kv_cache_dtype=ROWS[case.rows],
            max_total_tokens=host.slots,
            chunked_prefill_size=host.chunk,
            max_running_requests=8,
        )
        args |= host.server_args(case)
        with host.start(self._model, log, self._deadline, ess, patches, **args) as served:
            yield served


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(["", f"the end of {log.name}:", *(line[:LOG_COLUMNS] for line in lines)])
