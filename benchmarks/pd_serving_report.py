"""What pd_serving makes of its loads: rows, summary, tables, plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.common import Report, failed, find, measured, table
from benchmarks.pd_serving_load import SATURATED, Result

ONE_TIER, ESS = "one-tier", "ess"
OFF, ON = "off", "on"
SATURATION = "inf"  # the rate in a row's config: JSON has no infinity
# Of ESS's admission: requests sent back to the queue, scheduling rounds in which one waited.
COUNTS = (("shed_requests", "shed", "requests"), ("held_rounds", "held", "rounds"))
POINT_METRICS = ("output", "batch_mean", "batch_max", "itl_p50", "itl_p99", "ttft_p50", "ttft_p99")
POINT_TITLES = ("tokens/s", "batch", "largest", "ITL p50", "p99 ms", "TTFT p50", "p99 s")


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
    """Rows of one load. batches: as the server logged them; counted: ESS's counters' growth;
    cpu_seconds: the decode server's. At saturation they are near the wall's, or something else
    than decode was measured.

    Errors are a row and not a failure: the others of the load did complete.
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


def handover_row(config: dict, misses: Sequence[float]) -> dict:
    """misses: one figure a request, misses per layer in its first decode steps."""
    return measured("warmup", config, "handover_misses", "rows/layer", misses)


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


# --- summary ----------------------------------------------------------------------------


def summarise(report: Report, itl_target_ms: float) -> None:
    """Fill report.summary."""
    _summarise_output(report, itl_target_ms)
    _summarise_thrash(report)
    _summarise_warmup(report)
    errors = [row["median"] for row in report.rows if row["metric"] == "errors"]
    report.summarise("errors", sum(errors) if errors else None)


def _summarise_output(report: Report, itl_target_ms: float) -> None:
    found = {}
    for system, suffix in ((ONE_TIER, "one_tier"), (ESS, "ess")):
        config = {"system": system, "rate": SATURATION}
        found[system] = report.median("output", "output", **config)
        report.summarise(f"output_tokens_per_s_{suffix}", found[system])
        for metric in ("batch_mean", "batch_max", "itl_p50", "itl_p99", "ttft_p50", "ttft_p99"):
            report.summarise(f"{metric}_{suffix}", report.median("output", metric, **config))
        for metric in ("device_bytes", "slots"):
            value = report.median("output", metric, system=system)
            report.summarise(f"{metric}_{suffix}", value)
    report.summarise("output_ratio", ratio(found[ESS], found[ONE_TIER]))
    report.summarise("p99_itl_ms", report.summary.get("itl_p99_ess"))
    if "p99_itl_ms" in report.summary:
        report.summarise("itl_target_ms", itl_target_ms)


def curve(report: Report, name: str, metric: str, **config) -> list[tuple[float, float]]:
    """(rate, median) by rising rate; saturation is left out."""
    points = {}
    for row in report.rows:
        rate = row["config"].get("rate")
        if rate is not None and rate != SATURATION:
            if found := find([row], name, metric, **config):
                points[rate] = found["median"]
    return sorted(points.items())


def _summarise_thrash(report: Report) -> None:
    last = {}
    for admission, name in ((ON, "admission_retained"), (OFF, "admission_off_retained")):
        points = curve(report, "thrash", "output", admission=admission, linked=True)
        if points:
            last[admission] = points[-1]
            report.summarise(name, ratio(points[-1][1], max(value for _, value in points)))
    if len(last) == 2 and last[ON][0] == last[OFF][0]:  # the same rate
        report.summarise("thrash_gain", ratio(last[ON][1], last[OFF][1]))


def _summarise_warmup(report: Report) -> None:
    for metric, name, at in (
        ("handover_misses", "warmup_first8_ratio", "mean"),
        ("itl_p99", "warmup_itl_p99_ratio", "median"),
    ):
        rows = [find(report.rows, "warmup", metric, pd_warmup=value) for value in (ON, OFF)]
        if all(rows):
            report.summarise(name, ratio(rows[0][at], rows[1][at]))


# --- for people -------------------------------------------------------------------------


def print_tables(report: Report, link: str) -> None:
    headers = [*POINT_TITLES, "decode CPU", "hit rate", "shed", "errors"]
    print("\nA. prefill-decode disaggregation at equal decode device bytes, by requests/s")
    print(table(["system", "rate", *headers], _lines(report, "output", ("system", "rate"))))
    print(f"\nB. a hot tier far below the working sets, {link}, by requests/s")
    keys = ("admission", "linked", "rate")
    print(table([*keys, *headers], _lines(report, "thrash", keys)))
    print("\nC. warm-up across prefill-decode disaggregation")
    print(table(["warm-up", "rate", *headers], _lines(report, "warmup", ("pd_warmup", "rate"))))
    for row in report.rows:
        if row["kind"] == "failed":
            print(f"not measured: {row['metric']} of {row['name']} {row['config']}: {row['error']}")
    print()
    print(table(["summary", ""], report.summary.items()))


def _lines(report: Report, name: str, keys: Sequence[str]) -> list[list]:
    points = dict.fromkeys(
        tuple(row["config"][key] for key in keys)
        for row in report.rows
        if row["name"] == name and all(key in row["config"] for key in keys)
    )
    metrics = (*POINT_METRICS, "decode_cpu", "hit_rate", "shed", "errors")
    return [
        [
            *values,
            *(report.median(name, m, **dict(zip(keys, values, strict=True))) for m in metrics),
        ]
        for values in points
    ]


def draw(report: Report, axes, link: str) -> None:
    """Output tokens/s of both systems; p99 inter-token latency; thrash with admission."""
    speed, latency, thrash = axes
    for system, style in ((ONE_TIER, "s--"), (ESS, "o-")):
        for axis, metric in ((speed, "output"), (latency, "itl_p99")):
            points = curve(report, "output", metric, system=system)
            axis.plot(*zip(*points, strict=True) if points else ((), ()), style, label=system)
            value = report.median("output", metric, system=system, rate=SATURATION)
            if value is not None:
                color = axis.lines[-1].get_color()
                axis.axhline(value, color=color, ls=":", lw=1, label=f"{system}, all at once")
    speed.set(xlabel="requests/s", ylabel="output tokens/s", title="Equal decode device bytes")
    latency.set(xlabel="requests/s", ylabel="ms", title="p99 inter-token latency")
    if (target := report.summary.get("itl_target_ms")) is not None:
        latency.axhline(target, color="0.5", lw=1, label="target")
    for admission, style in ((OFF, "s--"), (ON, "o-")):
        points = curve(report, "thrash", "output", admission=admission, linked=True)
        lines = zip(*points, strict=True) if points else ((), ())
        thrash.plot(*lines, style, label=f"admission {admission}")
    thrash.set(xlabel="requests/s", ylabel="output tokens/s", title=f"Small hot tier, {link}")
    for axis in axes:
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=8)
