"""What it buys to move hot rows between layers, and what watching for it costs.

Three sets of production HotCaches decode the same generated streams (DeepSeek-V3.2's localities,
fitted on ESS's figures): one keeps as many rows in each layer, in the second a Rebalancer moves
them, as a CPU server's does, from the sampled ghost caches that its plans feed, in the third an
AgeRebalancer does, as a GPU server's, by how old the rows are. `before` is the time until they
have moved, once, `after` as many steps from then on; all are timed in both.
Beside each plan one ghost more is timed alone: ghosts run for a part of a round of steps, and
`ghost_share` is of all plans of a round. Misses are generated ones: rows of kind "simulated".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import thread_time as clock

import numpy as np
import torch

from benchmarks import common
from sglang_ess.sim.model.locality import Locality, TopkStream
from sglang_ess.tiers import HotCache, PlanBuffers, lru
from sglang_ess.tiers.balance import budgets as layer_budgets
from sglang_ess.tiers.balance import rebalance
from sglang_ess.tiers.balance.ghost_cache import GhostCache
from sglang_ess.tiers.balance.rebalance import AgeRebalancer, AgeSchedule, Rebalancer, Schedule
from sglang_ess.tiers.balance.row_ages import AgeSnapshot
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
SIDES = ("uniform", "auto", "ages")
FILL_STEPS = 16  # after a fill by recency, which the generator's own order is not quite
LOOK_STEPS = 8  # between two looks at the ages, as cuda/attention_backend.py mirrors them
AGES = 1024  # told apart by ess_kernels.rebuild_order


@dataclass
class Phase:
    """Misses of each layer [steps][layers], and seconds of each plan."""

    misses: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def per_step(self) -> np.ndarray:
        return np.mean(self.misses, axis=0)


def age_snapshot_of(caches: list[HotCache]) -> AgeSnapshot:
    """As DeviceTier.age_snapshot()."""
    evictions = np.array([cache.counters["evictions"] for cache in caches])
    steps = np.array([cache.steps for cache in caches])
    return AgeSnapshot(np.stack([_ages_of(cache) for cache in caches]), evictions, steps)


def _ages_of(cache: HotCache) -> np.ndarray:
    """[AGES] rows by steps since their last use, the oldest together, as rebuild_order counts."""
    head, tail = cache.state[lru.HEAD], cache.state[lru.TAIL]
    rows = cache.queue[head:tail]
    live = cache.row_place[rows] == np.arange(head, tail)
    ages = cache.steps - cache.queue_step[head:tail][live]
    return np.bincount(np.minimum(ages, AGES - 1), minlength=AGES)


class ByAge:
    """An AgeRebalancer over the caches of an arena, as a CUDA pool has one over a DeviceTier."""

    def __init__(self, arena: HotArena, demand: int, least: int, schedule: AgeSchedule):
        rows, slots = arena.caches[0].num_rows, arena.caches[0].num_slots
        self.decides = AgeRebalancer(len(arena.caches), rows, slots - 1, least, schedule)
        self._arena, self._demand, self._steps = arena, min(demand, rows), 0

    def step(self) -> None:
        snapshot, self._steps = None, self._steps + 1
        if self._steps % LOOK_STEPS == 0:
            snapshot = age_snapshot_of(self._arena.caches)
        if (budgets := self.decides.step(self._demand, snapshot)) is not None:
            self._arena.resize(list(budgets.rows))


class Side:
    """The layers' hot tiers in one arena, filled with what was selected last."""

    def __init__(self, layers: int, rows: int, num_slots: int, buffers: PlanBuffers):
        self.arena = HotArena(layers * rows)
        self.caches = [
            HotCache(None, rows, num_slots, buffers, arena=self.arena) for _ in range(layers)
        ]
        self.rebalancer: Rebalancer | ByAge | None = None
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

    def begin(self) -> Phase:
        """A new phase; returns the one that ends."""
        ended, self.phase = self.phase, Phase()
        return ended


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
        self._streams = [
            TopkStream(locality, layer, requests, context, seed) for layer in self.layers
        ]
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

    def run(self, steps: int) -> None:
        """Each step all sides, in turn first; every layer is planned before the next."""
        for step in range(steps):
            for side in self.sides.values():
                if side.rebalancer is not None:
                    side.rebalancer.step()
            topks = [
                torch.from_numpy(stream.next(self._which, self._lengths, self._slots, 1))
                for stream in self._streams
            ]
            order = list(self.sides.values())
            order = order[step % len(order) :] + order[: step % len(order)]
            for side in order:
                for layer in range(len(self.layers)):
                    side.step(topks, layer)
            for ghost, topk in zip(self._timed, topks, strict=True):
                began = clock()
                ghost.access(topk)
                self.ghost_seconds.append(clock() - began)


def measure(report: common.Report, point: dict, num_layers: int, seed: int) -> None:
    stage = Stage(**point, num_layers=num_layers, seed=seed)
    schedule = Schedule(rest=1 << 30)  # one round
    stage.run(FILL_STEPS)
    auto, by_age = stage.sides["auto"], stage.sides["ages"]
    topk = Locality.load(PROFILE).topk
    auto.rebalancer = Rebalancer(auto.arena, topk, schedule)
    for side in stage.sides.values():
        side.begin()
    stage.ghost_seconds.clear()
    watched = -(-num_layers // rebalance.LAYERS_A_STEP) + schedule.warmup_steps + schedule.counted
    # One round too, that ends with the other's.
    age_schedule = AgeSchedule(warmup_steps=watched - AgeSchedule.counted)
    demand = point["requests"] * (topk + 1)
    by_age.rebalancer = ByAge(by_age.arena, demand, topk, age_schedule)
    stage.run(watched)
    before = {name: side.begin() for name, side in stage.sides.items()}
    stage.run(1 + num_layers)  # decides, and moves the rows
    rows_of = {name: [c.num_rows for c in side.caches] for name, side in stage.sides.items()}
    rows = rows_of["auto"]
    curves = auto.rebalancer.curves
    for side in stage.sides.values():
        side.begin()
    stage.run(AFTER_STEPS)
    after = {name: side.begin() for name, side in stage.sides.items()}
    for side in stage.sides.values():
        side.arena.check_integrity()
    config = point | {"layers": num_layers}
    for when, phases in (("before", before), ("after", after)):
        for name, phase in phases.items():
            found = (phase.per_step / point["requests"]).tolist()
            row = common.measured(
                "misses",
                config | {"side": name, "when": when},
                "misses",
                "rows/request/layer/step",
                found,
                rows=rows_of[name],
            )
            report.add(row | {"kind": "simulated"})
            seconds = phase.seconds
            report.add(common.measured("plan", config | {"side": name, "when": when}, "time",
                                       "s", seconds))  # fmt: skip
    plan_seconds = float(np.sum(before["uniform"].seconds))
    ghosts = float(np.sum(stage.ghost_seconds[: len(before["uniform"].seconds)]))
    default = Schedule()
    round_steps = watched + default.rest
    report.add(common.measured("ghost", config, "share_while_on", "ratio", [ghosts / plan_seconds]))
    report.add(common.measured("ghost", config, "share", "ratio",
                               [ghosts / plan_seconds * watched / round_steps]))  # fmt: skip
    # While the ghosts counted: the rows were still the same in each layer.
    counted = np.mean(before["auto"].misses[-schedule.counted :], axis=0)
    estimated = [curve.at(stage.rows) for curve in curves]
    errors = np.abs(np.divide(estimated, counted) - 1)
    report.add(common.measured("curve_error", config, "error", "ratio", errors.tolist())
               | {"kind": "simulated"})  # fmt: skip
    total_error = sum(estimated) / counted.sum() - 1
    expected = layer_budgets.expected_misses(curves, rows) / layer_budgets.expected_misses(
        curves, [stage.rows] * num_layers
    )
    got, aged = (
        after[name].per_step.sum() / after["uniform"].per_step.sum() for name in ("auto", "ages")
    )
    plans = np.median(after["auto"].seconds) / np.median(after["uniform"].seconds)
    for metric, value in (("miss_ratio", got), ("age_miss_ratio", aged),
                          ("expected_miss_ratio", expected),
                          ("total_curve_error", total_error)):  # fmt: skip
        row = common.measured("budgets", config, metric, "ratio", [value], rows=rows,
                              model_layers=list(stage.layers))  # fmt: skip
        report.add(row | {"kind": "simulated"})
    report.add(common.measured("budgets", config, "plan_time", "ratio", [plans]))


# --- output -----------------------------------------------------------------------------


def _value(report: common.Report, name: str, metric: str, config: dict) -> float | None:
    for row in report.rows:
        if (row["name"], row["metric"]) == (name, metric) and config.items() <= row[
            "config"
        ].items():
            return row["median"]
    return None


def summarise(report: common.Report, point: dict) -> None:
    for key, (name, metric) in {
        "miss_ratio": ("budgets", "miss_ratio"),
        "age_miss_ratio": ("budgets", "age_miss_ratio"),
        "expected_miss_ratio": ("budgets", "expected_miss_ratio"),
        "plan_time_ratio": ("budgets", "plan_time"),
        "ghost_share": ("ghost", "share"),
        "ghost_share_while_on": ("ghost", "share_while_on"),
        "curve_error": ("curve_error", "error"),
        "total_curve_error": ("budgets", "total_curve_error"),
    }.items():
        report.summarise(key, _value(report, name, metric, point))


def _means(report: common.Report, point: dict) -> list[float | None]:
    """Misses a request, layer and step after the move, of each of SIDES."""
    return [
        row["mean"]
        for side in SIDES
        for row in report.rows
        if row["name"] == "misses"
        and (point | {"side": side, "when": "after"}).items() <= row["config"].items()
    ]


def print_tables(report: common.Report, points: list[dict]) -> None:
    headers = ("context", "requests", "ratio", "misses uniform", "auto", "ages", "auto/uniform",
               "ages/uniform", "expected", "plan time", "ghosts of a plan", "while on",
               "curve error")  # fmt: skip
    lines = []
    for point in points:
        figures = [_value(report, *key, point) for key in (
            ("budgets", "miss_ratio"), ("budgets", "age_miss_ratio"),
            ("budgets", "expected_miss_ratio"), ("budgets", "plan_time"),
            ("ghost", "share"), ("ghost", "share_while_on"), ("curve_error", "error"),
        )]  # fmt: skip
        lines.append([*point.values(), *_means(report, point), *figures])
    print(common.table(headers, lines), end="\n\n")
    print(common.table(("", "value"), report.summary.items()))


def draw(report: common.Report, axes, point: dict) -> None:
    """Left: rows of each layer. Right: its misses with as many rows as the others, and so."""
    sides = {
        row["config"]["side"]: row
        for row in report.rows
        if row["name"] == "misses" and row["config"]["when"] == "after"
        and point.items() <= row["config"].items()
    }  # fmt: skip
    for place, name in zip((-0.27, 0, 0.27), SIDES, strict=True):
        layers = np.arange(len(sides[name]["rows"]))
        axes[0].bar(layers + place, sides[name]["rows"], 0.27, label=name)
    axes[0].set_xlabel("layer, by number")
    axes[0].set_ylabel("hot rows")
    axes[0].legend()
    ratios = [
        row["median"] for row in report.rows
        if (row["name"], row["metric"]) == ("budgets", "miss_ratio")
    ]  # fmt: skip
    axes[1].bar(np.arange(len(ratios)), ratios)
    axes[1].axhline(1, color="gray", linestyle=":")
    axes[1].set_xlabel("point")
    axes[1].set_ylabel("misses, auto / uniform")


def main(argv: list[str] | None = None) -> None:
    args = common.arguments(__doc__.splitlines()[0]).parse_args(argv)
    report, progress = common.Report(), common.Progress()
    points = [QUICK_POINT] if args.quick else POINTS
    for point in points:
        progress(f"layer budgets: {point}")
        measure(report, point, QUICK_LAYERS if args.quick else LAYERS, args.seed)
    headline = next((p for p in points if p["ratio"] == 0.2), points[0])
    summarise(report, headline)
    print_tables(report, points)
    if args.json:
        report.write(args.json, args.seed, quick=args.quick)
    if args.plot:
        common.save_figure(args.plot, lambda axes: draw(report, axes, headline))


if __name__ == "__main__":
    main()
