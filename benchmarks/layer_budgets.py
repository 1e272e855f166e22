"""What it buys to move hot rows between layers, and what watching for it costs.

    python -m benchmarks.layer_budgets [--quick] [--json PATH] [--plot PATH]

Two sets of production HotCaches decode the same generated streams. In `uniform` every layer keeps
the same number of rows. In `auto` a Rebalancer moves rows, as on a CPU server, by sampled ghost
caches that its plans feed. `before` is the time until rows have moved, once; `after` AFTER_STEPS
from then on. One more ghost is timed alone after each plan. `ghost_share` is the ghosts' time by
that of all plans of a round, in a part of which they run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import thread_time as clock

import numpy as np
import torch

from benchmarks import harness
from sglang_ess.sim.model.locality import Locality, TopkStream
from sglang_ess.tiers import HotCache, HotGroups, PlanBuffers
from sglang_ess.tiers.balance import rebalance
from sglang_ess.tiers.balance.budgets import expected_misses
from sglang_ess.tiers.balance.ghost_cache import GhostCache
from sglang_ess.tiers.balance.rebalance import Rebalancer, Schedule
from sglang_ess.tiers.hot_arena import HotArena

PROFILE = "deepseek-v3.2"
POINTS = [
    {"context": context, "requests": requests, "ratio": ratio}
    for context, requests in ((32768, 16), (131072, 4))
    for ratio in (0.1, 0.2, 0.3)
]
QUICK_POINT = {"context": 32768, "requests": 4, "ratio": 0.2}
LAYERS, QUICK_LAYERS = 16, 8  # spread over the model's 61 by how often they miss
AFTER_STEPS = 64
SIDES = ("uniform", "auto")
FILL_STEPS = 16  # after a fill by recency, which is not quite the order of the generator


@dataclass
class Phase:
    """misses: [steps][layers]; seconds: of each plan"""

    misses: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Side:
    """The hot tiers of all layers in one arena, filled with the rows selected last."""

    def __init__(self, layers: int, rows: int, num_slots: int, buffers: PlanBuffers):
        arena = HotArena(layers * rows)
        self.caches = [HotCache(None, rows, num_slots, buffers, arena=arena) for _ in range(layers)]
        self.layers = HotGroups(self.caches)
        self.rebalancer: Rebalancer | None = None
        self.phase = Phase()

    def step(self, topks: list[torch.Tensor], layer: int) -> None:
        cache, start, misses = self.caches[layer], (0, 0), 0
        began = clock()
        while start is not None:
            plan = cache.plan(topks[layer], start)
            start, misses = plan.stop, misses + len(plan.miss_slots)
        self.phase.seconds.append(clock() - began)
        if layer == 0:
            self.phase.misses.append(np.zeros(len(self.caches), np.int64))
        self.phase.misses[-1][layer] = misses


class Stage:
    """Streams of some layers for a batch of requests, and the sides that serve them."""

    def __init__(self, context: int, requests: int, ratio: float, num_layers: int, seed: int):
        locality = Locality.load(PROFILE)
        self.layers = locality.spread(num_layers)
        self.num_slots = requests * context
        self.rows = int(ratio * self.num_slots)
        self._slots = np.arange(self.num_slots, dtype=np.int32).reshape(requests, context)
        self._which = np.arange(requests)
        self._lengths = np.full(requests, context)
        shape = requests, context, seed
        self._streams = [TopkStream(locality, layer, *shape) for layer in self.layers]
        buffers = PlanBuffers(requests * locality.topk)
        self.sides = {name: Side(num_layers, self.rows, self.num_slots, buffers) for name in SIDES}
        for layer, stream in enumerate(self._streams):
            for row in range(requests):
                stream.begin(row, context)
            recent = [self._slots[row, stream.by_recency(row)] for row in range(requests)]
            order = torch.from_numpy(np.stack(recent, axis=1).copy())
            for side in self.sides.values():
                side.caches[layer].warm(order)
        rate = rebalance.ghost_rate(self.num_slots)
        sizes = range(self.rows // 4, self.rows, self.rows // 30)  # as many as a Rebalancer's
        self._timed = [GhostCache(self.num_slots, rate, sizes) for _ in self.layers]
        self.ghost_seconds: list[float] = []

    def run(self, steps: int) -> dict[str, Phase]:
        """Decode steps of all sides, which take turns to be first; what each side found."""
        for side in self.sides.values():
            side.phase = Phase()
        for step in range(steps):
            for side in self.sides.values():
                if side.rebalancer is not None:
                    side.rebalancer.step()
            topks = [
                torch.from_numpy(stream.next(self._which, self._lengths, self._slots, 1))
                for stream in self._streams
            ]
            first = step % len(SIDES)
            for name in SIDES[first:] + SIDES[:first]:
                for layer in range(len(self.layers)):
                    self.sides[name].step(topks, layer)
            for ghost, topk in zip(self._timed, topks, strict=True):
                began = clock()
                ghost.access(topk)
                self.ghost_seconds.append(clock() - began)
        return {name: side.phase for name, side in self.sides.items()}


def measure(report: harness.Report, point: dict, num_layers: int, seed: int) -> None:
    stage = Stage(**point, num_layers=num_layers, seed=seed)
    schedule = Schedule(rest=1 << 30)  # one round
    stage.run(FILL_STEPS)
    auto = stage.sides["auto"]
    topk = Locality.load(PROFILE).topk
    auto.rebalancer = Rebalancer(auto.layers, topk, schedule)
    stage.ghost_seconds.clear()
    watched = -(-num_layers // rebalance.LAYERS_A_STEP) + schedule.warmup_steps + schedule.counted
    before = stage.run(watched)
    stage.run(1 + num_layers)  # decides, and moves the rows
    rows_of = {name: [c.num_rows for c in side.caches] for name, side in stage.sides.items()}
    rows = rows_of["auto"]
    curves = auto.rebalancer.curves
    after = stage.run(AFTER_STEPS)
    for side in stage.sides.values():
        side.layers.check_integrity()
    config, unit = point | {"layers": num_layers}, "rows/request/layer/step"
    for when, phases in (("before", before), ("after", after)):
        for name, phase in phases.items():
            at = config | {"side": name, "when": when}
            found = (np.mean(phase.misses, axis=0) / point["requests"]).tolist()
            report.add(harness.simulated("misses", at, "misses", unit, found, rows=rows_of[name]))
            report.add(harness.measured("plan", at, "time", "s", phase.seconds))
    plan_seconds = before["uniform"].seconds
    share = sum(stage.ghost_seconds[: len(plan_seconds)]) / sum(plan_seconds)
    share_of_round = share * watched / (watched + Schedule().rest)
    # While the ghosts counted, every layer still had the same rows.
    counted = np.mean(before["auto"].misses[-schedule.counted :], axis=0)
    estimated = [curve.at(stage.rows) for curve in curves]
    errors = np.abs(np.divide(estimated, counted) - 1)
    expected, even = (expected_misses(curves, sizes) for sizes in (rows, [stage.rows] * num_layers))
    got = np.sum(after["auto"].misses) / np.sum(after["uniform"].misses)
    plans = np.median(after["auto"].seconds) / np.median(after["uniform"].seconds)
    report.add(
        harness.measured("ghost", config, "share_while_on", "ratio", [share]),
        harness.measured("ghost", config, "share", "ratio", [share_of_round]),
        harness.simulated("curve_error", config, "error", "ratio", errors.tolist()),
    )
    figures = {"miss_ratio": got, "expected_miss_ratio": expected / even,
               "total_curve_error": sum(estimated) / counted.sum() - 1}  # fmt: skip
    facts = {"rows": rows, "model_layers": list(stage.layers)}
    for metric, value in figures.items():
        report.add(harness.simulated("budgets", config, metric, "ratio", [value], **facts))
    report.add(harness.measured("budgets", config, "plan_time", "ratio", [plans]))


FIGURES = {
    **{key: ("budgets", key) for key in ("miss_ratio", "expected_miss_ratio", "total_curve_error")},
    "plan_time_ratio": ("budgets", "plan_time"), "ghost_share": ("ghost", "share"),
    "ghost_share_while_on": ("ghost", "share_while_on"), "curve_error": ("curve_error", "error"),
}  # fmt: skip


def print_tables(report: harness.Report) -> None:
    index = ("context", "requests", "ratio")
    columns = {key: key for key in (*index, *SIDES)}
    misses = harness.pivot(report.select("misses", when="after"), index, "side", "mean")
    harness.print_table(misses, columns, "Rows fetched per request, layer and step after the move")
    ratios = [row for name in ("budgets", "ghost", "curve_error") for row in report.select(name)]
    columns = {key: key for key in index} | {
        "auto/uniform": "miss_ratio", "expected": "expected_miss_ratio",
        "plan time": "plan_time", "ghosts of a plan": "share",
        "while on": "share_while_on", "curve error": "error",
    }  # fmt: skip
    harness.print_table(harness.pivot(ratios, index), columns)


def panels(report: harness.Report, point: dict) -> list[harness.Panel]:
    """Left: rows of each layer after the move. Right: misses, auto over uniform, by point."""
    rows = [
        {"layer": layer, "rows": count, "side": row["config"]["side"]}
        for row in report.select("misses", when="after", **point)
        for layer, count in enumerate(row["rows"])
    ]
    return [
        harness.Panel(rows, "layer", "rows", "side", kind="bar",
                      axes={"xlabel": "layer_index", "ylabel": "hot rows"}),
        harness.Panel(report.select("budgets", "miss_ratio"),
              lambda row: "{context} x {requests}, {ratio}".format(**row["config"]), kind="bar",
                      levels={"no change": 1}, axes={"ylabel": "misses, auto / uniform"}),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = harness.argument_parser(__doc__).parse_args(argv)
    report, progress = harness.Report(), harness.Progress()
    points = [QUICK_POINT] if args.quick else POINTS
    for point in points:
        progress(f"layer budgets: {point}")
        measure(report, point, QUICK_LAYERS if args.quick else LAYERS, args.seed)
    headline = next((p for p in points if p["ratio"] == 0.2), points[0])
    for key, (name, metric) in FIGURES.items():
        report.summarise(key, report.figure(name, metric, **headline))
    print_tables(report)
    harness.finish(report, args, *panels(report, headline))


if __name__ == "__main__":
    main()
