"""Replacement policies, and organisations of the same hot rows, on generated top-k streams.

    python -m benchmarks.sim.policy_lab [--quick] [--json PATH] [--plot PATH]

1. LRU (the production HotCache), the other policies of sglang_ess.sim.policies and Belady's optimum
   at several sizes on the "glm-5.1" profile, next to the figures that HiSparse publishes.
2. The same number of hot rows on "deepseek-v3.2": rows of its own for each request, either the same
   number (HiSparse) or in proportion to its context (ESS); one shared tier; one with per-layer
   budgets, which come from the steps before those that count.
3. LRU, CLOCK, the aged clock (with the rows that it scans) and Belady: four requests share a tier.
4. LRU curves of sampled ghost caches compared with exact ones.
5. Misses of verify steps a kept token, by which lists make rows young and how alike they are.
Belady knows the stream only to its end, so the last steps of every run are not counted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from benchmarks import harness
from benchmarks.sim.published import HISPARSE
from sglang_ess.sim import policies
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.planning import lab
from sglang_ess.sim.planning.verify_lab import Verifying, by_rule
from sglang_ess.sim.policies.verified_lru import RULES

SIZES = (2048, 3072, 4096, 6144, 8192, 12288)  # 4096 and 6144: SGLang's device_buffer_size
WINDOWS = 8  # of the counted steps: samples of a policy's row
QUERIES, RATIO = 2, 0.2  # ESS: MTP 2, its lowest recommended ratio at 32K
RATES = (1.0, 0.1, 0.02)  # of a ghost's sample
GHOST_RATIOS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)  # hot rows of all slots
CLOCKS, CLOCK_CONTEXTS = ("lru", "clock", "aged_clock", "belady"), (32, 128)  # in K tokens
CLOCK_STEPS, CLOCK_RATIOS = (400, 300, 300), (0.1, 0.2)  # before, counted, after
AGES = (("deepseek-v3.2", 32, 0.2), ("deepseek-v3.2", 64, 0.1), ("deepseek-v3.2", 128, 0.1),
        ("deepseek-v3.2", 128, 0.2), ("glm-5.1", 64, 0.2))  # context in K; ratio  # fmt: skip
AGE_STEPS, DRAFTS = (200, 300), ((2, 1.7), (4, 2.8))  # before, counted; ESS: queries, kept tokens
ALIKE = {"other": 0.0, "near": 0.5, "alike": 1.0}  # near: as alike as two successive lists


@dataclass(frozen=True)
class Scenario:
    """Requests that decode together. contexts: tokens of each; prefix: tokens they share."""

    name: str
    contexts: tuple[int, ...]
    prefix: int = 0


SCENARIOS = (
    Scenario("32K", (32 << 10,) * 4),
    Scenario("16K-128K", tuple(size << 10 for size in (16, 32, 64, 128))),
    Scenario("32K, 24K shared", (32 << 10,) * 4, prefix=24 << 10),
)
# Name, organisation, policy, whether rows differ by layer.
RUNS = (
    ("fixed", "fixed", "lru", False),
    ("ratio", "ratio", "lru", False),
    ("shared", "shared", "lru", False),
    ("shared + budgets", "shared", "lru", True),
    ("ratio, Belady", "ratio", "belady", False),
    ("shared, Belady", "shared", "belady", False),
    ("shared + budgets, Belady", "shared", "belady", True),
)


@dataclass(frozen=True)
class Effort:
    """Steps before, in and after the counted part; layers of the 61."""

    before: int
    counted: int
    after: int
    layers: int
    scenarios: tuple[Scenario, ...]


FULL = Effort(300, 400, 300, 16, SCENARIOS)
QUICK = Effort(100, 80, 80, 4, SCENARIOS[:2])


def measure_policies(report: harness.Report, effort: Effort, seed: int) -> None:
    """Missed lookups of a tier of one request, by policy and size."""
    locality = Locality.load("glm-5.1")
    context, steps = locality.reference_tokens, 2 * (effort.before + effort.counted + effort.after)
    stream, warmup = lab.generate(locality, 0, [context], steps, seed=seed)
    first = warmup + 2 * effort.before
    for policy in policies.POLICIES:
        for rows in SIZES:
            found = lab.run([stream], "shared", policy, rows, seed=seed)
            misses = found.misses[0, first : first + 2 * effort.counted, 0] / found.lookups
            percent = [100 * float(part.mean()) for part in np.array_split(misses, WINDOWS)]
            config = {"policy": policy, "rows": rows, "context": context}
            paper = {"published": HISPARSE.get((policy, rows))}
            report.add(harness.simulated("policy", config, "missed", "%", percent, **paper))


def measure_clocks(report: harness.Report, name: str, context: int, seed: int) -> None:
    """Misses of four requests that share a tier, on a layer of a middle reach."""
    locality = Locality.load(name)
    layer, contexts = locality.spread(1)[0], [context] * 4
    stream, warmup = lab.generate(locality, layer, contexts, sum(CLOCK_STEPS), seed=seed)
    counted = slice(warmup + CLOCK_STEPS[0], len(stream.steps) - CLOCK_STEPS[2])
    for ratio, policy in itertools.product(CLOCK_RATIOS, CLOCKS):
        rows = int(ratio * stream.num_slots)
        cache = policies.POLICIES[policy](rows, stream.num_slots, stream.steps, seed)
        found = [(cache.step(topk).sum(), *getattr(cache, "cost", ())) for topk in stream.steps]
        misses, *cost = np.array(found[counted], float).T
        facts = {"scanned_per_miss": cost[0].sum() / misses.sum(), "rounds": cost[1].mean(),
                 "most_rounds": cost[1].max()} if cost else {}  # fmt: skip
        config = {"locality": name, "context": context, "ratio": ratio, "policy": policy}
        report.add(harness.simulated("clock", config, "misses", "rows/step", misses, **facts))


def measure_ages(report: harness.Report, layers: int, seed: int) -> None:
    """Misses of two requests that share a tier, by the rule for the ages of rejected lists."""
    for (name, k, ratio), (queries, accepted), like in itertools.product(AGES, DRAFTS, ALIKE):
        verifying = Verifying(k << 10, queries, lab.Drafts(accepted, ALIKE[like]))
        costs = by_rule(Locality.load(name), verifying, ratio, AGE_STEPS, layers, seed)
        config = {"locality": name, "context": k << 10, "ratio": ratio, "queries": queries}
        for rule, found in costs.items():
            report.add(harness.simulated("ages", config | {"alike": ALIKE[like], "rule": rule},
                "misses", "rows/layer/kept token", [one.per_token for one in found],
                verify=np.mean([one.misses for one in found]),
            ))  # fmt: skip


def measure_organisations(
    report: harness.Report, scenario: Scenario, effort: Effort, progress, seed: int
) -> list[lab.Stream]:
    """Misses by organisation, of a few layers that stand for all. Returns their streams."""
    locality = Locality.load("deepseek-v3.2")
    steps = effort.before + effort.counted + effort.after
    shape = {"queries": QUERIES, "prefix": scenario.prefix, "seed": seed}
    made = [lab.generate(locality, layer, scenario.contexts, steps, **shape)
            for layer in locality.spread(effort.layers)]  # fmt: skip
    streams, warmup = [stream for stream, _ in made], made[0][1]
    rows = int(RATIO * sum(scenario.contexts))
    budgets = lab.budgets(streams, rows, warmup=warmup, steps=effort.before).rows
    for name, organisation, policy, by_layer in RUNS:
        progress(f"{scenario.name}: {name}")
        found = lab.run(
            streams, organisation, policy, budgets if by_layer else rows,
            warmup=warmup + effort.before, tail=effort.after, seed=seed,
        )  # fmt: skip
        config = {"scenario": scenario.name, "run": name, "rows": rows, "queries": QUERIES}
        report.add(harness.simulated(
            "organisation", config, "misses", "rows/request/layer/step", found.by_layer.tolist(),
            by_request=found.by_request.round(1).tolist(), layers=effort.layers,
            layer_rows=[int(found.rows.min()), int(found.rows.max())],
        ))  # fmt: skip
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
            config, percent = {"rate": rate, "ratio": ratio, "rows": sizes[i]}, 100 * errors
            facts = {"worst": percent.max(), "exact": exact[:, i].mean(),
                     "estimate": found[:, i].mean()}  # fmt: skip
            report.add(harness.simulated("ghost", config, "error", "%", percent.tolist(), **facts))


def summarise(report: harness.Report) -> None:
    errors = []
    for (policy, rows), published in HISPARSE.items():
        value = report.figure("policy", key="mean", policy=policy, rows=rows)
        report.summarise(f"{policy}_{rows}_missed_percent", value)
        errors.append(abs(value / published - 1))
    report.summarise("published_mean_abs_error", np.mean(errors))
    by_scenario: dict[str, dict[str, float]] = {}
    for row in report.select("organisation"):
        by_scenario.setdefault(row["config"]["scenario"], {})[row["config"]["run"]] = row["mean"]
    for scenario, found in by_scenario.items():
        for key, run in (("fixed", "fixed"), ("shared", "shared"), ("budgets", "shared + budgets")):
            report.summarise(f"{key}_vs_ratio_{scenario}", found[run] / found["ratio"])
        best = found["shared + budgets, Belady"]
        value = best and found["shared + budgets"] / best  # 0 where Belady misses nothing
        report.summarise(f"budgets_vs_belady_{scenario}", value)
    for rate in RATES:
        found = [row["mean"] for row in report.select("ghost", rate=rate)]
        report.summarise(f"ghost_error_percent_at_{rate:g}", np.mean(found))
    for k, policy in itertools.product(CLOCK_CONTEXTS, CLOCKS[1:]):
        found, lru = (report.select("clock", context=k << 10, policy=p) for p in (policy, "lru"))
        value = max(row["mean"] / best["mean"] for row, best in zip(found, lru, strict=True))
        report.summarise(f"{policy}_vs_lru_{k}k", value)
    for key in ("scanned_per_miss", "rounds", "most_rounds"):
        value = max(row[key] for row in report.select("clock", policy="aged_clock"))
        report.summarise(f"aged_clock_{key}", value)


def summarise_ages(report: harness.Report) -> None:
    """Each rule against the production one; and what MTP 4 misses a verify, against MTP 2."""
    for (kind, alike), rule in itertools.product(ALIKE.items(), list(RULES)[1:]):
        of, name_of = {"alike": alike}, f"ages_{rule.replace(', ', '_').replace(' ', '_')}_{kind}"
        rows, served = (report.select("ages", rule=name, **of) for name in (rule, "all"))
        ratios = [row["mean"] / best["mean"] for row, best in zip(rows, served, strict=True)]
        for name, value in (("least", min(ratios)), ("most", max(ratios))):
            report.summarise(f"{name_of}_{name}", value)
        two, four = (report.select("ages", rule="all", queries=q, **of) for q in (2, 4))
        ratios = [row["verify"] / base["verify"] for base, row in zip(two, four, strict=True)]
        report.summarise(f"mtp4_over_mtp2_misses_{kind}", np.mean(ratios))


def print_tables(report: harness.Report) -> None:
    columns = {"policy": "policy", "rows": "rows", "missed, %": "mean",
               "HiSparse publishes": "published"}  # fmt: skip
    harness.print_table(report.select("policy"), columns, "Missed lookups, glm-5.1")
    columns = {
        "contexts": "scenario", "hot rows": "run", "misses": "mean",
        "vs ratio": lambda row: row["mean"] / report.figure(
            "organisation", key="mean", scenario=row["config"]["scenario"], run="ratio"),
        "by request": lambda row: "/".join(f"{value:.0f}" for value in row["by_request"]),
        "rows a layer": lambda row: "-".join(map(str, sorted(set(row["layer_rows"])))),
    }  # fmt: skip
    title = f"Rows fetched per request, layer and step; {QUERIES} queries, ratio {RATIO}"
    harness.print_table(report.select("organisation"), columns, title)
    columns = {"sampled": "rate", "hot rows of all slots": "ratio", "error, %": "mean",
               "worst layer": "worst"}  # fmt: skip
    harness.print_table(report.select("ghost"), columns, "Ghost caches: error of the misses")
    columns = {name: name for name in ("locality", "context", "ratio", "queries", "alike", "rule")}
    columns |= {"a verify": "verify:.1f", "a kept token": "mean:.2f"}
    harness.print_table(report.select("ages"), columns, "Misses of verify steps, a layer")


def panels(report: harness.Report) -> list[harness.Panel]:
    return [
        harness.Panel(report.select("policy"), "rows", "mean", "policy", points="published",
                      axes={"xlabel": "hot rows of a request (circles: HiSparse, published)",
                            "ylabel": "missed lookups, %", "xscale": "log"}),
        harness.Panel(report.select("organisation"), "run", "mean", "scenario", kind="bar",
                      axes={"ylabel": "rows fetched per request, layer and step"}),
        harness.Panel(report.select("ghost"), "ratio", "mean", "rate",
              axes={"xlabel": "hot rows of all slots", "ylabel": "error of a ghost's misses, %"}),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = harness.argument_parser(__doc__).parse_args(argv)
    effort = QUICK if args.quick else FULL
    report, progress = harness.Report(), harness.Progress()
    progress("policies")
    measure_policies(report, effort, args.seed)
    for name, context in itertools.product(("deepseek-v3.2", "glm-5.1"), CLOCK_CONTEXTS):
        progress(f"clocks: {name}, {context}K")
        measure_clocks(report, name, context << 10, args.seed)
    progress("ages of verify steps")
    measure_ages(report, effort.layers, args.seed)
    for scenario in effort.scenarios:
        streams = measure_organisations(report, scenario, effort, progress, args.seed)
        if scenario is SCENARIOS[0]:
            progress("ghosts")
            measure_ghosts(report, streams[:: max(1, len(streams) // 4)], effort)
    summarise(report)
    summarise_ages(report)
    print_tables(report)
    harness.finish(report, args, *panels(report))


if __name__ == "__main__":
    main()
