"""What two tiers buy and what they cost: SGLang one-tier against ESS, on the CPU platform.

    python -m benchmarks.serving.two_tier [--quick] [--json FILE] [--plot FILE]

One run, one number of threads, fp8 rows; the systems take turns of a few decode steps.
 (a) What it buys: the same device bytes for both, read back from the running pools, and more
     requests than either can run: unshared long prompts, then several questions on each of several
     long documents. How many run together, decode tokens/s of full batches, hits.
 (b) What it costs: equal batch, slots for all: a decode step at several hot ratios over the
     one-tier step, and prefill of 8K prompts.

docs/benchmarking.md says why BUYS_MODEL is shaped as it is. It has 205 MiB of weights, nearly all
of which a batch of four or more reads; with six layers ESS's two staging layers are small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import OtherLoad, finish, measured, ratios
from benchmarks.serving import shared, two_tier_figures
from benchmarks.serving.engines import DROPPED_PASSES, HeldEngine
from benchmarks.serving.shared import engine_env, parser_with_threads, prompts_of, run_parts
from benchmarks.serving.two_tier_figures import ONE_TIER, Window, buys_rows, prefill_tokens_per_s
from sglang_ess.config import EssConfig
from sglang_ess.layout import FP8_ROW_BYTES, GIB, INDEX_KEY_BYTES
from sglang_ess.layout import PAGE_SLOTS as PAGE
from tools.worker import Worker

LAYERS = 6
# Two of four experts active: a batch of 4 reads 94% of the experts if the router is fair.
BUYS_MODEL = dict(layers=LAYERS, dense_layers=0, hidden=1024, experts=4, moe_intermediate=1024,
                  index_heads=4)  # fmt: skip
CHECK_TOKENS = 480
CELL_BYTES = LAYERS * (FP8_ROW_BYTES + INDEX_KEY_BYTES)  # of one token, one-tier
ONE_TIER_REQUESTS = 4.3  # what the device bytes hold one-tier; a fraction is never admitted
SUBMITTED = 20
QUESTIONS, QUESTION_TOKENS = 3, 64  # on each document, and of each
COST_BATCH, COST_CONTEXT, PREFILL_CONTEXT = 16, 2048, 8192
MINIMUM_HOT_ROWS = 64  # capacity.MIN_HOT_ROWS, which comes with torch: a test compares them
# Of both sides of every comparison. Prompts are longer than a chunk, so that prefill has prefix
# rows to stream; with lpm a document's questions wait for its first one instead of computing it
# again; the batch limit is never reached.
SERVER_ARGS = dict(kv_cache_dtype="fp8_e4m3", chunked_prefill_size=2048, schedule_policy="lpm",
                   max_running_requests=128)  # fmt: skip


@dataclass(frozen=True)
class Grid:
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
    """Tokens that rounds of windows take, and some for the steps between them; whole pages."""
    return -(-(rounds * (steps + DROPPED_PASSES + 8) + 32) // PAGE) * PAGE


QUICK = Grid(prompt=2560, ratios=(0.1,), rounds=4, steps=12, cost_ratios=(1.0, 0.2), cost_rounds=8,
             cost_steps=16, prefill_rounds=2)  # fmt: skip
# Hot ratio 0 stands for the minimum.
FULL = Grid(prompt=4096, ratios=(0.1, 0.2), rounds=8, steps=24, cost_ratios=(1.0, 0.2, 0.1, 0.0),
            cost_rounds=20, cost_steps=16, prefill_rounds=5)  # fmt: skip


class Bench(shared.Bench):
    """One run: a report, and engines as the parts need them."""

    Engine: Callable = HeldEngine

    def __init__(self, grid, seed: int, threads: int, directory: Path):
        super().__init__(grid, seed, directory)
        self.threads = threads

    def engine(self, name: str, model: str, ess: dict, **server_args) -> Worker:
        stem = self.directory / name.replace(" ", "-")
        env = engine_env(self.threads) | EssConfig(platform="cpu", **ess).to_env()
        args = SERVER_ARGS | {"model_path": model} | server_args
        return Worker(self.Engine, f"{stem}.jsonl", args, env=env, log=Path(f"{stem}.log"))


def ess_name(ratio: float) -> str:
    return f"ess {ratio:g}" if ratio else "ess minimum"


def device_bytes(grid: Grid) -> int:
    """What (a) gives to each system: ONE_TIER_REQUESTS of latent rows and index keys."""
    return (one_tier_slots(grid) + PAGE) * CELL_BYTES


def one_tier_slots(grid: Grid) -> int:
    return int(ONE_TIER_REQUESTS * grid.request_tokens) // PAGE * PAGE


def buys_engines(bench: Bench, model: str) -> dict[str, Worker]:
    """The systems of (a): one limit on device bytes for all of them."""
    gib = device_bytes(bench.grid) / GIB
    args = {"context_length": bench.grid.request_tokens + PAGE}
    options = {ONE_TIER: {"enabled": False, "device_gib": gib}}
    for ratio in bench.grid.ratios:
        options[ess_name(ratio)] = dict(device_gib=gib, hot_ratio=ratio, admission="off")
    return {name: bench.engine(f"buys {name}", model, ess, **args) for name, ess in options.items()}


def cost_engines(bench: Bench, model: str) -> dict[str, Worker]:
    """The systems of (b): slots for the batch in all of them."""
    slots = bench.grid.cost_slots
    args = {"max_total_tokens": slots, "context_length": PREFILL_CONTEXT + 4 * PAGE}
    options = {ONE_TIER: {"enabled": False}}
    for ratio in bench.grid.cost_ratios:
        hot_ratio = ratio or MINIMUM_HOT_ROWS / slots
        options[ess_name(ratio)] = {"hot_ratio": hot_ratio, "admission": "off"}
    return {
        name: bench.engine(f"costs {name}", model, ess, **args) for name, ess in options.items()
    }


def check(bench: Bench, engines: dict[str, Worker]) -> None:
    """Refuse to time systems that write different tokens, or differ in their number of threads.

    Raises: RuntimeError (a WorkerError is one)
    """
    prompts = prompts_of(bench.seed, 2, CHECK_TOKENS, salt=1 << 20)
    # One at a time: a batch may be split differently, and rounding depends on that.
    runs = {
        name: [engine.call("generate", [prompt], 12) for prompt in prompts]
        for name, engine in engines.items()
    }
    tokens = {name: [run["token_ids"][0] for run in found] for name, found in runs.items()}
    # With fewer hot rows than top-k parts are merged, and rounding may decide a near-tie.
    exact = tokens.keys() - {ess_name(0)}
    if different := sorted(name for name in exact if tokens[name] != tokens[ONE_TIER]):
        raise RuntimeError(f"greedy tokens must be one-tier's: {', '.join(different)} differ")
    threads = {run["passes"][-1]["threads"] for found in runs.values() for run in found}
    if threads != {bench.threads}:
        raise RuntimeError(f"every system must have {bench.threads} threads: got {threads}")
    bench.progress(f"check passed: {len(exact)} systems write the same tokens")


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
    grid = bench.grid
    engines = buys_engines(bench, bench.model("buys-model", **BUYS_MODEL))
    with bench.running(engines.values()):
        check(bench, engines)
        sizes = {name: engine.call("sizes") for name, engine in engines.items()}
        for name, size in sizes.items():
            took, limit = size["device_bytes"], device_bytes(grid)
            if took > limit:
                raise RuntimeError(f"{name} must take {limit} device bytes: got {took}")
        for workload, prompts in (
            ("unshared", prompts_of(bench.seed, SUBMITTED, grid.prompt)),
            ("shared", shared_prompts(bench.seed, grid.prompt)),
        ):
            load = OtherLoad()
            before = hold(bench, engines, prompts, grid.new_tokens)
            windows = take_turns(engines, grid.rounds, grid.steps)
            for engine in engines.values():
                engine.call("drain")
            for name, found in windows.items():
                config = {"system": name, "workload": workload, "threads": bench.threads}
                config |= {"submitted": len(prompts), "prompt": grid.prompt}
                rows = buys_rows(found, windows[ONE_TIER], sizes[name], config, before[name])
                bench.add(rows, load)
                tokens = np.median([window.tokens_per_s for window in found])
                bench.progress(f"{workload}, {name}: {tokens:.0f} tokens/s")


def costs(bench: Bench) -> None:
    """Part (b)."""
    grid = bench.grid
    engines = cost_engines(bench, bench.model("costs-model"))
    shape = {"batch": COST_BATCH, "context": COST_CONTEXT, "threads": bench.threads}
    with bench.running(engines.values()):
        check(bench, engines)
        prefill_costs(bench, engines)
        load = OtherLoad()
        hold(bench, engines, prompts_of(bench.seed, COST_BATCH, COST_CONTEXT), grid.cost_new_tokens)
        windows = take_turns(engines, grid.cost_rounds, grid.cost_steps)
        for name, found in windows.items():
            if {window.batch for window in found} != {COST_BATCH}:
                raise RuntimeError(f"{name} must decode {COST_BATCH} requests at once")
            config = {"system": name} | shape
            steps = [1e3 * seconds for window in found for seconds in window.steps]
            misses = [window.misses_per_step for window in found]
            rows = [measured("costs", config, "decode_step", "ms", steps)]
            rows += [measured("costs", config, "misses", "rows/step", misses)]
            for metric, reduce in (("step_ratio", np.mean), ("step_ratio_median", np.median)):
                mine, theirs = ([reduce(w.steps) for w in windows[n]] for n in (name, ONE_TIER))
                rows.append(measured("costs", config, metric, "x", ratios(mine, theirs)))
            bench.add(rows, load)
            bench.progress(f"{name}: step {np.median(steps):.1f} ms")


def prefill_costs(bench: Bench, engines: dict[str, Worker]) -> None:
    """Prefill 8K prompts one at a time: one-tier and ESS at hot ratio 0.2, in turns."""
    names = (ONE_TIER, ess_name(0.2))
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(bench.grid.prefill_rounds):
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


def main(argv: list[str] | None = None) -> int:
    description = "SGLang one-tier against ESS: what two tiers buy, and what they cost."
    options = parser_with_threads(description).parse_args(argv)
    grid = QUICK if options.quick else FULL
    bench = run_parts(Bench, grid, (buys, costs), options.seed, options.threads)
    two_tier_figures.summarise(bench.report)
    two_tier_figures.print_tables(bench.report)
    finish(
        bench.report, options, *two_tier_figures.panels(bench.report), threads=options.threads,
        grid=asdict(grid), buys_model=BUYS_MODEL, server_args=SERVER_ARGS, minutes=bench.minutes(),
    )  # fmt: skip
    return 0 if bench.report.summary else 1


if __name__ == "__main__":
    sys.exit(main())
