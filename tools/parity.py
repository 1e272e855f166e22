"""How far the CPU platform is from transformers, by format: the figures behind the parity tests.

    python -m tools.parity [--quick] [--json PATH] [--plot PATH]

For each architecture and setup, |logprob difference| per token, twice. "forced": transformers makes
the engine's decisions, so this is what the arithmetic differs by; also in units of what rounding
explains. "free": transformers makes its own decisions, which is what a user sees. Then the overlap
of the two selections, and all of it again after a deliberate corruption.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import Panel, Report, argument_parser, finish, measured, pivot, print_table
from tests.support import parity

ARCHS, TOPK = ("v32", "glm"), 32
SETUPS = {
    "exact": parity.EXACT,
    "fp8_index": parity.FP8_INDEX,
    # Compared with the float32 selection: what fp8 keys cost.
    "fp8_index_unrounded": replace(parity.FP8_INDEX, rounds_index=False),
    "bf16_rows": parity.BF16_ROWS,
    "fp8_rows": parity.FP8_ROWS,
    "bf16_model": parity.BF16_MODEL,
}
FAULTS = ("swap_neighbour", "read_foreign_row")


def measure(report: Report, args: argparse.Namespace, arch: str, model: Path, kind: str) -> None:
    """Add the rows and summary figures of one setup, as it is and after each fault."""
    setup = SETUPS[kind]
    lengths = [TOPK // 2, TOPK + 1, 3 * TOPK + 5, (8 if args.quick else 16) * TOPK + 19]
    faults = () if kind.startswith("fp8_index") else FAULTS
    with setup.engine(model, faults=True) as engine:
        for fault in (None, *faults):
            with engine.switched(fault=fault):
                prompts = parity.prompts_of(lengths, seed=args.seed + 1)
                _, sequences = parity.scored(engine, prompts)
            found = parity.compare(setup, model, sequences, with_free=not fault)
            add(report, arch, kind, fault, found)


def add(report: Report, arch: str, kind: str, fault: str | None, found: parity.Difference) -> None:
    config = {"arch": arch, "setup": kind, "fault": fault}
    forced, free, ratios = found.logprob.engine, found.free_logprob, found.ratios()
    report.add(measured("parity", config, "forced_logprob", "nat", forced))
    if len(free):
        report.add(measured("parity", config, "free_logprob", "nat", free))
    report.add(measured("parity", config, "overlap", "ratio", [found.overlap]))
    for part, ratio in ratios.items():
        metric = part.replace(" ", "_") + "_by_yardstick"
        report.add(measured("parity", config, metric, "ratio", [ratio]))
    figures = {"mean": forced.mean(), "p99": np.quantile(forced, 0.99), "max": forced.max(),
               "overlap": found.overlap, "ratio": max(ratios.values())}  # fmt: skip
    if not fault:
        figures |= {"free_mean": free.mean(), "free_median": np.median(free)}
    name = f"{arch}_{kind}" + (f"_{fault}" if fault else "")
    for key, value in figures.items():
        report.summarise(f"{name}_{key}", value)


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as directory:
        for arch in ARCHS:
            model = parity.write_model(Path(directory) / arch, arch=arch, index_topk=TOPK, heads=4)
            for kind in SETUPS:
                measure(report, args, arch, model, kind)
    rows = [row | {"fault": row["config"]["fault"] or "as it is"} for row in report.rows]
    for row in rows:
        row["config"] = {key: row["config"][key] for key in ("arch", "setup")}
    lines = pivot(rows, ("arch", "setup", "fault"), value="mean")
    print_table(lines, {key: key for line in lines for key in line}, "means")
    forced = [row for row in rows if row["metric"] == "forced_logprob"]
    axes = {"ylabel": "mean |logprob difference|, nat", "yscale": "log"}
    panels = [
        Panel([row for row in forced if row["config"]["arch"] == arch], "setup", "mean", "fault",
              kind="bar", axes=axes | {"title": arch})
        for arch in ARCHS
    ]  # fmt: skip
    finish(report, args, *panels)


if __name__ == "__main__":
    main()
