"""Simulate what a shared hot tier with per-layer budgets gains over ESS at the same memory.

    python -m benchmarks.sim.beat_ess [--quick] [--json PATH] [--plot PATH]

Misses: generated streams of deepseek-v3.2 at 32K, MTP 2, with ESS's rows (ratio 0.2 of the context
for each request and layer) in the arrangements of `arrangements`. Throughput: ESS's own settings
(Table 1; 32K and 128K), cost model and memory equation of reproduce_ess.py. Every step of the gain
runs at the batch that is best for it and is compared with the same model's baseline without ESS,
as in the paper. Nothing is fitted here.

The steps:
  ESS                 rows of its own for each request, DA or DBA, its largest batch
  batch               the same at its best batch
  shared, budgets     one tier, rows by layer for the fewest misses (tiers/balance/budgets.py)
  other half          a fetch may also run behind the other half-batch (overlap = "halves")
  exposed budgets     rows by layer for the shortest step: hidden misses cost nothing
A figure whose name ends in _charged also pays for our maps and row states, which ESS leaves out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from benchmarks import harness
from benchmarks.sim.published import BASELINES, ESS_ROWS, K
from sglang_ess.layout import GIB
from sglang_ess.sim.inputs.specs import load
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.decode_tiers import Sampling, measure, miss_curves
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.memory import Charges, Memory
from sglang_ess.sim.planning import lab
from sglang_ess.tiers.balance.budgets import allot, uniform
from sglang_ess.tiers.balance.ghost_cache import MissCurve

MODEL, GPU, LINK, QUERIES = "deepseek-v3.2", "h200", "pcie5", 2
RATIO, CONTEXT = 0.2, 32 * K
SETTINGS = {32 * K: "ess-paper-32k", 128 * K: "ess-paper-128k"}
ROWS = (2048, 2300, 2600, 3000, 3500, 4100, 4800, 5600, 6554, 7600, 8800, 10000, 11500, 13000,
        15000, 18000, 22000, 28000, 32768)  # fmt: skip
WARMUP_STEPS = 20  # steps before those that count
HOST_GIB = 1024
PORTION = 64  # rows that budgets move at once
# A tier that holds no step's union takes passes. The union of two queries is 1.3 top-k's.
MIN_ROWS = 1.4
PUBLISHED = {32 * K: 69.4, 128 * K: 122.7}


def arrangements(report: harness.Report, locality: Locality, quick: bool, seed: int) -> None:
    """Misses of ESS's rows in other arrangements, and of Belady's optimum in ESS's arrangement."""
    requests, steps, tail = (2, 30, 40) if quick else (4, 60, 80)
    layers = locality.spread(12) if quick else range(locality.num_layers)
    shape = [CONTEXT] * requests, WARMUP_STEPS + steps + tail
    made = [
        lab.generate(locality, layer, *shape, queries=QUERIES, seed=seed)
        for layer in tqdm(layers, desc="streams", file=sys.stderr, disable=None)
    ]
    streams, warmup = [stream for stream, _ in made], made[0][1] + WARMUP_STEPS
    rows = int(RATIO * CONTEXT) * requests
    budgets = lab.budgets(streams, rows, warmup=warmup, steps=steps)
    cases = {
        "ESS: ratio of each request, LRU": ("ratio", "lru", rows),
        "shared, LRU": ("shared", "lru", rows),
        "shared, LRU, budgets by layer": ("shared", "lru", budgets.rows),
        "Belady, ratio of each request": ("ratio", "belady", rows),
        "Belady, shared, budgets by layer": ("shared", "belady", budgets.rows),
    }
    for name, (organisation, policy, count) in cases.items():
        outcome = lab.run(streams, organisation, policy, count, warmup=warmup, tail=tail)
        config = {"case": name, "layers": len(streams)}
        report.add(harness.simulated("misses", config, "misses", "rows", [outcome.mean]))
    found = report.select("misses")
    ess, _, ours, belady, own_belady = (row["median"] for row in found)
    report.summarise("miss_ratio", ours / ess)
    report.summarise("vs_belady", ours / belady)
    report.summarise("vs_belady_with_our_budgets", ours / own_belady)
    columns = {"": "case", "misses": "median:.0f",
               "of ESS's": lambda row: f"{row['median'] / ess:.2f}"}  # fmt: skip
    harness.print_table(found, columns, "Ratio 0.2 at 32K")


@dataclass(frozen=True)
class Point:
    """One step of the gain at one batch. misses: [layers]; rows: per request and layer"""

    batch: int
    rows: int
    misses: np.ndarray
    tokens_per_s: float
    budgets: tuple[int, ...]


class Setting:
    """One context of the paper: its deployment, our curves, and tokens/s of any arrangement."""

    def __init__(self, locality: Locality, context: int, charges: str, curves: list[MissCurve]):
        self.model, self.context, self.curves = load("model", MODEL), context, curves
        gpu, self._deployment = load("gpu", GPU), load("deployment", SETTINGS[context])
        self._machine = self.model, gpu, load("link", LINK)
        charge = getattr(Charges, charges)(self.model)
        # The paper states no limit of host memory; the table shows what each step takes.
        unlimited = replace(self._deployment, host_gib=HOST_GIB)
        self.memory = Memory.of(self.model, gpu, unlimited, charge)
        base = next(row for row in BASELINES if (row.context, row.queries) == (context, QUERIES))
        theirs = [r for r in ESS_ROWS if (r.context, r.queries) == (context, QUERIES)]
        self.ess_batch = max(row.batch for row in theirs)
        plain = self.cost("layerwise")
        seconds = plain.step(base.batch, context).seconds
        self.baseline = plain.node_tokens_per_second(base.batch, seconds)

    def cost(self, overlap: str) -> CostModel:
        halves = {"two_batch_overlap": True} if overlap == "halves" else {}
        return CostModel(*self._machine, replace(self._deployment, overlap=overlap, **halves))

    def rows(self, batch: int) -> int:
        return int(self.memory.hot_rows(batch, self.context) // batch)

    def batches(self) -> list[int]:
        """Batches whose tier holds more than the union of a step, in steps of about 2 %."""
        most = self.memory.max_batch(self.context)
        found = range(most // 3, most, max(1, most // 80))
        return [b for b in found if self.rows(b) >= MIN_ROWS * self.model.topk]

    def at(self, batch: int, overlap: str, curves: list[MissCurve] | None) -> Point:
        """One batch. curves: the budgets minimise their sum; None: the same rows in each layer"""
        rows, layers = self.rows(batch), self.model.layers
        budgets = uniform(layers, rows * layers)
        if curves is not None:
            least = int(MIN_ROWS * self.model.topk)
            budgets = allot(curves, rows * layers, least, self.context, PORTION).rows
        misses = np.array([c.at(n) for c, n in zip(self.curves, budgets, strict=True)])
        cost = self.cost(overlap)
        seconds = cost.step(batch, self.context, misses).seconds
        return Point(batch, rows, misses, cost.node_tokens_per_second(batch, seconds), budgets)

    def exposed_curves(self, batch: int) -> list[MissCurve]:
        """The curves with the us that a layer's misses add to a step in place of the misses."""
        cost = self.cost("halves")
        tried = np.linspace(0.0, self.model.topk * QUERIES, 120)
        seconds = np.array([cost.step(batch, self.context, m).seconds for m in tried])
        cost_us = 1e6 * (seconds - seconds[0]) / self.model.layers
        return [
            replace(c, misses=tuple(np.interp(c.misses, tried, cost_us).tolist()))
            for c in self.curves
        ]

    def best(self, of: Callable[[int], Point]) -> Point:
        return max((of(batch) for batch in self.batches()), key=lambda point: point.tokens_per_s)

    def steps(self) -> dict[str, Point]:
        """The gain, step by step."""
        return {
            "ESS": self.at(self.ess_batch, "layerwise", None),
            "batch": self.best(lambda b: self.at(b, "layerwise", None)),
            "shared, budgets": self.best(lambda b: self.at(b, "layerwise", self.curves)),
            "other half": self.best(lambda b: self.at(b, "halves", self.curves)),
            "exposed budgets": self.best(lambda b: self.at(b, "halves", self.exposed_curves(b))),
        }


def curves_of(locality: Locality, context: int, quick: bool) -> list[MissCurve]:
    """Each layer's misses per request and step, by hot rows a request."""
    rows = sorted({*(n for n in ROWS if n < context), context // 2, context})
    sampling = Sampling(20 if quick else 60, 10, QUERIES)
    with tqdm(total=locality.num_layers, desc="curves", file=sys.stderr, disable=None) as bar:
        misses = miss_curves(locality, context, rows, sampling, progress=bar.update)
    lookups = float(QUERIES * locality.topk)
    return [
        MissCurve(tuple(rows), tuple(np.minimum.accumulate(line).tolist()), lookups, 0, 1)
        for line in misses
    ]


def gains(report: harness.Report, locality: Locality, quick: bool, seed: int) -> None:
    for context in SETTINGS:
        curves = curves_of(locality, context, quick)
        for charges in ("paper", "ours"):
            setting = Setting(locality, context, charges, curves)
            gain = last = 0.0
            for name, point in setting.steps().items():
                last, gain = gain, 100 * (point.tokens_per_s / setting.baseline - 1)
                config = {"context": context, "memory": charges, "step": name,
                          "batch": point.batch, "rows": point.rows}  # fmt: skip
                host = setting.memory.host_used(point.batch, context) / GIB
                report.add(harness.simulated(
                    "tokens_per_s", config, "tokens_per_s", "1/s", [point.tokens_per_s],
                    misses=float(point.misses.mean()), host_gib=host, gain_percent=gain,
                    more_than_before=gain - last,
                ))  # fmt: skip
            ending = "" if charges == "paper" else "_charged"
            report.summarise(f"gain_{context // K}k{ending}", gain)
        columns = {
            "memory": "memory", "step": "step", "batch": "batch", "rows": "rows",
            "misses": "misses:.0f", "host GiB": "host_gib:.0f", "tokens/s": "median:.0f",
            "gain, %": "gain_percent:+.1f", "points": "more_than_before:+.1f",
        }  # fmt: skip
        title = f"{context // K}K; ESS publishes {PUBLISHED[context]:+.1f} %"
        harness.print_table(report.select("tokens_per_s", context=context), columns, title)
        check(report, locality, context, point, quick, seed)


def check(report, locality: Locality, context: int, point: Point, quick: bool, seed: int) -> None:
    """Simulate the last point in one shared tier, row by row: how far off are the curves?"""
    requests, steps, num_layers = (4, 20, 4) if quick else (12, 40, 16)
    layers = locality.spread(num_layers)
    sampling = Sampling(steps, 20, QUERIES, layers, seed)
    rows = [point.budgets[layer] for layer in layers]
    found = measure(locality, context, requests, rows, sampling)
    error = found.mean / point.misses[list(layers)].mean() - 1
    report.summarise(f"curve_error_{context // K}k", error)
    print(f"in one shared tier, row by row, {len(layers)} layers: {error:+.1%} misses")


def main() -> None:
    args = harness.argument_parser(__doc__).parse_args()
    locality, report = Locality.load(MODEL), harness.Report()
    arrangements(report, locality, args.quick, args.seed)
    gains(report, locality, args.quick, args.seed)
    panels = [
        harness.Panel(report.select("tokens_per_s", context=context), "step", series="memory",
                      kind="bar", axes={"title": f"{context // K}K, tokens/s of a node, simulated"})
        for context in SETTINGS
    ]  # fmt: skip
    harness.finish(report, args, *panels)


if __name__ == "__main__":
    main()
