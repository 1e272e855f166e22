"""Figures of the two_tier benchmark: windows of passes, rows, summary, tables and plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Panel, Report, measured, pivot, print_table, ratios

ONE_TIER = "one-tier"
HEADLINE = "ess 0.1"
# Systems of part (b) that have a summary figure of their own.
STEP_FIGURES = {"ess 1": "step_resident", "ess 0.2": "step_ratio02", "ess 0.1": "step_ratio01",
                "ess minimum": "step_minimum"}  # fmt: skip
WORKLOADS = {"unshared": "", "shared": "shared_"}  # with the prefix of its summary figures


@dataclass(frozen=True)
class Window:
    """Consecutive decode passes of one system; the last one only ends the step before it.

    Raises: ValueError for a prefill among them, another batch size, or a retraction.
    """

    passes: Sequence[dict]

    def __post_init__(self):
        modes = {one["mode"] for one in self.passes}
        batches = {one["batch"] for one in self.passes}
        retracted = {one["retracted"] for one in self.passes}
        if modes != {"DECODE"} or len(batches) > 1 or len(retracted) > 1:
            raise ValueError(
                f"a window must hold decode passes of one batch, none retracted: got {modes}, "
                f"batches {batches}, retracted {retracted}"
            )

    @property
    def batch(self) -> int:
        return self.passes[0]["batch"]

    @property
    def steps(self) -> list[float]:
        """Seconds from the start of a step to the next: the scheduler's own work is in them."""
        return np.diff([one["start"] for one in self.passes]).tolist()

    @property
    def tokens_per_s(self) -> float:
        return self.kept / sum(self.steps)

    @property
    def kept(self) -> int:
        """New tokens of all its steps: one a request and step, or the drafts accepted and one."""
        return sum(one["kept"] for one in self.passes[:-1])

    def counted(self, key: str) -> np.ndarray:
        """lookups or misses in the window, by layer; empty one-tier."""
        return np.array(self.passes[-1][key]) - np.array(self.passes[0][key])

    @property
    def hit_rates(self) -> np.ndarray:
        """By layer."""
        return 1 - self.counted("misses") / np.maximum(self.counted("lookups"), 1)

    @property
    def hit_rate(self) -> float:
        """Of all layers."""
        return 1 - self.counted("misses").sum() / max(self.counted("lookups").sum(), 1)

    @property
    def misses_per_step(self) -> float:
        """Rows fetched a decode step, all layers."""
        return float(self.counted("misses").sum() / len(self.steps))


def buys_rows(
    windows: Sequence[Window], one_tier: Sequence[Window], sizes: dict, config: dict, before: int
) -> list[dict]:
    """Rows of one system under one workload of part (a).

    one_tier: the windows of the same rounds; before: retractions before the first window
    """

    def row(metric, unit, samples, **more):
        return measured("buys", config | more, metric, unit, samples)

    batches = [window.batch for window in windows]
    speeds = [window.tokens_per_s for window in windows]
    rows = [
        row("requests", "requests", batches),
        row("requests_ratio", "x", ratios(batches, [window.batch for window in one_tier])),
        row("decode", "tokens/s", speeds),
        row("decode_ratio", "x", ratios(speeds, [window.tokens_per_s for window in one_tier])),
        row("decode_step", "ms", [1e3 * step for window in windows for step in window.steps]),
        row("retractions", "requests", [windows[-1].passes[-1]["retracted"] - before]),
    ]
    units = {"device_bytes": "B", "host_bytes": "B", "slots": "", "hot_rows": ""}
    rows += [row(key, unit, [sizes[key]]) for key, unit in units.items()]
    if sizes["hot_rows"]:
        rows.append(row("hit_rate", "ratio", [window.hit_rate for window in windows]))
        rows.append(row("misses", "rows/step", [window.misses_per_step for window in windows]))
        by_layer = np.transpose([window.hit_rates for window in windows])
        rows += [row("layer_hit_rate", "ratio", r, layer=i) for i, r in enumerate(by_layer)]
    return rows


def prefill_tokens_per_s(run: dict, context: int) -> float:
    """Speed of one HeldEngine.generate() of one prompt, from its first prefill pass to its last.

    Raises: ValueError if another number of tokens was prefilled.
    """
    extends = [one for one in run["passes"] if one["mode"] == "EXTEND"]
    tokens = sum(one["tokens"] for one in extends)
    if tokens != context:
        raise ValueError(f"a run must prefill {context} tokens: got {tokens}")
    return context / (extends[-1]["end"] - extends[0]["start"])


def summarise(report: Report) -> None:
    """Fill report.summary. Ratios are medians of the rounds' paired ratios."""
    for workload, prefix in WORKLOADS.items():
        config = {"system": HEADLINE, "workload": workload}
        for metric in ("requests_ratio", "decode_ratio"):
            report.summarise(prefix + metric, report.median("buys", metric, **config))
        report.summarise(f"hit_rate_{workload}", report.median("buys", "hit_rate", **config))
    for name, system in (("one_tier", ONE_TIER), ("ess", HEADLINE)):
        config = {"system": system, "workload": "unshared"}
        for metric in ("device_bytes", "host_bytes", "slots", "requests", "decode"):
            key = "decode_tokens_per_s" if metric == "decode" else metric
            report.summarise(f"{key}_{name}", report.median("buys", metric, **config))
    slots = [report.summary.get(f"slots_{name}") for name in ("ess", "one_tier")]
    report.summarise("slots_ratio", None if None in slots else slots[0] / slots[1])
    retractions = [row["median"] for row in report.rows if row["metric"] == "retractions"]
    report.summarise("retractions", sum(retractions) if retractions else None)
    for system, name in STEP_FIGURES.items():
        report.summarise(name, report.median("costs", "step_ratio", system=system))
        median = report.median("costs", "step_ratio_median", system=system)
        report.summarise(f"{name}_median_step", median)
    report.summarise("prefill_ratio", report.median("costs", "prefill_ratio", system="ess 0.2"))


BUYS_COLUMNS = {
    "workload": "workload", "system": "system", "device bytes": "device_bytes", "slots": "slots",
    "requests": "requests", "tokens/s": "decode", "step ms": "decode_step",
    "hit rate": "hit_rate", "misses/step": "misses",
}  # fmt: skip
COSTS_COLUMNS = {
    "system": "system", "step ms": "decode_step", "over one-tier": "step_ratio",
    "misses/step": "misses", "prefill tokens/s": "prefill", "of one-tier's": "prefill_ratio",
}  # fmt: skip


def print_tables(report: Report) -> None:
    buys = pivot(report.select("buys", kind="measured"), ("workload", "system"))
    print_table(buys, BUYS_COLUMNS, "what it buys, at equal device bytes: medians")
    costs = pivot(report.select("costs", kind="measured"), ("system",))
    title = "what it costs, at equal batch (prefill: 8K prompts): medians"
    print_table(costs, COSTS_COLUMNS, title)


def panels(report: Report) -> tuple[Panel, Panel]:
    """Requests and tokens/s of both systems; hit rate by layer."""
    bars = [
        row
        for metric in ("requests", "decode")
        for row in report.select("buys", metric, "measured")
        if row["config"]["system"] in (ONE_TIER, HEADLINE)
    ]
    units = {"requests": "requests", "decode": "tokens/s"}
    speed = {"yscale": "log", "title": "What it buys, at equal device bytes"}
    hits = {"xlabel": "layer", "ylabel": "hit rate", "ylim": (0, 1)}
    return (
        Panel(bars, lambda row: f"{units[row['metric']]}, {row['config']['workload']}",
              series="system", kind="bar", axes=speed),
        Panel(report.select("buys", "layer_hit_rate", "measured"), "layer",
              series=("system", "workload"), axes=hits | {"title": "Hit rate (random weights)"}),
    )  # fmt: skip
