"""Figures, tables, plot and cost table of benchmarks/kernels.py, from its rows."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

from benchmarks import common
from benchmarks.common import Report
from sglang_ess.attention.overlap import CostTable, Mode

ROW_BYTES = 656
PLAN_POINT = {"batch": 160, "topk": 2048}
EXPOSED_POINT = {"batch": 160, "misses": 256}
MIN_BATCH, MIN_MISSES = 16, 64  # from where fetch must reach the share of the peak
OUR_KERNELS = ("triton",)
FETCHES = (*OUR_KERNELS, "memcpy_per_row", "memcpy_batch", "index_select")
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
TARGETS = {  # issue 4
    "fetch_of_pcie_peak": (">=", 0.9),
    "plan_us": ("<=", 15),
    "swap_vs_hisparse": (">", 1),
    "exposed_share": ("<=", 0.1),
    "resident_overhead": ("<=", 1.01),
}


def measured_rows(report: Report, name: str, **config) -> list[dict]:
    return [
        row
        for row in report.rows
        if row["kind"] == "measured"
        and row["name"] == name
        and config.items() <= row["config"].items()
    ]


def best(candidates: Iterable[float | None], pick: Callable) -> float | None:
    found = [value for value in candidates if value is not None]
    return pick(found) if found else None


def peak(report: Report, direction: str) -> float | None:
    rows = measured_rows(report, "pcie_peak", direction=direction)
    return rows[-1]["gb_per_s"] if rows else None


def fetch_share(report: Report, system: str) -> float | None:
    """The least share of the measured peak from 64 misses and 16 requests up."""
    roof = peak(report, "h2d")
    rates = [
        row["gb_per_s"]
        for row in measured_rows(report, "fetch", system=system, row_bytes=ROW_BYTES)
        if row["config"]["batch"] >= MIN_BATCH and row["config"]["misses"] >= MIN_MISSES
    ]
    return min(rates) / roof if roof and rates else None


def plan_worst(report: Report, system: str) -> float | None:
    """us of plan at 160 x 2048, of the slowest miss count."""
    rows = measured_rows(report, "plan", system=system, **PLAN_POINT)
    return max((row["median"] for row in rows), default=None)


def swap_ratio(report: Report, system: str, reorder: bool) -> float | None:
    """The least of HiSparse's time over ours, at the points that both have."""
    found = []
    for theirs in measured_rows(report, "swap", system="hisparse"):
        point = {key: theirs["config"][key] for key in ("batch", "misses", "row_bytes")}
        ours = report.median("swap", "time", system=system, reorder=reorder, **point)
        if ours:
            found.append(theirs["median"] / ours)
    return min(found, default=None)


def step_kernels(report: Report) -> list[str]:
    """Decode kernels that took steps, the first measured first."""
    return list(dict.fromkeys(row["config"]["kernel"] for row in measured_rows(report, "step")))


def step(report: Report, kernel: str, mode: Mode, bare=False, **point) -> float | None:
    return report.median(
        "step", "time", kernel=kernel, mode=mode.value, bare=bare, row_bytes=ROW_BYTES, **point
    )


def exposed_share(report: Report, kernel: str, modes: Sequence[Mode]) -> float | None:
    """(step - the same step without misses) / fetch alone, of the better mode.

    What a mode costs beside the transfer, a second launch or a merge, counts as exposed.
    """
    without = step(report, kernel, Mode.OFF, batch=EXPOSED_POINT["batch"], misses=0)
    transfer = best(
        (report.median("fetch", "time", system=s, row_bytes=ROW_BYTES, **EXPOSED_POINT)
         for s in OUR_KERNELS[:1]), min,
    )  # fmt: skip
    with_misses = best((step(report, kernel, mode, **EXPOSED_POINT) for mode in modes), min)
    if None in (without, transfer, with_misses):
        return None
    return max(0.0, with_misses - without) / transfer


def resident_overhead(report: Report, kernel: str) -> float | None:
    """One request, no misses: our step without stand-ins / attention to resident rows."""
    point = {"batch": 1, "misses": 0}
    ours = best((step(report, kernel, m, bare=True, **point) for m in (Mode.OFF, Mode.DA)), min)
    resident = measured_rows(report, "attention", kernel=kernel, batch=1, row_bytes=ROW_BYTES)
    if ours is None or not resident:
        return None
    heads = max(row["config"]["heads"] for row in resident)
    alone = report.median(
        "attention", "time", kernel=kernel, batch=1, heads=heads, row_bytes=ROW_BYTES
    )
    return ours / alone


def summarise(report: Report) -> None:
    """The figures of issue 4; what was not measured is left out."""
    kernels = step_kernels(report)
    overlaps = (Mode.DA, Mode.DBA)
    figures = {
        "pcie_h2d_gb_per_s": peak(report, "h2d"),
        "pcie_d2h_gb_per_s": peak(report, "d2h"),
        "fetch_of_pcie_peak": best((fetch_share(report, s) for s in OUR_KERNELS), max),
        "plan_us": best((plan_worst(report, s) for s in OUR_KERNELS), min),
        "swap_vs_hisparse": best(
            (swap_ratio(report, f"ours_{s}", False) for s in OUR_KERNELS), max
        ),
        "swap_with_reorder_vs_hisparse": best(
            (swap_ratio(report, f"ours_{s}", True) for s in OUR_KERNELS), max
        ),
        "exposed_share": best((exposed_share(report, k, overlaps) for k in kernels), min),
        "exposed_share_off": best((exposed_share(report, k, [Mode.OFF]) for k in kernels), min),
        "resident_overhead": best((resident_overhead(report, k) for k in kernels), min),
    }
    for system in OUR_KERNELS:
        figures[f"fetch_of_pcie_peak_{system}"] = fetch_share(report, system)
        figures[f"plan_us_{system}"] = plan_worst(report, system)
        figures[f"swap_vs_hisparse_{system}"] = swap_ratio(report, f"ours_{system}", False)
    for key, value in figures.items():
        report.summarise(key, value)


def cost_table(report: Report, source: str) -> CostTable | None:
    """Steps without their stand-ins, as OverlapPolicy reads them; None where one is missing.

    One request cannot be halved: there DBA costs what DA does.
    """
    kernels = step_kernels(report)
    if not kernels:
        return None
    rows = measured_rows(report, "step", kernel=kernels[0], bare=False, row_bytes=ROW_BYTES)
    batches = sorted({row["config"]["batch"] for row in rows})
    misses = sorted({row["config"]["misses"] for row in rows})

    def around(batch, parts):
        indexer = report.median("indexer", "time", batch=batch, parts=parts)
        preattn = report.median("preattn", "time", batch=batch)
        return None if None in (indexer, preattn) else indexer + preattn

    def figure(mode, batch, count):
        took = step(report, kernels[0], mode, batch=batch, misses=count)
        rest = around(batch, 2 if mode is Mode.DBA else 1)
        if mode is Mode.DBA and batch == 1:
            return figure(Mode.DA, batch, count)
        return None if None in (took, rest) else max(0.0, took - rest)

    us = {m: tuple(tuple(figure(m, b, n) for n in misses) for b in batches) for m in Mode}
    halving = [around(batches[-1], parts) for parts in (2, 1)]
    empty = report.median("empty", "time", kernel=kernels[0], batch=batches[-1])
    figures = [value for table in us.values() for line in table for value in line]
    if None in (*figures, *halving, empty):
        return None
    return CostTable(tuple(batches), tuple(misses), us, empty, max(0.0, halving[0] - halving[1]),
                     source)  # fmt: skip


def _lines(report: Report) -> list[list]:
    lines = []
    for row in report.rows:
        config = " ".join(f"{key} {value}" for key, value in row["config"].items())
        figures = [row["median"], row["p10"], row["p90"], row.get("gb_per_s")]
        if row["kind"] == "interpreted":
            figures = [None] * len(figures)
        lines.append([row["name"], config, *figures])
    return lines


def print_tables(report: Report, costs: CostTable | None) -> None:
    """Every row, why some failed, and the summary beside its targets."""
    tried = sum(row["kind"] == "interpreted" for row in report.rows)
    if tried:
        print(f"{tried} rows interpreted on the CPU: their code ran, their times say nothing")
    headers = ("", "point", "us", "p10", "p90", "GB/s")
    print(common.table(headers, _lines(report)), end="\n\n")
    failed = [row for row in report.rows if row["kind"] == "failed"]
    for reason in dict.fromkeys(f"{row['name']}: {row['error']}" for row in failed):
        count = sum(f"{row['name']}: {row['error']}" == reason for row in failed)
        print(f"failed, {count} rows of {reason}")
    lines = []
    for key, value in report.summary.items():
        relation, limit = TARGETS.get(key, (None, None))
        verdict = None
        if limit is not None:
            verdict = "met" if COMPARE[relation](value, limit) else "missed"
        lines.append([key, value, limit and f"{relation} {limit}", verdict])
    if lines:
        print(common.table(("", "value", "target", ""), lines))
    print("cost table of the overlap: " + ("complete" if costs else "not complete, not written"))


def draw(report: Report, axes) -> None:
    """Fetch against the peak; swap-in against HiSparse's; a layer's step in the three modes."""
    batch = max((row["config"]["batch"] for row in report.rows if row["name"] == "fetch"),
                default=0)  # fmt: skip
    for system in FETCHES:
        _curve(axes[0], report, "fetch", "gb_per_s", system, system=system, batch=batch,
               row_bytes=ROW_BYTES)  # fmt: skip
    if (roof := peak(report, "h2d")) is not None:
        axes[0].axhline(roof, color="gray", linestyle=":", label="large copy")
    for system in ("ours_triton", "hisparse"):
        kind = {} if system == "hisparse" else {"reorder": False}
        _curve(axes[1], report, "swap", "median", system, system=system, batch=batch, **kind)
    for kernel in step_kernels(report)[:1]:
        for mode in Mode:
            _curve(axes[2], report, "step", "median", mode.value, kernel=kernel, batch=batch,
                   mode=mode.value, bare=False)  # fmt: skip
    for panel, title, unit in zip(
        axes, ("fetch", "plan and fetch", "layer step"), ("GB/s", "us", "us"), strict=True
    ):
        panel.set_title(f"{title}, {batch} requests")
        panel.set_xlabel("misses a request")
        panel.set_ylabel(unit)
        panel.set_xscale("symlog", base=2)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)


def _curve(panel, report: Report, name: str, key: str, label: str, **config) -> None:
    rows = [row for row in measured_rows(report, name, **config) if row.get(key) is not None]
    rows.sort(key=lambda row: row["config"]["misses"])
    if rows:
        panel.plot([row["config"]["misses"] for row in rows], [row[key] for row in rows],
                   marker="o", markersize=3, label=label)  # fmt: skip
