"""What admission is worth, and where it costs: tokens/s in the simulator with it and without.

    python -m benchmarks.admission [--quick] [--json PATH] [--plot PATH]

48 clients on one decode rank, as in the scenario `thrash`: 24K to 40K tokens of DeepSeek-V3.2,
whose next request follows the last. A grid of links by hot rows; at each point admission off, on,
and by working sets alone (what fits runs and no more, as if a miss could only do harm).
worst_on: the least, over the grid, of its tokens/s against the better of the two others;
worst_working_sets: that rule's against off. All this is simulated: docs/simulator.md says how
far to trust it. Measured is what a round of admission costs the scheduler with 100 to 10,000
requests waiting (admission_rounds.py): round_growth is its time at the most by that at the fewest,
whole_queue_growth the same where every waiting request is asked about.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from tqdm import tqdm

from benchmarks.admission_rounds import (
    BOUNDED,
    LOOKS,
    PLACES,
    QUICK_ROUNDS,
    ROUNDS,
    RUNNING,
    WAITING,
    WHOLE,
    round_seconds,
)
from benchmarks.common import Report, arguments, measured, save_figure, simulated, table
from sglang_ess.admission.policy import Admission
from sglang_ess.sim.engine.simulation import Simulation, workload_of
from sglang_ess.sim.inputs.arrivals import Arrivals, Lengths
from sglang_ess.sim.inputs.scenario import ESS, NO_ADMISSION, Scenario, read_scenario, with_settings

SCENARIO, CLIENTS = "thrash", 48
# Shares of a PCIe link: 2 to 37 GB/s at row size.
LINKS = (("pcie4", 0.1), ("pcie4", 0.3), ("pcie4", 1.0), ("pcie5", 1.0))
HOT_ROWS = (16384, 32768, 65536, 131072)  # working sets of 2 to 18 of the requests
QUICK_LINKS, QUICK_HOT_ROWS = LINKS[1:3], HOT_ROWS[1:3]
OFF, SETS, ON = RULES = "off", "working sets", "on"
SETTLE = 20  # steps before those that count


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
    settings = [f"link={point.link}", f"memory.link_share={point.share}",
                f"memory.hot_rows={point.hot_rows}", f"run.settle_steps={SETTLE}"]  # fmt: skip
    return with_settings(given, settings)


@contextmanager
def by_working_sets() -> Iterator[None]:
    """Meanwhile requests join while their working sets fit, and shed if rows go early."""
    production = Admission._best_batch, Admission._best_to_keep
    Admission._best_batch = lambda self, running, *_: running
    Admission._best_to_keep = lambda self, running: 0
    try:
        yield
    finally:
        Admission._best_batch, Admission._best_to_keep = production


def simulate(point: Point, requests: int, seed: int) -> dict[str, float]:
    """One run."""
    scenario = scenario_of(point, requests)
    system = NO_ADMISSION if point.rule == OFF else ESS
    simulation = Simulation(scenario, system, workload_of(scenario, seed), seed)
    with by_working_sets() if point.rule == SETS else nullcontext():
        results = simulation.run()
    return {
        "tokens_per_s": results.tokens_per_second,
        "batch": results.batch_mean,
        "misses": results.misses,
        "itl_p50_ms": 1000 * results.itl.p50,
        "itl_p99_ms": 1000 * results.itl.p99,
        "shed": results.preempted,
    }


UNITS = {"tokens_per_s": "1/s", "batch": "requests", "misses": "rows", "itl_p50_ms": "ms",
         "itl_p99_ms": "ms", "shed": "requests"}  # fmt: skip


def measure(report: Report, quick: bool, seed: int) -> dict[Point, dict[str, float]]:
    links, hot_rows = (QUICK_LINKS, QUICK_HOT_ROWS) if quick else (LINKS, HOT_ROWS)
    points = [Point(*link, rows, rule) for link in links for rows in hot_rows for rule in RULES]
    requests = CLIENTS * (1 if quick else 2)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(simulate, point, requests, seed) for point in points]
        found = {
            point: run.result()
            for point, run in zip(points, tqdm(runs, file=sys.stderr, disable=None), strict=True)
        }
    for point, figures in found.items():
        for metric, value in figures.items():
            config = vars(point) | {"clients": CLIENTS, "requests": requests}
            report.add(simulated("admission", config, metric, UNITS[metric], [value]))
    return found


def measure_rounds(report: Report, quick: bool) -> list[list]:
    """Milliseconds of a round by requests waiting: rows of a table, and of the report."""
    rounds, lines = QUICK_ROUNDS if quick else ROUNDS, []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for waiting in WAITING:
            found = pool.submit(round_seconds, waiting, rounds).result()
            for look in LOOKS:
                config = {
                    "looks_at": look,
                    "waiting": waiting,
                    "running": RUNNING,
                    "places": PLACES,
                }
                samples = [1000 * seconds for seconds in found[look]]
                report.add(measured("admission round", config, "round", "ms", samples))
            medians = [
                report.median("admission round", "round", looks_at=look, waiting=waiting)
                for look in LOOKS
            ]
            lines.append([f"{waiting:,}", *(f"{median:.3f}" for median in medians)])
    for key, look in (("round_growth", BOUNDED), ("whole_queue_growth", WHOLE)):
        few, many = (
            report.median("admission round", "round", looks_at=look, waiting=waiting)
            for waiting in (WAITING[0], WAITING[-1])
        )
        report.summarise(key, many / few)
    return lines


def summarise(report: Report, found: Mapping[Point, Mapping[str, float]]) -> None:
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


def lines(found: Mapping[Point, Mapping[str, float]]) -> list[list]:
    rows = []
    for point in found:
        if point.rule != ON:
            continue
        runs = [found[replace(point, rule=rule)] for rule in RULES]
        off, sets, on = (run["tokens_per_s"] for run in runs)
        batches = " / ".join(f"{run['batch']:.0f}" for run in runs)
        latencies = " / ".join(f"{run['itl_p50_ms']:.0f}" for run in runs)
        rows.append(
            [f"{point.share:g} {point.link}", point.hot_rows, off, sets, on, on / max(off, sets),
             batches, latencies]
        )  # fmt: skip
    return rows


def draw(found: Mapping[Point, Mapping[str, float]], report: Report) -> Callable:
    def on_axes(axes) -> None:
        hot_rows = sorted({point.hot_rows for point in found})
        for axis, rows in zip(axes[:2], (hot_rows[0], hot_rows[-1]), strict=True):
            for rule in RULES:
                runs = {p: f for p, f in found.items() if (p.rule, p.hot_rows) == (rule, rows)}
                names = [f"{p.share:g}\n{p.link}" for p in runs]
                axis.plot(names, [f["tokens_per_s"] for f in runs.values()], "o-", label=rule)
            axis.set(title=f"{rows:,} hot rows, simulated", xlabel="link", ylabel="tokens/s")
            axis.legend(title="admission")
        for look in LOOKS:
            config = {"looks_at": look}
            medians = [
                report.median("admission round", "round", **config, waiting=waiting)
                for waiting in WAITING
            ]
            axes[2].loglog(WAITING, medians, "o-", label=look)
        axes[2].set(title="A round, measured", xlabel="requests waiting", ylabel="ms")
        axes[2].legend(title="looks at")

    return on_axes


def main() -> None:
    options = arguments(__doc__.split("\n")[0]).parse_args()
    report = Report()
    rounds = measure_rounds(report, options.quick)  # before the machine is busy
    found = measure(report, options.quick, options.seed)
    summarise(report, found)
    headers = ["link", "hot rows", "off", "working sets", "on", "on / better", "batch", "ITL p50"]
    print(table(headers, lines(found)))
    print(table(["waiting", *(f"{look}, ms a round" for look in LOOKS)], rounds))
    print(table(["", "value"], [[k, f"{v:.3g}"] for k, v in report.summary.items()]))
    if options.json:
        report.write(options.json, options.seed, quick=options.quick)
    if options.plot:
        save_figure(options.plot, draw(found, report), size=(15, 4.5), panels=3)


if __name__ == "__main__":
    main()
