"""The GPU kernels: rows a second against PCIe's peak, against SGLang's HiSparse, with overlap.

    python -m benchmarks.kernels [--quick] [--seconds N] [--only SECTION] [--json F] [--plot F]

One run on a CUDA device, medians, each operation checked against its reference before it is timed
(timing.py). An import or launch that fails is a failed row with its reason. SECTIONS are in the
order in which they matter, so that --seconds cuts the least.

Exit status: 0, 1 if a result was wrong, 2 without a CUDA device. --interpret tries the code: on the
CPU, all in miniature, without figures, if CUDA's kernels are stood in for (tests/support/cuda_host)
"""

from __future__ import annotations

import os
import sys

from benchmarks.harness import Report, argument_parser, plot, print_failed
from benchmarks.serving import shared

SECTIONS = ("pcie", "fetch", "pack", "install", "swap", "attention", "steps", "other_steps")
DEFAULT_US = (400.0, 30.0)  # indexer, preattn: of a layer at batch 160; see arguments()


def arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--interpret", action="store_true", help="miniature on the CPU")
    add("--seconds", type=float, help="start nothing new after this [no limit]")
    add("--only", action="append", choices=SECTIONS, help="sections [all]")
    add("--indexer-us", type=float, default=DEFAULT_US[0],
        help="stand-in for the indexer at batch 160, us a layer [%(default)s: twice what ESS's "
        "figure 7 hides behind half of it at 128 K context, rounded down]")  # fmt: skip
    add("--preattn-us", type=float, default=DEFAULT_US[1],
        help="stand-in for the projections between plan and attention [%(default)s: their "
        "weights' bytes at 2 TB/s]")  # fmt: skip
    return parser


def card_facts(device) -> dict:
    """What the figures belong to."""
    import torch
    import triton

    facts = {"device": str(device), "torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"gpu": found.name, "l2_bytes": found.L2_cache_size, "cuda": torch.version.cuda}
    return facts | shared.card_facts()


def run_sections(bench, args, sizes) -> None:
    """Every section asked for; one that breaks as a whole is a failed row."""
    # Imported late, as --interpret must be set before.
    from benchmarks.kernels import attention, fetch, plan, points, step

    run = points.Run(bench, sizes, (args.indexer_us, args.preattn_us), args.seed)
    calls = (fetch.measure_peak, fetch.measure_fetch, fetch.measure_pack, fetch.measure_install,
             plan.measure_plans, attention.measure_attention, step.measure_first,
             step.measure_others)  # fmt: skip
    for name, section in zip(SECTIONS, calls, strict=True):
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
    from benchmarks.kernels import figures, points
    from benchmarks.kernels.timing import Bench

    device = torch.device("cpu" if args.interpret else "cuda")
    sizes = points.QUICK if args.quick else points.FULL
    report = Report()
    report.machine |= card_facts(device)
    bench = Bench(report, device, args.quick, args.seconds)
    run_sections(bench, args, points.MINIATURE if args.interpret else sizes)
    figures.summarise(report)
    source = " ".join(str(report.machine.get(key)) for key in ("gpu", "driver", "triton"))
    costs = figures.cost_table(report, source)
    figures.print_tables(report, costs)
    print_failed(report)
    if args.json:
        write_json(report, costs, args)
    if args.plot:
        plot(args.plot, *figures.panels(report))
    for name in bench.wrong:
        print(f"wrong result: {name}", file=sys.stderr)
    return 1 if bench.wrong else 0


def write_json(report: Report, costs, args) -> None:
    """The report, and in the same file the cost table that OverlapPolicy reads."""
    report.write(
        args.json, args.seed, {"overlap_costs": costs.as_dict()} if costs else None,
        quick=args.quick, interpreted=args.interpret, sections=args.only,
        indexer_us=args.indexer_us, preattn_us=args.preattn_us,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
