"""Figures of the cpu_serving benchmark: what its passes took, rows, summary, tables and plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.harness import Panel, Report, measured, pivot, print_table, ratios, spread
from benchmarks.serving.engines import SPLIT

HEADLINE = (16, 2048)  # (batch, context) at which the systems are compared side by side
SPLIT_BATCH = 16
WINDOW = 8  # steps whose mean makes one sample of decode tokens/s
WARMUP_STEPS = 4
PARTS = (*SPLIT, "rest")
OURS = {"system": "sglang-ess", "waits": "ours"}

# What is compared in rounds: the name of its row and of its summary figure.
RATIOS = {
    "decode": "decode_vs_transformers",
    "prefill": "prefill_vs_transformers",
    "spin": "spin_speedup",
    "spin_median": "spin_speedup_median_step",
}


@dataclass
class Timing:
    """Seconds of one or more runs of a point.

    prefill: one a run; steps: one a decode step, over all runs
    split[part], prefill_split[part]: how much of each of them went there
    """

    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    split: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})
    prefill_split: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PARTS})

    def __iadd__(self, other: Timing) -> Timing:
        self.prefill += other.prefill
        self.steps += other.steps
        for part in PARTS:
            self.split[part] += other.split[part]
            self.prefill_split[part] += other.prefill_split[part]
        return self


def read_run(run: dict, batch: int, context: int, fresh: bool = True) -> Timing:
    """Timing of one OurEngine.generate().

    Prefill lasts from the call to the end of the last extend pass. A step lasts from the
    start of a decode pass to the start of the next, so the scheduler's own work is in it;
    WARMUP_STEPS are dropped.
    Raises: ValueError if the run was not batch x context: a cached prefix, a retraction, or
    decode passes of another batch size.
    """
    extends = [p for p in run["passes"] if p["mode"] == "EXTEND"]
    decodes = [p for p in run["passes"] if p["mode"] == "DECODE"]
    tokens = sum(p["tokens"] for p in extends)
    if tokens + run["cached"] != batch * context or (fresh and run["cached"]):
        raise ValueError(
            f"a run must prefill {batch} x {context} tokens: got {tokens} "
            f"and {run['cached']} cached"
        )
    sizes = {p["batch"] for p in decodes}
    if sizes != {batch} or decodes[0]["start"] < extends[-1]["end"]:
        raise ValueError(f"every decode pass must have batch {batch}: got {sorted(sizes)}")
    timing = Timing()
    for this, following in zip(decodes[WARMUP_STEPS:], decodes[WARMUP_STEPS + 1 :], strict=False):
        timing.steps.append(following["start"] - this["start"])
        _add_split(timing.split, [this], timing.steps[-1])
    if fresh:
        timing.prefill.append(extends[-1]["end"] - run["submitted"])
        _add_split(timing.prefill_split, extends, timing.prefill[-1])
    return timing


def _add_split(split: dict[str, list[float]], passes: list[dict], total: float) -> None:
    spent = {part: sum(p[part] for p in passes) for part in SPLIT}
    for part in SPLIT:
        split[part].append(spent[part])
    split["rest"].append(total - sum(spent.values()))


def timing_rows(timing: Timing, config: dict, **extra) -> list[dict]:
    """Rows of one point of one system: tokens/s, the step, and at batch 16 where the time goes."""
    batch, tokens = config["batch"], config["batch"] * config["context"]
    rows = []

    def add(name, metric, unit, samples, **more):
        if samples:
            rows.append(measured(name, config, metric, unit, samples, **more, **extra))

    add("serving", "prefill", "tokens/s", [tokens / seconds for seconds in timing.prefill])
    if timing.steps:
        # By windows: a median of single steps would hide the rare long ones.
        decode = [batch / seconds for seconds in windows(timing.steps)]
        steps = [1e3 * seconds for seconds in timing.steps]
        add("serving", "decode", "tokens/s", decode, warmup=WARMUP_STEPS)
        add("serving", "decode_step", "ms", steps, warmup=WARMUP_STEPS)
    for part in PARTS if batch == SPLIT_BATCH else ():
        add("step_split", part, "ms", [1e3 * seconds for seconds in timing.split[part]])
        shares = ratios(timing.prefill_split[part], timing.prefill)
        add("prefill_split", part, "ratio", shares)
    return rows


def windows(steps: Sequence[float], size: int = WINDOW) -> list[float]:
    """Mean of each `size` steps in a row; fewer at the end are dropped, unless they are all."""
    last = max(len(steps) - size + 1, 1)
    return [float(np.mean(steps[i : i + size])) for i in range(0, last, size)]


def summarise(report: Report, growth: tuple[int, int]) -> None:
    """Fill report.summary. Ratios of two systems are medians of the rounds' paired ratios."""
    batch, context = HEADLINE
    at_headline = OURS | {"batch": batch, "context": context}
    for name in RATIOS.values():
        report.summarise(name, report.median(name, "speedup"))
    for part in ("attention", "indexer"):
        small, large = (
            report.median("step_split", part, **OURS, kv="bf16", batch=SPLIT_BATCH, context=tokens)
            for tokens in growth
        )
        report.summarise(f"{part}_growth", small and large and large / small)
    report.summarise("context_growth", growth[1] / growth[0])
    for metric in ("prefill", "decode"):
        for prefix, kv in (("", "bf16"), ("fp8_", "fp8_e4m3")):
            mine = report.median("serving", metric, **at_headline, kv=kv)
            report.summarise(f"{prefix}{metric}_tokens_per_s", mine)
        shape = {"batch": batch if metric == "decode" else 1, "context": context}
        theirs = report.median("serving", metric, system="transformers", **shape)
        report.summarise(f"transformers_{metric}_tokens_per_s", theirs)


def _kind(row: dict) -> str:
    """Column of a row's system: the KV format of sglang-ess, or transformers."""
    return row["config"].get("kv", row["config"]["system"])


def _point(row: dict) -> tuple[int, int]:
    return row["config"]["batch"], row["config"]["context"]


def _ours(report: Report, name: str, kv: str | None = None) -> list[dict]:
    """Rows of sglang-ess with its own thread waiting."""
    return report.select(name, kind="measured", **OURS, **({"kv": kv} if kv else {}))


def print_tables(report: Report) -> None:
    theirs = report.select("serving", kind="measured", system="transformers")
    rows = sorted(_ours(report, "serving") + theirs, key=_point)
    columns = {name: name for name in ("batch", "context", "bf16", "fp8_e4m3", "transformers")}
    for metric in ("prefill", "decode"):
        found = [row for row in rows if row["metric"] == metric]
        lines = pivot(found, ("batch", "context"), _kind, spread)
        title = f"{metric}, tokens/s: median [p10, p90]; bf16, fp8_e4m3: KV of sglang-ess"
        print_table(lines, columns, title)
    steps = sorted(_ours(report, "step_split"), key=lambda row: (_kind(row), _point(row)))
    lines = pivot(steps, ("kv", "context"))
    title = f"milliseconds of a decode step, batch {SPLIT_BATCH}: median"
    print_table(lines, {name: name for name in ("kv", "context", *PARTS)}, title)


def panels(report: Report) -> tuple[Panel, Panel]:
    """Decode tokens/s by context; where a decode step goes."""
    theirs = report.select("serving", "decode", "measured", system="transformers")
    rows = [row for row in _ours(report, "serving") if row["metric"] == "decode"] + theirs
    rows.sort(key=lambda row: row["config"]["context"])
    speed = {"xscale": "log", "yscale": "log", "xlabel": "context (tokens)"}
    split = {"xlabel": "context (tokens)", "ylabel": f"ms per decode step, batch {SPLIT_BATCH}"}
    steps = _ours(report, "step_split", "bf16")
    steps.sort(key=lambda row: (PARTS.index(row["metric"]), row["config"]["context"]))
    return (
        Panel(rows, "context", series=("system", "kv", "batch"),
              axes=speed | {"ylabel": "decode (tokens/s)", "title": "Decode speed"}),
        Panel(steps, "context", series="metric", kind="stack",
              axes=split | {"title": "Where a decode step goes (bf16 KV)"}),
    )  # fmt: skip
