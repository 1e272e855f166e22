"""Replacement policies, and organisations of the same hot rows, on generated top-k streams.

    python -m benchmarks.sim.policy_lab [--quick] [--json PATH] [--plot PATH]

1. LRU (the production HotCache), FIFO, CLOCK, LFU, random and Belady's optimum at several sizes,
   on the "glm-5.1" profile, beside what HiSparse published (papers.md 3).
2. As many hot rows as each request's own, the same for all (HiSparse) or in proportion to its
   context (ESS); as one shared tier; as one with per-layer budgets. On "deepseek-v3.2" with two
   queries a step. Budgets come from the steps before those that count.
3. LRU curves of sampled ghost caches beside exact ones.
Belady knows the stream to its end only: steps at the end are simulated and not counted, for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import thread_time as clock

import numpy as np

from benchmarks import harness
from benchmarks.harness import simulated
from benchmarks.sim.published import HISPARSE
from sglang_ess.sim import policies
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.planning import lab

SIZES = (2048, 3072, 4096, 6144, 8192, 12288)  # 4096 and 6144: SGLang's device_buffer_size
WINDOWS = 8  # of the counted steps: samples of a policy's row
QUERIES, RATIO = 2, 0.2  # ESS: MTP 2, its lowest recommended ratio at 32K
RATES = (1.0, 0.1, 0.02)  # of a ghost's sample
GHOST_RATIOS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)  # hot rows of all slots
SPEED_ROWS = 4096


@dataclass(frozen=True)
class Scenario:
    """contexts: of the requests; prefix: tokens they share; budgets: also of own rows, in
    proportion (a request that is much shorter than others cannot spare what a budget takes).
    """

    name: str
    contexts: tuple[int, ...]
    prefix: int = 0
    own_budgets: bool = False


SCENARIOS = (
    Scenario("32K", (32 << 10,) * 4, own_budgets=True),
    Scenario("16K-128K", tuple(size << 10 for size in (16, 32, 64, 128))),
    Scenario("32K, 24K shared", (32 << 10,) * 4, prefix=24 << 10),
)
# Name, organisation, policy, whether rows differ by layer.
RUNS = (
    ("fixed", "fixed", "lru", False),
    ("ratio", "ratio", "lru", False),
    ("ratio + budgets", "ratio", "lru", True),
    ("shared", "shared", "lru", False),
    ("shared + budgets", "shared", "lru", True),
    ("ratio, Belady", "ratio", "belady", False),
    ("shared, Belady", "shared", "belady", False),
    ("shared + budgets, Belady", "shared", "belady", True),
)


@dataclass(frozen=True)
class Effort:
    """Steps: before those that count, those, and after them; layers of 61."""

    before: int
    counted: int
    after: int
    layers: int
    scenarios: tuple[Scenario, ...]


FULL = Effort(300, 400, 300, 16, SCENARIOS)
QUICK = Effort(100, 80, 80, 4, SCENARIOS[:2])


# --- what is measured -------------------------------------------------------------------


def measure_policies(report: harness.Report, effort: Effort, seed: int) -> None:
    """Missed lookups of one request's own tier, by policy and size; and lookups a second."""
    locality = Locality.load("glm-5.1")
    context, steps = locality.reference_tokens, 2 * (effort.before + effort.counted + effort.after)
    stream, warmup = lab.generate(locality, 0, [context], steps, seed=seed)
    first = warmup + 2 * effort.before
    for policy in policies.POLICIES:
        policies.misses(policy, stream.steps[:2], SPEED_ROWS, stream.num_slots)  # compiled
        for rows in SIZES:
            start = clock()
            found = lab.run([stream], "shared", policy, rows, seed=seed)
            seconds = clock() - start
            misses = found.misses[0, first : first + 2 * effort.counted, 0] / found.lookups
            samples = [float(part.mean()) for part in np.array_split(misses, WINDOWS)]
            config = {"policy": policy, "rows": rows, "context": context}
            published = HISPARSE.get((policy, rows))
            report.add(
                simulated("policy", config, "missed", "%", [100 * s for s in samples],
                          published=published)
            )  # fmt: skip
            rate = stream.steps.size / seconds
            report.add(harness.measured("speed", config, "lookups", "lookups/s", [rate]))


def measure_organisations(
    report: harness.Report, scenario: Scenario, effort: Effort, progress, seed: int
) -> list[lab.Stream]:
    """Misses of the layers that stand for all, by organisation. Returns their streams."""
    locality = Locality.load("deepseek-v3.2")
    steps = effort.before + effort.counted + effort.after
    streams = []
    for layer in locality.spread(effort.layers):
        made = lab.generate(
            locality, layer, scenario.contexts, steps, queries=QUERIES, prefix=scenario.prefix,
            seed=seed,
        )  # fmt: skip
        streams.append(made[0])
    warmup = made[1]
    rows = int(RATIO * sum(scenario.contexts))
    budgets = lab.budgets(streams, rows, warmup=warmup, steps=effort.before).rows
    for name, organisation, policy, by_layer in RUNS:
        if name == "ratio + budgets" and not scenario.own_budgets:
            continue
        progress(f"{scenario.name}: {name}")
        found = lab.run(
            streams, organisation, policy, budgets if by_layer else rows,
            warmup=warmup + effort.before, tail=effort.after, seed=seed,
        )  # fmt: skip
        config = {"scenario": scenario.name, "run": name, "rows": rows, "queries": QUERIES}
        by_request = found.by_request.round(1).tolist()
        report.add(
            simulated("organisation", config, "misses", "rows/request/layer/step",
                      found.by_layer.tolist(), by_request=by_request, layers=effort.layers,
                      layer_rows=[int(found.rows.min()), int(found.rows.max())])
        )  # fmt: skip
    return streams


def measure_ghosts(report: harness.Report, streams: list[lab.Stream], effort: Effort) -> None:
    """Errors of sampled curves against runs of the production LRU at each size."""
    warmup = len(streams[0].steps) - effort.before - effort.counted - effort.after
    sizes = [int(ratio * streams[0].num_slots) for ratio in GHOST_RATIOS]
    exact = np.array([lab.exact_curve(stream, sizes, warmup) for stream in streams])
    for rate in RATES:
        curves = [lab.ghost_curve(stream, sizes, rate, warmup) for stream in streams]
        found = np.array([[curve.at(size) for size in sizes] for curve in curves])
        for i, ratio in enumerate(GHOST_RATIOS):
            errors = np.abs(found[:, i] / exact[:, i] - 1)
            config = {"rate": rate, "ratio": ratio, "rows": sizes[i]}
            report.add(
                simulated("ghost", config, "error", "%", (100 * errors).tolist(),
                          worst=100 * errors.max(), exact=exact[:, i].mean(),
                          estimate=found[:, i].mean())
            )  # fmt: skip


# --- output -----------------------------------------------------------------------------


def rows_of(report: harness.Report, name: str, **config) -> list[dict]:
    return [
        row
        for row in report.rows
        if row["name"] == name and config.items() <= row["config"].items()
    ]


def mean(report: harness.Report, name: str, **config) -> float | None:
    found = rows_of(report, name, **config)
    return found[0]["mean"] if found else None


def summarise(report: harness.Report) -> None:
    errors = []
    for (policy, rows), published in HISPARSE.items():
        value = mean(report, "policy", policy=policy, rows=rows)
        report.summarise(f"{policy}_{rows}_missed_percent", value)
        errors.append(abs(value / published - 1))
    report.summarise("published_mean_abs_error", np.mean(errors))
    for scenario in SCENARIOS:
        base = mean(report, "organisation", scenario=scenario.name, run="ratio")
        for key, run in (("fixed", "fixed"), ("shared", "shared"), ("budgets", "shared + budgets")):
            value = mean(report, "organisation", scenario=scenario.name, run=run)
            report.summarise(f"{key}_vs_ratio_{scenario.name}", value and value / base)
        best = mean(report, "organisation", scenario=scenario.name, run="shared + budgets, Belady")
        report.summarise(f"budgets_vs_belady_{scenario.name}", best and value / best)
    for rate in RATES:
        found = [row["mean"] for row in rows_of(report, "ghost", rate=rate)]
        report.summarise(f"ghost_error_percent_at_{rate:g}", np.mean(found))
    for policy in policies.POLICIES:
        value = mean(report, "speed", policy=policy, rows=SPEED_ROWS)
        report.summarise(f"{policy}_lookups_per_s", value)


def print_tables(report: harness.Report) -> None:
    lines = []
    for policy in policies.POLICIES:
        cells = []
        for row in rows_of(report, "policy", policy=policy):
            published = f" ({row['published']:g})" if row["published"] else ""
            cells.append(f"{row['mean']:.1f}{published}")
        speed = mean(report, "speed", policy=policy, rows=SPEED_ROWS)
        lines.append([policy, *cells, speed / 1e6])
    print("Missed lookups in %, glm-5.1 (HiSparse's published figure)")
    print(harness.table(("policy", *map(str, SIZES), "M lookups/s"), lines), end="\n\n")
    print(f"Rows fetched per request, layer and step; {QUERIES} queries, ratio {RATIO}")
    lines = []
    for row in rows_of(report, "organisation"):
        config = row["config"]
        base = mean(report, "organisation", scenario=config["scenario"], run="ratio")
        requests = "/".join(f"{value:.0f}" for value in row["by_request"])
        spread = "-".join(str(count) for count in sorted(set(row["layer_rows"])))
        lines.append([config["scenario"], config["run"], row["mean"], row["mean"] / base,
                      requests, spread])  # fmt: skip
    headers = ("contexts", "hot rows", "misses", "vs ratio", "by request", "rows a layer")
    print(harness.table(headers, lines), end="\n\n")
    print("Ghost caches: error of the misses in %, mean of the layers (worst)")
    lines = [
        [f"{rate:g}"]
        + [f"{row['mean']:.1f} ({row['worst']:.1f})" for row in rows_of(report, "ghost", rate=rate)]
        for rate in RATES
    ]
    print(harness.table(("sampled", *map(str, GHOST_RATIOS)), lines), end="\n\n")
    print(harness.table(("", "value"), report.summary.items()))


def draw(report: harness.Report, axes) -> None:
    """Left: misses of each policy by size. Middle: organisations. Right: ghosts' errors."""
    for policy in policies.POLICIES:
        found = rows_of(report, "policy", policy=policy)
        line = axes[0].plot(SIZES, [row["mean"] for row in found], marker=".", label=policy)
        points = [(size, value) for (name, size), value in HISPARSE.items() if name == policy]
        if points:
            axes[0].plot(*zip(*points, strict=True), "x", color=line[0].get_color())
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("hot rows of a request (x: HiSparse, published)")
    axes[0].set_ylabel("missed lookups, %")
    axes[0].legend()
    names = [run[0] for run in RUNS]
    shown = [s for s in SCENARIOS if rows_of(report, "organisation", scenario=s.name)]
    for i, scenario in enumerate(shown):
        values = [mean(report, "organisation", scenario=scenario.name, run=n) or 0 for n in names]
        axes[1].barh(np.arange(len(names)) + 0.25 * i, values, 0.25, label=scenario.name)
    axes[1].set_yticks(np.arange(len(names)) + 0.25, names, fontsize=8)
    axes[1].invert_yaxis()
    axes[1].set_xlabel("rows fetched per request, layer and step")
    axes[1].legend()
    for rate in RATES:
        found = rows_of(report, "ghost", rate=rate)
        axes[2].plot(GHOST_RATIOS, [row["mean"] for row in found], marker=".", label=f"{rate:g}")
    axes[2].set_xlabel("hot rows of all slots")
    axes[2].set_ylabel("error of a ghost's misses, %")
    axes[2].legend(title="sampled")


def main(argv: list[str] | None = None) -> None:
    args = harness.argument_parser(__doc__.splitlines()[0]).parse_args(argv)
    effort = QUICK if args.quick else FULL
    report, progress, load = harness.Report(), harness.Progress(), harness.OtherLoad()
    progress("policies")
    measure_policies(report, effort, args.seed)
    for scenario in effort.scenarios:
        streams = measure_organisations(report, scenario, effort, progress, args.seed)
        if scenario is SCENARIOS[0]:
            progress("ghosts")
            measure_ghosts(report, streams[:: max(1, len(streams) // 4)], effort)
    summarise(report)
    print_tables(report)
    if args.json:
        report.write(args.json, args.seed, quick=args.quick, other_load=load.ratio())
    if args.plot:
        harness.save_figure(args.plot, lambda axes: draw(report, axes), size=(17, 5), panels=3)


if __name__ == "__main__":
    main()
