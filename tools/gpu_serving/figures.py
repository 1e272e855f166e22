"""Figures of the gpu_serving benchmark: windows of passes, rows, summary, tables and plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from benchmarks.harness import Panel, Report, find, measured, pivot, print_table, select
from tools.gpu_serving.grid import ESS_SYSTEMS, HISPARSE, ONE_TIER, RESIDENT, SYSTEMS

DROPPED_STEPS = 2  # of a window: its first steps finish what was launched in the mode before
METRICS = {
    "step": "ms", "decode_tokens_per_s": "tokens/s", "itl_p50": "ms", "itl_p99": "ms",
    "running": "requests", "tokens": "tokens/request", "misses": "rows/request/layer/step",
}  # fmt: skip


@dataclass(frozen=True)
class Window:
    """Consecutive decode passes of one label, with every request of the batch running.

    Times are launches: with SGLang's overlapped scheduling a launch waits for the result of the
    pass before the last, so the distance of two launches is the time of a step.
    """

    label: str
    passes: tuple[dict, ...]

    @property
    def running(self) -> int:
        return self.passes[0]["batch"]

    @property
    def steps(self) -> list[float]:
        """Seconds."""
        return np.diff([one["start"] for one in self.passes[DROPPED_STEPS:]]).tolist()

    @property
    def tokens_per_s(self) -> float:
        return self.running * len(self.steps) / sum(self.steps)

    @property
    def mean_index(self) -> float:
        """Steps of the fill so far."""
        return (self.passes[DROPPED_STEPS]["index"] + self.passes[-1]["index"]) / 2

    def misses(self, layers: int) -> float | None:
        """Rows a request, layer and step. A device reports its total every few steps, each time
        equally late: the rows between two reports belong to the steps between them.
        """
        known = [(one["index"], one["misses"]) for one in self.passes if one["misses"] is not None]
        news = [at for at, before in zip(known[1:], known, strict=False) if at[1] != before[1]]
        if not known:
            return None
        # A report every step, or one that never changes: nothing is late.
        (first, low), (last, high) = (news[0], news[-1]) if len(news) > 1 else (known[0], known[-1])
        steps = last - first
        return (high - low) / (steps * layers * self.running) if steps else None


def windows_of(passes: Sequence[dict], dropped: int, steps: int) -> list[Window]:
    """Whole windows after the dropped passes, of the largest batch that ran.

    Raises: ValueError if none is left.
    """
    running = max((one["batch"] for one in passes), default=0)
    kept = [one for one in passes if one["index"] >= dropped and one["batch"] == running]
    found = []
    for _, group in groupby(kept, key=lambda one: one["index"] // steps):
        window = tuple(group)
        if len(window) == steps and len({one["label"] for one in window}) == 1:
            found.append(Window(window[0]["label"], window))
    if not found:
        raise ValueError(
            f"a fill must leave windows of {steps} steps behind {dropped}: got {len(passes)} "
            f"passes, {running} requests at most"
        )
    return found


def point_rows(windows: Sequence[Window], config: dict, layers: int) -> list[dict]:
    """The rows of one system at one point."""
    steps = [1e3 * step for window in windows for step in window.steps]
    misses = [window.misses(layers) for window in windows]
    samples = {
        "step": steps,
        "decode_tokens_per_s": [window.tokens_per_s for window in windows],
        "itl_p50": [float(np.percentile(steps, 50))],
        "itl_p99": [float(np.percentile(steps, 99))],
        "running": [window.running for window in windows],
        "tokens": [config["context"] + window.mean_index for window in windows],
        "misses": [value for value in misses if value is not None],
    }
    return [
        measured("decode", config, metric, METRICS[metric], values)
        for metric, values in samples.items()
        if values
    ]


# --- summary ----------------------------------------------------------------------------


def context_name(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


@dataclass(frozen=True)
class Speeds:
    """tokens/s of the first round: {(system, context, running): tokens/s}."""

    found: dict[tuple[str, int, int], float]

    @classmethod
    def of(cls, rows: Iterable[dict]) -> Speeds:
        rows, found = list(rows), {}
        for row in select(rows, "decode", "decode_tokens_per_s", "measured", round=0):
            config = row["config"]
            running = find(rows, "decode", "running", **config)
            found[config["system"], config["context"], int(running["median"])] = row["median"]
        return cls(found)

    def contexts(self) -> list[int]:
        return sorted({context for _, context, _ in self.found})

    def by_batch(self, systems: Sequence[str], context: int) -> dict[int, float]:
        """{running: tokens/s of the fastest of these systems}, by rising batch."""
        found: dict[int, float] = {}
        for (system, at, running), speed in sorted(self.found.items(), key=lambda item: item[0][2]):
            if system in systems and at == context:
                found[running] = max(speed, found.get(running, 0.0))
        return found


def summarise(report: Report, batch1_context: int) -> None:
    """Fill report.summary; a ratio that lacks a side is left out."""
    speeds = Speeds.of(report.rows)
    report.summary.clear()

    def ratio(key: str, above: float | None, below: float | None, gain: bool = False) -> None:
        if above is not None and below is not None:
            report.summarise(key, 100 * (above / below - 1) if gain else above / below)

    def single(*systems: str) -> float | None:
        return speeds.by_batch(systems, batch1_context).get(1)

    ratio("batch1_vs_one_tier", single(*ESS_SYSTEMS), single(ONE_TIER))
    ratio("hisparse_batch1_vs_one_tier", single(HISPARSE), single(ONE_TIER))
    equal = []
    for context in speeds.contexts():
        name = context_name(context)
        ess = speeds.by_batch(ESS_SYSTEMS, context)
        found = {"ess": ess, "one_tier": speeds.by_batch((ONE_TIER,), context),
                 "hisparse": speeds.by_batch((HISPARSE,), context)}  # fmt: skip
        largest = {key: by_batch[max(by_batch)] for key, by_batch in found.items() if by_batch}
        for key in largest:
            report.summarise(f"running_{key}_{name}", max(found[key]))
        base = largest.get("one_tier")
        ratio(f"gain_{name}", largest.get("ess"), base, gain=True)
        ratio(f"best_gain_{name}", max(ess.values(), default=None), base, gain=True)
        ratio(f"hisparse_gain_{name}", largest.get("hisparse"), base, gain=True)
        ratio(f"vs_hisparse_{name}", largest.get("ess"), largest.get("hisparse"))
        resident = speeds.by_batch((RESIDENT,), context)
        equal += [ess[running] / resident[running] for running in ess.keys() & resident.keys()]
    report.summarise("equal_batch_vs_resident", min(equal, default=None))
    report.summarise("drift", _drift(report.rows))


def _drift(rows: Sequence[dict]) -> float | None:
    """tokens/s of one-tier's second round over the first; the ratio farthest from 1."""
    found = []
    for row in select(rows, "decode", "decode_tokens_per_s", "measured", round=1):
        wanted = {name: row["config"].get(name) for name in ("system", "context", "batch")}
        first = find(rows, "decode", row["metric"], **wanted, round=0)
        found += [row["median"] / first["median"]] if first else []
    return max(found, key=lambda value: abs(value - 1), default=None)


# --- for people -------------------------------------------------------------------------

COLUMNS = {"context": lambda line: context_name(line["context"]), "batch": "batch",
           "system": lambda line: line["system"] + " again" * line["round"], "step ms": "step",
           "tokens/s": "decode_tokens_per_s", "p50": "itl_p50", "p99": "itl_p99",
           "running": "running", "tokens": "tokens", "misses": "misses"}  # fmt: skip


def print_tables(report: Report) -> None:
    lines = pivot(report.select("decode", kind="measured"), ("context", "batch", "system", "round"))
    lines.sort(key=lambda line: (line["context"], line["batch"], SYSTEMS.index(line["system"]),
                                 line["round"]))  # fmt: skip
    title = "decode: medians; misses: rows a request, layer and step"
    print_table(lines, COLUMNS, title)


def panels(report: Report) -> list[Panel]:
    """tokens/s by batch, one panel a context."""
    speeds = Speeds.of(report.rows)
    rows = [
        {"system": system, "context": context, "running": running, "median": speed}
        for (system, context, running), speed in sorted(speeds.found.items())
    ]
    axes = {"xlabel": "running requests", "ylabel": "decode tokens/s", "xscale": "log",
            "yscale": "log"}  # fmt: skip
    return [
        Panel([row for row in rows if row["context"] == context], "running", series="system",
              styles={RESIDENT: "s--"}, axes=axes | {"title": f"context {context_name(context)}"})
        for context in speeds.contexts()
    ]  # fmt: skip
