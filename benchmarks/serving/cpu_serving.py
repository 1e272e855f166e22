"""Serving a DSA model on the CPU: SGLang with sglang-ess against transformers' generate.

    python -m benchmarks.serving.cpu_serving [--quick] [--arch glm] [--json FILE] [--plot FILE]

One tiny checkpoint, one number of threads, one run; the systems take turns, never at once:
 (a) prefill and decode of sglang-ess by context, batch and KV format;
 (b) side by side with transformers, in rounds at 16 x 2048 tokens;
 (c) what a decode step spends in indexer scores, top-k, sparse attention and the rest;
 (d) a decode step with the thread waiting that sglang-ess sets, and with libgomp's default.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.harness import OtherLoad, failed, finish, measured
from benchmarks.serving import cpu_figures, shared
from benchmarks.serving.cpu_figures import HEADLINE, RATIOS, SPLIT_BATCH, WARMUP_STEPS, Timing
from benchmarks.serving.engines import TheirModel, TimedEngine
from benchmarks.serving.shared import end_on_sigterm, engine_env, parser_with_threads, prompts_of
from sglang_ess.config import EssConfig
from tools.worker import Worker, WorkerError

REPEATED_TOKENS = 8192  # a batch of at most this many tokens is prefilled three times
# A prompt shorter than the model's top-k, so that both systems attend to every position.
# Differences are below 0.1 in bf16 (measured); another model would be off by several.
CHECK_TOKENS, CHECK_LOGPROB = 96, 0.5


@dataclass(frozen=True)
class Grid:
    """Which points (batch, context) one run measures, in addition to HEADLINE.

    ours: bf16 rows; ours_fp8: fp8 rows
    growth: the two contexts that the growth figures compare, at SPLIT_BATCH
    """

    ours: tuple[tuple[int, int], ...]
    ours_fp8: tuple[tuple[int, int], ...]
    growth: tuple[int, int]
    rounds: int
    steps: int
    their_steps: int

    @property
    def points(self) -> set[tuple[int, int]]:
        """Points of bf16 rows. HEADLINE is measured in rounds instead."""
        return {*self.ours, *((SPLIT_BATCH, context) for context in self.growth)} - {HEADLINE}

    @property
    def slots(self) -> int:
        """Room for the largest point with nothing evicted or retracted, page rounding included."""
        points = (*self.points, *self.ours_fp8, HEADLINE)
        return max(batch * (context + self.steps + 256) for batch, context in points) + 4096


QUICK = Grid(ours=((1, 2048),), ours_fp8=(HEADLINE,), growth=(512, 2048), rounds=3, steps=24,
             their_steps=6)  # fmt: skip
POINTS = tuple((b, c) for c in (512, 1024, 2048, 4096, 8192) for b in (1, 4, 16))
FULL = Grid(POINTS, POINTS, growth=(1024, 8192), rounds=5, steps=48, their_steps=8)


class Bench(shared.Bench):
    """One run: the four systems, in workers that start with their first call."""

    def __init__(self, grid: Grid, arch: str, seed: int, threads: int, directory: Path):
        super().__init__(grid, seed, directory)
        self.threads, self.env = threads, engine_env(threads)
        self.path = self.model("model", arch=arch)
        self.bf16 = self._engine("auto", "ours")  # "auto" follows the model
        self.fp8 = self._engine("fp8_e4m3", "ours")
        self.libgomp = self._engine("auto", "libgomp")
        half = psutil.virtual_memory().available / 2**31
        log = directory / "transformers.log"
        self.theirs = Worker(TheirModel, self.path, env=self.env, log=log, memory_gib=half)

    def _engine(self, kv_cache_dtype: str, waits: str) -> Worker:
        stem = self.directory / f"{kv_cache_dtype}-{waits}"
        args = dict(model_path=self.path, kv_cache_dtype=kv_cache_dtype,
                    max_total_tokens=self.grid.slots)  # fmt: skip
        env = self.env | EssConfig(enabled=False, platform="cpu").to_env()
        return Worker(TimedEngine, f"{stem}.jsonl", args, waits, env=env, log=Path(f"{stem}.log"))

    def config(self, system: str, batch: int, context: int, **more) -> dict:
        shape = {"batch": batch, "context": context, "threads": self.threads}
        return {"system": system, **more} | shape

    def ours(self, worker, batch, context, steps, salt=0, fresh=True) -> Timing:
        prompts = prompts_of(self.seed, batch, context, salt)
        new_tokens = steps + WARMUP_STEPS + 2  # the first comes from prefill; n passes, n-1 gaps
        return cpu_figures.read_run(
            worker.call("generate", prompts, new_tokens, fresh), batch, context, fresh
        )

    def point(self, worker: Worker, kv: str, batch: int, context: int) -> None:
        """Add the rows of a point of sglang-ess; a failure becomes a row."""
        config = self.config("sglang-ess", batch, context, kv=kv, waits="ours")
        load, timing = OtherLoad(), Timing()
        try:
            for salt in range(3 if batch * context <= REPEATED_TOKENS else 1):
                timing += self.ours(worker, batch, context, self.grid.steps, salt)
            rows = cpu_figures.timing_rows(timing, config)
        except (WorkerError, ValueError) as error:
            rows = [failed("serving", config, "decode", "tokens/s", error)]
        self.add(rows, load)
        found = [f"{r['metric']} {r['median']:.0f} {r['unit']}" for r in rows if r["n"]][:2]
        self.progress(f"{kv}, {batch} x {context}: {', '.join(found) or rows[0]['error']}")


def check(bench: Bench) -> None:
    """Compare what the systems compute, before anything is timed.

    Raises: RuntimeError if greedy tokens of two identical runs differ, if transformers gives
    our first token another probability, or if the numbers of threads differ.
    """
    prompts = prompts_of(bench.seed, 3, CHECK_TOKENS, salt=1 << 20)
    threads = {bench.theirs.call("threads")}
    for worker in bench.bf16, bench.fp8, bench.libgomp:
        # One at a time: a batch may be split differently, and rounding depends on that.
        first, again = (
            [worker.call("generate", [prompt], 12, True, True) for prompt in prompts] for _ in "12"
        )
        tokens, same = ([run["token_ids"][0] for run in runs] for runs in (first, again))
        if tokens != same:
            raise RuntimeError(f"two identical greedy runs must agree: got {tokens} and {same}")
        threads |= {run["passes"][-1]["threads"] for run in first}
        if worker is bench.fp8:  # rounds its rows on purpose
            continue
        theirs = bench.theirs.call("logprobs", prompts, tokens)
        ours = [run["logprobs"][0] for run in first]
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if not worst <= CHECK_LOGPROB:
            raise RuntimeError(
                f"log-probabilities must be within {CHECK_LOGPROB} of transformers': "
                f"got {ours}, {theirs}"
            )
    if threads != {bench.threads}:
        raise RuntimeError(f"every system must have {bench.threads} threads: got {threads}")
    bench.progress(f"check passed: same tokens twice, transformers within {worst:.3f}")


def side_by_side(bench: Bench) -> None:
    """HEADLINE in rounds: ours, ours with libgomp's waiting, transformers; then the ratios."""
    totals = {name: Timing() for name in ("ours", "libgomp", "decode", "prefill")}
    pairs: dict[str, list[float]] = {key: [] for key in RATIOS}
    both, load = bench.config("both", *HEADLINE), OtherLoad()
    for number in range(bench.grid.rounds):
        try:
            timings = _round(bench, number)
        except (WorkerError, ValueError) as error:
            bench.report.add(failed("side_by_side", both, "speedup", "x", error))
            bench.progress(f"round {number + 1} failed: {error}")
            continue
        for name, timing in timings.items():
            totals[name] += timing
        for key, ratio in compare(**timings).items():
            pairs[key].append(ratio)
        found = ", ".join(f"{key} {values[-1]:.2f}x" for key, values in pairs.items())
        bench.progress(f"round {number + 1} of {bench.grid.rounds}: {found}")
    configs = {
        "ours": bench.config("sglang-ess", *HEADLINE, kv="bf16", waits="ours"),
        "libgomp": bench.config("sglang-ess", *HEADLINE, kv="bf16", waits="libgomp"),
        "decode": bench.config("transformers", *HEADLINE),
        "prefill": bench.config("transformers", 1, HEADLINE[1]),
    }
    rows = []
    for name, config in configs.items():
        rows += cpu_figures.timing_rows(totals[name], config)
    rows += [measured(RATIOS[key], both, "speedup", "x", pairs[key]) for key in RATIOS]
    bench.add(rows, load)


def _round(bench: Bench, number: int) -> dict[str, Timing]:
    steps, (batch, context) = bench.grid.steps, HEADLINE
    ours = bench.ours(bench.bf16, batch, context, steps, salt=number)
    # Its prompts are the same in each round: only their first prefill is worth its time.
    libgomp = bench.ours(bench.libgomp, batch, context, steps, fresh=number == 0)
    bench.theirs.call("start", prompts_of(bench.seed, batch, context))
    decode = Timing(steps=bench.theirs.call("decode", bench.grid.their_steps))
    # One whole prompt at a time is how transformers prefills fastest.
    prefill = bench.theirs.call("prefill", prompts_of(bench.seed, 1, context, number))
    return dict(ours=ours, libgomp=libgomp, decode=decode, prefill=Timing(prefill=[prefill]))


def compare(ours: Timing, libgomp: Timing, decode: Timing, prefill: Timing) -> dict[str, float]:
    """Speedups of one round at HEADLINE, by the keys of RATIOS; above 1 is better for ours.

    Steps are compared by their mean (that is throughput), waiting by the median as well.
    prefill is transformers' for one prompt of the batch.
    """
    mean, median = np.mean(ours.steps), np.median(ours.steps)
    return {
        "decode": float(np.mean(decode.steps) / mean),
        "prefill": prefill.prefill[0] * HEADLINE[0] / ours.prefill[0],
        "spin": float(np.mean(libgomp.steps) / mean),
        "spin_median": float(np.median(libgomp.steps) / median),
    }


def sweep(bench: Bench) -> None:
    """The other points, the smallest first."""
    grid = bench.grid
    for point in sorted({*grid.points, *grid.ours_fp8}, key=lambda p: p[0] * p[1]):
        if point in grid.points:
            bench.point(bench.bf16, "bf16", *point)
        if point in grid.ours_fp8:
            bench.point(bench.fp8, "fp8_e4m3", *point)


def parser():
    options = parser_with_threads("SGLang with sglang-ess on the CPU, against transformers.")
    options.add_argument("--arch", choices=("v32", "glm"), default="v32", help="of the model [v32]")
    return options


def measure(bench: Bench) -> None:
    """Raises: RuntimeError if the systems do not compute the same thing."""
    with bench.running((bench.bf16, bench.fp8, bench.libgomp, bench.theirs)):
        load = OtherLoad()
        check(bench)
        side_by_side(bench)
        sweep(bench)
        bench.report.machine["other_cpu_ratio"] = load.ratio()


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    grid = QUICK if options.quick else FULL
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="ess-bench-") as directory:
        bench = Bench(grid, options.arch, options.seed, options.threads, Path(directory))
        try:
            measure(bench)
        except RuntimeError as error:  # WorkerError is a RuntimeError
            print(f"cpu_serving: not timed: {error}", file=sys.stderr)
            return 1
    cpu_figures.summarise(bench.report, grid.growth)
    cpu_figures.print_tables(bench.report)
    config = {"arch": options.arch, "threads": options.threads, "minutes": bench.minutes()}
    finish(bench.report, options, *cpu_figures.panels(bench.report), **config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
