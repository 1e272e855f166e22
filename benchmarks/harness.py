"""The harness of every benchmark: options, rows, the result file, tables and plots.

A benchmark measures, adds rows to a Report, and calls `finish`. docs/benchmarking.md has the form
of its result file. A row has name, kind, config, metric, unit, median, p10, p90, mean, n, load1
(the load of the machine when it was added), and fields of the benchmark. Its kind is `measured`,
`simulated` (a number that a simulation gave), `computed` (from sizes alone) or `failed` (`error`
says why it has no numbers).

This module imports neither torch nor SGLang: both read the environment at import. Code that needs
them with an environment of its own runs in a Worker (tools/worker.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sglang", "torch", "numba", "transformers", "numpy")
SPREAD = ("median", "p10", "p90", "mean")
Key = str | Callable[[Mapping], Any]  # a row's field, or a function of the row: see field_of


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark. description: its first line is shown by --help."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer points, in minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write rows and summary here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG here")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and weights [0]")
    return parser


def measured(name, config: dict, metric, unit, samples: Sequence[float], **extra) -> dict:
    """A row with median, p10, p90 and mean of the samples; a failed row if there are none.

    extra: further fields of the row
    """
    if not len(samples):
        return failed(name, config, metric, unit, "no samples", **extra)
    found = *np.percentile(np.asarray(samples, float), (50, 10, 90)), np.mean(samples)
    spread = dict(zip(SPREAD, map(float, found), strict=True))
    row = {"name": name, "kind": "measured", "config": config, "metric": metric, "unit": unit}
    return row | spread | {"n": len(samples)} | extra


def simulated(name, config: dict, metric, unit, samples: Sequence[float], **extra) -> dict:
    """The same as `measured`, for numbers that a simulation gave."""
    return measured(name, config, metric, unit, samples, **extra) | {"kind": "simulated"}


def computed(name, config: dict, metric, unit, value: float, **extra) -> dict:
    """A row for a number that follows from others: the same on every machine."""
    return measured(name, config, metric, unit, [value], **extra) | {"kind": "computed"}


def failed(name, config: dict, metric, unit, error, **extra) -> dict:
    """A row for a point that gave no number."""
    row = {"name": name, "kind": "failed", "config": config, "metric": metric, "unit": unit}
    return row | dict.fromkeys(SPREAD) | {"n": 0, "error": str(error)} | extra


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above[i] / below[i] for the rounds that both have: a paired comparison.

    Whatever slows a round of a shared machine slows both its halves, so the median of the
    paired ratios moves less than the ratio of two medians.
    """
    return [a / b for a, b in zip(above, below, strict=False)]


def select(rows: Iterable[dict], /, name=None, metric=None, kind=None, **config) -> list[dict]:
    """The rows with this name, metric and kind (None: any) and at least this config."""
    wanted = {"name": name, "metric": metric, "kind": kind}
    return [
        row
        for row in rows
        if all(value in (None, row.get(key)) for key, value in wanted.items())
        and config.items() <= row["config"].items()
    ]


def find(rows: Iterable[dict], name, metric, /, **config) -> dict | None:
    """The last measured row with this name, metric and at least this config."""
    # Not select's own **config: a config may have a kind.
    rows = select(rows, name, metric, "measured")
    return next((r for r in reversed(rows) if config.items() <= r["config"].items()), None)


def field_of(row: Mapping, key: Key) -> Any:
    """A field of the row's config, else of the row, else None; or what a function gives."""
    if callable(key):
        return key(row)
    config = row.get("config", {})
    return config[key] if key in config else row.get(key)


def pivot(
    rows: Iterable[Mapping], index: Sequence[str], column: Key = "metric", value: Key = "median"
) -> list[dict]:
    """One flat dict for each combination of the index fields, in the order of the rows.

    A dict holds the index fields, and `value` of each of its rows under what `column` gives for
    the row: pivot(rows, ("system", "rate")) has a key per metric. The last row of a key wins.
    Rows that lack an index field are left out.
    """
    found: dict[tuple, dict] = {}
    for row in rows:
        at = tuple(field_of(row, key) for key in index)
        if None not in at:
            line = found.setdefault(at, dict(zip(index, at, strict=True)))
            line[field_of(row, column)] = field_of(row, value)
    return list(found.values())


@dataclass
class Report:
    """What one run found: rows, the summary and the machine."""

    rows: list[dict] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine_facts())

    def add(self, *rows: dict) -> None:
        self.rows += [{**row, "load1": round(os.getloadavg()[0], 2)} for row in rows]

    def select(self, name=None, metric=None, kind=None, **config) -> list[dict]:
        """The rows with this name, metric and kind (None: any) and at least this config."""
        return select(self.rows, name, metric, kind, **config)

    def median(self, name, metric, **config) -> float | None:
        """The median of the last measured row that matches; None if there is none."""
        row = find(self.rows, name, metric, **config)
        return row and row["median"]

    def figure(self, name, metric=None, key: str = "median", **config) -> float | None:
        """A field of the last row that matches, of any kind; None if there is none."""
        found = self.select(name, metric, **config)
        return found[-1][key] if found else None

    def summarise(self, key: str, value: float | None) -> None:
        """Keep a headline figure. None (not measured) is left out: it never becomes zero."""
        if value is not None:
            self.summary[key] = float(value)

    def write(self, path: Path, seed: int, more: Mapping[str, Any] | None = None, **config) -> None:
        """Write the result file. more: further keys of it; config: settings of the run"""
        content = {
            "machine": self.machine | {"loadavg_end": os.getloadavg()},
            "versions": versions(),
            "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seed": seed,
            "quick": bool(config.get("quick", False)),
            "config": config,
            "rows": self.rows,
            "summary": self.summary,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | (more or {}), indent=1) + "\n")


def finish(report: Report, args: argparse.Namespace, *panels: Panel, **config) -> None:
    """Print failed rows and the summary, then write the files of --json and --plot.

    args: of argument_parser(); panels: what --plot draws, side by side; config: settings of the run
    """
    print_failed(report)
    print_summary(report)
    if args.json:
        report.write(args.json, args.seed, quick=args.quick, **config)
    if args.plot and panels:
        plot(args.plot, *panels)


def machine_facts() -> dict[str, Any]:
    """The host now, its load included: no number of a shared machine means much without it."""
    usable = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    flags = _cpuinfo("flags").split()
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": usable,
        "simd": next((f for f in ("amx_tile", "avx512f", "avx2") if f in flags), "none"),
        "memory_gib": round(memory.total / 2**30, 1),
        "available_gib": round(memory.available / 2**30, 1),
        "os": platform.platform(),
        "loadavg_start": os.getloadavg(),
    }


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def versions() -> dict[str, Any]:
    """Versions of Python and PACKAGES; the commit; whether files outside results/ have changes."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _git("rev-parse", "HEAD") or None
    status = _git("status", "--porcelain", "--", ".", ":!results")
    found["dirty"] = None if status is None else bool(status)
    return found


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", "-C", ROOT, *args), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this host
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class OtherLoad:
    """The share of the machine that other people's processes took since this object was made."""

    def __init__(self):
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        ours = os.times()
        total = sum(ours[:4])  # this process and its reaped children
        for child in psutil.Process().children(recursive=True):
            try:
                spent = child.cpu_times()
            except psutil.Error:
                continue
            total += spent.user + spent.system
        return time.monotonic(), sum(times[:8]) - idle, total

    def ratio(self) -> float:
        """CPU seconds of others / (cores x wall seconds), in [0, 1].

        Processes that a worker reaped on its own count as others: make this object and read it
        while the same workers live.
        """
        wall, busy, ours = (b - a for a, b in zip(self._start, self._now(), strict=True))
        others = (busy - ours) / max(wall * psutil.cpu_count(), 1e-9)
        return round(min(max(others, 0.0), 1.0), 3)


class Progress:
    """Lines on stderr, each with the seconds since the start."""

    def __init__(self):
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.0f} s] {text}", file=sys.stderr, flush=True)


def table(headers: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Text columns, right-aligned; None becomes "-" and floats get three digits."""
    cells = [list(headers)] + [[_cell(value) for value in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headers))]
    text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def print_table(rows: Iterable[Mapping], columns: Mapping[str, Key], title: str = "") -> None:
    """A line per row. Nothing is printed if there are no rows.

    columns: {header: field}, the field as `field_of` reads it; "error:+.1%" is the field `error`
        in the format +.1%. Two columns cannot share a header; a trailing space tells them apart.
    """
    lines = [[_formatted(row, key) for key in columns.values()] for row in rows]
    if lines:
        print(f"\n{title}" if title else "")
        print(table(list(columns), lines))


def _formatted(row: Mapping, key: Key) -> Any:
    if callable(key):
        return key(row)
    name, _, style = key.partition(":")
    value = field_of(row, name)
    return format(value, style) if style and isinstance(value, int | float) else value


def spread(row: Mapping) -> str | None:
    """A column of print_table: "median [p10, p90]"."""
    if row.get("median") is None:
        return None
    return "{} [{}, {}]".format(*(_cell(row[key]) for key in ("median", "p10", "p90")))


def print_failed(report: Report) -> None:
    """One line for each reason why points gave no number, with how many there are."""
    reasons: dict[tuple, list] = {}
    for row in report.select(kind="failed"):
        reasons.setdefault((row["name"], row["metric"], row["error"]), []).append(row["config"])
    for (name, metric, error), configs in reasons.items():
        where = " ".join(str(value) for value in configs[0].values())
        more = f" and {len(configs) - 1} more" if len(configs) > 1 else ""
        print(f"not measured: {metric} of {name} {where}{more}: {error}")


def print_summary(report: Report) -> None:
    if report.summary:
        print(f"\n{table(['summary', ''], report.summary.items())}")


@dataclass(frozen=True)
class Panel:
    """One pair of axes, filled with rows.

    x, y: fields as `field_of` reads them; rows without y are left out
    series: the field, or the tuple of fields, that tells one line from the next
    kind: "line", "bar" (groups of bars side by side), "stack" (bars upon each other), "heat" (a
        map of values 0 to 1: x across, series down)
    points: a further y, drawn as unconnected circles in its line's colour (a published figure)
    styles: {series: matplotlib format}; levels: {label: y} as dotted horizontal lines
    axes: what Axes.set takes (title, xlabel, ylabel, xscale, yscale, ylim, ...)
    """

    rows: Sequence[Mapping]
    x: Key
    y: Key = "median"
    series: Key | tuple[str, ...] | None = None
    kind: str = "line"
    points: Key | None = None
    styles: Mapping[Any, str] = field(default_factory=dict)
    levels: Mapping[str, float] = field(default_factory=dict)
    axes: Mapping[str, Any] = field(default_factory=dict)

    def name(self, row: Mapping) -> Any:
        if isinstance(self.series, tuple):
            return ", ".join(_cell(field_of(row, key)) for key in self.series)
        return None if self.series is None else field_of(row, self.series)

    def lines(self) -> Iterator[tuple[Any, list[Mapping]]]:
        """(series, its rows), in the order of the rows."""
        rows = [row for row in self.rows if field_of(row, self.y) is not None]
        for name in dict.fromkeys(self.name(row) for row in rows):
            yield name, [row for row in rows if self.name(row) == name]


def draw(axes: Any, panel: Panel) -> None:
    """Fill a matplotlib Axes."""
    {"line": _draw_lines, "heat": _draw_heat}.get(panel.kind, _draw_bars)(axes, panel)
    for label, value in panel.levels.items():
        axes.axhline(value, color="gray", linestyle=":", label=label)
    axes.set(**panel.axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _draw_lines(axes: Any, panel: Panel) -> None:
    for name, rows in panel.lines():
        places = [field_of(row, panel.x) for row in rows]
        style = panel.styles.get(name, "o-")
        (line,) = axes.plot(places, [field_of(row, panel.y) for row in rows], style,
                            markersize=3, label=name)  # fmt: skip
        if panel.points is not None:
            values = np.array([field_of(row, panel.points) for row in rows], float)  # None: nan
            axes.plot(places, values, "o", color=line.get_color(), fillstyle="none")


def _draw_heat(axes: Any, panel: Panel) -> None:
    lines = list(panel.lines())
    across = list(dict.fromkeys(field_of(row, panel.x) for _, rows in lines for row in rows))
    values = np.full((len(lines), len(across)), np.nan)
    for place, (_, rows) in enumerate(lines):
        for row in rows:
            values[place, across.index(field_of(row, panel.x))] = field_of(row, panel.y)
    axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for (down, right), value in np.ndenumerate(values):
        axes.text(right, down, _cell(float(value)), ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(across)), [_cell(value) for value in across])
    axes.set_yticks(range(len(lines)), [_cell(name) for name, _ in lines])


def _draw_bars(axes: Any, panel: Panel) -> None:
    lines = list(panel.lines())
    names = list(dict.fromkeys(str(field_of(row, panel.x)) for _, rows in lines for row in rows))
    width = 0.8 if panel.kind == "stack" else 0.8 / max(1, len(lines))
    bottom = np.zeros(len(names))
    for number, (name, rows) in enumerate(lines):
        heights = np.zeros(len(names))
        for row in rows:
            heights[names.index(str(field_of(row, panel.x)))] = field_of(row, panel.y)
        if panel.kind == "stack":
            axes.bar(np.arange(len(names)), heights, width, bottom=bottom, label=name)
            bottom += heights
        else:
            places = np.arange(len(names)) + width * (number - (len(lines) - 1) / 2)
            axes.bar(places, heights, width, label=name)
    axes.set_xticks(np.arange(len(names)), names, fontsize=7, rotation=60 if len(names) > 6 else 0)


def plot(path: Path, *panels: Panel) -> None:
    """Write a PNG with the panels side by side. Needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        draw(figure.add_subplot(1, len(panels), place), panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
