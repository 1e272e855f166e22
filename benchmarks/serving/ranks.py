"""Several TP ranks: what their host tiers take, and a decode step of two tiers over one.

    python -m benchmarks.serving.ranks [--quick] [--json FILE] [--plot FILE]

 (a) memory: host bytes of a node at TP1, TP2 and TP4, the same number of slots, all of them
     written. allocated: by the pool; resident: physical pages behind the ranks' host tiers, each
     counted once, by the kernel (needs root).
 (b) speed: TP2 at equal batch, slots for all, the same prompts (prefix hits). The systems take
     turns of one answer each. Each rank has half of the cores; one rank's passes are timed.

The CPU platform's all-reduce is gloo's, by loopback: a larger share of a step than NCCL's.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import numpy as np

from benchmarks import harness
from benchmarks.harness import OtherLoad, Panel, Report, measured, ratios
from benchmarks.serving import speculative, two_tier
from benchmarks.serving.shared import finish_parts, parser_with_threads, prompts_of, run_parts
from benchmarks.serving.speculative import BATCH, CONTEXT, FITS, SPEED_MODEL, SYSTEMS
from benchmarks.serving.two_tier_figures import HEADLINE, ONE_TIER
from sglang_ess.layout import PAGE_SLOTS as PAGE
from tools.worker import Worker

BIND_VAR = "SGLANG_CPU_OMP_THREADS_BIND"
SPEED_RANKS = 2
HOST_MODEL = dict(layers=8, heads=4, hidden=64, q_lora_rank=32, intermediate=64,
                  moe_intermediate=32, experts=4, index_heads=2, index_topk=48)  # fmt: skip
HOST_SLOTS, HOST_PROMPT = 8192, 2048


@dataclass(frozen=True)
class Grid:
    """What one run measures.

    ranks: of (a); systems: of (b), each with rounds x new_tokens a request
    """

    ranks: tuple[int, ...]
    systems: tuple[str, ...]
    rounds: int
    new_tokens: int

    @property
    def slots(self) -> int:
        """Room in (b) for the batch."""
        return BATCH * (CONTEXT + self.new_tokens + 2 * PAGE)


QUICK = Grid((1, 2), (ONE_TIER, FITS), rounds=3, new_tokens=24)
FULL = Grid((1, 2, 4), (ONE_TIER, FITS, HEADLINE), rounds=12, new_tokens=32)


def bound(ranks: int, threads: int) -> str:
    """SGLang's variable for the cores of each rank: `threads` of them, in turn."""
    cores = sorted(os.sched_getaffinity(0))
    takes = [[cores[(i * threads + j) % len(cores)] for j in range(threads)] for i in range(ranks)]
    return "|".join(",".join(map(str, own)) for own in takes)


def engine(bench: two_tier.Bench, ranks: int, name: str, *args, **server_args) -> Worker:
    os.environ[BIND_VAR] = bound(ranks, bench.threads)  # its process starts with these variables
    return bench.engine(f"tp{ranks} {name}", *args, tp_size=ranks, **server_args)


def memory(bench: two_tier.Bench) -> None:
    """Part (a)."""
    model = bench.model("host-model", **HOST_MODEL)
    prompts = prompts_of(bench.seed, HOST_SLOTS // HOST_PROMPT, HOST_PROMPT - PAGE)
    for ranks in bench.grid.ranks:
        one = engine(bench, ranks, "host", model, {"hot_ratio": 0.1, "admission": "off"},
                     max_total_tokens=HOST_SLOTS)  # fmt: skip
        load = OtherLoad()
        with bench.running([one]):
            for prompt in prompts:
                one.call("generate", [prompt], 1, False)
            allocated = one.call("sizes")["host_bytes"]
            found = {"allocated": allocated, "resident": one.call("resident_host_bytes")}
        config = {"ranks": ranks, "slots": HOST_SLOTS}
        rows = [measured("memory", config, key, "B", [value]) for key, value in found.items()]
        bench.add(rows, load)
        bench.progress(f"TP{ranks}: {found['resident']} bytes of host memory")


def speed(bench: two_tier.Bench) -> None:
    """Part (b)."""
    grid, model = bench.grid, bench.model("speed-model", **SPEED_MODEL)
    args = {"max_total_tokens": grid.slots, "context_length": grid.slots // BATCH}
    engines = {
        system: engine(bench, SPEED_RANKS, system, model, {"admission": "off"} | SYSTEMS[system],
                       **args)
        for system in grid.systems
    }  # fmt: skip
    with bench.running(engines.values()):
        two_tier.check(bench, engines)
        windows, load = speculative.take_turns(bench, engines)
    theirs = [window.tokens_per_s for window in windows[ONE_TIER]]
    for system, found in windows.items():
        config = {"system": system, "ranks": SPEED_RANKS, "batch": BATCH, "context": CONTEXT,
                  "threads": bench.threads}  # fmt: skip
        speeds = [window.tokens_per_s for window in found]
        steps = [1e3 * step for window in found for step in window.steps]
        rows = [measured("speed", config, "decode", "tokens/s", speeds),
                measured("speed", config, "decode_step", "ms", steps),
                measured("speed", config, "vs_one_tier", "x", ratios(speeds, theirs))]  # fmt: skip
        bench.add(rows, load)
        bench.progress(f"{system}: {np.median(speeds):.1f} tokens/s")


def summarise(report: Report) -> None:
    """Fill report.summary. Ratios of speeds are medians of the rounds' paired ratios."""
    one = report.median("memory", "resident", ranks=1)
    for ranks in FULL.ranks:
        found = report.median("memory", "resident", ranks=ranks)
        report.summarise(f"host_bytes_tp{ranks}", found / one if found and one else None)
    for key, system in (("", FITS), ("_hot01", HEADLINE)):
        found = report.median("speed", "vs_one_tier", system=system)
        report.summarise(f"decode_tp2_vs_one_tier{key}", found)


def print_tables(report: Report) -> None:
    columns = {"ranks": "ranks", "allocated": "allocated", "resident": "resident"}
    bytes_of = harness.pivot(report.select("memory", kind="measured"), ("ranks",))
    harness.print_table(bytes_of, columns, "host bytes of a node")
    columns = {"system": "system", "tokens/s": "decode", "step ms": "decode_step",
               "over one-tier": "vs_one_tier"}  # fmt: skip
    speeds = harness.pivot(report.select("speed", kind="measured"), ("system",))
    harness.print_table(speeds, columns, f"TP{SPEED_RANKS}, equal batch: medians")


def panels(report: Report) -> tuple[Panel, Panel]:
    memories, speeds = report.select("memory", "resident"), report.select("speed", "decode")
    return (
        Panel(memories, "ranks", kind="bar", axes={"ylabel": "host bytes", "xlabel": "TP ranks"}),
        Panel(speeds, "system", kind="bar", axes={"ylabel": f"tokens/s, TP{SPEED_RANKS}"}),
    )


def main(argv: list[str] | None = None) -> int:
    options = parser_with_threads(__doc__).parse_args(argv)
    threads = max(1, options.threads // SPEED_RANKS)
    grid = QUICK if options.quick else FULL
    bench = run_parts(two_tier.Bench, grid, (memory, speed), options.seed, threads)
    summarise(bench.report)
    print_tables(bench.report)
    return finish_parts(bench, options, *panels(bench.report), threads=threads,
                        speed_model=SPEED_MODEL, host_model=HOST_MODEL)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
