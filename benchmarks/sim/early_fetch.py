"""Rows fetched while drafts are computed: which misses of the next verify step they save.

    python -m benchmarks.sim.early_fetch [--traces DIR] [--quick] [--json PATH] [--plot PATH]

After each verify step of D queries a tier (the production HotCache) takes up to M rows a request
and layer from one source, cold slots, the likeliest first:

    runner-ups   ranks k + 1 to 2 k of the last kept query (scores: traces alone)
    next slot    the slot after each of that query's, in the same page
    other layer  the lists of the next step's first D - 1 queries in the last layer. The draft
                 layer's own lists would be like that; it is a stand-in for them
    evicted      the slots that were used last and have lost their row
    oracle       what the next step looks up

The last query's own list has nothing to give: all of it is hot. Streams: --traces, files
context_*.npz with topk_layer_L [queries, k] and runner_layer_L [queries, m] int32, positions by
falling score; and generated ones (no scores, no neighbours). Then the cost model says how many rows
the link carries during the drafts, what these save, and how much of the exposed transfer goes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import harness
from sglang_ess.layout import PAGE_SLOTS
from sglang_ess.sim.engine.decode_rank import acceptance_probability, draw_kept
from sglang_ess.sim.inputs.specs import changed, load
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.miss_table import MissTable
from sglang_ess.sim.planning import lab
from sglang_ess.sim.planning.planner import Planner, Question
from sglang_ess.tiers import HotCache

DRAFTS = ((2, 1.7), (4, 2.8))  # ESS: queries of a verify step, tokens it keeps
SIZES = (8, 16, 32, 64)  # rows fetched ahead of a request and layer
WARMUP, RATIO = 60, 0.1  # verify steps that do not count; hot rows of all slots
K = 1024
MODELS, CONTEXTS, ITL_SECONDS = ("deepseek-v3.2", "glm-5.2"), (32 * K, 128 * K), 0.05
NONE, EVICTED, ORACLE = "none", "evicted", "oracle"
TRACED = ("runner-ups", "next slot", "other layer", EVICTED, ORACLE)


class Steps(NamedTuple):
    """One layer's verify steps. topk [steps, requests, D, k] int32 slots, -1 pads; num_slots

    guesses: source -> [steps, requests, m] int32: after each step, the likeliest first
    """

    topk: np.ndarray
    num_slots: int
    guesses: dict[str, np.ndarray]


class Found(NamedTuple):
    """Of a request, layer and counted step: misses, rows fetched ahead, and of these used."""

    misses: float
    early: float
    used: float


def run(steps: Steps, source: str, most: int, warmup: int = WARMUP) -> Found:
    """Count what a tier fetches. most: rows ahead of a request after each step."""
    requests, rows = steps.topk.shape[1], int(RATIO * steps.num_slots)
    tier, last_use = HotCache(None, rows, steps.num_slots), np.full(steps.num_slots, -1)
    before = tier.counters
    for step, topk in enumerate(steps.topk):
        if step == warmup:
            before = tier.counters
        tier.plan(torch.from_numpy(topk.reshape(-1, topk.shape[-1])))
        last_use[topk[topk >= 0]] = step
        if source == NONE or step + 1 == len(steps.topk):
            continue
        if source == ORACLE:
            guess = steps.topk[step + 1].reshape(requests, -1)
        elif source == EVICTED:
            cold = np.where(tier.slot_row < 0, last_use, -1)
            best = np.argsort(-cold, kind="stable")[: most * requests]
            guess = best[cold[best] >= 0].astype(np.int32).reshape(1, -1)
        else:
            guess = steps.guesses[source][step]
        tier.fetch_ahead(np.ascontiguousarray(guess), most * (requests if len(guess) == 1 else 1))
    counted = (len(steps.topk) - warmup) * requests
    names = "misses", "early", "early_used"
    return Found(*((tier.counters[name] - before[name]) / counted for name in names))


# --- streams ----------------------------------------------------------------------------


def traced(path: Path, queries: int, kept: float, seed: int) -> list[Steps]:
    """Regroup a trace's queries, one a step, into verify steps; a Steps for each layer.

    A step that keeps n of D tokens is followed by the one that begins n queries later: its
    rejected lists are those of the right tokens, which is kind to every source.
    """
    with np.load(path) as data:
        names = sorted(name for name in data if name.startswith("topk_layer_"))
        lists = [data[name] for name in names]
        others = [data[name.replace("topk", "runner")] for name in names]
    rng, probability = np.random.default_rng(seed), acceptance_probability(queries, kept)
    length, first = len(lists[0]), 0
    firsts, lasts = [], []
    while first + queries <= length:
        firsts.append(first)
        taken = int(draw_kept(rng, 1, queries, probability)[0])
        lasts.append(first + taken - 1)
        first += taken
    members = np.array(firsts)[:, None] + np.arange(queries)
    made, num_slots = [], max(int(part.max()) for part in (*lists, *others)) + 1
    for layer, topk in enumerate(lists):
        own = topk[lasts]
        after = np.where((own >= 0) & ((own + 1) % PAGE_SLOTS > 0), own + 1, -1)
        draft = lists[-1] if layer < len(lists) - 1 else lists[-2]
        drafted = np.full((len(firsts), (queries - 1) * topk.shape[1]), -1, np.int32)
        # By rank, the first draft's before the others'.
        drafted[:-1] = draft[members[1:, :-1]].swapaxes(1, 2).reshape(len(firsts) - 1, -1)
        found = {"runner-ups": others[layer][lasts], "next slot": after, "other layer": drafted}
        guesses = {name: part.astype(np.int32)[:, None] for name, part in found.items()}
        guesses["next slot"] = np.minimum(guesses["next slot"], num_slots - 1)
        made.append(Steps(topk[members][:, None].astype(np.int32), num_slots, guesses))
    return made


def generated(name: str, context: int, drafts: tuple[int, float], quick: bool, seed: int):
    """Steps of two requests for each of a few layers, with the lab's warm-up first; its length."""
    locality = Locality.load(name)
    queries, kept = drafts
    for layer in locality.spread(2 if quick else 4):
        stream, warmup = lab.generate(
            locality, layer, [context] * 2, 90 if quick else 200, queries=queries,
            drafts=lab.Drafts(kept), seed=seed,
        )  # fmt: skip
        topk = stream.steps.reshape(len(stream.steps), 2, queries, -1)
        yield Steps(topk, stream.num_slots, {}), warmup + 30


def measure(report: harness.Report, config: dict, layers: list, sources: tuple[str, ...]) -> None:
    """Rows for each source and size. layers: (Steps, steps that do not count)"""
    base = [run(steps, NONE, 0, warmup).misses for steps, warmup in layers]
    report.add(harness.simulated("misses", config | {"source": NONE, "rows": 0}, "misses", "rows",
                                 base, share=1.0))  # fmt: skip
    for source, most in itertools.product(sources, SIZES):
        found = [run(steps, source, most, warmup) for steps, warmup in layers]
        early, used = (np.mean([getattr(one, name) for one in found]) for name in ("early", "used"))
        misses = [one.misses for one in found]
        share = np.mean(misses) / np.mean(base)
        report.add(harness.simulated(
            "misses", config | {"source": source, "rows": most}, "misses", "rows", misses,
            early=float(early), used=float(used / early) if early else 0.0, share=float(share),
            link=float((np.mean(misses) + early) / np.mean(base)),
            ahead=float(early / np.mean(base)),
        ))  # fmt: skip


# --- time -------------------------------------------------------------------------------

Curve = Callable[[float], float]  # rows fetched ahead / misses without -> share of misses saved


def saved_by(report: harness.Report, source: str, queries: int, context: int) -> Curve:
    rows = report.select("misses", source=source, queries=queries, context=context)
    points = sorted((row["ahead"], 1 - row["share"]) for row in rows)
    x, y = np.array([(0.0, 0.0), *points]).T
    return lambda ahead: float(np.interp(ahead, x, y))


def time(report: harness.Report, name: str, context: int, queries: int, curves: dict) -> None:
    """What the draft window carries at the batch that the planner chooses, and what it saves."""
    model, kept = load("model", name), dict(DRAFTS)[queries]
    values = {"queries": queries, "accepted_tokens": kept, "kv_gib": None, "overlap": "auto"}
    deployment = changed(load("deployment", "node-8"), **values)
    question = Question(model, load("gpu", "h200"), load("link", "pcie5"), deployment, context,
                        ITL_SECONDS)  # fmt: skip
    table = MissTable.from_profile(Locality.load(name), model.groups, context, queries)
    best = Planner(question, table).ess()
    config = {"model": name, "context": context, "queries": queries}
    if best is None:
        report.add(harness.failed("time", config, "exposed", "%", "no batch keeps the target"))
        return
    cost = CostModel(model, question.gpu, question.link, deployment)
    misses = table.uniform(best.hot_rows / best.batch)
    plain = cost.step(best.batch, context, misses)
    many = 1e6
    row_seconds = (cost.fetch_seconds(2 * many) - cost.fetch_seconds(many)) / many
    share = best.batch * model.layers * row_seconds
    window = plain.parts["draft"]
    carried, ahead = window / share, window / share / misses.mean()
    for source, curve in curves.items():
        step = cost.step(best.batch, context, misses * (1 - curve(ahead)))
        before, after = plain.parts["transfer"], step.parts["transfer"]
        saved = 100 * (1 - after / before) if before else 0.0
        report.add(harness.simulated(
            "time", config | {"source": source}, "exposed transfer saved", "%", [saved],
            batch=best.batch, misses=float(misses.mean()), window_ms=1e3 * window, carried=carried,
            ahead=float(ahead), misses_saved=curve(ahead), transfer_ms=1e3 * before,
            step_percent=100 * (1 - step.seconds / plain.seconds),
        ))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="files context_*.npz")
    args: argparse.Namespace = parser.parse_args(argv)
    report, progress = harness.Report(), harness.Progress()
    contexts = set()
    for path in sorted(args.traces.glob("context_*.npz")) if args.traces else ():
        contexts.add(context := int(path.stem.split("_")[1]))
        for queries, kept in DRAFTS:
            progress(f"{path.name}, D {queries}")
            layers = [(steps, WARMUP) for steps in traced(path, queries, kept, args.seed)]
            config = {"stream": "trace", "context": context, "queries": queries}
            measure(report, config, layers, TRACED)
    for name, drafts in itertools.product(MODELS[:1] if args.quick else MODELS, DRAFTS):
        progress(f"{name}, D {drafts[0]}")
        layers = list(generated(name, 32 * K, drafts, args.quick, args.seed))
        config = {"stream": name, "context": 32 * K, "queries": drafts[0]}
        measure(report, config, layers, (EVICTED, ORACLE))
    longest = max(contexts, default=None)
    for name, context, (queries, _) in itertools.product(MODELS, CONTEXTS, DRAFTS):
        progress(f"time: {name}, {context // K}K, D {queries}")
        curves: dict[str, Curve] = {ORACLE: lambda ahead: min(1.0, ahead)}
        if longest is not None:
            curves |= {one: saved_by(report, one, queries, longest) for one in TRACED[:3]}
        time(report, name, context, queries, curves)
    summarise(report)
    print_tables(report)
    harness.finish(report, args, harness.Panel(
        report.select("misses", stream="trace", context=longest, queries=4), "rows", "share",
        "source", axes={"xlabel": "rows fetched ahead, at most", "ylabel": "misses / without"},
    ))  # fmt: skip


def summarise(report: harness.Report) -> None:
    for source in (*TRACED[:3], ORACLE):
        found = [row for row in report.select("time", kind="simulated", source=source)]
        if found:
            name = source.replace(" ", "_").replace("-", "_")
            report.summarise(f"{name}_exposed_saved_percent_most", max(r["mean"] for r in found))
            report.summarise(f"{name}_step_percent_most", max(r["step_percent"] for r in found))


def print_tables(report: harness.Report) -> None:
    columns = {name: name for name in ("stream", "context", "queries", "source", "rows")}
    columns |= {"misses": "mean:.1f", "of those without": "share:.3f", "link rows": "link:.3f",
                "ahead": "early:.1f", "used": "used:.2f"}  # fmt: skip
    harness.print_table(report.select("misses"), columns, "A verify step's misses, a layer")
    columns = {name: name for name in ("model", "context", "queries", "source", "batch")}
    columns |= {"misses": "misses:.0f", "window, ms": "window_ms:.2f",
                "carries rows": "carried:.1f", "misses saved": "misses_saved:.3f",
                "exposed, ms": "transfer_ms:.2f", "of it saved, %": "mean:.1f",
                "of the step, %": "step_percent:.2f"}  # fmt: skip
    harness.print_table(report.select("time"), columns, "The draft window, simulated")


if __name__ == "__main__":
    main()
