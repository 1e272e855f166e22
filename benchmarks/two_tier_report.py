"""What two_tier makes of its passes: windows, rows, summary, tables, plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.common import Report, find, measured, ratios, table

ONE_TIER = "one-tier"
HEADLINE = "ess 0.1"
# (b)'s systems that have a summary figure of their own.
STEP_FIGURES = {
    "ess 1": "step_resident",
    "ess 0.2": "step_ratio02",
    "ess 0.1": "step_ratio01",
    "ess minimum": "step_minimum",
}
WORKLOADS = {"unshared": "", "shared": "shared_"}  # with the prefix of its summary figures


@dataclass(frozen=True)
class Window:
    """Decode passes of one system, in a row; the last one only says when the one before ended.

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
        return self.batch * len(self.steps) / sum(self.steps)

    @property
    def retracted(self) -> int:
        """Requests since the engine's start."""
        return self.passes[-1]["retracted"]

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
    rows = [
        row("requests", "requests", batches),
        row("requests_ratio", "x", ratios(batches, [window.batch for window in one_tier])),
        row("decode", "tokens/s", [window.tokens_per_s for window in windows]),
        row("decode_ratio", "x", _tokens_ratios(windows, one_tier)),
        row("decode_step", "ms", [1e3 * step for window in windows for step in window.steps]),
        row("retractions", "requests", [windows[-1].retracted - before]),
    ]
    for key, unit in (("device_bytes", "B"), ("host_bytes", "B"), ("slots", ""), ("hot_rows", "")):
        rows.append(row(key, unit, [sizes[key]]))
    if sizes["hot_rows"]:
        rows.append(row("hit_rate", "ratio", [window.hit_rate for window in windows]))
        rows.append(row("misses", "rows/step", [window.misses_per_step for window in windows]))
        by_layer = np.array([window.hit_rates for window in windows])
        rows += [
            row("layer_hit_rate", "ratio", by_layer[:, layer], layer=layer)
            for layer in range(by_layer.shape[1])
        ]
    return rows


def _tokens_ratios(windows: Sequence[Window], one_tier: Sequence[Window]) -> list[float]:
    mine, theirs = ([window.tokens_per_s for window in both] for both in (windows, one_tier))
    return ratios(mine, theirs)


def prefill_tokens_per_s(run: dict, context: int) -> float:
    """Of one HeldEngine.generate() of one prompt: from its first prefill pass to its last's end.

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
        for metric in ("device_bytes", "host_bytes", "slots", "requests"):
            report.summarise(f"{metric}_{name}", report.median("buys", metric, **config))
        report.summarise(f"decode_tokens_per_s_{name}", report.median("buys", "decode", **config))
    slots = [report.summary.get(f"slots_{name}") for name in ("ess", "one_tier")]
    report.summarise("slots_ratio", None if None in slots else slots[0] / slots[1])
    retractions = [row["median"] for row in report.rows if row["metric"] == "retractions"]
    report.summarise("retractions", sum(retractions) if retractions else None)
    for system, name in STEP_FIGURES.items():
        report.summarise(name, report.median("costs", "step_ratio", system=system))
        median = report.median("costs", "step_ratio_median", system=system)
        report.summarise(f"{name}_median_step", median)
    report.summarise("prefill_ratio", report.median("costs", "prefill_ratio", system="ess 0.2"))


def print_tables(report: Report) -> None:
    metrics = ("device_bytes", "slots", "requests", "decode", "decode_step", "hit_rate", "misses")
    names = ("device bytes", "slots", "requests", "tokens/s", "step ms", "hit rate", "misses/step")
    print("\nwhat it buys, at equal device bytes: medians")
    print(table(["workload", "system", *names], _lines(report, "buys", metrics, "workload")))
    metrics = ("decode_step", "step_ratio", "misses", "prefill", "prefill_ratio")
    names = ("step ms", "over one-tier", "misses/step", "prefill tokens/s", "of one-tier's")
    print("\nwhat it costs, at equal batch (prefill: 8K prompts): medians")
    print(table(["", "system", *names], _lines(report, "costs", metrics, "part")))
    for row in report.rows:
        if row["kind"] == "failed":
            print(f"not measured: {row['metric']} of {row['name']}: {row['error']}")
    print()
    print(table(["summary", ""], report.summary.items()))


def _lines(report: Report, name: str, metrics: Sequence[str], group: str) -> list[list]:
    keys = dict.fromkeys(
        (row["config"].get(group, ""), row["config"]["system"])
        for row in report.rows
        if row["name"] == name and "system" in row["config"]
    )
    lines = []
    for value, system in keys:
        config = {"system": system} | ({group: value} if value else {})
        lines.append([value, system, *(report.median(name, m, **config) for m in metrics)])
    return lines


def draw(report: Report, axes) -> None:
    """Requests and tokens/s of both systems; hit rate by layer."""
    speed, hits = axes
    bars = [
        (f"{label},\n{workload}", metric, workload)
        for metric, label in (("requests", "requests"), ("decode", "decode tokens/s"))
        for workload in WORKLOADS
    ]
    places = np.arange(len(bars))
    for offset, (system, label) in ((-0.2, (ONE_TIER, ONE_TIER)), (0.2, (HEADLINE, "ESS, 0.1"))):
        found = [report.median("buys", metric, system=system, workload=w) for _, metric, w in bars]
        drawn = speed.bar(places + offset, [value or 0 for value in found], 0.4, label=label)
        speed.bar_label(drawn, fmt="%.0f", fontsize=8)
    speed.set_xticks(places, [label for label, _, _ in bars], fontsize=8)
    speed.set(yscale="log", title="What it buys, at equal device bytes")
    speed.legend(fontsize=8)
    rows = [row for row in report.rows if row["metric"] == "layer_hit_rate"]
    for system, workload in dict.fromkeys(
        (row["config"]["system"], row["config"]["workload"]) for row in rows
    ):
        config = {"system": system, "workload": workload}
        layers = sorted({row["config"]["layer"] for row in rows})
        found = [find(rows, "buys", "layer_hit_rate", **config, layer=layer) for layer in layers]
        values = [row["median"] if row else np.nan for row in found]
        hits.plot(
            layers, values, "o-" if workload == "unshared" else "s--", label=f"{system}, {workload}"
        )
    hits.set(xlabel="layer", ylabel="hit rate", ylim=(0, 1), title="Hit rate (random weights)")
    if rows:
        hits.legend(fontsize=8)
