"""`python -m sglang_ess.simulate SCENARIO`: what would a deployment serve?

SCENARIO is a .toml file, or a name that --list shows. Its systems (ESS, ESS without admission,
one tier) run on the same workload and are printed as columns of one table. For a scenario that
cannot be used the command prints one line on stderr and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sglang_ess.errors import program_name
from sglang_ess.sim.engine.report import Percentiles, Results
from sglang_ess.sim.engine.simulation import Simulation, workload_of
from sglang_ess.sim.inputs.files import SpecError
from sglang_ess.sim.inputs.scenario import Scenario, read_scenario, scenario_names, with_settings

REFUSED = 2
FILE_COLUMNS = 120  # width of the table where stdout is no terminal
TITLES = {"ess": "ESS", "no-admission": "ESS, no admission", "one-tier": "one tier"}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.list:
            _print_list()
            return 0
        if arguments.scenario is None:
            raise SpecError("scenario must be given: a name (--list has them) or a .toml file.")
        settings = list(arguments.set)
        if arguments.layers is not None:
            settings.append(f"run.layers={arguments.layers}")
        scenario = with_settings(read_scenario(arguments.scenario), settings)
        results = simulate(scenario, arguments.seed, _bar)
        if arguments.json:
            _write_json(arguments.json, scenario, results, arguments.seed)
        if arguments.plot:
            plot(arguments.plot, scenario.title, results)
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"sglang-ess: {line}", file=sys.stderr)
        return REFUSED
    _print_table(scenario, results)
    return 0


def simulate(
    scenario: Scenario, seed: int = 0, bar: Callable[[str, int], Any] | None = None
) -> list[Results]:
    """Run each of the scenario's systems. bar(name, total): returns a tqdm bar; None: no bar.

    Raises: ValueError for a scenario that cannot run, RuntimeError if the bookkeeping is wrong.
    """
    workload = workload_of(scenario, seed)
    results = []
    for system in scenario.systems:
        simulation = Simulation(scenario, system, workload, seed)
        if bar is None:
            results.append(simulation.run())
            continue
        with bar(TITLES[system], simulation.serving.total) as progress:
            results.append(simulation.run(partial(_advance, progress)))
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("simulate"),
        description="Simulate a deployment with ESS and with one tier.",
    )
    parser.add_argument("scenario", nargs="?", help="a .toml file, or a name that --list shows")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE",
        help="change a field, as arrivals.rate=4 or server.itl_ms=50; may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG here")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="simulate N layers row by row; 0: all [the file's]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all random draws [0]")
    parser.add_argument("--list", action="store_true", help="list the scenarios that come with ESS")
    return parser


def _advance(progress: Any, done: int) -> None:
    progress.update(done - progress.n)


def _bar(name: str, total: int) -> Any:
    from tqdm import tqdm

    # delay: no bar for a short run; disable=None: no bar if stderr is no terminal.
    return tqdm(total=total, desc=name, delay=2, disable=None, file=sys.stderr, leave=False)


# --- output -----------------------------------------------------------------------------


def _print_list() -> None:
    lines = ((name, read_scenario(name).title) for name in scenario_names())
    _print(lines, ("scenario", "left"), ("what it is", "left"))


def _print_table(scenario: Scenario, results: Sequence[Results]) -> None:
    caption = f"simulated: {scenario.model}, {scenario.gpu}, {scenario.link}, {scenario.deployment}"
    columns = [(TITLES[result.system], "right") for result in results]
    _print(lines(results), ("", "left"), *columns, title=scenario.title, caption=caption)


def _print(rows: Iterable[Sequence[str]], *columns: tuple[str, Any], **about: Any) -> None:
    """Print a table. columns: (title, justification); about: title and caption."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, **about)
    for title, justify in columns:
        table.add_column(title, justify=justify)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # rich assumes 80 columns if stdout is no terminal.
    (console if console.is_terminal else Console(width=FILE_COLUMNS)).print(table)


def lines(results: Sequence[Results]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: a name, and a cell for each system."""

    def row(name: str, cell: Callable[[Results], str]) -> tuple[str, ...]:
        return (name, *map(cell, results))

    yield row("tokens/s per GPU", lambda r: f"{r.tokens_per_second_per_gpu:,.0f}")
    yield row("tokens/s per node", lambda r: f"{r.tokens_per_second_per_node:,.0f}")
    if base := next((r for r in results if r.system == "one-tier"), None):
        yield row("  against one tier", lambda r: _gain(r, base))
    yield row("batch, mean / max", lambda r: f"{r.batch_mean:.1f} / {r.batch_max}")
    yield row("ITL p50/p90/p99, ms", lambda r: _percentiles(r.itl, 1000))
    yield row("TTFT p50/p90/p99, s", lambda r: _percentiles(r.ttft, 1))
    yield row("queueing p50/p90/p99, s", lambda r: _percentiles(r.queueing, 1))
    yield row("step, ms", lambda r: f"{1000 * r.step_seconds:.1f}")
    for part in sorted({part for result in results for part in result.step_parts}):
        cells = (f"{1000 * result.step_parts.get(part, 0.0):.1f}" for result in results)
        yield (f"  {part}", *cells)
        late = [1000 * (r.in_turn_seconds - r.step_parts.get(part, 0.0)) for r in results]
        if part == "transfer" and max(late) > 0:
            yield row("    without early fetches", lambda r: f"{1000 * r.in_turn_seconds:.1f}")
    yield row("misses a request and layer", lambda r: f"{r.misses:.1f}")
    yield row("hit rate", lambda r: f"{r.hit_rate:.3f}")
    yield row("link in use", lambda r: f"{r.link_utilisation:.1%}")
    yield row("retracted / preempted", lambda r: f"{r.retractions} / {r.preempted}")
    yield row("deferred, rounds", _deferred)
    if any(result.prefill_share for result in results):
        yield row("time in prompts", lambda r: f"{r.prefill_share:.1%}")
    yield row("slots / hot rows", lambda r: f"{r.slots:,} / {r.hot_rows:,}")
    yield row("host GiB, pinned / peak", lambda r: f"{r.host_gib:.0f} / {r.peak_host_gib:.0f}")
    yield row("finished / unfinished", lambda r: f"{r.finished} / {r.unfinished}")
    if any(result.refused for result in results):
        yield row("refused: too long", lambda r: str(r.refused))
    yield row("simulated seconds", lambda r: f"{r.seconds:.1f}")


def _gain(result: Results, base: Results) -> str:
    if result is base or not base.tokens_per_second:
        return ""
    return f"{result.tokens_per_second / base.tokens_per_second - 1:+.1%}"


def _deferred(result: Results) -> str:
    """Rounds in which the admission kept the queue's head out, by reason."""
    deferred = [f"{reason} {rounds}" for reason, rounds in result.deferred.items() if rounds]
    return ", ".join(deferred) or "-"


def _percentiles(values: Percentiles, scale: float) -> str:
    if not values.count:
        return "-"
    found = (value for value in (values.p50, values.p90, values.p99) if value is not None)
    return " / ".join(f"{scale * value:.3g}" for value in found)


def _write_json(path: Path, scenario: Scenario, results: Sequence[Results], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "kind": "simulated",
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "seed": seed,
        "scenario": asdict(scenario),
        "systems": [result.as_dict() for result in results],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def plot(path: Path, title: str, results: Sequence[Results]) -> None:
    """Write a PNG: batch, misses and step time over simulated time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title} (simulated)")
    panels = figure.subplots(1, 3)
    for result in results:
        series = result.series
        # The first rank stands for the others.
        first = series.rank == 0
        columns = (series.batch, series.misses, 1000 * series.step_seconds)
        for axes, column in zip(panels, columns, strict=True):
            axes.plot(series.seconds[first], column[first], label=TITLES[result.system], lw=1)
    labels = ("requests of rank 0's batch", "misses a request, layer and step", "step, ms")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel("simulated seconds")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
