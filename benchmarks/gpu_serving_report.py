"""What gpu_serving makes of its passes: windows, rows, summary, tables, plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from benchmarks.common import Report, failed, find, measured, table
from benchmarks.gpu_serving_plan import (
    BUDGETS,
    ESS_SYSTEMS,
    HISPARSE,
    ONE_TIER,
    RESIDENT,
    SYSTEMS,
)

# Of a window: the first steps end what was launched in the mode before.
DROPPED_STEPS = 2
METRICS = {
    "step": "ms",
    "decode_tokens_per_s": "tokens/s",
    "itl_p50": "ms",
    "itl_p99": "ms",
    "running": "requests",
    "tokens": "tokens/request",
    "misses": "rows/request/layer/step",
    "pcie": "GB/s",
    "pcie_out": "GB/s",
    "gpu_busy": "ratio",
    "sm_busy": "ratio",
}
PROBED = ("pcie", "pcie_out", "gpu_busy", "sm_busy")


@dataclass(frozen=True)
class Window:
    """Decode passes of one label in a row, with every request of the batch running.

    Times are launches: with SGLang's overlapped scheduling the one of a pass waits for the
    result of the pass before the last, so that their distance is a step's.
    """

    label: str
    passes: tuple[dict, ...]

    @property
    def start(self) -> float:
        return self.passes[DROPPED_STEPS]["start"]

    @property
    def end(self) -> float:
        return self.passes[-1]["start"]

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
        """Rows a request, layer and step. A device reports its total every few steps, always as
        late: the rows between two reports belong to as many steps as lie between them.
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
    """Whole windows behind the dropped passes, of the largest batch that ran.

    Raises: ValueError where none is left.
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


def point_rows(
    windows: Sequence[Window],
    config: dict,
    layers: int,
    between: Callable[[float, float], dict],
    why_none: Callable[[], str],
) -> list[dict]:
    """The rows of one system at one point; windows: its own.

    between, why_none: a Probe's
    """

    def row(metric: str, samples: Iterable[float | None]) -> dict:
        known = [value for value in samples if value is not None]
        if not known:
            return failed("decode", config, metric, METRICS[metric], why_none())
        return measured("decode", config, metric, METRICS[metric], known)

    steps = [1e3 * step for window in windows for step in window.steps]
    rows = [
        row("step", steps),
        row("decode_tokens_per_s", [window.tokens_per_s for window in windows]),
        row("itl_p50", [float(np.percentile(steps, 50))]),
        row("itl_p99", [float(np.percentile(steps, 99))]),
        row("running", [window.running for window in windows]),
        row("tokens", [config["context"] + window.mean_index for window in windows]),
    ]
    misses = [window.misses(layers) for window in windows]
    if known := [value for value in misses if value is not None]:
        rows.append(row("misses", known))
    probed = [between(window.start, window.end) for window in windows]
    if is_one_stretch(windows) and not any(one["pcie"] is not None for one in probed):
        probed = [between(windows[0].start, windows[-1].end)]
    return rows + [row(name, [one[name] for one in probed]) for name in PROBED]


def is_one_stretch(windows: Sequence[Window]) -> bool:
    """Whether nothing ran between them that was not theirs."""
    steps = len(windows[0].passes)
    first = [window.passes[0]["index"] for window in windows]
    return all(b - a == steps for a, b in zip(first, first[1:], strict=False))


# --- summary ----------------------------------------------------------------------------


def context_name(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


@dataclass(frozen=True)
class Speeds:
    """tokens/s of what was measured: {(system, context, running): tokens/s}, first round."""

    found: dict[tuple[str, int, int], float]

    @classmethod
    def of(cls, rows: Iterable[dict]) -> Speeds:
        rows = [row for row in rows if row["name"] == "decode" and row["kind"] == "measured"]
        found = {}
        for row in rows:
            config = row["config"]
            if row["metric"] != "decode_tokens_per_s" or config["round"]:
                continue
            running = find(rows, "decode", "running", **config)
            found[config["system"], config["context"], int(running["median"])] = row["median"]
        return cls(found)

    def contexts(self) -> list[int]:
        return sorted({context for _, context, _ in self.found})

    def at(self, systems: Sequence[str], context: int, running: int) -> float | None:
        """Of the fastest of these systems."""
        keys = [(system, context, running) for system in systems]
        return max((self.found[key] for key in keys if key in self.found), default=None)

    def largest(self, systems: Sequence[str], context: int) -> tuple[int, float] | None:
        """(running, tokens/s) at the largest batch that any of these systems ran."""
        batches = [n for system, c, n in self.found if system in systems and c == context]
        if not batches:
            return None
        return max(batches), self.at(systems, context, max(batches))

    def best(self, systems: Sequence[str], context: int) -> float | None:
        """Of any batch."""
        speeds = [v for (s, c, _), v in self.found.items() if s in systems and c == context]
        return max(speeds, default=None)


def summarise(report: Report, batch1_context: int) -> None:
    """Fill report.summary; what lacks a side is left out."""
    speeds = Speeds.of(report.rows)
    report.summary.clear()

    def ratio(key: str, above: float | None, below: float | None, gain: bool = False) -> None:
        if above is not None and below is not None:
            report.summarise(key, 100 * (above / below - 1) if gain else above / below)

    one = speeds.at((ONE_TIER,), batch1_context, 1)
    ratio("batch1_vs_one_tier", speeds.at(ESS_SYSTEMS, batch1_context, 1), one)
    ratio("hisparse_batch1_vs_one_tier", speeds.at((HISPARSE,), batch1_context, 1), one)
    for context in speeds.contexts():
        name = context_name(context)
        ess = speeds.largest(ESS_SYSTEMS, context)
        one_tier = speeds.largest((ONE_TIER,), context)
        hisparse = speeds.largest((HISPARSE,), context)
        for system, found in (("ess", ess), ("one_tier", one_tier), ("hisparse", hisparse)):
            report.summarise(f"running_{system}_{name}", found and found[0])
        base = one_tier and one_tier[1]
        ratio(f"gain_{name}", ess and ess[1], base, gain=True)
        ratio(f"best_gain_{name}", speeds.best(ESS_SYSTEMS, context), base, gain=True)
        ratio(f"hisparse_gain_{name}", hisparse and hisparse[1], base, gain=True)
        ratio(f"vs_hisparse_{name}", ess and ess[1], hisparse and hisparse[1])
    equal = [
        speeds.at(ESS_SYSTEMS, context, running) / resident
        for (system, context, running), resident in speeds.found.items()
        if system == RESIDENT and speeds.at(ESS_SYSTEMS, context, running) is not None
    ]
    report.summarise("equal_batch_vs_resident", min(equal, default=None))
    report.summarise("drift", _drift(report.rows))


def _drift(rows: Sequence[dict]) -> float | None:
    """One-tier's tokens/s when it was measured again over the first time; the one farthest off."""
    found = []
    for row in rows:
        config = row["config"]
        wanted = {name: config.get(name) for name in ("system", "context", "batch")}
        if row["metric"] == "decode_tokens_per_s" and row["kind"] == "measured" and config["round"]:
            first = find(rows, "decode", row["metric"], **wanted, round=0)
            found += [row["median"] / first["median"]] if first else []
    return max(found, key=lambda value: abs(value - 1), default=None)


# --- for people -------------------------------------------------------------------------


def print_tables(report: Report) -> None:
    print("\ndecode: medians; misses: rows a request, layer and step; busy: share of the time")
    keys = dict.fromkeys(
        (c["context"], c["batch"], c["system"], c["round"])
        for row in report.rows
        if row["name"] == "decode" and "batch" in (c := row["config"])
    )
    order = {system: place for place, system in enumerate(SYSTEMS)}
    lines = []
    for context, batch, system, number in sorted(
        keys, key=lambda k: (k[0], k[1], order[k[2]], k[3])
    ):
        wanted = {"context": context, "batch": batch, "system": system, "round": number}
        values = [report.median("decode", metric, **wanted) for metric in METRICS]
        if any(value is not None for value in values):
            name = f"{system} again" if number else system
            lines.append([context_name(context), batch, name, *values])
    heads = (
        "step ms",
        "tokens/s",
        "p50",
        "p99",
        "running",
        "tokens",
        "misses",
        "in GB/s",
        "out GB/s",
    )
    print(table(["context", "batch", "system", *heads, "busy", "SM busy"], lines))
    reasons = dict.fromkeys(
        (row["config"].get("system"), row["error"])
        for row in report.rows
        if row["kind"] == "failed" and row["metric"] not in PROBED
    )
    for system, error in reasons:
        count = sum(r["kind"] == "failed" and r["error"] == error for r in report.rows)
        print(f"not measured: {system}, {count} rows: {error}")
    print()
    print(table(["summary", ""], report.summary.items()))


def draw(report: Report, axes) -> None:
    """tokens/s by batch, one panel a context: the first four that were measured."""
    speeds = Speeds.of(report.rows)
    for axis, context in zip(axes, speeds.contexts(), strict=False):
        for system in SYSTEMS:
            points = sorted((n, v) for (s, c, n), v in speeds.found.items() if (s, c) == (
                system, context))  # fmt: skip
            if points:
                style = "s--" if system == RESIDENT else "D-." if system == BUDGETS else "o-"
                axis.plot(*zip(*points, strict=True), style, label=system, markersize=4)
        axis.set(xlabel="running requests", ylabel="decode tokens/s", xscale="log", yscale="log")
        axis.set_title(f"context {context_name(context)}")
        axis.legend(fontsize=7)
