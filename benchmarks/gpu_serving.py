"""Decode of SGLang with ESS on a GPU, beside one tier, HiSparse and all rows resident.

    python -m benchmarks.serving.gpu_serving --model DIR [--seconds 560] [--json FILE] [--plot FILE]
    python -m benchmarks.serving.gpu_serving --platform cpu      # a miniature, here, in minutes

DIR: a slice of `python -m sglang_ess.slice_model`: true layers, few of them, dummy weights.
Systems: one-tier; hisparse (--enable-hisparse); ess off, ess da, ess dba (no overlap, DA, DBA; with
--overlap-costs also ess auto); ess budgets (hot rows move between layers; DA); resident (one tier
with as much memory as it wants). The first three kinds get the same device bytes for the KV pool:
gpu_serving_plan.py says how; each engine's are counted in its process, and a point of one that
took more is a failed row. All play one top-k stream (--topk-stream), whose table is beside.

What is measured. Every engine is a decode server of PD with SGLang's fake transfer: nothing is
prefilled, a prompt's rows are what the slots held, and a step costs what it costs with true ones.
A point is a batch of equal requests that join in one step and decode 576 tokens: 192 while the
hot tiers fill, then windows of 32 steps. Modes of overlap take turns window by window on one
batch, so they are paired; two engines are not (one's batch would disturb the other's): one-tier
is measured again at the end (`drift`). A step's time is the distance between two launches in the
scheduler's process, with SGLang's overlapped scheduling on; it is what every request waits for
its token (ITL). Misses are the pool's own count; HiSparse has none (its PCIe rate tells).

Order. Engines start in waves, side by side as far as device and host memory go (--side-by-side 1:
one after another): those that wait cost the one that is measured nothing, and a start takes a
minute or more. What does not start beside others is tried once more, alone. A wave measures what
is wanted first (batch 1 at 32K, the largest batch at 32K and 128K), then the rest if that leaves
time for the waves to come. With 4 layers on 80 GB: 13 engines in 4 waves of 40 to 120 s to start,
60 points of about 5 s: an estimate, as this has not run on a GPU yet. --seconds N: nothing starts
that would not end by then; what was not reached is a failed row with the reason. The JSON is
written anew after every point.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

if not __package__:  # `python benchmarks/serving/gpu_serving.py` works too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks.common import ROOT, Progress, Report, arguments, save_figure
from benchmarks.gpu_serving_engine import MODES_VAR, DecodeEngine
from benchmarks.gpu_serving_plan import (
    AUTO_MODE,
    CPU,
    CUDA,
    FIRST,
    GIB,
    PAGE,
    ROW_BYTES,
    SYSTEMS,
    THEN,
    EnginePlan,
    Model,
    Plan,
    Planner,
    Room,
    budget_bytes,
    ess_options,
    server_args,
    waves,
)
from benchmarks.gpu_serving_probe import Probe
from benchmarks.gpu_serving_report import draw, print_tables, summarise
from benchmarks.gpu_serving_run import PACES, Clock, EngineWorker, Run
from sglang_ess.config import EssConfig

TINY_MODEL = {"layers": 2, "dense_layers": 1, "experts": 4}
LOCALITY = "deepseek-v3.2"
# Weights of four layers and the head, CUDA context, graphs and workspaces of one engine: an
# estimate, for how many engines share a card.
OTHER_GIB = 11.0
# Engines that start at once share cores, and compile the same kernels the first time.
SIDE_BY_SIDE = 4
MEMORY_SHARE = 0.9  # of a card; of the host's memory HOST_SHARE may be pinned
HOST_SHARE = 0.55


def parser():
    options = arguments("Decode on a GPU: ESS beside one tier, HiSparse and all rows resident.")
    add = options.add_argument
    add("--platform", choices=tuple(PACES), default="cuda", help="cpu: a miniature [cuda]")
    add(
        "--model",
        type=Path,
        metavar="DIR",
        help="of sglang_ess.slice_model; cpu: writes its own",
    )
    add("--seconds", type=float, default=1500, help="nothing that ends later is begun [1500]")
    add("--systems", type=_names(SYSTEMS), default=SYSTEMS, help="some of: " + ", ".join(SYSTEMS))
    add("--contexts", type=_counts, metavar="N,N", help="prompt tokens [8192,...,131072]")
    add("--only", choices=(FIRST, THEN), help="the points that must be there, or the others")
    add("--kv-gib-per-layer", type=float, help="device memory of the KV pool [1.28]")
    add("--topk-stream", metavar="SPEC", help=f"as --ess-topk-stream takes it [of {LOCALITY}]")
    add("--overlap-costs", type=Path, metavar="JSON", help="of benchmarks.kernels: ess auto too")
    add("--side-by-side", type=int, metavar="N", help=f"engines at once [{SIDE_BY_SIDE}; cpu: 1]")
    add("--other-gib", type=float, default=OTHER_GIB, help="an engine's without KV [%(default)s]")
    add("--logs", type=Path, metavar="DIR", help="keep the engines' logs and passes here")
    return options


def _names(known):
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if unknown := set(names) - set(known):
            raise ValueError(f"unknown: {unknown}")
        return names

    parse.__name__ = "list of systems"  # argparse names it in its error
    return parse


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def plan_of(options) -> Plan:
    """The platform's plan with the options' changes."""
    plan = CPU if options.platform == "cpu" else CUDA
    changes: dict = {}
    if options.quick:  # half the windows, the leads alone
        windows = plan.new_tokens - plan.dropped
        changes |= {"contexts": plan.lead, "batches": ()}
        changes |= {"new_tokens": -(-(plan.dropped + windows // 2) // PAGE) * PAGE}
    if options.contexts:
        changes["contexts"] = options.contexts
    if options.kv_gib_per_layer is not None:
        changes["kv_gib_per_layer"] = options.kv_gib_per_layer
    if options.overlap_costs and not plan.on_cpu:
        changes["labels"] = plan.labels | AUTO_MODE
    return replace(plan, **changes)


class Maker:
    """Makes the workers of a run: their options, environments and files.

    stream: of --ess-topk-stream; costs: of --ess-overlap-costs, or empty
    """

    def __init__(self, plan: Plan, model: Model, directory: Path, stream: str, costs: str):
        self.plan, self.model, self.directory = plan, model, directory
        self.stream, self.costs = stream, costs
        self._made = 0

    def __call__(self, engine: EnginePlan) -> EngineWorker:
        self._made += 1
        stem = self.directory / f"{self._made}-{engine.name.replace(' ', '-')}"
        args = server_args(engine, self.plan, self.model)
        record = f"{stem}.jsonl"
        on_cpu = self.plan.on_cpu
        return EngineWorker(
            DecodeEngine, record, args, self.model.vocabulary, on_cpu,
            env=self.environment(engine), log=Path(f"{stem}.log"),
        )  # fmt: skip

    def environment(self, engine: EnginePlan) -> dict[str, str | None]:
        options = ess_options(engine, self.plan, self.model)
        options |= {"topk_stream": self.stream, "unsafe": True}
        options["platform"] = "cpu" if self.plan.on_cpu else "native"
        if self.costs and set(AUTO_MODE) & set(engine.systems):
            options["overlap_costs"] = self.costs
        env = {"HF_HUB_OFFLINE": "1", MODES_VAR: "+".join(engine.systems)}
        if self.plan.on_cpu:
            # One thread waits for no other: threads that share cores do, for most of a step.
            env |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
            env |= dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"))
        else:  # every shape of every GEMM ahead takes minutes; the captured ones suffice
            env["SGLANG_JIT_DEEPGEMM_PRECOMPILE"] = "0"
        return env | EssConfig(**options).to_env()


def run_module(name: str, *flags: str) -> None:
    """Raises: RuntimeError with its last line where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", name, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"{name} must end well: got {done.returncode}, {last}")


def tiny_model(directory: Path, seed: int) -> Path:
    path = directory / "tiny"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in TINY_MODEL.items()]
    run_module("sglang_ess.testing.tiny_model", "--out", str(path), "--seed", str(seed), *flags)
    return path


def stream_spec(plan: Plan) -> str:
    """As --ess-topk-stream takes it: the contexts of this run and no others."""
    return f"{LOCALITY}@{','.join(map(str, sorted(plan.contexts)))}"


def stream_file(directory: Path, plan: Plan, model: Model, seed: int) -> str:
    """stream_spec()'s table, made once for all engines."""
    path, contexts = directory / "topk.npz", stream_spec(plan).partition("@")[2]
    run_module(
        "sglang_ess.topk_stream", "--out", str(path), "--locality", LOCALITY, "--seed", str(seed),
        "--contexts", contexts, "--layers", str(model.layers), "--top-k", str(model.topk),
    )  # fmt: skip
    return str(path)


def slice_facts(model: Model) -> dict | None:
    """What sglang_ess.testing.slice_model wrote beside its config.json; None for another model."""
    try:
        return json.loads((Path(model.path) / "slice_model.json").read_text())
    except (OSError, ValueError):
        return None


def room_of(options, probe: Probe) -> Room:
    """What engines side by side may take together."""
    host = int(psutil.virtual_memory().available * HOST_SHARE)
    if options.platform == "cpu":
        return Room(options.side_by_side or 1, host, host, 0)
    card = probe.facts.get("gpu_free_bytes") or 80 * GIB  # unknown: what the plan is made for
    other = int(options.other_gib * GIB)
    return Room(options.side_by_side or SIDE_BY_SIDE, int(card * MEMORY_SHARE), host, other)


def saver(report: Report, options, facts: dict) -> Callable[[], None]:
    """Writes the report as it stands; a kill in the middle leaves the one before."""

    def save() -> None:
        summarise(report, facts["batch1_context"])
        if options.json:
            draft = options.json.with_suffix(".draft")
            report.write(draft, options.seed, **facts)
            os.replace(draft, options.json)

    return save


def measure(options, directory: Path) -> Report:
    progress, clock, probe = Progress(), Clock(options.seconds), Probe()
    plan = plan_of(options)
    model = Model.read(options.model or tiny_model(directory, options.seed))
    spec = options.topk_stream or stream_spec(plan)
    stream = options.topk_stream or stream_file(directory, plan, model, options.seed)
    planner = Planner(plan, model, options.systems)
    room = room_of(options, probe)
    engines = waves(planner.engines(), plan, model, room)
    facts = {"platform": options.platform, "plan": asdict(plan), "model": asdict(model)}
    facts |= {"topk_stream": spec, "kv_budget_bytes": budget_bytes(plan, model)}
    facts |= {"slice": slice_facts(model), "row_bytes": ROW_BYTES}
    facts |= {"probe": probe.kind, "probe_reason": probe.reason, "card": probe.facts}
    facts |= {"waves": [[engine.name for engine in wave] for wave in engines]}
    facts |= {"batch1_context": planner.lead[0], "seconds": options.seconds}
    report = Report()
    save = saver(report, options, facts)
    make = Maker(plan, model, directory, stream, str(options.overlap_costs or ""))
    pace = PACES[options.platform]
    run = Run(plan, model, spec, report, clock, pace, probe, make, save, progress)
    run.all(engines, (options.only,) if options.only else (FIRST, THEN))
    save()
    progress(f"done, {clock.left():.0f} s left")
    return report


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.model is None and options.platform == "cuda":
        parser().error("--model must be given on cuda: write one with sglang_ess.slice_model")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the engines on the way out
    with tempfile.TemporaryDirectory(prefix="ess-bench-") as scratch:
        directory = options.logs or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        report = measure(options, directory)
    print_tables(report)
    if options.plot:
        panels = max(len({row["config"].get("context") for row in report.rows} - {None}), 1)
        size = (5 * panels, 4.5)
        save_figure(options.plot, lambda axes: draw(report, axes), size=size, panels=panels)
    return 0 if any(row["metric"] == "step" and row["n"] for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
