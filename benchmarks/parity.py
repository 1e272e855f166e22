"""How far the CPU platform is from transformers, by format: the figures behind the tests.

For each architecture and setup: |logprob difference| per token with the engine's decisions forced
on transformers ("forced": what the arithmetic differs by), as a number and in units of what
rounding explains, and with transformers' own ("free": what a user sees); the overlap of the two
selections; and the same after a deliberate corruption.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import common
from tests.support import parity

SETUPS = {
    "exact": parity.EXACT,
    "fp8_index": parity.FP8_INDEX,
    # Beside the oracle's own float32 selection: what fp8 keys cost.
    "fp8_index_unrounded": replace(parity.FP8_INDEX, rounds_index=False),
    "bf16_rows": parity.BF16_ROWS,
    "fp8_rows": parity.FP8_ROWS,
    "bf16_model": parity.BF16_MODEL,
}
FAULTS = ("swap_neighbour", "read_foreign_row")


def differences(model, setup, lengths, seed, faults):
    """(fault, Difference) of one engine; None: as it is."""
    with setup.engine(model, faults=True) as engine:
        for fault in (None, *faults):
            with engine.switched(fault=fault):
                _, sequences = parity.scored(engine, parity.prompts_of(lengths, seed=seed))
            yield fault, parity.compare(setup, model, sequences, with_free=not fault)


def rows_of(arch, kind, difference, fault):
    config = {"arch": arch, "setup": kind, "fault": fault}
    forced = difference.logprob.engine
    yield common.measured("parity", config, "forced_logprob", "nat", forced)
    if len(difference.free_logprob):
        yield common.measured("parity", config, "free_logprob", "nat", difference.free_logprob)
    yield common.measured("parity", config, "overlap", "ratio", [difference.overlap])
    for part, ratio in difference.ratios().items():
        name = part.replace(" ", "_") + "_by_yardstick"
        yield common.measured("parity", config, name, "ratio", [ratio])


def measure(report, args, arch, model, kind) -> None:
    """Add the rows and summary figures of one setup, as it is and corrupted."""
    topk = 32
    lengths = [topk // 2, topk + 1, 3 * topk + 5, (8 if args.quick else 16) * topk + 19]
    faults = () if kind.startswith("fp8_index") else FAULTS
    for fault, found in differences(model, SETUPS[kind], lengths, args.seed + 1, faults):
        report.add(*rows_of(arch, kind, found, fault))
        name = f"{arch}_{kind}" + (f"_{fault}" if fault else "")
        forced, ratios = found.logprob.engine, found.ratios()
        report.summarise(f"{name}_mean", forced.mean())
        report.summarise(f"{name}_p99", np.quantile(forced, 0.99))
        report.summarise(f"{name}_max", forced.max())
        report.summarise(f"{name}_overlap", found.overlap)
        report.summarise(f"{name}_ratio", max(ratios.values()))
        if not fault:
            report.summarise(f"{name}_free_mean", found.free_logprob.mean())
            report.summarise(f"{name}_free_median", np.median(found.free_logprob))
        shown = "  ".join(f"{part} {ratio:.2g}" for part, ratio in ratios.items())
        print(f"{name:32s} forced mean {forced.mean():.1e} p99 {np.quantile(forced, 0.99):.1e}")
        print(f"    overlap {found.overlap:.5f}  x yardstick: {shown}", flush=True)


def main() -> None:
    args = common.arguments(__doc__.splitlines()[0]).parse_args()
    report = common.Report()
    with tempfile.TemporaryDirectory() as directory:
        for arch in ("v32", "glm"):
            model = parity.write_model(Path(directory) / arch, arch=arch, index_topk=32, heads=4)
            for kind in SETUPS:
                measure(report, args, arch, model, kind)
    if args.json:
        report.write(args.json, args.seed)
    if args.plot:
        plot(report, args.plot)


def plot(report, path: Path) -> None:
    """Mean difference by setup, clean beside corrupted, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, arch in zip(axes, ("v32", "glm"), strict=True):
        for offset, fault in enumerate(("", *(f"_{fault}" for fault in FAULTS))):
            bars = [(i, report.summary.get(f"{arch}_{kind}{fault}_mean")) for i, kind in
                    enumerate(SETUPS)]  # fmt: skip
            bars = [(i + offset * 0.27, height) for i, height in bars if height]
            axis.bar(*zip(*bars, strict=True), width=0.25, label=fault[1:] or "as it is")
        axis.set_xticks([i + 0.27 for i in range(len(SETUPS))], SETUPS, rotation=20)
        axis.set_yscale("log")
        axis.set_title(arch)
    axes[0].set_ylabel("mean |logprob difference| to transformers, nat")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
