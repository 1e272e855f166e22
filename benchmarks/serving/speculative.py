"""Speculative decoding over one tier and two: tokens/s at equal batch, requests at equal bytes.

    python -m benchmarks.serving.speculative [--quick] [--json FILE] [--plot FILE]

SGLang's EAGLE with chains of drafts: a verify step has `queries` of a request, its drafts and one.
One run, one number of threads, fp8 rows, one checkpoint a part.
 (a) speed: equal batch, slots for all, the same prompts (prefix hits). The systems take turns of
     one answer each. Only passes of the whole batch count. The weights make most drafts right:
     rows have the accept length.
 (b) batch: the same device bytes, the draft layer's included, for one tier and ESS, read back from
     the running pools, and more requests than either can run. The model has DeepSeek-V3.2's number
     of layers, rows and index keys, and is otherwise narrow. requests_ratio is rounded to whole
     requests, and SGLang admits by an estimate: slots_ratio is not. With it, computed: the largest
     batches of real models, by benchmarks.serving.capacity.

Most of SPEED_MODEL's step is its linear layers, as of a real one at a small batch. Its MTP layer is
one layer in 9, in DeepSeek-V3.2 one in 62: drafts cost more here.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import OtherLoad, Panel, Report, computed, measured, ratios
from benchmarks.serving import two_tier
from benchmarks.serving.shared import finish_parts, parser_with_threads, prompts_of, run_parts
from benchmarks.serving.two_tier_figures import HEADLINE, ONE_TIER, Window, buys_rows
from sglang_ess.config import ENV_VAR
from sglang_ess.layout import FP8_ROW_BYTES, GIB, INDEX_KEY_BYTES
from sglang_ess.layout import PAGE_SLOTS as PAGE
from tools.worker import Worker

# Top-k is 1/16 of the context, as V3.2's of 32K.
SPEED_MODEL = dict(layers=8, dense_layers=8, hidden=1024, intermediate=4096, experts=4,
                   moe_intermediate=1024, index_heads=4, index_topk=48, mtp_layers=1,
                   drafts="right")  # fmt: skip
BATCH, CONTEXT = 4, 768
FITS, PLAIN = "ess 1", 1  # all rows stay hot, so nothing misses; queries of a step without drafts
SYSTEMS = {ONE_TIER: {"enabled": False}, FITS: {"hot_ratio": 1.0}, HEADLINE: {"hot_ratio": 0.1}}
# (system, queries); those that are compared stand together. An engine takes a GiB to itself.
FOUR = ((ONE_TIER, PLAIN), (FITS, PLAIN), (FITS, 4), (ONE_TIER, 4))

BATCH_MODEL = dict(layers=61, dense_layers=61, heads=2, nope_dim=32, v_dim=32, index_heads=2,
                   hidden=64, q_lora_rank=32, intermediate=64, moe_intermediate=32, experts=4,
                   index_topk=32, mtp_layers=1)  # fmt: skip
BATCH_QUERIES, BATCH_STEPS, SUBMITTED, PROMPT = 4, 4, 20, 512
CELL_BYTES = (BATCH_MODEL["layers"] + 1) * (FP8_ROW_BYTES + INDEX_KEY_BYTES)
CAPACITY_GIB, CAPACITY_MODELS = 40, ("v32", "glm52")


@dataclass(frozen=True)
class Grid:
    """What one run measures.

    systems: of (a), each with rounds x new_tokens a request
    """

    systems: tuple[tuple[str, int], ...]
    rounds: int
    new_tokens: int

    @property
    def slots(self) -> int:
        """Room in (a) for the batch, and for what SGLang sets aside for the drafts of a step."""
        return BATCH * (CONTEXT + self.new_tokens + 2 * PAGE)

    @property
    def batch_new_tokens(self) -> int:
        """More than the steps of (b) take even if each draft is accepted."""
        return BATCH_QUERIES * two_tier.outlasting(1, BATCH_STEPS)

    @property
    def request_tokens(self) -> int:
        return PROMPT + self.batch_new_tokens + PAGE


QUICK = Grid(FOUR, rounds=3, new_tokens=24)
FULL = Grid((*FOUR, (HEADLINE, 4), (ONE_TIER, 2), (FITS, 2)), rounds=10, new_tokens=32)


def drafting(queries: int) -> dict[str, Any]:
    """SGLang's options for this many queries a request and step."""
    if queries == PLAIN:
        return {}
    return dict(speculative_algorithm="EAGLE", speculative_eagle_topk=1,
                speculative_num_steps=queries - 1,
                speculative_num_draft_tokens=queries)  # fmt: skip


class Capacity:
    """Largest batches of real models with an MTP layer. Needs a process without a platform."""

    def requests(self, model: str) -> dict[str, int]:
        from benchmarks.serving import capacity

        point = capacity.Point(model, capacity.HEADLINE, CAPACITY_GIB * GIB, mtp_layers=1)
        found = {ONE_TIER: capacity.one_tier(point), HEADLINE: capacity.ess(point, capacity.RATIO)}
        return {system: sizes["requests"] for system, sizes in found.items()}


def whole_batches(run: dict) -> Window:
    """The decode passes of a HeldEngine.generate() that have all requests."""
    decode = [one for one in run["passes"] if one["mode"] == "DECODE"]
    return Window([one for one in decode if one["batch"] == BATCH])


def accept_length(window: Window) -> float:
    """Tokens that a request keeps of a step."""
    return window.kept / (window.batch * len(window.steps))


def speed(bench: two_tier.Bench) -> None:
    """Part (a)."""
    grid, model = bench.grid, bench.model("speed-model", **SPEED_MODEL)
    args = {"max_total_tokens": grid.slots, "context_length": grid.slots // BATCH}
    engines = {
        (system, queries): bench.engine(
            f"{system} {queries}", model, {"admission": "off"} | SYSTEMS[system],
            **args, **drafting(queries),
        )
        for system, queries in grid.systems
    }  # fmt: skip
    with bench.running(engines.values()):
        for width in sorted({queries for _, queries in engines}):
            same = {system: engines[system, n] for system, n in engines if n == width}
            two_tier.check(bench, same)
        windows, load = take_turns(bench, engines)
        for (system, queries), found in windows.items():
            rows = speed_rows(found, windows, system, queries, bench.threads)
            bench.add(rows, load)
            tokens = np.median([window.tokens_per_s for window in found])
            bench.progress(f"{system}, {queries} queries: {tokens:.1f} tokens/s")


def take_turns(
    bench: two_tier.Bench, engines: Mapping[Any, Worker]
) -> tuple[dict[Any, list[Window]], OtherLoad]:
    """Answers of one batch by each engine in turn, one a round; who begins changes."""
    grid, prompts = bench.grid, prompts_of(bench.seed, BATCH, CONTEXT)
    for engine in engines.values():
        engine.call("generate", prompts, grid.new_tokens)
    load, windows, order = OtherLoad(), {key: [] for key in engines}, deque(engines)
    for _ in range(grid.rounds):
        for key in order:
            run = engines[key].call("generate", prompts, grid.new_tokens, False)
            windows[key].append(whole_batches(run))
        order.rotate()
    return windows, load


def speed_rows(
    found: Sequence[Window], windows: dict, system: str, queries: int, threads: int
) -> list[dict]:
    """Rows of a system. windows: of all systems, {(system, queries): one a round}"""
    config = {"system": system, "queries": queries, "batch": BATCH, "context": CONTEXT}

    def row(metric, unit, samples):
        return measured("speed", config | {"threads": threads}, metric, unit, samples)

    def paired(metric, key):
        theirs = [window.tokens_per_s for window in windows[key]]
        return row(metric, "x", ratios(speeds, theirs))

    speeds = [window.tokens_per_s for window in found]
    rows = [
        row("decode", "tokens/s", speeds),
        row("decode_step", "ms", [1e3 * step for window in found for step in window.steps]),
        row("accept_length", "tokens/step", [accept_length(window) for window in found]),
    ]
    if system != ONE_TIER:
        rows.append(row("misses", "rows/step", [window.misses_per_step for window in found]))
        rows.append(paired("vs_one_tier", (ONE_TIER, queries)))
    if queries != PLAIN and (system, PLAIN) in windows:
        rows.append(paired("gain", (system, PLAIN)))
    return rows


def batch(bench: two_tier.Bench) -> None:
    """Part (b), what runs."""
    grid, model = bench.grid, bench.model("batch-model", **BATCH_MODEL)
    limit = (two_tier.one_tier_slots(grid) + PAGE) * CELL_BYTES
    args = drafting(BATCH_QUERIES) | {"context_length": grid.request_tokens + PAGE}
    engines = {
        name: bench.engine(
            f"batch {name}", model, {"admission": "off", "device_gib": limit / GIB} | SYSTEMS[name],
            **args,
        )
        for name in (ONE_TIER, HEADLINE)
    }  # fmt: skip
    with bench.running(engines.values()):
        sizes = {name: engine.call("sizes") for name, engine in engines.items()}
        if any(size["device_bytes"] > limit for size in sizes.values()):
            raise RuntimeError(f"each system must take {limit} device bytes: got {sizes}")
        load, prompts = OtherLoad(), prompts_of(bench.seed, SUBMITTED, PROMPT)
        before = two_tier.hold(bench, engines, prompts, grid.batch_new_tokens)
        windows = two_tier.take_turns(engines, 1, BATCH_STEPS)
        for name, found in windows.items():
            config = {"system": name, "queries": BATCH_QUERIES, "threads": bench.threads}
            config |= {"submitted": SUBMITTED, "prompt": PROMPT}
            rows = buys_rows(found, windows[ONE_TIER], sizes[name], config, before[name])
            rows = [row | {"name": "batch"} for row in rows if row["metric"] != "layer_hit_rate"]
            bench.add(rows, load)


def real_models(bench: two_tier.Bench) -> None:
    """Part (b), what is computed."""
    env = dict.fromkeys((ENV_VAR, "SGLANG_USE_CPU_ENGINE", "SGLANG_PLATFORM"))
    with Worker(Capacity, env=env, log=bench.directory / "capacity.log") as worker:
        for model in CAPACITY_MODELS:
            for system, requests in worker.call("requests", model).items():
                config = {"model": model, "system": system, "device_gib": CAPACITY_GIB}
                row = computed("real models", config, "requests", "requests", requests)
                bench.report.add(row)


def summarise(report: Report) -> None:
    """Fill report.summary. Ratios are medians of the rounds' paired ratios."""
    for queries in (4, 2):
        short = "" if queries == 4 else f"_{queries}_queries"
        for key, system, metric in (
            ("two_tier_vs_one_tier", FITS, "vs_one_tier"),
            ("two_tier_vs_one_tier_hot01", HEADLINE, "vs_one_tier"),
            ("speculation_gain", FITS, "gain"),
            ("speculation_gain_one_tier", ONE_TIER, "gain"),
            ("accept_length", FITS, "accept_length"),
        ):
            found = report.median("speed", metric, system=system, queries=queries)
            report.summarise(key + short, found)
    for metric in ("requests_ratio", "retractions"):
        report.summarise(metric, report.median("batch", metric, system=HEADLINE))
    figures = {"slots_ratio": ("batch", "slots", {})}
    for model in CAPACITY_MODELS:
        figures[f"requests_ratio_{model}"] = ("real models", "requests", {"model": model})
    for key, (*of, config) in figures.items():
        ours, one = (report.figure(*of, system=name, **config) for name in (HEADLINE, ONE_TIER))
        report.summarise(key, ours / one if ours and one else None)


def print_tables(report: Report) -> None:
    columns = {"system": "system", "queries": "queries", "tokens/s": "decode",
               "step ms": "decode_step", "accept": "accept_length", "misses/step": "misses",
               "over one-tier": "vs_one_tier", "over no drafts": "gain"}  # fmt: skip
    speeds = harness.pivot(report.select("speed", kind="measured"), ("queries", "system"))
    harness.print_table(speeds, columns, "tokens/s at equal batch: medians")
    columns = {"system": "system", "device bytes": "device_bytes", "slots": "slots",
               "requests": "requests", "over one-tier": "requests_ratio"}  # fmt: skip
    requests = harness.pivot(report.select("batch"), ("system",))
    harness.print_table(requests, columns, "at equal device bytes")


def panels(report: Report) -> tuple[Panel, Panel]:
    speeds, requests = report.select("speed", "decode"), report.select("batch", "requests")
    axes = {"xlabel": "queries a request and step", "ylabel": "tokens/s, equal batch"}
    return (
        Panel(speeds, "queries", series="system", kind="bar", axes=axes),
        Panel(requests, "system", kind="bar", axes={"ylabel": "requests, equal device bytes"}),
    )


def main(argv: list[str] | None = None) -> int:
    options = parser_with_threads(__doc__).parse_args(argv)
    grid = QUICK if options.quick else FULL
    bench = run_parts(
        two_tier.Bench, grid, (speed, batch, real_models), options.seed, options.threads
    )
    summarise(bench.report)
    print_tables(bench.report)
    return finish_parts(bench, options, *panels(bench.report), threads=options.threads,
                        speed_model=SPEED_MODEL, batch_model=BATCH_MODEL)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
