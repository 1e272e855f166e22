"""Decode of SGLang with ESS on a GPU, beside one tier, HiSparse and all rows resident.

    python -m tools.gpu_serving --model DIR [--seconds 560] [--json FILE] [--plot FILE]
    python -m tools.gpu_serving --platform cpu      # a miniature, here, in minutes

DIR: a slice of `python -m sglang_ess.slice_model`. docs/gpu.md has the systems and the figures.
Every engine is a decode server of PD with SGLang's fake transfer, and plays one top-k stream. A
point is a batch of equal requests that join in one step and decode 576 tokens: 192 while the hot
tiers fill, then windows of 32 steps. Modes of overlap take turns window by window on one batch, so
they are paired; two engines are not: one-tier is measured again at the end (`drift`). A step's time
is the distance between two launches in the scheduler's process, with SGLang's overlapped
scheduling on. Misses are the pool's own count; HiSparse has none.

One engine after another, the most important first; a start takes a minute or more. --seconds N:
nothing starts that would not end by then; what was not reached is a failed row with the reason.
--systems and --contexts split the work over several calls. The JSON is written after every point.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Progress, Report, argument_parser, failed, finish, measured
from benchmarks.serving import shared
from sglang_ess.config import EssConfig
from sglang_ess.layout import FP8_ROW_BYTES, GIB, PAGE_SLOTS
from tools.gpu_serving import figures as gpu_figures
from tools.gpu_serving import grid as gpu_grid
from tools.gpu_serving.engine import LEAVE_SECONDS, DecodeEngine
from tools.gpu_serving.grid import RESIDENT, SYSTEMS, Engine, Grid, Model, Point
from tools.worker import Worker, WorkerError

TINY_MODEL = {"layers": 2, "dense_layers": 1, "experts": 4}
LOCALITY = "deepseek-v3.2"
CLOSE_SECONDS = 5
DECODE_SECONDS = 60  # of a fill, at most
ENGINE_METRICS = {"start": "s", "slots": "", "hot_rows": ""} | dict.fromkeys(
    ("device_bytes", "latent_bytes", "index_bytes", "metadata_bytes", "host_bytes",
     "budget_bytes"), "B")  # fmt: skip


@dataclass(frozen=True)
class Pace:
    """Seconds that must be left to begin an engine, a point; the most that a start may take."""

    engine: float
    point: float
    start: float


PACES = {"cuda": Pace(90, 12, 330), "cpu": Pace(25, 4, 300)}


def parser():
    options = argument_parser("Decode on a GPU: ESS, one tier, HiSparse and all rows resident.")
    add = options.add_argument
    add("--platform", choices=tuple(PACES), default="cuda", help="cpu: a miniature [cuda]")
    add("--model", type=Path, metavar="DIR", help="of sglang_ess.slice_model; cpu: writes its own")
    add("--seconds", type=float, default=1500, help="nothing that ends later is begun [1500]")
    add("--systems", type=_systems, default=SYSTEMS, help="some of: " + ", ".join(SYSTEMS))
    add("--contexts", type=_counts, metavar="N,N", help="prompt tokens [32768,131072]")
    add("--batches", type=_counts, metavar="N,N", help="also these, if they fit [16,64]")
    add("--kv-gib-per-layer", type=float, help="device memory of the KV pool [1.28]")
    add("--topk-stream", metavar="SPEC", help=f"as --ess-topk-stream takes it [of {LOCALITY}]")
    add("--overlap-costs", type=Path, metavar="JSON", help="of benchmarks.kernels: ess auto too")
    add("--logs", type=Path, metavar="DIR", help="keep the engines' logs and passes here")
    return options


def _systems(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := set(names) - set(SYSTEMS):
        raise ValueError(f"unknown: {unknown}")
    return names


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def grid_of(options) -> Grid:
    """The platform's grid with the options' changes."""
    grid = gpu_grid.CPU if options.platform == "cpu" else gpu_grid.CUDA
    changes: dict = {"contexts": options.contexts or grid.contexts}
    if options.batches is not None:
        changes["batches"] = options.batches
    if options.quick:  # half the windows, and only the largest batches and 1
        changes["batches"] = ()
        tokens = grid.dropped + (grid.new_tokens - grid.dropped) // 2
        changes["new_tokens"] = -(-tokens // PAGE_SLOTS) * PAGE_SLOTS
    if options.kv_gib_per_layer is not None:
        changes["kv_gib_per_layer"] = options.kv_gib_per_layer
    if options.overlap_costs and not grid.on_cpu:
        changes["labels"] = grid.labels | gpu_grid.AUTO_MODE
    return replace(grid, **changes)


# --- workers ----------------------------------------------------------------------------


class EngineWorker(Worker):
    @property
    def alive(self) -> bool:
        """Whether its process is there: calling a dead one would start a new one."""
        return self._process is not None

    def reason(self) -> str:
        """The last line of its log that explains a death; empty if none does."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        telling = re.compile(r"^(sglang-ess: |[\w.]*(Error|Exception|Refusal)\b.*: )")
        found = [line for line in lines if telling.match(line)]
        return found[-1][:300] if found else ""


@dataclass
class Maker:
    """Makes the workers of a run. stream, costs: of --ess-topk-stream and --ess-overlap-costs"""

    grid: Grid
    model: Model
    directory: Path
    stream: str
    costs: str

    def __call__(self, engine: Engine) -> EngineWorker:
        stem = self.directory / engine.name.replace(" ", "-")
        args = gpu_grid.server_args(engine, self.grid, self.model)
        env = self.environment(engine)
        return EngineWorker(DecodeEngine, f"{stem}.jsonl", args, self.model.vocabulary,
                            self.grid.on_cpu, env=env, log=Path(f"{stem}.log"))  # fmt: skip

    def environment(self, engine: Engine) -> dict[str, str | None]:
        options = gpu_grid.ess_options(engine, self.grid, self.model)
        options |= {"topk_stream": self.stream, "unsafe": True}
        if self.grid.on_cpu:
            # With one thread an engine never waits for a thread whose core another process has.
            env = shared.engine_env(1) | {"NUMBA_NUM_THREADS": "1"}
            return env | EssConfig(platform="cpu", **options).to_env()
        if options.get("overlap") == "auto":  # with a cost table the server captures every mode
            options["overlap_costs"] = self.costs or str(flat_costs(self.directory))
        # DeepGEMM would compile every shape of every GEMM for minutes; the captured ones suffice.
        env = {"HF_HUB_OFFLINE": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
        return env | EssConfig(platform="native", **options).to_env()


def flat_costs(directory: Path) -> Path:
    """A cost table in which all modes cost the same: every mode is captured, none is preferred."""
    us = {mode: [[1.0, 1.0]] for mode in gpu_grid.MODES}
    table = {"batches": [1], "misses": [0, 1], "us": us, "empty_us": 0.0, "halving_us": 0.0}
    path = directory / "flat_costs.json"
    path.write_text(json.dumps({"overlap_costs": table | {"source": "none: flat"}}))
    return path


def stream_file(directory: Path, spec: str, model: Model, seed: int) -> str:
    """The table of a top-k stream, made once for all engines."""
    path = directory / "topk.npz"
    shared.run_module(
        "sglang_ess.topk_stream", "--out", str(path), "--locality", LOCALITY, "--seed", str(seed),
        "--contexts", spec.partition("@")[2], "--layers", str(model.layers),
        "--top-k", str(model.topk),
    )  # fmt: skip
    return str(path)


# --- one run ----------------------------------------------------------------------------


class Clock:
    """The time that is left of --seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._until = now, now() + seconds

    def left(self) -> float:
        return self._until - self._now()


@dataclass
class Run:
    """Engine after engine; every result goes to the report at once.

    stream: the top-k stream's name; make: Engine -> an EngineWorker that has not started
    save: called after every result; progress: prints a line
    """

    grid: Grid
    model: Model
    stream: str
    report: Report
    clock: Clock
    pace: Pace
    make: Callable[[Engine], EngineWorker]
    save: Callable[[], None]
    progress: Callable[[str], None]

    def all(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            worker = self.make(engine)
            try:
                self._measure_all(engine, worker)
            finally:
                worker.close(grace=CLOSE_SECONDS)

    def _measure_all(self, engine: Engine, worker: EngineWorker) -> None:
        sizes, error = {}, None
        try:
            sizes = self._start(engine, worker)
        except WorkerError as caught:
            error = self._lost(engine, worker, f"start: {caught}")
        except TimeoutError as caught:
            error = str(caught)
        for point in engine.points:
            error = self._point(engine, worker, point, sizes, error)
            self.save()

    def _start(self, engine: Engine, worker: EngineWorker) -> dict[str, Any]:
        """Sizes of the running pool. Raises: TimeoutError if no time is left for a start."""
        if self.clock.left() < self.pace.engine:
            raise TimeoutError(f"out of time: {self.clock.left():.0f} s left for a start")
        self.progress(f"starting {engine.name}: {engine.slots} slots")
        began = time.monotonic()
        worker.start()
        worker.wait(max(min(self.pace.start, self.clock.left() - self.pace.point), 1))
        sizes = worker.call("sizes", timeout=60) | {"start": time.monotonic() - began}
        sizes["budget_bytes"] = gpu_grid.budget_bytes(self.grid, self.model)
        sizes["device_bytes"] = sizes["latent_bytes"] + sizes["index_bytes"]
        if engine.ratio is None:  # HiSparse's tables come on top: see grid.py
            sizes["device_bytes"] += sizes["metadata_bytes"]
        config = {"engine": engine.name, "systems": list(engine.systems.values())}
        self.report.add(*[measured("engine", config, metric, unit, [sizes[metric]])
                          for metric, unit in ENGINE_METRICS.items()
                          if sizes.get(metric) is not None])  # fmt: skip
        self.save()
        self.progress(f"{engine.name} serves after {sizes['start']:.0f} s: {sizes['slots']} slots, "
                      f"{sizes['device_bytes'] / GIB:.3f} GiB of KV pool")  # fmt: skip
        return sizes

    def _lost(self, engine: Engine, worker: EngineWorker, error: str) -> str:
        worker.close(grace=0)
        why = worker.reason()
        error = f"{error} | {why}" if why else error
        self.progress(f"{engine.name} is lost: {error[:300]}")
        return error

    def _point(
        self, engine: Engine, worker: EngineWorker, point: Point, sizes: dict, lost: str | None
    ) -> str | None:
        """Add a point's rows. Returns why the engine is lost, None while it serves."""
        config = {"context": point.context, "batch": point.batch, "layers": self.model.layers}
        config |= {"engine": engine.name, "round": engine.round}
        config |= {"topk_stream": self.stream, "slots": sizes.get("slots")}
        config |= {"hot_rows": sizes.get("hot_rows")}
        error = lost or self._why_not(engine, sizes)
        if error is None:
            try:
                self.report.add(*self._measure(engine, worker, point, config))
                return None
            except (WorkerError, ValueError) as caught:
                error = str(caught)
                # An engine that hangs would take the time of everything that comes after it.
                if not worker.alive or error.startswith("TimeoutError"):
                    lost = error = self._lost(engine, worker, error)
        self.report.add(*[
            failed("decode", {"system": system} | config, "decode_tokens_per_s", "tokens/s", error)
            for system in engine.systems.values()
        ])  # fmt: skip
        return lost

    def _why_not(self, engine: Engine, sizes: dict) -> str | None:
        """A reason to leave a point out."""
        if sizes["device_bytes"] > sizes["budget_bytes"] and engine.system != RESIDENT:
            got, limit = sizes["device_bytes"], sizes["budget_bytes"]
            return f"the KV pool must take the compared device bytes: got {got}, limit {limit}"
        if self.clock.left() < self.pace.point:
            return f"out of time: {self.clock.left():.0f} s left"
        return None

    def _measure(self, engine: Engine, worker: EngineWorker, point: Point, config: dict):
        """Rows of every system of the engine."""
        grid, labels = self.grid, list(engine.systems)
        seconds = min(max(self.clock.left() - LEAVE_SECONDS, 5), DECODE_SECONDS)
        passes = worker.call(
            "decode", point.batch, point.context, grid.new_tokens, labels, grid.steps, seconds,
            timeout=seconds + LEAVE_SECONDS + 5,
        )  # fmt: skip
        windows, rows = gpu_figures.windows_of(passes, grid.dropped, grid.steps), []
        for label, system in engine.systems.items():
            mine = [window for window in windows if window.label == label]
            if not mine:
                raise ValueError(f"a fill must have windows of {system}: got none")
            rows += gpu_figures.point_rows(mine, {"system": system} | config, self.model.layers)
            self.progress(f"{system}, {mine[0].running} of {point.batch} x {point.context}: "
                          f"{1e3 * mine[-1].running / mine[-1].tokens_per_s:.2f} ms")  # fmt: skip
        return rows


def slice_facts(model: Model) -> dict | None:
    """What slice_model wrote beside its config.json; None for another model."""
    try:
        return json.loads((Path(model.path) / "slice_model.json").read_text())
    except (OSError, ValueError):
        return None


def saver(report: Report, options, facts: dict) -> Callable[[], None]:
    """Writes the report as it stands; if it is killed meanwhile, the last one remains."""

    def save() -> None:
        gpu_figures.summarise(report, facts["batch1_context"])
        if options.json:
            draft = options.json.with_suffix(".draft")
            report.write(draft, options.seed, quick=options.quick, **facts)
            os.replace(draft, options.json)

    return save


def measure(options, directory: Path) -> tuple[Report, dict]:
    """The report, and the settings of the run."""
    progress, clock = Progress(), Clock(options.seconds)
    grid, report = grid_of(options), Report()
    tiny = directory / "tiny"
    model = options.model or shared.write_tiny_model(tiny, options.seed, **TINY_MODEL)
    model = Model.read(model)
    contexts = ",".join(map(str, sorted(grid.contexts)))
    spec = options.topk_stream or f"{LOCALITY}@{contexts}"
    stream = options.topk_stream or stream_file(directory, spec, model, options.seed)
    engines = gpu_grid.Selection(grid, model, options.systems).engines()
    facts = {
        "platform": options.platform, "grid": asdict(grid), "model": asdict(model),
        "topk_stream": spec, "kv_budget_bytes": gpu_grid.budget_bytes(grid, model),
        "slice": slice_facts(model), "row_bytes": FP8_ROW_BYTES, "card": shared.card_facts(),
        "engines": [engine.name for engine in engines],
        "batch1_context": grid.contexts[0], "seconds": options.seconds,
    }  # fmt: skip
    save = saver(report, options, facts)
    make = Maker(grid, model, directory, stream, str(options.overlap_costs or ""))
    pace = PACES[options.platform]
    run = Run(grid, model, spec, report, clock, pace, make, save, progress)
    run.all(engines)
    save()
    progress(f"done, {clock.left():.0f} s left")
    return report, facts


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.model is None and options.platform == "cuda":
        parser().error("--model must be given on cuda: write one with sglang_ess.slice_model")
    shared.end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="ess-bench-") as scratch:
        directory = options.logs or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        report, facts = measure(options, directory)
    gpu_figures.print_tables(report)
    finish(report, options, *gpu_figures.panels(report), **facts)
    return 0 if report.select("decode", "step", "measured") else 1


if __name__ == "__main__":
    sys.exit(main())
