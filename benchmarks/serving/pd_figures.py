"""Figures of the pd_serving benchmark: rows of a load, summary, tables and plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.harness import Panel, Report, failed, find, measured, pivot, print_table
from benchmarks.serving.pd_load import SATURATED, Result

ONE_TIER, ESS = "one-tier", "ess"
OFF, ON = "off", "on"
SATURATION = "inf"  # the rate in a row's config: JSON has no infinity
# Counters of ESS's admission: requests sent back to the queue, scheduling rounds in which one
# waited. (counter, metric, unit)
COUNTS = (("shed_requests", "shed", "requests"), ("held_rounds", "held", "rounds"))
# {column: metric} of a load.
COLUMNS = {
    "tokens/s": "output", "batch": "batch_mean", "largest": "batch_max", "ITL p50": "itl_p50",
    "p99 ms": "itl_p99", "TTFT p50": "ttft_p50", "p99 s": "ttft_p99", "decode CPU": "decode_cpu",
    "hit rate": "hit_rate", "shed": "shed", "errors": "errors",
}  # fmt: skip


def rate_name(rate: float) -> float | str:
    return SATURATION if rate == SATURATED else round(rate, 4)


def point_rows(
    name: str,
    config: dict,
    result: Result,
    batches: Sequence[int],
    counted: Mapping[str, float],
    cpu_seconds: float,
) -> list[dict]:
    """Rows of one load. A request's error is a row and no failure: the others did complete.

    batches: batch sizes that the decode server logged; counted: growth of ESS's counters
    cpu_seconds: of the decode server. At saturation they are near the wall time, or the load did
        not measure decode.
    """
    errors = result.errors
    rows = [measured(name, config, "errors", "requests", [len(errors)])]
    if not (result.completed and batches):
        error = f"{len(result.completed)} of {len(result.answers)} completed: {errors[:1]}"
        return [*rows, failed(name, config, "output", "tokens/s", error)]
    gaps, firsts = np.array(result.gaps_s) * 1e3, np.array(result.first_tokens_s)
    figures = [
        ("output", "tokens/s", result.tokens_per_s),
        ("batch_mean", "requests", np.mean(batches)),
        ("batch_max", "requests", max(batches)),
        *((f"itl_p{p}", "ms", np.percentile(gaps, p)) for p in (50, 99)),
        *((f"ttft_p{p}", "s", np.percentile(firsts, p)) for p in (50, 99)),
        ("completed", "requests", len(result.completed)),
        ("seconds", "s", result.seconds),
        ("decode_cpu", "ratio", cpu_seconds / result.seconds),
    ]
    if counted.get("lookups"):
        figures.append(("hit_rate", "ratio", 1 - counted["misses"] / counted["lookups"]))
    for counter, metric, unit in COUNTS:
        if counter in counted:
            figures.append((metric, unit, counted[counter]))
    first_error = {"error": errors[0]} if errors else {}
    rows += [measured(name, config, metric, unit, [value]) for metric, unit, value in figures]
    return [{**row, **first_error} for row in rows]


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def summarise(report: Report, itl_target_ms: float) -> None:
    """Fill report.summary."""
    found = {}
    for system, suffix in ((ONE_TIER, "one_tier"), (ESS, "ess")):
        config = {"system": system, "rate": SATURATION}
        found[system] = report.median("output", "output", **config)
        report.summarise(f"output_tokens_per_s_{suffix}", found[system])
        for metric in ("batch_mean", "batch_max", "itl_p50", "itl_p99", "ttft_p50", "ttft_p99"):
            report.summarise(f"{metric}_{suffix}", report.median("output", metric, **config))
        for metric in ("device_bytes", "slots"):  # not of one rate
            report.summarise(f"{metric}_{suffix}", report.median("output", metric, system=system))
    report.summarise("output_ratio", ratio(found[ESS], found[ONE_TIER]))
    report.summarise("p99_itl_ms", report.summary.get("itl_p99_ess"))
    if "p99_itl_ms" in report.summary:
        report.summarise("itl_target_ms", itl_target_ms)
    _summarise_thrash(report)
    for metric, name, at in (
        ("handover_misses", "warmup_first8_ratio", "mean"),
        ("itl_p99", "warmup_itl_p99_ratio", "median"),
    ):
        rows = [find(report.rows, "warmup", metric, pd_warmup=value) for value in (ON, OFF)]
        if all(rows):
            report.summarise(name, ratio(rows[0][at], rows[1][at]))
    errors = [row["median"] for row in report.select(metric="errors")]
    report.summarise("errors", sum(errors) if errors else None)


def curve(report: Report, name: str, metric: str, **config) -> list[tuple[float, float]]:
    """(rate, median) by rising rate; saturation is left out."""
    rows = report.select(name, metric, "measured", **config)
    points = {row["config"].get("rate", SATURATION): row["median"] for row in rows}
    return sorted((rate, value) for rate, value in points.items() if rate != SATURATION)


def _summarise_thrash(report: Report) -> None:
    last = {}
    for admission, name in ((ON, "admission_retained"), (OFF, "admission_off_retained")):
        points = curve(report, "thrash", "output", admission=admission, linked=True)
        if points:
            last[admission] = points[-1]
            report.summarise(name, ratio(points[-1][1], max(value for _, value in points)))
    if len(last) == 2 and last[ON][0] == last[OFF][0]:  # the same rate
        report.summarise("thrash_gain", ratio(last[ON][1], last[OFF][1]))


def print_tables(report: Report, link: str) -> None:
    for name, keys, title in (
        ("output", ("system", "rate"), "A. equal decode device bytes, by requests/s"),
        ("thrash", ("admission", "linked", "rate"),
         f"B. a hot tier far below the working sets, {link}, by requests/s"),
        ("warmup", ("pd_warmup", "rate"), "C. warm-up across the hand-over"),
    ):  # fmt: skip
        rows = pivot(report.select(name, kind="measured"), keys)
        print_table(rows, {key: key for key in keys} | COLUMNS, title)


def panels(report: Report, link: str) -> tuple[Panel, ...]:
    """Output tokens/s of both systems; p99 inter-token latency; thrash with admission."""

    def rows(name: str, metric: str, **config) -> list[dict]:
        """By rising rate, without saturation."""
        found = report.select(name, metric, "measured", **config)
        found = [row for row in found if row["config"]["rate"] != SATURATION]
        return sorted(found, key=lambda row: row["config"]["rate"])

    def levels(metric: str) -> dict[str, float]:
        values = {
            system: report.median("output", metric, system=system, rate=SATURATION)
            for system in (ONE_TIER, ESS)
        }
        return {f"{name}, all at once": value for name, value in values.items() if value}

    target = report.summary.get("itl_target_ms")
    axes = {"xlabel": "requests/s", "ylabel": "output tokens/s"}
    return (
        Panel(rows("output", "output"), "rate", series="system",
              levels=levels("output"), axes=axes | {"title": "Equal decode device bytes"}),
        Panel(rows("output", "itl_p99"), "rate", series="system",
              levels=levels("itl_p99") | ({"target": target} if target else {}),
              axes=axes | {"ylabel": "ms", "title": "p99 inter-token latency"}),
        Panel(rows("thrash", "output", linked=True), "rate", series="admission",
              axes=axes | {"title": f"Small hot tier, {link}, by admission"}),
    )  # fmt: skip
