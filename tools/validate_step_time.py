"""Does the step-time model hold? Fitted on half of the measured points, it predicts the others.

    python -m tools.validate_step_time [--quick] [--json FILE] [--plot FILE]

Measured: decode steps of part (b) of benchmarks/serving/two_tier.py, its engine, model shape and
arguments, at more points: batch x context x hot ratio, with the rows fetched a step. The engines
take turns. The model is linear, with the terms of the simulator's cost model:

    seconds = fixed + request x batch + token x (tokens of all requests) + row x (rows fetched)

fixed: what a step costs whatever is in it; request: projections, experts, attention over top-k;
token: the indexer, which scores every token of the context; row: a row from host to hot tier.
The coefficients are at least 0 and give the least relative squared error of the points they are
fitted on: every second one in an order that the seed draws. Only the others are in the figures.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from benchmarks.harness import (
    OtherLoad,
    Panel,
    Report,
    argument_parser,
    failed,
    finish,
    measured,
    pivot,
    print_table,
    simulated,
)
from benchmarks.serving.shared import prompts_of
from benchmarks.serving.two_tier import PAGE, Bench, ess_name, outlasting, take_turns
from benchmarks.serving.two_tier_figures import Window
from tools.worker import Worker

TERMS = ("fixed", "request", "token", "row")
UNITS = {"fixed": "ms", "request": "us", "token": "ns", "row": "us"}
SCALES = {"ms": 1e3, "us": 1e6, "ns": 1e9}
NAME = "validate_step_time"


@dataclass(frozen=True)
class Grid:
    """What one run measures: every batch x context of no more than `tokens`, at every ratio.

    rounds x steps: decode steps of each engine at each point
    """

    ratios: tuple[float, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    tokens: int
    rounds: int
    steps: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(batch, context), in an order in which each finds the prompts of those before cached."""
        pairs = [(b, c) for c in sorted(self.contexts) for b in sorted(self.batches)]
        return [(batch, context) for batch, context in pairs if batch * context <= self.tokens]

    @property
    def new_tokens(self) -> int:
        return outlasting(self.rounds, self.steps)

    @property
    def slots(self) -> int:
        """Room for the largest batch, and no more: a hot ratio is a share of these."""
        need = self.new_tokens + 2 * PAGE
        return max(batch * (context + need) for batch, context in self.shapes) // PAGE * PAGE


QUICK = Grid((1.0, 0.1), (2, 4, 8, 16), (1024, 2048), tokens=16 * 2048, rounds=3, steps=12)
FULL = Grid(
    (1.0, 0.2, 0.05),
    (2, 4, 8, 16),
    (1024, 2048, 4096, 8192),
    tokens=16 * 4096,
    rounds=4,
    steps=16,
)


@dataclass(frozen=True)
class Point:
    """One batch on one engine. tokens: of all its requests; rows: fetched a step, all layers."""

    system: str
    batch: int
    context: int
    tokens: float
    rows: float
    steps: tuple[float, ...]

    @property
    def seconds(self) -> float:
        return float(np.median(self.steps))

    @property
    def config(self) -> dict:
        return {"system": self.system, "batch": self.batch, "context": self.context}

    @classmethod
    def of(cls, system: str, batch: int, context: int, windows: Sequence[Window]) -> Point:
        """Raises: ValueError if another batch ran."""
        if {window.batch for window in windows} != {batch}:
            raise ValueError(f"{system} must decode {batch} requests: got {windows[0].batch}")
        tokens = [one["context_tokens"] for window in windows for one in window.passes[:-1]]
        rows = np.mean([window.misses_per_step for window in windows])
        steps = tuple(step for window in windows for step in window.steps)
        return cls(system, batch, context, float(np.mean(tokens)), float(rows), steps)


# --- the model --------------------------------------------------------------------------


def terms(points: Sequence[Point]) -> np.ndarray:
    """[points, TERMS]: what each coefficient is multiplied by."""
    return np.array([[1.0, point.batch, point.tokens, point.rows] for point in points])


def fit(points: Sequence[Point]) -> np.ndarray:
    """[TERMS] seconds, at least 0, that minimise the sum of squared relative errors.

    Raises: ValueError for points that do not tell the terms apart.
    """
    matrix, seconds = terms(points), np.array([point.seconds for point in points])
    if np.linalg.matrix_rank(matrix / matrix.max(axis=0).clip(1e-12)) < len(TERMS):
        raise ValueError(
            f"points must differ in batch, context and rows fetched: got {len(points)} points, "
            f"{int(np.linalg.matrix_rank(matrix))} independent. Measure more points."
        )
    return nnls(matrix / seconds[:, None], np.ones(len(points)))[0]


def errors(points: Sequence[Point], coefficients: np.ndarray) -> np.ndarray:
    """[points] predicted over measured, less 1."""
    return terms(points) @ coefficients / [point.seconds for point in points] - 1


def halves(points: Sequence[Point], seed: int) -> tuple[list[Point], list[Point]]:
    """(points to fit, points to predict): every second one, in an order drawn by the seed."""
    order = np.random.default_rng(seed).permutation(len(points))
    return [points[i] for i in order[::2]], [points[i] for i in order[1::2]]


def judge(report: Report, points: Sequence[Point], seed: int) -> np.ndarray:
    """Add a measured and a simulated row for each point, and the summary. Gives coefficients."""
    fitted, predicted = halves(points, seed)
    coefficients = fit(fitted)
    for half, part in (("fitted", fitted), ("predicted", predicted)):
        for point, error in zip(part, errors(part, coefficients), strict=True):
            config = point.config | {"half": half}
            more = {"tokens": point.tokens, "rows_per_step": point.rows}
            steps = [1e3 * step for step in point.steps]
            report.add(measured(NAME, config, "decode_step", "ms", steps, **more))
            model = [1e3 * point.seconds * (1 + error)]
            more["error"] = float(error)
            report.add(simulated(NAME, config, "decode_step", "ms", model, **more))
    found = np.abs(errors(predicted, coefficients))
    report.summarise("mean_abs_error", found.mean())
    report.summarise("max_abs_error", found.max())
    report.summarise("points", len(points))
    report.summarise("predicted_points", len(predicted))
    swapped = np.abs(errors(fitted, fit(predicted)))  # how far it hangs on which half is which
    report.summarise("swapped_mean_abs_error", swapped.mean())
    for term, value in zip(TERMS, coefficients, strict=True):
        report.summarise(f"{term}_{UNITS[term]}", value * SCALES[UNITS[term]])
    return coefficients


# --- measuring --------------------------------------------------------------------------


def engines_of(bench: Bench, model: str) -> dict[str, Worker]:
    grid = bench.grid
    args = {"max_total_tokens": grid.slots}
    args |= {"context_length": max(grid.contexts) + grid.new_tokens + 2 * PAGE}
    return {
        ess_name(ratio): bench.engine(
            ess_name(ratio), model, {"hot_ratio": ratio, "admission": "off"}, **args
        )
        for ratio in grid.ratios
    }


def measure(bench: Bench) -> list[Point]:
    """All points. Raises: RuntimeError or ValueError for an engine that does not do as told."""
    grid, points = bench.grid, []
    prompts = prompts_of(bench.seed, max(grid.batches), max(grid.contexts))
    engines = engines_of(bench, bench.model("model"))
    with bench.running(engines.values()):
        for number, (batch, context) in enumerate(grid.shapes):
            asked = [prompt[:context] for prompt in prompts[:batch]]
            for engine in engines.values():
                engine.call("fill", asked, grid.new_tokens, number == 0)
            for system, windows in take_turns(engines, grid.rounds, grid.steps).items():
                points.append(Point.of(system, batch, context, windows))
            for engine in engines.values():
                engine.call("drain")
            bench.progress(f"batch {batch}, context {context}: {_steps(points[-len(engines) :])}")
    return points


def _steps(points: Sequence[Point]) -> str:
    return ", ".join(f"{p.system} {1e3 * p.seconds:.1f} ms ({p.rows:.0f} rows)" for p in points)


# --- output -----------------------------------------------------------------------------


def output(report: Report) -> list[Panel]:
    """Print the predicted points; the panel has both halves."""
    index = ("half", "system", "batch", "context", "rows_per_step", "error")
    points = pivot(report.select(kind="simulated"), index, "kind")
    columns = {"system": "system", "batch": "batch", "context": "context",
               "rows/step": "rows_per_step", "measured ms": "measured",
               "predicted ms": "simulated", "error": "error:+.1%"}  # fmt: skip
    for row, real in zip(points, report.select(kind="measured"), strict=True):
        row["measured"] = real["median"]
    print_table([row for row in points if row["half"] == "predicted"], columns)
    axes = {"xlabel": "measured ms", "ylabel": "by the model, ms", "title": "A decode step"}
    styles = {"fitted": "x", "predicted": "o"}
    return [Panel(points, "measured", "simulated", "half", styles=styles, axes=axes)]


def parser():
    options = argument_parser(__doc__)
    cores = len(os.sched_getaffinity(0))
    options.add_argument(
        "--threads", type=int, default=cores, help="threads of every engine [all cores]"
    )
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    grid = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers on the way out
    with tempfile.TemporaryDirectory(prefix="ess-bench-") as directory:
        bench = Bench(grid, options.seed, options.threads, Path(directory))
        load, report = OtherLoad(), bench.report
        try:
            judge(report, measure(bench), options.seed)
        except (RuntimeError, ValueError) as error:  # a WorkerError is a RuntimeError
            report.add(failed(NAME, {"half": None}, "all", "", error))
            bench.progress(f"not measured: {error}")
        report.machine["other_cpu_ratio"] = load.ratio()
    minutes = round((time.monotonic() - bench.started) / 60, 1)
    config = {"threads": options.threads, "grid": asdict(grid), "minutes": minutes}
    finish(report, options, *output(report), **config)
    return 0 if report.summary else 1


if __name__ == "__main__":
    sys.exit(main())
