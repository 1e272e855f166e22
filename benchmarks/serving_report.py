"""What cpu_serving makes of its timings: rows, summary, tables, plot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.common import Report, find, measured, ratios, table
from benchmarks.serving_systems import PARTS, WARMUP_STEPS, Timing

HEADLINE = (16, 2048)  # (batch, context) at which the systems are compared side by side
SPLIT_BATCH = 16
WINDOW = 8  # steps whose mean makes one sample of decode tokens/s

# What is compared in rounds: the name of its row and of its summary figure.
RATIOS = {
    "decode": "decode_vs_transformers",
    "prefill": "prefill_vs_transformers",
    "spin": "spin_speedup",
    "spin_median": "spin_speedup_median_step",
}


def timing_rows(timing: Timing, config: dict, **extra) -> list[dict]:
    """Rows of one point of one system: tokens/s, the step, and (batch 16) where time goes."""
    batch, tokens = config["batch"], config["batch"] * config["context"]
    prefill = [tokens / seconds for seconds in timing.prefill]
    rows = []
    if prefill:
        rows.append(measured("serving", config, "prefill", "tokens/s", prefill, **extra))
    if timing.steps:
        # By windows: a median of single steps would not see the rare long ones.
        decode = [batch / seconds for seconds in windows(timing.steps)]
        steps = [1e3 * seconds for seconds in timing.steps]
        warm = {"warmup": WARMUP_STEPS} | extra
        rows.append(measured("serving", config, "decode", "tokens/s", decode, **warm))
        rows.append(measured("serving", config, "decode_step", "ms", steps, **warm))
    if batch == SPLIT_BATCH:
        rows += _split_rows(timing, config, **extra)
    return rows


def windows(steps: Sequence[float], size: int = WINDOW) -> list[float]:
    """Mean of each `size` steps in a row; fewer at the end are dropped, unless they are all."""
    last = max(len(steps) - size + 1, 1)
    return [float(np.mean(steps[i : i + size])) for i in range(0, last, size)]


def _split_rows(timing: Timing, config: dict, **extra) -> list[dict]:
    rows = []
    for part in PARTS:
        if values := [1e3 * seconds for seconds in timing.split[part]]:
            rows.append(measured("step_split", config, part, "ms", values, **extra))
        if shares := ratios(timing.prefill_split[part], timing.prefill):
            rows.append(measured("prefill_split", config, part, "ratio", shares, **extra))
    return rows


def summarise(report: Report, growth: tuple[int, int]) -> None:
    """Fill report.summary. Ratios of two systems are medians of the rounds' paired ratios."""
    batch, context = HEADLINE
    ours = {"system": "sglang-ess", "waits": "ours"}
    at_headline = ours | {"batch": batch, "context": context}
    for name in RATIOS.values():
        report.summarise(name, report.median(name, "speedup"))
    for part in ("attention", "indexer"):
        small, large = (
            report.median("step_split", part, **ours, kv="bf16", batch=SPLIT_BATCH, context=tokens)
            for tokens in growth
        )
        report.summarise(f"{part}_growth", small and large and large / small)
    report.summarise("context_growth", growth[1] / growth[0])
    for metric in ("prefill", "decode"):
        mine = report.median("serving", metric, **at_headline, kv="bf16")
        report.summarise(f"{metric}_tokens_per_s", mine)
        fp8 = report.median("serving", metric, **at_headline, kv="fp8_e4m3")
        report.summarise(f"fp8_{metric}_tokens_per_s", fp8)
        shape = {"batch": batch if metric == "decode" else 1, "context": context}
        theirs = report.median("serving", metric, system="transformers", **shape)
        report.summarise(f"transformers_{metric}_tokens_per_s", theirs)


def print_tables(report: Report) -> None:
    configs = [row["config"] for row in report.rows if row["name"] == "serving"]
    points = sorted({(c["batch"], c["context"]) for c in configs})
    systems = [
        ("bf16", {"system": "sglang-ess", "kv": "bf16", "waits": "ours"}),
        ("fp8", {"system": "sglang-ess", "kv": "fp8_e4m3"}),
        ("transformers", {"system": "transformers"}),
    ]
    for metric in ("prefill", "decode"):
        print(f"\n{metric}, tokens/s: median [p10, p90]; bf16 and fp8 are KV formats of sglang-ess")
        lines = [
            [*point]
            + [
                _spread(find(report.rows, "serving", metric, **system, **_at(point)))
                for _, system in systems
            ]
            for point in points
        ]
        print(table(["batch", "context", *(name for name, _ in systems)], lines))
    print(f"\nmilliseconds of a decode step, batch {SPLIT_BATCH}: median")
    for name, system in systems[:2]:
        print(table([name, *PARTS], [[c, *parts] for c, parts in split_lines(report, **system)]))
    for row in report.rows:
        if row["kind"] == "failed":
            where = " ".join(str(value) for value in row["config"].values())
            print(f"not measured: {row['metric']} of {where}: {row['error']}")
    print()
    print(table(["summary", ""], report.summary.items()))


def _at(point: tuple[int, int]) -> dict:
    return {"batch": point[0], "context": point[1]}


def _spread(row: dict | None) -> str | None:
    return row and f"{row['median']:.0f} [{row['p10']:.0f}, {row['p90']:.0f}]"


def split_lines(report: Report, **system) -> list[tuple[int, list[float]]]:
    """(context, milliseconds by PARTS) of each context measured at SPLIT_BATCH."""
    config = {"batch": SPLIT_BATCH} | system
    contexts = {row["config"]["context"] for row in report.rows if row["name"] == "step_split"}
    lines = [
        (context, [report.median("step_split", part, **config, context=context) for part in PARTS])
        for context in sorted(contexts)
    ]
    return [line for line in lines if None not in line[1]]


def draw(report: Report, axes) -> None:
    speed, split = axes
    configs = [row["config"] for row in report.rows if row["name"] == "serving"]
    for colour, batch in enumerate(sorted({c["batch"] for c in configs})):
        for label, style, system in (
            ("bf16", "o-", {"system": "sglang-ess", "kv": "bf16", "waits": "ours"}),
            ("fp8", "s--", {"system": "sglang-ess", "kv": "fp8_e4m3"}),
            ("transformers", "x:", {"system": "transformers"}),
        ):
            values = [
                (context, report.median("serving", "decode", **system, **_at((batch, context))))
                for context in sorted({c["context"] for c in configs})
            ]
            values = [pair for pair in values if pair[1]]
            if values:
                name = f"{label}, batch {batch}"
                speed.plot(*zip(*values, strict=True), style, color=f"C{colour}", label=name)
    speed.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="decode (tokens/s)")
    speed.set_xscale("log", base=2)
    speed.set_title("Decode speed by batch; bf16 and fp8 are KV formats of sglang-ess")
    speed.legend(fontsize=7)
    lines = split_lines(report, system="sglang-ess", kv="bf16", waits="ours")
    labels = [str(context) for context, _ in lines]
    bottom = np.zeros(len(lines))
    for i, part in enumerate(PARTS):
        heights = np.array([parts[i] for _, parts in lines])
        split.bar(labels, heights, bottom=bottom, label=part)
        bottom += heights
    split.set(xlabel="context (tokens)", ylabel=f"ms per decode step, batch {SPLIT_BATCH}")
    split.set_title("Where a decode step goes (bf16 KV)")
    split.legend(fontsize=7)
