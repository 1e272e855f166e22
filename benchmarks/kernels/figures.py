"""Figures, tables, plot and cost table of benchmarks/kernels, from its rows."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from benchmarks.harness import Panel, Report, print_table
from sglang_ess.attention.overlap import CostTable, Mode

PLAN_POINT = {"batch": 160, "topk": 2048}
EXPOSED_POINT = {"batch": 160, "misses": 256}
MIN_BATCH, MIN_MISSES = 16, 64  # from where fetch must reach the share of the peak
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
TARGETS = {"fetch_of_pcie_peak": (">=", 0.9), "plan_us": ("<=", 15), "swap_vs_hisparse": (">", 1),
           "exposed_share": ("<=", 0.1), "resident_overhead": ("<=", 1.01)}  # fmt: skip


def least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def peak(report: Report, direction: str) -> float | None:
    return report.figure("pcie_peak", key="gb_per_s", kind="measured", direction=direction)


def fetch_share(report: Report) -> float | None:
    """The lowest share of the measured peak, from MIN_BATCH requests and MIN_MISSES misses up."""
    limit = peak(report, "h2d")
    rates = [
        row["gb_per_s"]
        for row in report.select("fetch", kind="measured")
        if row["config"]["batch"] >= MIN_BATCH and row["config"]["misses"] >= MIN_MISSES
    ]
    return min(rates) / limit if limit and rates else None


def swap_ratio(report: Report) -> float | None:
    """The lowest ratio of HiSparse's time to ours, over the points that both have."""
    return least(
        theirs["median"] / mine
        for theirs in report.select("swap", kind="measured", system="hisparse")
        if (mine := report.median("swap", "time", **theirs["config"] | {"system": "ours"}))
    )


def step_kernels(report: Report) -> list[str]:
    """Decode kernels that took steps, the first measured first."""
    rows = report.select("step", kind="measured")
    return list(dict.fromkeys(row["config"]["kernel"] for row in rows))


def step(report: Report, kernel: str, mode: Mode, bare=False, **point) -> float | None:
    return report.median("step", "time", kernel=kernel, mode=mode.value, bare=bare, **point)


def exposed_share(report: Report, kernel: str, modes: Sequence[Mode]) -> float | None:
    """(step - the same step without misses) / fetch alone, of the better mode.

    What a mode costs besides the transfer, a second launch or a merge, counts as exposed.
    """
    without = step(report, kernel, Mode.OFF, batch=EXPOSED_POINT["batch"], misses=0)
    transfer = report.median("fetch", "time", **EXPOSED_POINT)
    with_misses = least(step(report, kernel, mode, **EXPOSED_POINT) for mode in modes)
    if None in (without, transfer, with_misses):
        return None
    return max(0.0, with_misses - without) / transfer


def resident_overhead(report: Report, kernel: str) -> float | None:
    """One request, no misses: our step without stand-ins / attention to resident rows."""
    ours = least(
        step(report, kernel, mode, bare=True, batch=1, misses=0) for mode in (Mode.OFF, Mode.DA)
    )
    resident = report.select("attention", kind="measured", kernel=kernel, batch=1)
    if ours is None or not resident:
        return None
    return ours / max(resident, key=lambda row: row["config"]["heads"])["median"]


def summarise(report: Report) -> None:
    """Fill report.summary; what was not measured is left out."""
    kernels = step_kernels(report)
    plans = report.select("plan", kind="measured", **PLAN_POINT)
    figures = {
        "pcie_h2d_gb_per_s": peak(report, "h2d"),
        "pcie_d2h_gb_per_s": peak(report, "d2h"),
        "fetch_of_pcie_peak": fetch_share(report),
        "plan_us": max((row["median"] for row in plans), default=None),
        "swap_vs_hisparse": swap_ratio(report),
        "exposed_share": least(exposed_share(report, k, (Mode.DA, Mode.DBA)) for k in kernels),
        "exposed_share_off": least(exposed_share(report, k, (Mode.OFF,)) for k in kernels),
        "resident_overhead": least(resident_overhead(report, k) for k in kernels),
    }
    for key, value in figures.items():
        report.summarise(key, value)


def cost_table(report: Report, source: str) -> CostTable | None:
    """Steps without their stand-ins, as OverlapPolicy reads them; None if one is missing.

    One request cannot be halved: there DBA costs what DA does.
    """
    kernel = next(iter(step_kernels(report)), None)
    points = [row["config"] for row in report.select("step", kind="measured", kernel=kernel)]
    if not points:
        return None
    batches = sorted({point["batch"] for point in points})
    misses = sorted({point["misses"] for point in points})

    def around(batch, parts):
        indexer = report.median("indexer", "time", batch=batch, parts=parts)
        preattn = report.median("preattn", "time", batch=batch)
        return None if None in (indexer, preattn) else indexer + preattn

    def figure(mode, batch, count):
        mode = Mode.DA if mode is Mode.DBA and batch == 1 else mode
        took = step(report, kernel, mode, batch=batch, misses=count)
        rest = around(batch, 2 if mode is Mode.DBA else 1)
        return None if None in (took, rest) else max(0.0, took - rest)

    us = {m: tuple(tuple(figure(m, b, n) for n in misses) for b in batches) for m in Mode}
    whole, halves = (around(batches[-1], parts) for parts in (1, 2))
    empty = report.median("empty", "time", kernel=kernel, batch=batches[-1])
    found = [value for lines in us.values() for line in lines for value in line]
    if None in (*found, whole, halves, empty):
        return None
    return CostTable(tuple(batches), tuple(misses), us, empty, max(0.0, halves - whole), source)


def print_tables(report: Report, costs: CostTable | None) -> None:
    """Print every row, and the summary with its targets."""
    if tried := len(report.select(kind="interpreted")):
        print(f"{tried} rows interpreted on the CPU: their code ran, their times say nothing")

    def point(row):
        return " ".join(f"{key} {value}" for key, value in row["config"].items())

    columns = {"": "name", "point": point, "us": "median", "p10": "p10", "p90": "p90"}
    print_table(report.select(kind="measured"), columns | {"GB/s": "gb_per_s"})
    lines = []
    for key, value in report.summary.items():
        relation, limit = TARGETS.get(key, (None, None))
        met = None if limit is None else "met" if COMPARE[relation](value, limit) else "missed"
        target = limit and f"{relation} {limit}"
        lines.append({"": key, "value": value, "target": target, "met": met})
    print_table(lines, {key: key for key in ("", "value", "target", "met")})
    print("cost table of the overlap: " + ("complete" if costs else "not complete, not written"))


def panels(report: Report) -> list[Panel]:
    """At the largest batch: fetch; swap-in with HiSparse's; a layer's step in the three modes."""
    batch = max((row["config"]["batch"] for row in report.select("fetch")), default=0)
    found = []
    for name, y, series, config in (
        ("fetch", "gb_per_s", "system", {}), ("swap", "median", "system", {}),
        ("step", "median", ("kernel", "mode"), {"bare": False}),
    ):  # fmt: skip
        rows = report.select(name, kind="measured", batch=batch, **config)
        rows.sort(key=lambda row: row["config"]["misses"])
        axes = {"title": f"{name}, {batch} requests", "xlabel": "misses a request",
                "ylabel": "us" if y == "median" else "GB/s", "xscale": "symlog"}  # fmt: skip
        found.append(Panel(rows, "misses", y, series, axes=axes))
    return found
