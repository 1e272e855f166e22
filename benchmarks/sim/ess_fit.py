"""Fit the cost model to figures of ESS. A guard refuses a row that is to be predicted."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from benchmarks.sim import published
from benchmarks.sim.published import BASELINES, ESS_ROWS, K, Row
from sglang_ess.sim.inputs.specs import Calibration, load
from sglang_ess.sim.model.cost import MICRO, CostModel
from sglang_ess.sim.model.overlap_time import MODES

MODEL, GPU, LINK = "deepseek-v3.2", "h200", "pcie5"
TABLE_SIGMA = 0.005  # relative; the paper prints six digits, so the error is that of the model
FIGURE7_SIGMA = 5 * MICRO
_load = functools.cache(load)
COMPUTE = {"layer_us": 300.0, "token_bytes": 3e6, "step_us": 5000.0}  # names, and start of the fit
OVERLAP = {"transfer_ratio": 1.0, "preattn_us": 50.0, "da_us": 30.0, "dba_us": 30.0}


@dataclass(frozen=True)
class Point:
    """A step time that a fit may use. ratio: Sparse Memory Ratio of its row; sigma: relative"""

    name: str
    queries: int
    context: int
    batch: int
    ratio: float
    seconds: float
    sigma: float

    @classmethod
    def of(cls, row: Row) -> Point:
        return cls(row.name, row.queries, row.context, row.batch, row.ratio, row.step_seconds,
                   TABLE_SIGMA)  # fmt: skip


def table_points() -> list[Point]:
    """The distinct baseline rows of Table 2: acceptance does not change the time of a step."""
    distinct = {(row.queries, row.context, row.batch): row for row in reversed(BASELINES)}
    return [Point.of(row) for row in reversed(distinct.values())]


def figure1_points() -> list[Point]:
    queries, accepted, context = published.FIGURE1_SETTING
    return [
        Point(
            f"figure 1 batch {batch}", queries, context, batch, 1.0,
            published.GPUS_PER_NODE * batch * accepted / rate, sigma,
        )
        for batch, (rate, sigma) in published.FIGURE1.items()
    ]  # fmt: skip


def require_unseen(fitted: Iterable[str], predicted: Iterable[str]) -> None:
    """Raises: AssertionError if a row is both fitted and predicted."""
    if both := sorted(set(fitted) & set(predicted)):
        raise AssertionError(f"predicted rows must not be fitted: got {', '.join(both)}.")


@dataclass(frozen=True)
class Reading:
    """One reading of what the paper leaves open.

    changes: fields that differ from the paper's deployments; long_changes: only at 128K
    """

    gpu: str = GPU
    changes: Mapping[str, Any] = field(default_factory=dict)
    long_changes: Mapping[str, Any] = field(default_factory=dict)

    def model(self, calibration: Calibration, queries: int, context: int, **more: Any) -> CostModel:
        """The paper's setting at MTP `queries`. more: deployment fields that override changes"""
        is_long = context >= 128 * K
        changes = {"queries": queries, "accepted_tokens": 1.0, **self.changes}
        changes |= self.long_changes if is_long else {}
        deployment = _load("deployment", "ess-paper-128k" if is_long else "ess-paper-32k")
        deployment = replace(deployment, **(changes | more))
        specs = _load("model", MODEL), _load("gpu", self.gpu), _load("link", LINK)
        return CostModel(*specs, deployment, calibration)


PAPER = Reading()


def fit_compute(
    calibration: Calibration, points: list[Point], reading: Reading = PAPER
) -> Calibration:
    """The calibration with COMPUTE's fields fitted to the points: least squares, relative errors.

    Raises: AssertionError for a point that is an ESS row.
    """
    require_unseen([point.name for point in points], [row.name for row in ESS_ROWS])
    assert all(point.ratio == 1 for point in points), "fitted rows must have no ESS"

    def errors(values: dict[str, float]) -> list[float]:
        found = replace(calibration, **values)
        return [
            (reading.model(found, p.queries, p.context).step(p.batch, p.context).seconds
             / p.seconds - 1) / p.sigma
            for p in points
        ]  # fmt: skip

    return replace(calibration, **_least_squares(errors, COMPUTE))


def figure7_us(
    calibration: Calibration, mode: str, misses: float, reading: Reading = PAPER
) -> float:
    """The value that figure 7 plots: us added to one layer of one micro-batch."""
    queries, context = published.FIGURE7_QUERIES, published.FIGURE7_CONTEXT
    model = reading.model(calibration, queries, context, overlap=mode)
    half = published.FIGURE7_BATCH / 2
    return float(model.transfer(half, context, misses)[-1]) / MICRO


def fit_overlap(calibration: Calibration, reading: Reading = PAPER) -> Calibration:
    """The calibration with OVERLAP's fields fitted to figure 7."""

    def errors(values: dict[str, float]) -> list[float]:
        found = replace(calibration, **values)
        return [
            (figure7_us(found, mode, misses, reading) - us) * MICRO / FIGURE7_SIGMA
            for mode in MODES
            for misses, us in zip(published.FIGURE7_MISSES, published.FIGURE7[mode], strict=True)
        ]

    return replace(calibration, **_least_squares(errors, OVERLAP))


def _least_squares(errors, start: dict[str, float]) -> dict[str, float]:
    """Non-negative values for the names of `start` that minimise the sum of squared errors."""
    scale = np.array(list(start.values()))

    def named(x):
        return dict(zip(start, (float(v) for v in x * scale), strict=True))

    found = least_squares(lambda x: errors(named(x)), np.ones(len(scale)), bounds=(0, np.inf))
    return named(found.x)
