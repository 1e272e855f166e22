"""Does the simulator, fed with a GPU host's measured costs, predict that host's decode steps?

    python -m tools.predict_gpu --kernels kernels.json --serving gpu_serving.json
        [--gpu h100] [--quick] [--json FILE] [--plot FILE]

kernels.json (benchmarks/kernels) gives the link, the attention kernel, plan, and what DA and
DBA add; gpu_serving.json (tools/gpu_serving) gives the steps of a slice of V3.2.
Fitted, on one-tier and "resident" at half of the (context, batch) pairs, is what is in no kernel:

    layer_us     of a layer: launches, gaps, small kernels
    token_bytes  of a layer and request: its element-wise work
    step_us      of a step: sampling, scheduling
    scan_ratio   of the indexer over all keys: its time over the roofline's

Predicted are the steps of ESS, at every pair and in every mode, and of one-tier and "resident" at
the other half. Nothing that is predicted is fitted. Misses are simulated: the production HotCache
over the profile that was served, with the hot rows and the batch that the server had. A second
figure takes the measured misses instead: what is then left is the cost model's error.
What lies between plan and attention, behind which every mode fetches, is taken to be the stand-in
of kernels.json (preattn_us): no file has the server's own.
HiSparse is not predicted: its buffers and its copy are not in the simulator.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.harness import (
    Panel,
    Report,
    argument_parser,
    finish,
    measured,
    pivot,
    print_table,
    simulated,
)
from sglang_ess.sim.inputs.specs import Calibration, Model, load, names
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.decode_tiers import Sampling, measure
from sglang_ess.testing.topk_stream.spec import MAX_LAYERS, Profile
from sglang_ess.testing.topk_stream.table import scaled
from tools.predict_gpu_files import FREE, OVERLAPS, RESIDENT, Host, Point, Served
from tools.validate_step_time import halves

NAME = "predict_gpu"
QUICK_REQUESTS, QUICK_STEPS = 8, 20
STEPS = 40

# --- fit and predict --------------------------------------------------------------------

Seconds = Callable[[Point, Calibration, Any], float]


def seconds(served: Served, host: Host, point: Point, calibration: Calibration, misses) -> float:
    """Of a step by the simulator's cost model. misses: one figure or [layers]."""
    overlap = OVERLAPS.get(point.system, "off")
    if point.system in OVERLAPS:
        calibration = host.fetching(calibration, point.batch)
    deployment = replace(load("deployment", "one-gpu"), overlap=overlap)
    slice_model = served.model(point.layers)
    model = CostModel(slice_model, host.gpu, host.link, deployment, calibration)
    return model.step(point.batch, point.tokens, misses).seconds


def fit(points: Sequence[Point], calibration: Calibration, cost: Seconds) -> Calibration:
    """calibration with FREE's fields, at least 0, of the least squared relative errors.

    The cost model is linear in them. Raises: ValueError for points of ESS, or of one batch or
    context alone.
    """
    if any(point.system not in RESIDENT for point in points):
        raise ValueError("fitted points must keep every row on the device: got one of ESS.")
    for what in ("batch", "context"):
        if len({getattr(point, what) for point in points}) < 2:
            raise ValueError(
                f"fitted points must differ in {what}: got one. Measure more, or another --seed."
            )
    zero = replace(calibration, **dict.fromkeys(FREE, 0.0))
    base = np.array([cost(point, zero, 0.0) for point in points])
    units = [replace(zero, **{name: 1.0}) for name in FREE]
    columns = np.array([[cost(point, unit, 0.0) for unit in units] for point in points])
    columns -= base[:, None]
    scale = columns.max(axis=0)
    took = np.array([point.seconds for point in points])
    found = nnls(columns / scale / took[:, None], (took - base) / took)[0] / scale
    return replace(calibration, **dict(zip(FREE, map(float, found), strict=True)))


@functools.cache
def simulated_misses(
    model: Model, stream: str, tokens: int, batch: int, hot_rows: float, quick: bool,
    seed: int,
) -> np.ndarray:  # fmt: skip
    """[layers] rows fetched per request and step, of the streams that the server played.

    Raises: ValueError for a stream that is no profile, or is not played at so few tokens.
    """
    if not stream or stream.endswith(".npz"):
        raise ValueError(
            f"ESS must have been served with a locality profile: got topk_stream {stream!r}. Serve "
            "with --ess-topk-stream PROFILE."
        )
    profile = Profile.parse(stream)
    played = [context for context in profile.contexts_at(model.topk) if context <= tokens]
    if not played:
        raise ValueError(
            f"topk_stream must have a context of at most the {tokens} tokens that requests had: "
            f"got {stream}. Serve longer requests or a shorter context of the stream."
        )
    locality = scaled(profile.locality, model.topk)
    chosen = locality.spread(min(model.layers, MAX_LAYERS))
    which = np.arange(model.layers) % len(chosen)
    rows = min(hot_rows / batch, played[-1])
    requests = min(batch, QUICK_REQUESTS) if quick else batch
    steps = QUICK_STEPS if quick else STEPS
    found = measure(
        locality,
        played[-1],
        requests,
        rows,
        Sampling(steps, steps, layers=chosen, seed=seed),
    )
    return found.misses[which]


@dataclass(frozen=True)
class Prediction:
    """seconds: of the step; misses: [layers], simulated; measured_misses: seconds with those"""

    point: Point
    seconds: float
    misses: np.ndarray
    with_measured_misses: float | None

    @property
    def error(self) -> float:
        return self.seconds / self.point.seconds - 1


def predict(
    served: Served, point: Point, calibration: Calibration, cost: Seconds, quick: bool, seed: int
) -> Prediction:
    if point.system in RESIDENT:
        took = cost(point, calibration, 0.0)
        return Prediction(point, took, np.zeros(point.layers), took)
    misses = simulated_misses(
        served.model(point.layers), point.stream, int(point.tokens), round(point.batch),
        point.hot_rows, quick, seed,
    )  # fmt: skip
    known = None if point.misses is None else cost(point, calibration, point.misses)
    return Prediction(point, cost(point, calibration, misses), misses, known)


def judge(
    report: Report, served: Served, host: Host, seed: int, quick: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> None:  # fmt: skip
    """Add rows for each point, measured and simulated, and the summary."""
    cost = functools.partial(seconds, served, host)
    resident = [point for point in served.points if point.system in RESIDENT]
    known = set(halves(sorted({point.cell for point in resident}), seed)[0])
    fitted = [point for point in resident if point.cell in known]
    calibration = fit(fitted, host.calibration, cost)
    found = []
    for point in served.points:
        half = "fitted" if point in fitted else "predicted"
        one = predict(served, point, calibration, cost, quick, seed)
        progress(f"{point.config} {1e3 * point.seconds:.2f} ms, {1e3 * one.seconds:.2f} predicted")
        _add(report, one, half)
        found.append((half, one))
    _summarise(report, found)
    report.summarise("gather_gb_per_s", host.link.gather_gb_s)
    report.summarise("attention_tflops", host.gpu.attention_tflops)
    for name in FREE:
        report.summarise(name, getattr(calibration, name))


def _add(report: Report, one: Prediction, half: str) -> None:
    point = one.point
    config = point.config | {"half": half}
    rates = point.batch / point.seconds, point.batch / one.seconds
    both = (
        ("step", "ms", 1e3 * point.seconds, 1e3 * one.seconds),
        ("decode_tokens_per_s", "tokens/s", *rates),
        ("misses", "rows/request/layer/step", point.misses, float(one.misses.mean())),
    )
    for metric, unit, real, model in both:
        more = {"running": point.batch}
        if real is not None:
            report.add(measured(NAME, config, metric, unit, [real], **more))
            more |= {"error": model / real - 1} if metric != "misses" else {}
        report.add(simulated(NAME, config, metric, unit, [model], **more))


def _summarise(report: Report, found: Sequence[tuple[str, Prediction]]) -> None:
    predicted = [one for half, one in found if half == "predicted"]
    groups = {"": predicted}
    for one in predicted:
        groups.setdefault("_" + one.point.system.replace(" ", "_"), []).append(one)
    for name, group in groups.items():
        errors = np.abs([one.error for one in group])
        report.summarise(f"mean_abs_error{name}", errors.mean())
        report.summarise(f"max_abs_error{name}", errors.max())
    report.summarise("predicted_points", len(predicted))
    report.summarise("fitted_points", len(found) - len(predicted))
    fitted = [abs(one.error) for half, one in found if half == "fitted"]
    report.summarise("fitted_mean_abs_error", float(np.mean(fitted)))
    known = [one for one in predicted if one.point.misses is not None]
    if known:
        left = [abs(one.with_measured_misses / one.point.seconds - 1) for one in known]
        report.summarise("mean_abs_error_with_measured_misses", float(np.mean(left)))
        most = max(one.point.misses for one in known)
        apart = [abs(float(one.misses.mean()) - one.point.misses) for one in known]
        report.summarise("misses_mean_abs_error", float(np.mean(apart)))
        report.summarise("misses_most", most)


# --- output -----------------------------------------------------------------------------


COLUMNS = {
    "system": "system", "context": "context", "batch": "batch", "layers": "layers",
    "running": "running", "ms": "step measured", "predicted": "step simulated",
    "tokens/s": "decode_tokens_per_s measured", "predicted ": "decode_tokens_per_s simulated",
    "misses": "misses measured", "predicted  ": "misses simulated", "error %": "error:.1%",
}  # fmt: skip


def print_tables(report: Report) -> None:
    """Print every point that was predicted."""
    rows = [row for row in report.rows if row["config"]["half"] == "predicted"]
    at = ("system", "context", "batch", "layers", "running")
    lines = pivot(rows, at, lambda row: f"{row['metric']} {row['kind']}")
    for line in lines:
        line["error"] = line["step simulated"] / line["step measured"] - 1
    print_table(lines, COLUMNS)


def panel(report: Report) -> Panel:
    """Predicted over measured milliseconds of a step."""
    rows = pivot(report.select(NAME, "step"), ("system", "context", "batch", "half"), "kind")
    axes = {"xlabel": "measured ms", "ylabel": "predicted ms", "title": "Decode steps"}
    return Panel(rows, "measured", "simulated", "half", axes=axes,
                 styles={"fitted": "x", "predicted": "o"})  # fmt: skip


def parser():
    options = argument_parser("The simulator's decode steps beside those measured on a GPU host.")
    options.add_argument("--kernels", type=Path, required=True, help="of benchmarks.kernels")
    options.add_argument("--serving", type=Path, required=True, help="of gpu_serving")
    options.add_argument("--gpu", choices=names("gpus"), help="[the card that --kernels names]")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    report = Report()
    try:
        served = Served.read(options.serving)
        host = Host.read(options.kernels, served, options.gpu)
        judge(report, served, host, options.seed, options.quick,
              lambda line: print(line, file=sys.stderr))  # fmt: skip
    except ValueError as error:  # a SpecError is a ValueError
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    print_tables(report)
    files = {"kernels": str(options.kernels), "serving": str(options.serving)}
    finish(report, options, panel(report), gpu=served.gpu, **files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
