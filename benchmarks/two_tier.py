"""What two tiers buy and what they cost: SGLang one-tier against ESS, on the CPU platform.

    python -m benchmarks.two_tier [--quick] [--json FILE] [--plot FILE]

One run, one number of threads, fp8 rows (656 B); the systems take turns of a few decode steps.
 (a) What it buys: the same device bytes for both (--ess-device-gib counts latent rows, index
     keys, maps, staging, everything; read back from the running pools), the same arguments and
     more requests than either can run: unshared long prompts, then several questions on each
     of several long documents. How many run together, decode tokens/s of full batches, hits.
 (b) What it costs: equal batch, slots for all: a decode step at several hot ratios over the
     one-tier step, and prefill of 8K prompts, cpu_serving's model shape and headline point.

The model of (a) has a real one's balance: a step reads the weights once whatever the batch, so
a larger batch gives more tokens (DeepSeek-V3.2: latent rows of 1.3 GB a request at 32K context,
hundreds of GB of weights). Of tiny_model's default shape nearly all decode time goes by the
request. BUYS_MODEL has 205 MiB of weights: two of its four experts are active for a token, so
prefill stays quick, and nearly all are read for a batch of four or more. Six layers make ESS's
two staging layers small against the pool.
Weights are random, so are prompts: how often decode finds its rows in the hot tier is these
models' own locality, not a trained model's. The miss rate is reported with every figure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # `python benchmarks/two_tier.py` works too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import (
    ROOT,
    OtherLoad,
    Progress,
    Report,
    Worker,
    arguments,
    failed,
    measured,
    ratios,
    save_figure,
)
from benchmarks.cpu_serving import CHECK_TOKENS, prompts_of
from benchmarks.two_tier_engine import DROPPED_PASSES, HeldEngine
from benchmarks.two_tier_report import (
    ONE_TIER,
    Window,
    buys_rows,
    draw,
    prefill_tokens_per_s,
    print_tables,
    summarise,
)
from sglang_ess.config import EssConfig

LAYERS = 6
# Two of four experts active: a batch of 4 reads 94% of the experts if the router is fair.
BUYS_MODEL = {
    "layers": LAYERS,
    "dense_layers": 0,
    "hidden": 1024,
    "experts": 4,
    "moe_intermediate": 1024,
    "index_heads": 4,
}
PAGE = 64
ROW_BYTES, INDEX_KEY_BYTES = 656, 132
CELL_BYTES = LAYERS * (ROW_BYTES + INDEX_KEY_BYTES)  # of one token, one-tier
ONE_TIER_REQUESTS = 4.3  # what the device bytes hold one-tier; a fraction is never admitted
SUBMITTED = 20
QUESTIONS, QUESTION_TOKENS = 3, 64  # a document; the prompt without them is the document
COST_BATCH, COST_CONTEXT, PREFILL_CONTEXT = 16, 2048, 8192
MINIMUM_HOT_ROWS = 64  # capacity.MIN_HOT_ROWS, which comes with torch: a test compares them
START_SECONDS = 900  # an import of SGLang takes 15 s of CPU; a busy machine has little of it
# Both sides of every comparison. Prompts longer than a chunk, so that prefill has prefix rows
# to stream; lpm, so that a document's questions wait for its first one instead of computing it
# again; a batch limit that is never reached.
SERVER_ARGS = {
    "kv_cache_dtype": "fp8_e4m3",
    "chunked_prefill_size": 2048,
    "schedule_policy": "lpm",
    "max_running_requests": 128,
}


@dataclass(frozen=True)
class Plan:
    """What one run measures.

    prompt: tokens of a request in (a); ratios: hot ratios in (a), the first is the headline's
    rounds x steps: decode steps of each system
    cost_ratios, cost_rounds, cost_steps: of (b); prefill_rounds: 8K prompts
    """

    prompt: int
    ratios: tuple[float, ...]
    rounds: int
    steps: int
    cost_ratios: tuple[float, ...]
    cost_rounds: int
    cost_steps: int
    prefill_rounds: int

    @property
    def new_tokens(self) -> int:
        """More than the rounds take: all requests outlast them."""
        return outlasting(self.rounds, self.steps)

    @property
    def request_tokens(self) -> int:
        return self.prompt + self.new_tokens + PAGE

    @property
    def cost_new_tokens(self) -> int:
        return outlasting(self.cost_rounds, self.cost_steps)

    @property
    def cost_slots(self) -> int:
        """Room for the batch and no more: a hot ratio is a share of these."""
        return COST_BATCH * (COST_CONTEXT + self.cost_new_tokens + PAGE)


def outlasting(rounds: int, steps: int) -> int:
    """Tokens that rounds of windows take, with some that run while one asks; whole pages."""
    return -(-(rounds * (steps + DROPPED_PASSES + 8) + 32) // PAGE) * PAGE


QUICK = Plan(
    prompt=2560,
    ratios=(0.1,),
    rounds=4,
    steps=12,
    cost_ratios=(1.0, 0.2),
    cost_rounds=8,
    cost_steps=16,
    prefill_rounds=2,
)
FULL = Plan(
    prompt=4096,
    ratios=(0.1, 0.2),
    rounds=8,
    steps=24,
    cost_ratios=(1.0, 0.2, 0.1, 0.0),  # 0: the minimum
    cost_rounds=20,
    cost_steps=16,
    prefill_rounds=5,
)


# --- the systems ------------------------------------------------------------------------


class Bench:
    """One run: a report, and engines as the parts need them."""

    def __init__(self, plan: Plan, seed: int, threads: int, directory: Path):
        self.plan, self.seed, self.threads, self.directory = plan, seed, threads, directory
        self.report, self.progress, self.started = Report(), Progress(), time.monotonic()

    def engine(self, name: str, model: str, ess: dict, **server_args) -> Worker:
        stem = self.directory / name.replace(" ", "-")
        env = {"OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        env |= dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"))
        env |= EssConfig(platform="cpu", **ess).to_env()
        args = SERVER_ARGS | {"model_path": model} | server_args
        return Worker(HeldEngine, f"{stem}.jsonl", args, env=env, log=Path(f"{stem}.log"))

    def model(self, name: str, **shape: int) -> str:
        path = self.directory / name
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
        command = [
            sys.executable,
            "-m",
            "sglang_ess.testing.tiny_model",
            "--out",
            str(path),
            *flags,
        ]
        command += ["--seed", str(self.seed)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return str(path)


def ess_name(ratio: float) -> str:
    return f"ess {ratio:g}" if ratio else "ess minimum"


def device_bytes(plan: Plan) -> int:
    """What (a) gives to each system: ONE_TIER_REQUESTS of latent rows and index keys."""
    return (one_tier_slots(plan) + PAGE) * CELL_BYTES


def one_tier_slots(plan: Plan) -> int:
    return int(ONE_TIER_REQUESTS * plan.request_tokens) // PAGE * PAGE


def buys_engines(bench: Bench, model: str) -> dict[str, Worker]:
    """The systems of (a): one limit on device bytes for all of them."""
    plan = bench.plan
    total = device_bytes(plan)
    args = {"context_length": plan.request_tokens + PAGE}
    one_tier = {"enabled": False, "device_gib": total / 2**30}
    engines = {ONE_TIER: bench.engine("buys one tier", model, one_tier, **args)}
    for ratio in plan.ratios:
        ess = {"device_gib": total / 2**30, "hot_ratio": ratio, "admission": "off"}
        name = ess_name(ratio)
        engines[name] = bench.engine(f"buys {name}", model, ess, **args)
    return engines


def cost_engines(bench: Bench, model: str) -> dict[str, Worker]:
    """The systems of (b): slots for the batch in all of them."""
    slots = bench.plan.cost_slots
    args = {"max_total_tokens": slots, "context_length": PREFILL_CONTEXT + 4 * PAGE}
    engines = {ONE_TIER: bench.engine("costs one tier", model, {"enabled": False}, **args)}
    for ratio in bench.plan.cost_ratios:
        ess = {"hot_ratio": ratio or MINIMUM_HOT_ROWS / slots, "admission": "off"}
        name = ess_name(ratio)
        engines[name] = bench.engine(f"costs {name}", model, ess, **args)
    return engines


def check(bench: Bench, engines: dict[str, Worker]) -> None:
    """Refuse to time systems that do not say the same, or have another number of threads.

    Raises: RuntimeError (a WorkerError is one)
    """
    prompts = prompts_of(bench.seed, 2, 5 * CHECK_TOKENS, salt=1 << 20)
    # One at a time: a batch may be split differently, and rounding depends on that.
    runs = {
        name: [engine.call("generate", [prompt], 12) for prompt in prompts]
        for name, engine in engines.items()
    }
    tokens = {name: [run["token_ids"][0] for run in found] for name, found in runs.items()}
    # Fewer hot rows than top-k: parts are merged, and rounding may decide a near-tie.
    exact = tokens.keys() - {ess_name(0)}
    if different := sorted(name for name in exact if tokens[name] != tokens[ONE_TIER]):
        raise RuntimeError(f"greedy tokens must be one-tier's: {', '.join(different)} differ")
    threads = {run["passes"][-1]["threads"] for found in runs.values() for run in found}
    if threads != {bench.threads}:
        raise RuntimeError(f"every system must have {bench.threads} threads: got {threads}")
    bench.progress(f"check passed: {len(exact)} systems write the same tokens")


# --- measuring --------------------------------------------------------------------------


def hold(bench: Bench, engines: dict[str, Worker], prompts, new_tokens: int) -> dict[str, int]:
    """Fill the engines one after another and hold them. {system: retractions on the way}."""
    found = {}
    for name, engine in engines.items():
        passes = engine.call("fill", prompts, new_tokens)
        found[name] = passes[-1]["retracted"]
        bench.progress(f"{name}: {passes[-1]['batch']} of {len(prompts)} requests run")
    return found


def take_turns(engines: dict[str, Worker], rounds: int, steps: int) -> dict[str, list[Window]]:
    """Windows of all held engines, one each a round; who begins changes."""
    names, windows = list(engines), {name: [] for name in engines}
    for number in range(rounds):
        for name in np.roll(names, -number).tolist():
            windows[name].append(Window(engines[name].call("window", steps)))
    return windows


def shared_prompts(seed: int, prompt: int) -> list[list[int]]:
    """QUESTIONS on each of SUBMITTED documents: prompts of `prompt` tokens."""
    documents = prompts_of(seed, SUBMITTED, prompt - QUESTION_TOKENS, salt=1)
    questions = prompts_of(seed, SUBMITTED * QUESTIONS, QUESTION_TOKENS, salt=2)
    return [documents[i // QUESTIONS] + question for i, question in enumerate(questions)]


def buys(bench: Bench) -> None:
    """Part (a)."""
    plan = bench.plan
    engines = buys_engines(bench, bench.model("buys-model", **BUYS_MODEL))
    with ExitStack() as stack:
        start(bench, stack, engines)
        check(bench, engines)
        sizes = {name: engine.call("sizes") for name, engine in engines.items()}
        for name, size in sizes.items():
            if size["device_bytes"] > device_bytes(plan):
                raise RuntimeError(
                    f"{name} must take {device_bytes(plan)} device bytes: {size['device_bytes']}"
                )
        for workload, prompts in (
            ("unshared", prompts_of(bench.seed, SUBMITTED, plan.prompt)),
            ("shared", shared_prompts(bench.seed, plan.prompt)),
        ):
            load = OtherLoad()
            before = hold(bench, engines, prompts, plan.new_tokens)
            windows = take_turns(engines, plan.rounds, plan.steps)
            for engine in engines.values():
                engine.call("drain")
            for name, found in windows.items():
                config = {"system": name, "workload": workload, "threads": bench.threads}
                config |= {"submitted": len(prompts), "prompt": plan.prompt}
                rows = buys_rows(found, windows[ONE_TIER], sizes[name], config, before[name])
                bench.report.add(*[{**row, "other_cpu_ratio": load.ratio()} for row in rows])
                tokens = np.median([window.tokens_per_s for window in found])
                bench.progress(f"{workload}, {name}: {tokens:.0f} tokens/s")
        hang_up(engines)


def costs(bench: Bench) -> None:
    """Part (b)."""
    plan = bench.plan
    engines = cost_engines(bench, bench.model("costs-model"))
    shape = {"batch": COST_BATCH, "context": COST_CONTEXT, "threads": bench.threads}
    with ExitStack() as stack:
        start(bench, stack, engines)
        check(bench, engines)
        prefill_costs(bench, engines)
        load = OtherLoad()
        hold(bench, engines, prompts_of(bench.seed, COST_BATCH, COST_CONTEXT), plan.cost_new_tokens)
        windows = take_turns(engines, plan.cost_rounds, plan.cost_steps)
        for name, found in windows.items():
            if {window.batch for window in found} != {COST_BATCH}:
                raise RuntimeError(f"{name} must decode {COST_BATCH} requests at once")
            config = {"system": name} | shape
            extra = {"other_cpu_ratio": load.ratio()}
            steps = [1e3 * seconds for window in found for seconds in window.steps]
            bench.report.add(measured("costs", config, "decode_step", "ms", steps, **extra))
            misses = [window.misses_per_step for window in found]
            bench.report.add(measured("costs", config, "misses", "rows/step", misses))
            for metric, reduce in (("step_ratio", np.mean), ("step_ratio_median", np.median)):
                mine, theirs = ([reduce(w.steps) for w in windows[n]] for n in (name, ONE_TIER))
                row = measured("costs", config, metric, "x", ratios(mine, theirs), **extra)
                bench.report.add(row)
            bench.progress(f"{name}: step {np.median(steps):.1f} ms")
        hang_up(engines)


def prefill_costs(bench: Bench, engines: dict[str, Worker]) -> None:
    """8K prompts, one at a time: one-tier and the hot ratio that has a target, in turns."""
    names = (ONE_TIER, ess_name(0.2))
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(bench.plan.prefill_rounds):
        prompts = prompts_of(bench.seed, 1, PREFILL_CONTEXT, salt=number)
        for name in names if number % 2 else names[::-1]:
            run = engines[name].call("generate", prompts, 1)
            found[name].append(prefill_tokens_per_s(run, PREFILL_CONTEXT))
    for name in names:
        config = {"system": name, "batch": 1, "context": PREFILL_CONTEXT, "threads": bench.threads}
        bench.report.add(measured("costs", config, "prefill", "tokens/s", found[name]))
        paired = ratios(found[name], found[ONE_TIER])
        bench.report.add(measured("costs", config, "prefill_ratio", "x", paired))
        bench.progress(f"{name}: prefill {np.median(found[name]):.0f} tokens/s")


def start(bench: Bench, stack: ExitStack, engines: dict[str, Worker]) -> None:
    bench.progress(f"starting {len(engines)} engines at once: {', '.join(engines)}")
    for engine in engines.values():
        stack.enter_context(engine)
        engine.start()
    for engine in engines.values():
        engine.wait(START_SECONDS)


def hang_up(engines: dict[str, Worker]) -> None:
    """All at once: each takes seconds to end."""
    for engine in engines.values():
        engine.hang_up()


def run(bench: Bench, parts: Sequence) -> None:
    """A part that fails becomes a row, and the other part is measured still."""
    for part in parts:
        try:
            part(bench)
        except (RuntimeError, ValueError) as error:  # WorkerError is a RuntimeError
            bench.report.add(failed(part.__name__, {}, "all", "", error))
            bench.progress(f"{part.__name__}: not measured: {error}")


def parser():
    options = arguments("SGLang one-tier against ESS: what two tiers buy, and what they cost.")
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--threads", type=int, default=cores, help="of every system [all cores]")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    plan = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers on the way out
    with tempfile.TemporaryDirectory(prefix="ess-bench-") as directory:
        bench = Bench(plan, options.seed, options.threads, Path(directory))
        load = OtherLoad()
        run(bench, (buys, costs))
        bench.report.machine["other_cpu_ratio"] = load.ratio()
    report = bench.report
    summarise(report)
    print_tables(report)
    if options.json:
        config = {"quick": options.quick, "threads": options.threads, "plan": asdict(plan)}
        config |= {"buys_model": BUYS_MODEL, "server_args": SERVER_ARGS}
        config |= {"minutes": round((time.monotonic() - bench.started) / 60, 1)}
        report.write(options.json, options.seed, **config)
    if options.plot:
        save_figure(options.plot, lambda axes: draw(report, axes))
    return 0 if report.summary else 1


if __name__ == "__main__":
    sys.exit(main())
