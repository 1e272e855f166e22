"""What tools/predict_gpu.py reads: steps that a GPU host served, and its kernels' costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sglang_ess.sim.inputs.specs import Calibration, Gpu, Link, Model, from_kernels, load, names
from sglang_ess.sim.model.cost import MICRO, TERA
from sglang_ess.testing.slice_model import SliceConfig

RESIDENT = ("one-tier", "resident")
OVERLAPS = {"ess off": "off", "ess da": "da", "ess dba": "dba", "ess auto": "auto"}
FREE = ("layer_us", "token_bytes", "step_us", "scan_ratio")  # of Calibration: what is fitted


@dataclass(frozen=True)
class Point:
    """One served batch. context: of a prompt; submitted: requests; batch: those that ran.

    tokens: of a request, its mean while measured; hot_rows: of a layer, None: all
    stream: --ess-topk-stream's argument; misses: rows/request/layer/step, None if unknown
    """

    system: str
    context: int
    submitted: int
    batch: float
    tokens: float
    layers: int
    hot_rows: float | None
    stream: str
    seconds: float
    misses: float | None

    @property
    def cell(self) -> tuple[int, int]:
        return self.context, self.submitted

    @property
    def config(self) -> dict:
        return {"system": self.system, "context": self.context, "batch": self.submitted,
                "layers": self.layers}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """gpu_serving.json. slice: what was served; row_bytes: of a latent row; gpu: if known."""

    points: tuple[Point, ...]
    slice: SliceConfig
    row_bytes: int
    gpu: str | None

    @classmethod
    def read(cls, path: Path) -> Served:
        """Raises: ValueError, one line, for a file that lacks what is needed."""
        found = _json(path, "tools.gpu_serving")
        try:
            config = found["config"]
            slice_config = SliceConfig(**config["slice"])
            points = _points(found["rows"])
            row_bytes, gpu = int(config["row_bytes"]), config["card"].get("gpu")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold decode rows, and the slice, row_bytes and card in its config: "
                f"got {type(error).__name__} {error}. Write it with python -m "
                "tools.gpu_serving on a GPU, of a slice by sglang_ess.slice_model."
            ) from None
        resident = [point for point in points if point.system in RESIDENT]
        if len(points) == len(resident) or len({point.cell for point in resident}) < 4:
            raise ValueError(
                f"{path} must hold steps of ESS, and of one-tier or resident at 4 pairs of context "
                f"and batch or more: got {len(points) - len(resident)} and "
                f"{len({point.cell for point in resident})}. Measure more points."
            )
        return cls(tuple(points), slice_config, row_bytes, gpu)

    def model(self, layers: int) -> Model:
        """The slice with so many layers, as the simulator knows models."""
        model = self.slice.model
        dense = min(model.dense_layers, layers)
        return replace(model, layers=layers, dense_layers=dense, row_bytes=self.row_bytes)


def _json(path: Path, writer: str) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(
            f"{path} must be JSON: got {type(error).__name__} {error}. Write it with python -m "
            f"{writer} --json."
        ) from None


def _points(rows: Sequence[dict]) -> list[Point]:
    """Of the first round; where a point was measured twice, the last."""
    metrics: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["name"] == "decode" and row["kind"] == "measured":
            of = json.dumps(row["config"], sort_keys=True)
            metrics.setdefault(of, {})[row["metric"]] = float(row["median"])
    points = {}
    for of, found in metrics.items():
        at = json.loads(of)
        if "step" not in found or at.get("round") or at["system"] not in (*RESIDENT, *OVERLAPS):
            continue
        point = Point(
            at["system"], at["context"], at["batch"], found["running"],
            found["tokens"], at["layers"],
            float(at["hot_rows"]) if at["system"] in OVERLAPS else None,
            at.get("topk_stream") or "", found["step"] / 1e3, found.get("misses"),
        )  # fmt: skip
        points[tuple(point.config.values())] = point
    return list(points.values())


@dataclass(frozen=True)
class Host:
    """What kernels.json says of a host. plans: ascending batches and plan's us at each."""

    gpu: Gpu
    link: Link
    calibration: Calibration
    plans: tuple[tuple[float, ...], tuple[float, ...]]

    @classmethod
    def read(cls, path: Path, served: Served, gpu: str | None = None) -> Host:
        """gpu: a file of data/gpus, by default the one that kernels.json names.

        Raises: ValueError, one line, for a file that lacks what is needed or is of another card.
        """
        found = _json(path, "benchmarks.kernels")
        model = served.model(served.slice.layers)
        # What only a fit can say is 0 until then.
        start = replace(load("calibration", "ess-paper"), **dict.fromkeys(FREE, 0.0))
        link, calibration = from_kernels(path, load("link", "pcie5"), start)
        try:
            card = str(found["machine"]["gpu"])
            preattn = float(found["config"]["preattn_us"])
            rows = [row for row in found["rows"] if row["kind"] == "measured"]
            tflops, plans = _attention_tflops(rows, model), _plans(rows, model)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} must hold rows attention ({model.heads} heads, rows of {model.row_bytes} "
                f"B) and plan, its card and preattn_us: got {type(error).__name__} {error}. Write "
                "it with python -m benchmarks.kernels --json on a GPU."
            ) from None
        if served.gpu not in (None, card):
            raise ValueError(
                f"both files must be of one card: got {card!r} and {served.gpu!r}. Measure both "
                "on the same host."
            )
        # The server fetches behind what precedes attention in every mode.
        calibration = replace(calibration, preattn_us=preattn, early_us=preattn)
        specs = replace(load("gpu", gpu or _gpu_file(card)), attention_tflops=tflops)
        return cls(specs, link, calibration, plans)

    def fetching(self, calibration: Calibration, batch: float) -> Calibration:
        """calibration for two tiers, whose layers plan before they attend."""
        return replace(calibration, plan_us=float(np.interp(batch, *self.plans)))


def _gpu_file(card: str) -> str:
    """Raises: ValueError for a card without a file."""
    memory = "80gb" if "80GB" in card else "40gb"
    for name in names("gpus"):
        chip, _, size = name.partition("-")
        if chip in card.lower() and size in ("", memory):
            return name
    raise ValueError(f"--gpu must be given for {card!r}: got none. Name one of {names('gpus')}.")


def _attention_tflops(rows: Sequence[dict], model: Model) -> float:
    """Of the fastest kernel at the largest batch, every row resident."""
    wanted = {"heads": model.heads, "row_bytes": model.row_bytes, "topk": model.topk}
    found = [r for r in rows if r["name"] == "attention" and wanted.items() <= r["config"].items()]
    batch = max(row["config"]["batch"] for row in found)
    us = min(row["median"] for row in found if row["config"]["batch"] == batch)
    return batch * model.topk * model.attention_flops / (us * MICRO) / TERA


def _plans(rows: Sequence[dict], model: Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(batches, us of plan, the median over its misses)."""
    us: dict[int, list[float]] = {}
    for row in rows:
        at = row["config"]
        if row["name"] == "plan" and at["topk"] == model.topk:
            us.setdefault(at["batch"], []).append(row["median"])
    if not us:
        raise ValueError("no plan")
    found = {batch: np.median(each) for batch, each in sorted(us.items())}
    return tuple(map(float, found)), tuple(map(float, found.values()))
