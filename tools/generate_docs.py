"""Write the documentation's generated tables: python -m tools.generate_docs [--check]

A page keeps a table between two comments, `<!-- generated: NAME -->` and `<!-- end -->`. The
flags come from EssConfig, the architectures from the launcher's table, the series from the
Prometheus exporter, the hooks from ess_patches, the figures from results/*.json, the sizes of a
deployment from deploy/sizes.py. --check writes nothing and exits with status 1 for a stale page.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPO = Path(__file__).resolve().parent.parent
REGION = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.S)
UPSTREAM = "sglang.srt."
WHERE = {
    "cpu": "CPU platform",
    "cuda": "GPU",
    "both": "CPU platform and GPU",
    "always": "ESS",
}
# Sizes of a table of results. Larger ones are left to the file.
MAX_LINES, MAX_COLUMNS = 16, 9


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. A `|` inside a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |\n" for line in lines
    )


def flags() -> str:
    """A row for each field of EssConfig: its flag with its values, its default, its help."""
    from sglang_ess.config import EssConfig

    rows = []
    for field in fields(EssConfig):
        kind, choices = field.metadata["kind"], field.metadata["choices"]
        value = (
            "|".join(choices)
            if choices
            else {float: "NUMBER", int: "NUMBER", str: "TEXT"}.get(kind, "")
        )
        flag = f"{field.metadata['flag']} {value}".rstrip()
        rows.append((f"`{flag}`", _default(field.default), field.metadata["help"]))
    return table(("Flag", "Default", "Meaning"), rows)


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return "off"  # of the flag, which switches the field away from its default
    if value is None:
        return "automatic"
    return f"`{value:g}`" if isinstance(value, int | float) else f"`{value}`" if value else "none"


def metrics() -> str:
    """A row for each series that the exporter makes."""
    from prometheus_client import CollectorRegistry

    from sglang_ess.mem_cache.linker import LinkerFigures
    from sglang_ess.mem_cache.linker_metrics import StoreMetrics
    from sglang_ess.metrics import Exporter, LayerSnapshot, Snapshot
    from sglang_ess.store.page_store import StoreStats

    registry, figures = CollectorRegistry(), LinkerFigures()
    figures.failures["damaged"] = 1
    linker = SimpleNamespace(figures=figures, store_stats=StoreStats)
    exporter = Exporter({"model_name": "m"}, [0], registry)
    StoreMetrics(linker, {"model_name": "m"}, registry).update()
    # Some series begin with the first figure.
    group = LayerSnapshot(**{field.name: 0 for field in fields(LayerSnapshot)})
    exporter.update(Snapshot((group,), 0, 0))
    rows = []
    for family in registry.collect():
        names = {name for sample in family.samples for name in sample.labels}
        own = ", ".join(sorted(names - {"model_name", "le"})) or "none"
        name = family.name + ("_total" if family.type == "counter" else "")
        rows.append((f"`{name}`", family.type, own, family.documentation))
    del exporter
    return table(("Series", "Type", "Own labels", "Meaning"), rows)


def hooks() -> str:
    """A row for each upstream name that is hooked, with the first reason that is given for it."""
    from ess_patches import all_hooks

    by_target: dict[str, list[Any]] = {}
    for hook in all_hooks():
        if hook.is_registered:
            by_target.setdefault(hook.target, []).append(hook)
    rows = [
        (
            f"`{target.removeprefix(UPSTREAM)}`",
            found[0].kind,
            " and ".join(sorted({WHERE[hook.when] for hook in found})),
            found[0].reason,
        )
        for target, found in sorted(by_target.items())
    ]
    return table(("Upstream function", "Kind", "In force", "Why"), rows)


def architectures() -> str:
    """A row for each architecture with sparse attention: how it was tried, what came of it."""
    from sglang_ess.launch.architectures import ARCHITECTURES

    rows = [
        (f"`{name}`", one.models, one.tried, f"{one.found}: {one.missing}".removesuffix(": "))
        for name, one in ARCHITECTURES.items()
    ]
    return table(("Architecture", "Models", "Tried", "What came of it"), rows)


def touch_points() -> str:
    """A row for each upstream name that is used in place, with how."""
    from ess_patches import all_hooks

    by_target: dict[str, list[Any]] = {}
    for hook in all_hooks():
        if not hook.is_registered:
            by_target.setdefault(hook.target, []).append(hook)
    rows = [
        (
            f"`{target.removeprefix(UPSTREAM)}`",
            found[0].kind,
            " and ".join(sorted({WHERE[hook.when] for hook in found})),
        )
        for target, found in sorted(by_target.items())
    ]
    return table(("Upstream name", "Kind", "In force"), rows)


def results(name: str) -> str:
    """The conditions, summary and rows of results/NAME.json, which benchmarks.harness wrote."""
    file = REPO / "results" / f"{name}.json"
    report = json.loads(file.read_text())
    parts = [f"{_conditions(report)} File: [results/{file.name}](../results/{file.name}).\n"]
    if summary := report.get("summary"):
        rows = ((f"`{key}`", _number(value)) for key, value in summary.items())
        parts.append(table(("Summary", "Value"), rows))
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        by_name.setdefault(row["name"], []).append(row)
    parts += [_rows_table(title, rows) for title, rows in by_name.items()]
    return "\n".join(filter(None, parts))


def _conditions(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    kinds = " and ".join(sorted({row["kind"] for row in report["rows"]}))
    facts = [
        f"`{report['command']}`",
        str(report.get("date", "")),
        f"commit {str(versions.get('commit', 'unknown'))[:7]}",
        f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'an unknown CPU')}",
        f"rows: {kinds}",
    ]
    return "; ".join(filter(None, facts)) + "."


def _rows_table(title: str, rows: list[dict[str, Any]]) -> str:
    """Medians of one benchmark point a line, a column for each metric; "" if it is too large."""
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row["config"])
        if len({json.dumps(row["config"].get(key)) for row in rows}) > 1
    ]
    metrics = {row["metric"]: f"{row['metric']}, {row['unit']}" for row in rows}
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        at = {key: row["config"].get(key) for key in keys}
        line = lines.setdefault(json.dumps(at), at)
        line[f"metric {row['metric']}"] = row["median"]
    if len(lines) > MAX_LINES or len(keys) + len(metrics) > MAX_COLUMNS or len(lines) < 2:
        return ""
    cells = [*keys, *(f"metric {metric}" for metric in metrics)]
    body = ([_number(line.get(cell)) for cell in cells] for line in lines.values())
    return f"{title}\n\n" + table([*keys, *metrics.values()], body)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"


def deployment() -> str:
    """A row for each way to serve a model on one node, by formula."""
    from deploy import sizes

    return table(sizes.HEADER, sizes.lines())


def all_results() -> str:
    """A section for each file of results/."""
    files = sorted((REPO / "results").glob("*.json"))
    return "\n".join(f"### {file.stem}\n\n{results(file.stem)}" for file in files)


TABLES: dict[str, Callable[[], str]] = {
    "results": all_results,
    "deployment": deployment,
    "architectures": architectures,
    "flags": flags,
    "metrics": metrics,
    "hooks": hooks,
    "touch_points": touch_points,
}


def generated(text: str) -> str:
    """The page `text` with every generated region renewed."""
    return REGION.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main(argv: list[str] | None = None) -> int:
    """Renew all pages, or with --check name the stale ones: 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tools.generate_docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 for a stale page")
    check = parser.parse_args(argv).check
    stale = []
    for page in sorted((REPO / "docs").glob("*.md")):
        text = page.read_text()
        if (renewed := generated(text)) != text:
            stale.append(page)
            if not check:
                page.write_text(renewed)
    for page in stale:
        print(f"{page.relative_to(REPO)} {'is stale' if check else 'is renewed'}", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
