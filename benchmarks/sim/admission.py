"""What admission is worth, and where it costs: tokens/s in the simulator with it and without.

    python -m benchmarks.sim.admission [--quick] [--json PATH] [--plot PATH]

48 clients on one decode rank, as in the scenario `thrash`: requests of 24K to 40K tokens of
DeepSeek-V3.2, each client's next one following its last. A grid of links by hot rows; each point
runs with admission off, on, and by working sets alone (a request joins only if its working set
fits, as if a miss could only do harm).

worst_on: the least, over the grid, of tokens/s with admission against the better of the two others;
worst_working_sets: the least of working sets alone against off. Both are simulated. Measured is a
round of admission with 100 to 10,000 requests waiting (admission_rounds.py): round_growth is its
time with the most by that with the fewest, whole_queue_growth the same where admission asks about
every waiting request.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from tqdm import tqdm

from benchmarks import harness
from benchmarks.sim import admission_rounds
from benchmarks.sim.admission_rounds import BOUNDED, LOOKS, WAITING, WHOLE, round_seconds
from sglang_ess.admission.policy import Admission, Candidate
from sglang_ess.sim.engine.simulation import Simulation, workload_of
from sglang_ess.sim.inputs.arrivals import Arrivals, Lengths
from sglang_ess.sim.inputs.scenario import ESS, NO_ADMISSION, Scenario, read_scenario, with_settings

SCENARIO, CLIENTS = "thrash", 48
# Shares of a PCIe link: 2 to 37 GB/s at row size.
LINKS = (("pcie4", 0.1), ("pcie4", 0.3), ("pcie4", 1.0), ("pcie5", 1.0))
HOT_ROWS = (16384, 32768, 65536, 131072)  # working sets of 2 to 18 of the requests
QUICK_LINKS, QUICK_HOT_ROWS = LINKS[1:3], HOT_ROWS[1:3]
OFF, SETS, ON = RULES = "off", "working sets", "on"
WARMUP_STEPS = 20  # steps before those that count
UNITS = {"tokens_per_s": "1/s", "batch": "requests", "misses": "rows", "itl_p50_ms": "ms",
         "itl_p99_ms": "ms", "shed": "requests"}  # fmt: skip


class WorkingSetsAlone(Admission):
    """Requests join while their working sets fit, and are preempted when rows go early."""

    def best_batch(self, running: int, rows: float, waiting: Iterable[Candidate]) -> int:
        return running

    def best_to_keep(self, running: int) -> int:
        return 0


@dataclass(frozen=True)
class Point:
    link: str
    share: float
    hot_rows: int
    rule: str


def scenario_of(point: Point, requests: int) -> Scenario:
    given = replace(
        read_scenario(SCENARIO),
        arrivals=Arrivals("closed", clients=CLIENTS, requests=requests),
        output_tokens=Lengths("uniform", low=80, high=240),  # so that they end one by one
    )
    settings = {"link": point.link, "memory.link_share": point.share,
                "memory.hot_rows": point.hot_rows, "run.settle_steps": WARMUP_STEPS}  # fmt: skip
    return with_settings(given, [f"{key}={value}" for key, value in settings.items()])


def simulate(point: Point, requests: int, seed: int) -> dict[str, float]:
    """One run: its figures by the names of UNITS."""
    scenario = scenario_of(point, requests)
    system = NO_ADMISSION if point.rule == OFF else ESS
    policy = WorkingSetsAlone if point.rule == SETS else Admission
    results = Simulation(scenario, system, workload_of(scenario, seed), seed, policy).run()
    return {
        "tokens_per_s": results.tokens_per_second, "batch": results.batch_mean,
        "misses": results.misses, "itl_p50_ms": 1000 * results.itl.p50,
        "itl_p99_ms": 1000 * results.itl.p99, "shed": results.preempted,
    }  # fmt: skip


def measure(report: harness.Report, quick: bool, seed: int) -> dict[Point, dict[str, float]]:
    links, hot_rows = (QUICK_LINKS, QUICK_HOT_ROWS) if quick else (LINKS, HOT_ROWS)
    points = [Point(*link, rows, rule) for link in links for rows in hot_rows for rule in RULES]
    requests = CLIENTS * (1 if quick else 2)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(simulate, point, requests, seed) for point in points]
        results = [run.result() for run in tqdm(runs, file=sys.stderr, disable=None)]
    found = dict(zip(points, results, strict=True))
    for point, figures in found.items():
        config = vars(point) | {"clients": CLIENTS, "requests": requests}
        for metric, value in figures.items():
            report.add(harness.simulated("admission", config, metric, UNITS[metric], [value]))
    return found


def measure_rounds(report: harness.Report, quick: bool) -> None:
    """Milliseconds of a round by requests waiting, and how they grow."""
    rounds = admission_rounds.QUICK_ROUNDS if quick else admission_rounds.ROUNDS
    fixed = {"running": admission_rounds.RUNNING, "places": admission_rounds.PLACES}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for waiting in WAITING:
            for look, seconds in pool.submit(round_seconds, waiting, rounds).result().items():
                config = {"looks_at": look, "waiting": waiting} | fixed
                report.add(harness.measured("admission round", config, "round", "ms",
                                            [1000 * value for value in seconds]))  # fmt: skip
    for key, look in (("round_growth", BOUNDED), ("whole_queue_growth", WHOLE)):
        rows = sorted(report.select("admission round", looks_at=look),
                      key=lambda row: row["config"]["waiting"])  # fmt: skip
        report.summarise(key, rows[-1]["median"] / rows[0]["median"])


def summarise(report: harness.Report, found: Mapping[Point, Mapping[str, float]]) -> None:
    """Tokens/s of each rule against the others', at its worst and best point."""

    def ratios(rule: str, *others: str) -> list[float]:
        return [
            figures["tokens_per_s"]
            / max(found[replace(point, rule=other)]["tokens_per_s"] for other in others)
            for point, figures in found.items()
            if point.rule == rule
        ]

    report.summarise("worst_on", min(ratios(ON, OFF, SETS)))
    report.summarise("worst_working_sets", min(ratios(SETS, OFF)))
    report.summarise("best_on", max(ratios(ON, OFF)))
    report.summarise("best_on_against_better", max(ratios(ON, OFF, SETS)))


def print_tables(report: harness.Report) -> None:
    for metric, title in (("tokens_per_s", "tokens/s"), ("batch", "mean batch"),
                          ("itl_p50_ms", "ITL p50, ms")):  # fmt: skip
        rows = harness.pivot(
            report.select("admission", metric), ("link", "share", "hot_rows"), "rule"
        )
        columns = {name: name for name in ("link", "share", "hot_rows", *RULES)}
        if metric == "tokens_per_s":
            columns["on / better"] = lambda row: row[ON] / max(row[OFF], row[SETS])
        harness.print_table(rows, columns, f"{title} by admission, simulated")
    rows = harness.pivot(report.select("admission round"), ("waiting",), "looks_at")
    columns = {"waiting": "waiting:,"} | {look: look for look in LOOKS}
    harness.print_table(rows, columns, "ms a round of admission, by the requests it asks about")


def panels(report: harness.Report) -> list[harness.Panel]:
    hot_rows = sorted({row["config"]["hot_rows"] for row in report.select("admission")})
    axes = {"title": "A round, measured", "xlabel": "requests waiting", "ylabel": "ms",
            "xscale": "log", "yscale": "log"}  # fmt: skip
    return [
        *(harness.Panel(report.select("admission", "tokens_per_s", hot_rows=rows),
                        lambda row: "{share:g}\n{link}".format(**row["config"]), series="rule",
                        axes={"title": f"{rows:,} hot rows, simulated", "ylabel": "tokens/s"})
          for rows in (hot_rows[0], hot_rows[-1])),
        harness.Panel(report.select("admission round"), "waiting", series="looks_at", axes=axes),
    ]  # fmt: skip


def main() -> None:
    args = harness.argument_parser(__doc__).parse_args()
    report = harness.Report()
    measure_rounds(report, args.quick)  # before the machine is busy
    summarise(report, measure(report, args.quick, args.seed))
    print_tables(report)
    harness.finish(report, args, *panels(report))


if __name__ == "__main__":
    main()
