"""The GPU kernels: rows a second against PCIe's peak, against SGLang's HiSparse, with overlap.

One run on a CUDA device, medians, each operation checked against its reference before it is timed
(benchmarks/kernels_timing says how). Grid: batch 1, 16, 64, 160 x 2 to 2048 misses a request, top-k
2048, rows of 656 B (and a few of 1152 B), DeepSeek-V3.2's 128 heads (and 16, a rank of tensor
parallelism 8). An import or launch that fails is a failed row with its reason. Sections in the
order in which they matter, so that --seconds cuts the least: see SECTIONS.

Exit status: 0, 1 if a result was wrong, 2 without a CUDA device. --interpret runs a miniature of
every section on the CPU under Triton's interpreter, to try the code: its rows give no figures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

DEFAULT_US = (400.0, 30.0)  # indexer, preattn: of a layer at batch 160; see arguments()
ESS_POINT = (16, 64)  # batch, misses: the least for which fetch has a target


def arguments():
    from benchmarks import common

    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="miniature on the CPU")
    parser.add_argument("--seconds", type=float, help="start nothing new after this [no limit]")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), help="sections [all]")
    parser.add_argument(
        "--indexer-us", type=float, default=DEFAULT_US[0],
        help="stand-in for the indexer at batch 160, us a layer [%(default)s: twice what ESS's "
        "figure 7 hides behind half of it at 128 K context, rounded down]",
    )  # fmt: skip
    parser.add_argument(
        "--preattn-us", type=float, default=DEFAULT_US[1],
        help="stand-in for the projections between plan and attention [%(default)s: their "
        "weights' bytes at 2 TB/s]",
    )  # fmt: skip
    return parser


class Run:
    """What the sections share: a bench, sizes and one host tier of each row format."""

    def __init__(self, bench, args, sizes):
        import torch

        from benchmarks.kernels_points import host_tier
        from sglang_ess.layout import FP8_ROW_BYTES

        self.bench, self.sizes, self.seed = bench, sizes, args.seed
        self.us = args.indexer_us, args.preattn_us
        self.row_bytes = FP8_ROW_BYTES
        bench.progress("filling the host tier")
        generator = torch.Generator(bench.device).manual_seed(args.seed)
        slots = max(sizes.batches) * sizes.context
        self.host = host_tier(slots, FP8_ROW_BYTES, bench.device, generator)

    @property
    def points(self) -> list[tuple[int, int]]:
        return [(batch, misses) for batch in self.sizes.batches for misses in self.sizes.misses]

    @property
    def some_points(self) -> list[tuple[int, int]]:
        """The ends and the middle of both axes."""
        s = self.sizes
        picks = [{line[0], line[len(line) // 2], line[-1]} for line in (s.batches, s.misses)]
        return [(batch, misses) for batch, misses in self.points
                if batch in picks[0] and misses in picks[1]]  # fmt: skip

    @property
    def step_points(self) -> list[tuple[int, int]]:
        return [
            (batch, misses) for batch in self.sizes.batches for misses in (0, *self.sizes.misses)
        ]


def pcie(run: Run) -> None:
    from benchmarks.kernels_copies import measure_peak

    measure_peak(run.bench, run.sizes)


def fetch(run: Run) -> None:
    from benchmarks.kernels_copies import measure_fetch, measure_programs

    measure_fetch(run.bench, run.host, run.sizes, run.points, run.seed)
    point = ESS_POINT if ESS_POINT in run.points else run.points[-1]
    measure_programs(run.bench, run.host, run.sizes, point, run.seed)


def swap(run: Run) -> None:
    from benchmarks.kernels_plans import measure_plans

    measure_plans(run.bench, run.host, run.sizes, run.points, run.seed)


def attention(run: Run) -> None:
    from benchmarks.kernels_steps import measure_attention

    measure_attention(run.bench, run.sizes, run.row_bytes, run.sizes.batches, run.seed)


def _decode_kernels(run: Run) -> list[str]:
    """Those that take parts of lists, as preferred, less what failed when it ran alone."""
    from benchmarks.kernels_steps import step_kernels

    names = step_kernels(run.bench.device, run.host.dtype, run.sizes.heads[0])
    alone = [row for row in run.bench.report.rows if row["name"] == "attention"]
    ran = {row["config"]["kernel"] for row in alone if row["kind"] != "failed"}
    return [name for name in names if not alone or name in ran]


def steps(run: Run) -> None:
    from benchmarks.kernels_steps import measure_steps

    for name in _decode_kernels(run)[:1]:
        measure_steps(run.bench, run.host, run.sizes, name, run.step_points, run.us, run.seed)


def replaced(run: Run) -> None:
    from benchmarks.kernels_copies import measure_replaced

    measure_replaced(run.bench, run.host, run.sizes, run.some_points, run.seed)


def save(run: Run) -> None:
    from benchmarks.kernels_copies import measure_save

    measure_save(run.bench, run.host, run.sizes, run.seed)


def other_steps(run: Run) -> None:
    from benchmarks.kernels_steps import measure_steps

    points = [point for point in run.step_points if point[0] == max(run.sizes.batches)]
    for name in _decode_kernels(run)[1:]:
        measure_steps(run.bench, run.host, run.sizes, name, points, run.us, run.seed)


def bf16_rows(run: Run) -> None:
    """A few points of rows of 1152 B: fetch, and every decode kernel that reads them."""
    from benchmarks.kernels_copies import measure_fetch
    from benchmarks.kernels_points import BF16_ROW_BYTES
    from benchmarks.kernels_steps import measure_attention

    rows = run.host.view(-1)
    rows = rows[: rows.numel() // BF16_ROW_BYTES * BF16_ROW_BYTES].view(-1, BF16_ROW_BYTES)
    smaller = [point for point in run.some_points if point[0] < max(run.sizes.batches)]
    measure_fetch(run.bench, rows, run.sizes, smaller, run.seed)
    batches = (run.sizes.batches[0], run.sizes.batches[-1])
    measure_attention(run.bench, run.sizes, BF16_ROW_BYTES, batches, run.seed)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "pcie": pcie,
    "fetch": fetch,
    "swap": swap,
    "attention": attention,
    "steps": steps,
    "replaced": replaced,
    "save": save,
    "other_steps": other_steps,
    "bf16_rows": bf16_rows,
}


def card_facts(device) -> dict:
    """What the figures belong to."""
    import torch
    import triton

    facts = {"device": str(device), "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": found.name,
            "sms": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    return facts


def _driver() -> str | None:
    import subprocess

    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def run_sections(bench, args, sizes) -> None:
    """Every section asked for; one that breaks as a whole is a failed row."""
    run = Run(bench, args, sizes)
    for name, section in SECTIONS.items():
        if args.only and name not in args.only:
            continue
        try:
            section(run)
        except Exception as error:
            bench.fail(f"section {name}", {}, error)


def main(argv: list[str] | None = None) -> int:
    import torch

    args = arguments().parse_args(argv)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels' import
    elif not torch.cuda.is_available():
        print("benchmarks.kernels needs a CUDA device; --interpret tries its code without one.",
              file=sys.stderr)  # fmt: skip
        return 2
    from benchmarks import common, kernels_points, kernels_report
    from benchmarks.kernels_timing import Bench

    device = torch.device("cpu" if args.interpret else "cuda")
    sizes = kernels_points.MINIATURE if args.interpret else (
        kernels_points.QUICK if args.quick else kernels_points.FULL
    )  # fmt: skip
    report = common.Report()
    report.machine |= card_facts(device)
    bench = Bench(report, device, args.quick, args.seconds)
    run_sections(bench, args, sizes)
    kernels_report.summarise(report)
    source = " ".join(str(report.machine.get(key)) for key in ("gpu", "driver", "triton"))
    costs = kernels_report.cost_table(report, source)
    kernels_report.print_tables(report, costs)
    if args.json:
        write_json(report, costs, args)
    if args.plot:
        common.save_figure(args.plot, lambda a: kernels_report.draw(report, a), (15, 4.5), 3)
    for name in bench.wrong:
        print(f"wrong result: {name}", file=sys.stderr)
    return 1 if bench.wrong else 0


def write_json(report, costs, args) -> None:
    """The report, and beside it the cost table that OverlapPolicy reads."""
    import json

    content = report.as_dict(
        args.seed, quick=args.quick, interpreted=args.interpret, sections=args.only,
        indexer_us=args.indexer_us, preattn_us=args.preattn_us,
    )  # fmt: skip
    if costs:
        content["overlap_costs"] = costs.as_dict()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
