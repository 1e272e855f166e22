"""Figures, tables, plot and cost table of benchmarks/kernels, from its rows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

from benchmarks.harness import Panel, Report, print_table, table
from sglang_ess.attention.overlap import CostTable, Mode
from sglang_ess.layout import FP8_ROW_BYTES

FP8 = {"row_bytes": FP8_ROW_BYTES}
PLAN_POINT = {"batch": 160, "topk": 2048}
EXPOSED_POINT = {"batch": 160, "misses": 256}
MIN_BATCH, MIN_MISSES = 16, 64  # from where fetch must reach the share of the peak
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
TARGETS = {
    "fetch_of_pcie_peak": (">=", 0.9),
    "plan_us": ("<=", 15),
    "swap_vs_hisparse": (">", 1),
    "exposed_share": ("<=", 0.1),
    "resident_overhead": ("<=", 1.01),
}


def best(candidates: Iterable[float | None], pick: Callable) -> float | None:
    found = [value for value in candidates if value is not None]
    return pick(found) if found else None


def peak(report: Report, direction: str) -> float | None:
    return report.figure("pcie_peak", key="gb_per_s", kind="measured", direction=direction)


def fetch_share(report: Report) -> float | None:
    """The lowest share of the measured peak, from MIN_BATCH requests and MIN_MISSES misses up."""
    limit = peak(report, "h2d")
    rates = [
        row["gb_per_s"]
        for row in report.select("fetch", kind="measured", system="triton", **FP8)
        if row["config"]["batch"] >= MIN_BATCH and row["config"]["misses"] >= MIN_MISSES
    ]
    return min(rates) / limit if limit and rates else None


def plan_worst(report: Report) -> float | None:
    """us of plan at PLAN_POINT, of the slowest miss count."""
    rows = report.select("plan", kind="measured", **PLAN_POINT)
    return max((row["median"] for row in rows), default=None)


def swap_ratio(report: Report, reorder: bool) -> float | None:
    """The lowest ratio of HiSparse's time to ours, over the points that both have."""
    found = []
    for theirs in report.select("swap", kind="measured", system="hisparse"):
        point = {key: theirs["config"][key] for key in ("batch", "misses", "row_bytes")}
        ours = report.median("swap", "time", system="ours_triton", reorder=reorder, **point)
        if ours:
            found.append(theirs["median"] / ours)
    return min(found, default=None)


def step_kernels(report: Report) -> list[str]:
    """Decode kernels that took steps, the first measured first."""
    rows = report.select("step", kind="measured")
    return list(dict.fromkeys(row["config"]["kernel"] for row in rows))


def step(report: Report, kernel: str, mode: Mode, bare=False, **point) -> float | None:
    at = FP8 | {"kernel": kernel, "mode": mode.value, "bare": bare} | point
    return report.median("step", "time", **at)


def exposed_share(report: Report, kernel: str, modes: Sequence[Mode]) -> float | None:
    """(step - the same step without misses) / fetch alone, of the better mode.

    What a mode costs besides the transfer, a second launch or a merge, counts as exposed.
    """
    without = step(report, kernel, Mode.OFF, batch=EXPOSED_POINT["batch"], misses=0)
    transfer = report.median("fetch", "time", system="triton", **FP8, **EXPOSED_POINT)
    with_misses = best((step(report, kernel, mode, **EXPOSED_POINT) for mode in modes), min)
    if None in (without, transfer, with_misses):
        return None
    return max(0.0, with_misses - without) / transfer


def resident_overhead(report: Report, kernel: str) -> float | None:
    """One request, no misses: our step without stand-ins / attention to resident rows."""
    point = {"batch": 1, "misses": 0}
    ours = best((step(report, kernel, m, bare=True, **point) for m in (Mode.OFF, Mode.DA)), min)
    resident = report.select("attention", kind="measured", kernel=kernel, batch=1, **FP8)
    if ours is None or not resident:
        return None
    return ours / max(resident, key=lambda row: row["config"]["heads"])["median"]


def summarise(report: Report) -> None:
    """Fill report.summary; what was not measured is left out."""
    kernels = step_kernels(report)

    def exposed(*modes: Mode) -> float | None:
        return best((exposed_share(report, k, modes) for k in kernels), min)

    figures = {
        "pcie_h2d_gb_per_s": peak(report, "h2d"),
        "pcie_d2h_gb_per_s": peak(report, "d2h"),
        "fetch_of_pcie_peak": fetch_share(report),
        "plan_us": plan_worst(report),
        "swap_vs_hisparse": swap_ratio(report, False),
        "swap_with_reorder_vs_hisparse": swap_ratio(report, True),
        "exposed_share": exposed(Mode.DA, Mode.DBA),
        "exposed_share_off": exposed(Mode.OFF),
        "resident_overhead": best((resident_overhead(report, k) for k in kernels), min),
    }
    for key, value in figures.items():
        report.summarise(key, value)


def cost_table(report: Report, source: str) -> CostTable | None:
    """Steps without their stand-ins, as OverlapPolicy reads them; None if one is missing.

    One request cannot be halved: there DBA costs what DA does.
    """
    kernels = step_kernels(report)
    if not kernels:
        return None
    rows = report.select("step", kind="measured", kernel=kernels[0], bare=False, **FP8)
    batches = sorted({row["config"]["batch"] for row in rows})
    misses = sorted({row["config"]["misses"] for row in rows})

    def around(batch, parts):
        indexer = report.median("indexer", "time", batch=batch, parts=parts)
        preattn = report.median("preattn", "time", batch=batch)
        return None if None in (indexer, preattn) else indexer + preattn

    def figure(mode, batch, count):
        if mode is Mode.DBA and batch == 1:
            return figure(Mode.DA, batch, count)
        took = step(report, kernels[0], mode, batch=batch, misses=count)
        rest = around(batch, 2 if mode is Mode.DBA else 1)
        return None if None in (took, rest) else max(0.0, took - rest)

    us = {m: tuple(tuple(figure(m, b, n) for n in misses) for b in batches) for m in Mode}
    halving = [around(batches[-1], parts) for parts in (2, 1)]
    empty = report.median("empty", "time", kernel=kernels[0], batch=batches[-1])
    found = [value for lines in us.values() for line in lines for value in line]
    if None in (*found, *halving, empty):
        return None
    halving_us = max(0.0, halving[0] - halving[1])
    return CostTable(tuple(batches), tuple(misses), us, empty, halving_us, source)


def print_tables(report: Report, costs: CostTable | None) -> None:
    """Print every row, and the summary with its targets."""
    tried = len(report.select(kind="interpreted"))
    if tried:
        print(f"{tried} rows interpreted on the CPU: their code ran, their times say nothing")

    def point(row):
        return " ".join(f"{key} {value}" for key, value in row["config"].items())

    columns = {"": "name", "point": point, "us": "median", "p10": "p10", "p90": "p90"}
    print_table(report.select(kind="measured"), columns | {"GB/s": "gb_per_s"})
    lines = []
    for key, value in report.summary.items():
        relation, limit = TARGETS.get(key, (None, None))
        met = None if limit is None else "met" if COMPARE[relation](value, limit) else "missed"
        lines.append([key, value, limit and f"{relation} {limit}", met])
    if lines:
        print(table(("", "value", "target", ""), lines))
    print("cost table of the overlap: " + ("complete" if costs else "not complete, not written"))


def panels(report: Report) -> tuple[Panel, ...]:
    """Fetch with the peak; swap-in with HiSparse's; a layer's step in the three modes."""
    batch = max((row["config"]["batch"] for row in report.select("fetch")), default=0)

    def rows(name: str, **config) -> list[dict]:
        found = report.select(name, kind="measured", batch=batch, **config)
        return sorted(found, key=lambda row: row["config"]["misses"])

    def axes(title: str, unit: str) -> dict:
        return {"title": f"{title}, {batch} requests", "xlabel": "misses a request",
                "ylabel": unit, "xscale": "symlog"}  # fmt: skip

    swaps = [row for row in rows("swap") if not row["config"].get("reorder")]
    limit = peak(report, "h2d")
    steps = rows("step", kernel=(step_kernels(report) or [None])[0], bare=False)
    return (
        Panel(rows("fetch", **FP8), "misses", "gb_per_s", "system", axes=axes("fetch", "GB/s"),
              levels={"large copy": limit} if limit else {}),
        Panel(swaps, "misses", series="system", axes=axes("plan and fetch", "us")),
        Panel(steps, "misses", series="mode", axes=axes("layer step", "us")),
    )  # fmt: skip
