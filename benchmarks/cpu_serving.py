"""Serving a DSA model on the CPU: SGLang with sglang-ess against transformers' generate.

    python -m benchmarks.cpu_serving [--quick] [--arch glm] [--json FILE] [--plot FILE]

One tiny checkpoint, one number of threads, one run; the systems take turns, never at once:
 (a) prefill and decode of sglang-ess by context, batch and KV format;
 (b) transformers at the same points, and side by side in rounds at 16 x 2048 tokens;
 (c) what a decode step spends in indexer scores, top-k, sparse attention and the rest;
 (d) a decode step with the thread waiting that sglang-ess sets, and with libgomp's default.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if not __package__:  # `python benchmarks/cpu_serving.py` works too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil

from benchmarks.common import (
    ROOT,
    OtherLoad,
    Progress,
    Report,
    Worker,
    WorkerError,
    arguments,
    failed,
    measured,
    save_figure,
)
from benchmarks.serving_report import (
    HEADLINE,
    RATIOS,
    SPLIT_BATCH,
    draw,
    print_tables,
    summarise,
    timing_rows,
)
from benchmarks.serving_systems import WARMUP_STEPS, OurEngine, TheirModel, Timing, read_run
from sglang_ess.config import EssConfig

VOCABULARY = 256  # the tiny tokenizer's plain bytes
REPEATED_TOKENS = 8192  # prompts of up to so many tokens in all are prefilled three times
# A prompt shorter than the model's top-k, so that both systems attend to every position.
# Differences are below 0.1 in bf16 (measured); another model would be off by several.
CHECK_TOKENS, CHECK_LOGPROB = 96, 0.5


@dataclass(frozen=True)
class Plan:
    """Which points (batch, context) one run measures, beside HEADLINE.

    ours, ours_fp8, theirs: prefill and decode; theirs_prefill: whole prompts in transformers
    growth: the two contexts that the growth figures compare, at SPLIT_BATCH
    budget_s: points not started by then are rows that say so; HEADLINE and growth always run
    """

    ours: tuple[tuple[int, int], ...]
    ours_fp8: tuple[tuple[int, int], ...]
    theirs: tuple[tuple[int, int], ...]
    theirs_prefill: tuple[tuple[int, int], ...]
    growth: tuple[int, int]
    rounds: int
    steps: int
    their_steps: int
    budget_s: float

    @property
    def slots(self) -> int:
        """Room for the largest point with nothing evicted or retracted, page rounding included."""
        contexts = [(SPLIT_BATCH, context) for context in self.growth]
        points = (*self.ours, *self.ours_fp8, HEADLINE, *contexts)
        return max(batch * (context + self.steps + 256) for batch, context in points) + 4096


QUICK = Plan(
    ours=((1, 2048),),
    ours_fp8=(HEADLINE,),
    theirs=(),
    theirs_prefill=(),
    growth=(512, 2048),
    rounds=3,
    steps=24,
    their_steps=6,
    budget_s=240,
)
GRID = tuple((b, c) for c in (512, 1024, 2048, 4096, 8192) for b in (1, 4, 16))
FULL = Plan(
    ours=tuple(point for point in GRID if point != HEADLINE),
    ours_fp8=GRID,
    theirs=tuple((b, c) for b, c in GRID if (b, c) != HEADLINE and b * c <= 16 * 4096),
    theirs_prefill=((1, 512), (1, 1024), (1, 4096), (4, 512), (16, 512), HEADLINE),
    growth=(1024, 8192),
    rounds=5,
    steps=48,
    their_steps=8,
    budget_s=1300,
)


def prompts_of(seed: int, batch: int, context: int, salt: int = 0) -> list[list[int]]:
    """Distinct random prompts; the same arguments give the same ones."""
    rng = np.random.default_rng((seed, batch, context, salt))
    return rng.integers(0, VOCABULARY, (batch, context)).tolist()


# --- measuring --------------------------------------------------------------------------


class Bench:
    """One run: the four systems, in workers that start with their first call."""

    def __init__(self, plan: Plan, arch: str, seed: int, threads: int, directory: Path):
        self.plan, self.seed, self.threads = plan, seed, threads
        self.report, self.progress, self.started = Report(), Progress(), time.monotonic()
        self.model = make_model(directory / "model", arch, seed)
        env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        env |= dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"))
        self._env, self._directory = env, directory
        self.bf16 = self._engine("bf16", "auto", "ours")
        self.fp8 = self._engine("fp8_e4m3", "fp8_e4m3", "ours")
        self.libgomp = self._engine("bf16, libgomp's waiting", "auto", "libgomp")
        half = psutil.virtual_memory().available / 2**31
        log = directory / "transformers.log"
        self.theirs = Worker(TheirModel, self.model, env=env, log=log, memory_gib=half)

    def _engine(self, name: str, kv_cache_dtype: str, waits: str) -> Worker:
        stem = self._directory / f"{kv_cache_dtype}-{waits}"
        args = (self.model, kv_cache_dtype, self.plan.slots, f"{stem}.jsonl", waits)
        env = self._env | EssConfig(enabled=False, platform="cpu").to_env()
        return Worker(OurEngine, *args, env=env, log=Path(f"{stem}.log"))

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self.bf16, self.fp8, self.libgomp, self.theirs

    def config(self, system: str, batch: int, context: int, **more) -> dict:
        shape = {"batch": batch, "context": context, "threads": self.threads}
        return {"system": system, **more} | shape

    def ours(self, worker, batch, context, steps, salt=0, fresh=True) -> Timing:
        prompts = prompts_of(self.seed, batch, context, salt)
        new_tokens = steps + WARMUP_STEPS + 2  # the first comes from prefill; n passes, n-1 gaps
        return read_run(worker.call("generate", prompts, new_tokens, fresh), batch, context, fresh)

    def point(
        self, config: dict, measure: Callable[[], Timing], metric="decode", always=False
    ) -> None:
        """Add a point's rows; a failure, or no time left, becomes a row of that metric."""
        label = " ".join(str(value) for key, value in config.items() if key != "threads")
        if not always and time.monotonic() - self.started > self.plan.budget_s:
            error = f"not measured: the run's {self.plan.budget_s:.0f} s were spent"
            self.report.add(failed("serving", config, metric, "tokens/s", error))
            return
        load = OtherLoad()
        try:
            rows = timing_rows(measure(), config)
        except (WorkerError, ValueError) as error:
            rows = [failed("serving", config, metric, "tokens/s", error)]
        self.report.add(*[{**row, "other_cpu_ratio": load.ratio()} for row in rows])
        found = [f"{r['metric']} {r['median']:.0f} {r['unit']}" for r in rows if r["n"]][:2]
        self.progress(f"{label}: {', '.join(found) or rows[0]['error']}")


def make_model(path: Path, arch: str, seed: int) -> str:
    command = [sys.executable, "-m", "sglang_ess.tiny_model", "--out", str(path)]
    command += ["--arch", arch, "--seed", str(seed)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return str(path)


def check(bench: Bench) -> None:
    """Refuse to time systems that do not compute the same thing.

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
    load = OtherLoad()
    for number in range(bench.plan.rounds):
        try:
            timings = _round(bench, number)
        except (WorkerError, ValueError) as error:
            both = bench.config("both", *HEADLINE)
            bench.report.add(failed("side_by_side", both, "speedup", "x", error))
            bench.progress(f"round {number + 1} failed: {error}")
            continue
        for name, timing in timings.items():
            totals[name] += timing
        for key, ratio in compare(**timings).items():
            pairs[key].append(ratio)
        found = ", ".join(f"{key} {values[-1]:.2f}x" for key, values in pairs.items())
        batch, context = HEADLINE
        bench.progress(f"round {number + 1} of {bench.plan.rounds} at {batch} x {context}: {found}")
    configs = {
        "ours": bench.config("sglang-ess", *HEADLINE, kv="bf16", waits="ours"),
        "libgomp": bench.config("sglang-ess", *HEADLINE, kv="bf16", waits="libgomp"),
        "decode": bench.config("transformers", *HEADLINE),
        "prefill": bench.config("transformers", 1, HEADLINE[1]),
    }
    rows = [row for name in configs for row in timing_rows(totals[name], configs[name])]
    both = bench.config("both", *HEADLINE)
    rows += [measured(RATIOS[key], both, "speedup", "x", pairs[key]) for key in RATIOS]
    bench.report.add(*[{**row, "other_cpu_ratio": load.ratio()} for row in rows])


def _round(bench: Bench, number: int) -> dict[str, Timing]:
    steps, first = bench.plan.steps, number == 0
    ours = bench.ours(bench.bf16, *HEADLINE, steps, salt=number)
    # The same prompts each round: only their first prefill is worth its time.
    libgomp = bench.ours(bench.libgomp, *HEADLINE, steps, fresh=first)
    decode = _their_decode(bench, *HEADLINE)
    # One whole prompt at a time is how transformers prefills fastest.
    prompt = prompts_of(bench.seed, 1, HEADLINE[1], number)
    return {
        "ours": ours,
        "libgomp": libgomp,
        "decode": decode,
        "prefill": Timing(prefill=[bench.theirs.call("prefill", prompt)]),
    }


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
    """The other points; each goes through the systems before the next point."""
    plan = bench.plan
    growth = [(SPLIT_BATCH, context) for context in plan.growth]
    growth = [point for point in growth if point != HEADLINE]
    rest = {*plan.ours, *plan.ours_fp8, *plan.theirs, *plan.theirs_prefill} - {*growth}
    for point in [*growth, *sorted(rest, key=lambda p: p[0] * p[1])]:
        always = point in growth
        for worker, kv, points in (
            (bench.bf16, "bf16", (*plan.ours, *growth)),
            (bench.fp8, "fp8_e4m3", plan.ours_fp8),
        ):
            if point in points:
                config = bench.config("sglang-ess", *point, kv=kv, waits="ours")
                always_here = (always and kv == "bf16") or (point == HEADLINE)
                measure = partial(_repeat, bench, worker, *point)
                bench.point(config, measure, always=always_here)
        if point in plan.theirs:
            config = bench.config("transformers", *point)
            bench.point(config, partial(_their_decode, bench, *point))
        if point in plan.theirs_prefill:
            config = bench.config("transformers", *point)
            bench.point(config, partial(_their_prefill, bench, *point), "prefill")


def _repeat(bench: Bench, worker: Worker, batch: int, context: int) -> Timing:
    timing = Timing()
    for salt in range(3 if batch * context <= REPEATED_TOKENS else 1):
        timing += bench.ours(worker, batch, context, bench.plan.steps, salt)
    return timing


def _their_decode(bench: Bench, batch: int, context: int) -> Timing:
    bench.theirs.call("start", prompts_of(bench.seed, batch, context))
    return Timing(steps=bench.theirs.call("decode", bench.plan.their_steps))


def _their_prefill(bench: Bench, batch: int, context: int) -> Timing:
    prompts = prompts_of(bench.seed, batch, context)
    return Timing(prefill=[bench.theirs.call("prefill", prompts)])


def parser():
    options = arguments("SGLang with sglang-ess on the CPU, against transformers' generate.")
    options.add_argument("--arch", choices=("v32", "glm"), default="v32", help="of the model [v32]")
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--threads", type=int, default=cores, help="of every system [all cores]")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    plan = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers on the way out
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ess-bench-")))
        bench = Bench(plan, options.arch, options.seed, options.threads, directory)
        for worker in bench.workers:
            stack.enter_context(worker)
            worker.start()
        load = OtherLoad()
        try:
            check(bench)
        except RuntimeError as error:  # WorkerError is one
            print(f"cpu_serving: not timed: {error}", file=sys.stderr)
            return 1
        side_by_side(bench)
        sweep(bench)
        bench.report.machine["other_cpu_ratio"] = load.ratio()
        for worker in bench.workers:  # all at once: each takes seconds to end
            worker.hang_up()
    report = bench.report
    summarise(report, plan.growth)
    print_tables(report)
    if options.json:
        minutes = round((time.monotonic() - bench.started) / 60, 1)
        config = {"arch": options.arch, "quick": options.quick, "threads": options.threads}
        report.write(options.json, options.seed, **config, minutes=minutes)
    if options.plot:
        save_figure(options.plot, lambda axes: draw(report, axes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
