"""`python -m sglang_ess.replay TRACE`: run a recorded trace through the hot tier's own code.

The first replay has the recorded sizes, and every count must equal the server's. Others show how
many rows each layer would miss with fewer or more hot rows, and with the best budgets for the
same number. Exit status: 0; 2 with one line of reason, or if a count differs from the server's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sglang_ess.errors import program_name
from sglang_ess.sim.model.trace_replay import (
    SCALES,
    Progress,
    Replay,
    ReplayError,
    best_budgets,
    replay,
)
from sglang_ess.tiers.balance.budgets import BudgetError
from sglang_ess.tiers.index_groups import IndexGroups
from sglang_ess.trace.trace import Trace, read_trace

HALF, DOUBLE = 0.5, 2.0  # scales in the table of layers


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    try:
        trace = read_trace(options.trace)
        study = Study(trace, options.rows)
        console = Console()
        # rich assumes 80 columns in a file or a pipe; the tables need more.
        study.print(console if console.is_terminal else Console(width=120))
        if options.json:
            options.json.write_text(json.dumps(study.as_dict(), indent=1) + "\n")
        if options.plot:
            _plot(study, options.plot)
    except (OSError, ValueError) as error:
        print(f"sglang_ess.replay: {_one_line(error)}", file=sys.stderr)
        return 2
    return 2 if study.recorded.differences else 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"a file must be open to this command: got {error.filename} ({error.strerror})."
    return " ".join(str(error).split())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program_name("replay"), description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("trace", type=Path, help="a file that --ess-trace wrote")
    parser.add_argument(
        "--rows",
        type=_positive,
        nargs="+",
        default=[],
        metavar="N",
        help="also replay with N hot rows in each layer",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write miss-ratio curves here")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more: got {text}")
    return number


class Study:
    """Replays of one trace: as recorded, at scales of it, at given rows, with the best budgets.

    Raises: ReplayError for a trace without a decode step; ValueError as replay.
    """

    def __init__(self, trace: Trace, rows: Sequence[int] = ()):
        self.trace = trace
        # A trace's layers are the pool's index groups: a miss fetches a row for each layer of one.
        sizes = trace.header["meta"].get("group_layers")
        self.groups = IndexGroups(tuple(sizes)) if sizes else IndexGroups.single(trace.layers)
        self.unit = "layer" if self.groups.layers == trace.layers else "index group"
        scales = [scale for scale in SCALES if scale != 1]
        with tqdm(total=(len(scales) + len(rows) + 2) * trace.bytes, unit="B", unit_scale=True,
                  desc="replay", disable=None, leave=False) as bar:  # fmt: skip
            self.recorded = replay(trace, progress=bar.update)
            if not self.recorded.total("lookups"):
                raise ReplayError(f"a trace must have a decode step: got none in {trace.path}.")
            self.scaled = {1.0: self.recorded}
            for scale in scales:
                self.scaled[scale] = replay(trace, scale=scale, progress=bar.update)
            self.scaled = dict(sorted(self.scaled.items()))
            self.given = {count: replay(trace, rows=count, progress=bar.update) for count in rows}
            self.best = self._best(bar.update)

    def _best(self, progress: Progress) -> Replay | None:
        """Replay with the best budgets for the recorded number of rows; None if no better.

        Rows move between index groups of as many layers.
        """
        recorded = [layer.rows for layer in self.recorded.layers]
        rows = list(recorded)
        try:
            for alike in self.groups.by_size().values():
                total = sum(recorded[i] for i in alike)
                budgets = best_budgets(self.scaled.values(), total, alike)
                for i, count in zip(alike, budgets.rows, strict=True):
                    rows[i] = count
        except BudgetError:
            return None
        if rows == recorded:
            return None
        best = replay(self.trace, rows=rows, progress=progress)
        return best if best.misses_per_step < self.recorded.misses_per_step else None

    # --- what is shown ------------------------------------------------------------------

    @property
    def end(self) -> str:
        trailer = self.trace.trailer
        return trailer["end"] if trailer else "cut off"

    def verdict(self) -> str:
        """One line: do server and replay count the same?"""
        found = self.recorded
        server = {
            name: sum(layer.server[name] for layer in found.layers)
            for name in ("lookups", "misses")
        }
        text = f"server: {server['lookups']:,} lookups, {server['misses']:,} misses; replay: "
        if found.differences:
            return text + f"not the same, first at {found.differences[0]}."
        if found.missing:
            missing = f"{found.missing:,} events were dropped while recording"
            return text + f"{found.total('misses'):,} misses, and cannot be exact: {missing}."
        return text + f"the same after each of {found.num_events:,} events."

    def print(self, console: Console) -> None:
        trace, steps = self.trace, max(one.counters["steps"] for one in self.recorded.layers)
        units = f"{trace.layers} {self.unit}s"
        if self.groups.layers != trace.layers:
            units += f" of {self.groups.layers} layers"
        scores = "" if trace.runner_ups is None else f" + {trace.runner_ups} with scores"
        console.print(
            f"{trace.path.name}: {units}, top-k {trace.topk}{scores}, {trace.slots:,} "
            f"slots, {steps:,} decode steps ({self.end})",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        console.print(
            self.verdict()[0].upper() + self.verdict()[1:], highlight=False, soft_wrap=True
        )
        if self.recorded.queries > 1:
            console.print(self.speculation(), highlight=False, soft_wrap=True)
        console.print(self._layer_table())
        console.print(self._tier_table())

    def speculation(self) -> str:
        """One line: what a verify step of a request misses, and what that is a token."""
        found = self.recorded
        return (
            f"Speculation: {found.queries} queries a verify step, {found.verifies:,} verifies of a "
            f"request, {found.tokens / found.verifies:.2f} tokens kept; in all {self.unit}s "
            f"{found.misses_per_verify:,.1f} misses a verify, {found.misses_per_token:,.1f} a kept "
            "token."
        )

    def _layer_table(self) -> Table:
        table = Table(title=f"Each {self.unit}", title_justify="left", box=SIMPLE_HEAD)
        names = [self.unit, "hot rows", "lookups", "hit rate", "misses /step", "evicted at age"]
        names += ["largest plan", f"hit rate x{HALF:g}", f"hit rate x{DOUBLE:g}"]
        for name in names + (["best rows", "then"] if self.best else []):
            table.add_column(name, justify="right")
        for i, layer in enumerate(self.recorded.layers):
            counters = layer.counters
            evictions = counters["evictions"]
            cells = [f"{i}", f"{layer.rows:,}", f"{counters['lookups']:,}"]
            cells += [f"{layer.hit_ratio:.2%}", f"{layer.misses_per_step:,.1f}"]
            cells += [f"{counters['evicted_age'] / evictions:.1f}" if evictions else "-"]
            cells += [f"{layer.union:,}"]
            cells += [f"{self.scaled[scale].layers[i].hit_ratio:.2%}" for scale in (HALF, DOUBLE)]
            if self.best:
                best = self.best.layers[i]
                cells += [f"{best.rows:,}", f"{best.hit_ratio:.2%}"]
            table.add_row(*cells)
        return table

    def _tier_table(self) -> Table:
        table = Table(title="The whole hot tier", title_justify="left", box=SIMPLE_HEAD)
        for name in (
            "hot tier",
            "rows",
            "MiB",
            "hit rate",
            "misses/step",
            "KiB/step",
            "misses/verify",
            "misses/token",
            "misses to x1",
        ):
            table.add_column(name, justify="right")
        for point in self.points():
            size = [point[key] for key in ("device_bytes", "fetched_bytes_per_step")]
            mib, kib = (
                "-" if number is None else f"{number / unit:,.1f}"
                for number, unit in zip(size, (2**20, 2**10), strict=True)
            )
            table.add_row(
                point["name"], f"{point['rows']:,}", mib, f"{point['hit_ratio']:.2%}",
                f"{point['misses_per_step']:,.1f}", kib, f"{point['misses_per_verify']:,.1f}",
                f"{point['misses_per_token']:,.1f}", f"x{point['misses_ratio']:.2f}",
            )  # fmt: skip
        return table

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield the whole tier at each size. misses_ratio: to the recorded size.

        A step is one of the batch, a verify one of a request. Without speculation it is a token.
        """
        named = {f"x{scale:g}": found for scale, found in self.scaled.items()}
        named |= {f"{count} a {self.unit}": found for count, found in self.given.items()}
        if self.best:
            named["best budgets"] = self.best
        row_bytes, before = self.trace.header["meta"].get("row_bytes"), self.recorded
        for name, found in named.items():
            layers = list(zip(self.groups.sizes, found.layers, strict=True))
            hot_rows = sum(size * one.rows for size, one in layers)
            fetched = sum(size * one.misses_per_step for size, one in layers)
            misses = found.total("misses")
            yield {
                "name": name,
                "kind": "simulated",
                "rows": found.rows,
                "device_bytes": row_bytes and hot_rows * row_bytes,
                "hit_ratio": found.hit_ratio,
                "misses": misses,
                "misses_per_step": found.misses_per_step,
                "misses_per_verify": found.misses_per_verify,
                "misses_per_token": found.misses_per_token,
                "fetched_bytes_per_step": row_bytes and fetched * row_bytes,
                "misses_ratio": misses / (before.total("misses") or 1),
                "layers": [
                    {"rows": one.rows, "hit_ratio": one.hit_ratio} | one.counters
                    for one in found.layers
                ],
            }

    def as_dict(self) -> dict[str, Any]:
        found = self.recorded
        return {
            "trace": str(self.trace.path),
            "header": self.trace.header,
            "end": self.end,
            "events": found.num_events,
            "events_missing": found.missing,
            "queries": found.queries,
            "verifies": found.verifies,
            "kept_tokens": found.tokens,
            "exact": not found.missing and not found.differences,
            "differences": [asdict(one) for one in found.differences],
            "server": [layer.server for layer in found.layers],
            "points": list(self.points()),
        }


def _plot(study: Study, path: Path) -> None:
    """Write a PNG: misses per lookup by hot rows, one line a layer, a thick one for the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, scaled = figure.subplots(), study.scaled.values()
    layers = study.trace.layers
    for i in range(layers):
        points = [one.layers[i] for one in scaled]
        axes.plot([p.rows for p in points], [1 - p.hit_ratio for p in points], "0.7", lw=0.8)
    rows, misses = [one.rows / layers for one in scaled], [1 - one.hit_ratio for one in scaled]
    axes.plot(rows, misses, "C0o-", lw=2, label=f"all {study.unit}s")
    recorded = study.recorded
    axes.plot(recorded.rows / layers, 1 - recorded.hit_ratio, "ks", label="as recorded")
    if study.best:
        axes.plot(study.best.rows / layers, 1 - study.best.hit_ratio, "C1*", ms=12,
                  label="best budgets, same number of rows")  # fmt: skip
    axes.set(
        xscale="log", xlabel=f"hot rows a {study.unit}", ylabel="misses per lookup", ylim=(0, None)
    )
    axes.set_xticks(rows, [f"{count:,.0f}" for count in rows])
    axes.minorticks_off()
    axes.set_title(f"{study.trace.path.name}: {layers} {study.unit}s, top-k {study.trace.topk}")
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
