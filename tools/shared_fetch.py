"""What it saves if the GPUs of a tensor-parallel rank each fetch a share of the missed rows.

    python -m tools.shared_fetch [--quick] [--json PATH]

First, the number of misses a layer from which a share and its exchange are faster than fetching
every row on every GPU, for ranks of 2, 4 and 8 GPUs on three links, all 8 GPUs of the node busy.
`gather` is NCCL's all-gather of as many rows as missed; `padded` moves as many as TP8's best batch
of DeepSeek-V3.2 looks up, which is what a CUDA graph's fixed shapes allow. Then the planner's
answer for TP8 on H200 with and without it. sim.model.fetch_ways.py has the formulas, and
sim/data/nodes the figures and their sources. --quick leaves the planner out.
"""

from __future__ import annotations

from argparse import Namespace

from benchmarks.harness import Report, argument_parser, finish, pivot, print_table, simulated
from sglang_ess.sim.cli import plan
from sglang_ess.sim.inputs.specs import load
from sglang_ess.sim.model.fetch_ways import GATHER, PUSH, FetchWays, link_gb_s
from sglang_ess.sim.planning.planner import Planner

LINKS, RANKS, NODE_GPUS, ROW_BYTES = ("pcie4", "pcie5", "pcie6"), (2, 4, 8), 8, 656
MISSES = 15554  # a layer: 77 requests of 202, plan's answer for DeepSeek-V3.2 at TP8 and 32K
LOOKUPS = 77 * 2 * 2048
POINTS = (
    ("deepseek-v3.2", 32768),
    ("deepseek-v3.2", 131072),
    ("glm-5.2", 131072),
    ("glm-5.2", 1000000),
)
OVERLAPS = ("auto", "off")


def add_thresholds(report: Report) -> None:
    """Rows of misses a layer from which each way pays, and microseconds at MISSES."""
    node = load("node", "hgx")
    for name in LINKS:
        rate = link_gb_s(node, load("link", name), NODE_GPUS, NODE_GPUS)
        for ranks in RANKS:
            fetch = FetchWays(node, rate, ranks, ROW_BYTES)
            at = {"link": name, "gpus": ranks}
            figures = {
                ("link_rate", "GB/s"): rate,
                ("gather_pays_from", "misses a layer"): fetch.pays_from(GATHER),
                ("push_pays_from", "misses a layer"): fetch.pays_from(PUSH),
                ("each", "us a layer"): fetch.each(MISSES) * 1e6,
                ("gather", "us a layer"): float(fetch.gather(MISSES)) * 1e6,
                ("padded", "us a layer"): float(fetch.gather(MISSES, LOOKUPS)) * 1e6,
                ("push", "us a layer"): float(fetch.push(MISSES)) * 1e6,
            }
            for (metric, unit), value in figures.items():
                report.add(simulated("a layer's fetch", at, metric, unit, [value]))
                if ranks == NODE_GPUS and metric.endswith("pays_from"):
                    report.summarise(f"{metric}_tp8_{name}", value)


def add_plans(report: Report, args: Namespace) -> None:
    """Rows of the planner's best for TP8, with and without shares."""
    for model, context in POINTS:
        words = ["--model", model, "--gpu", "h200", "--context", str(context), "--itl-ms", "60"]
        words += ["--tp", "8", "--seed", str(args.seed)]
        parser = plan.argument_parser()
        question = plan.ask(parser.parse_args(words))
        misses = plan.misses_of(question, parser.parse_args(words), lambda *_: lambda done: None)
        for overlap in OVERLAPS:
            speeds = []
            for fetches, more in (("each", []), ("a share", ["--share-fetch"])):
                asked = plan.ask(parser.parse_args([*words, "--overlap", overlap, *more]))
                best = Planner(asked, misses).ess()
                if best is None:
                    raise ValueError(f"{model} at {context} tokens must fit: got no batch.")
                at = {"model": model, "context": context, "overlap": overlap, "fetches": fetches}
                for metric, unit, value in (
                    ("batch", "requests", best.batch),
                    ("misses", "a layer", best.misses * best.batch),
                    ("transfer", "ms a step", best.parts["transfer"]),
                    ("step", "ms", best.step_ms),
                    ("tokens_per_s", "a node", best.tokens_per_second_per_node),
                ):
                    report.add(simulated("TP8 on 8 H200", at, metric, unit, [value]))
                speeds.append(best.tokens_per_second)
            name = f"{model.replace('-', '').replace('.', '')}_{context // 1000}k_{overlap}"
            report.summarise(f"gain_{name}", speeds[1] / speeds[0] - 1)


def main() -> None:
    args = argument_parser(__doc__).parse_args()
    report = Report()
    add_thresholds(report)
    if not args.quick:
        add_plans(report, args)
    for name, index in (
        ("a layer's fetch", ("link", "gpus")),
        ("TP8 on 8 H200", ("model", "context", "overlap", "fetches")),
    ):
        lines = pivot(report.select(name), index)
        print_table(lines, {key: key for line in lines[:1] for key in line}, f"{name}, simulated")
    finish(report, args)


if __name__ == "__main__":
    main()
