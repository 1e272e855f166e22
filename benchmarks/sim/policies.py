"""Rivals of LRU on what models select: misses, link bytes and waits at equal device bytes.

    python -m benchmarks.sim.policies [--quick] [--traces PATH ...] [--json PATH] [--plot PATH]

Two sources, each at several contexts with hot rows for a tenth and a fifth of it:
  trace      what a model has selected: files or folders of --traces, as sim/planning/selections.py
             reads them (traces of --ess-trace, with scores or without, or arrays)
  generator  streams fitted to published misses. They have no scores, because no figure that is
             published would support any, so rules that need hints or scores are left out there.
A rule's own state counts: it has as many rows fewer as that state takes bytes. Rows over the link
are misses and what was fetched ahead, used or not. Waits are those of the cost model for DeepSeek
V3.2 on H200 with ESS's deployment at 32K, if it missed the same share of its lookups.
`layer_before` takes as hints what the layer before has selected in the same step.

Belady's optimum knows the future, and the last steps of every stream are left out for it. Misses of
slots that no earlier step has selected (`first`) no policy avoids that does not fetch ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import harness
from sglang_ess.layout import FP8_ROW_BYTES
from sglang_ess.sim.inputs.specs import load
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.planning import lab, selections
from sglang_ess.sim.policies import RULES, Clues
from sglang_ess.sim.policies.keyed import Worth

RATIOS = (0.1, 0.2)
LAYER_BEFORE = Worth(hint_age=1, hints=2048, ahead=8, margin=2)
RIVALS: dict[str, str | Worth] = {
    name: name for name in ("lru", "clock", "aged_clock", *RULES, "belady")
} | {"layer_before": LAYER_BEFORE}
LONG = 8000  # contexts of at least so many tokens count in the summary
ROUNDING = 1e-9
BATCH, CONTEXT = 128, 32 << 10  # of the cost model: ESS, Table 1


@dataclass(frozen=True)
class Source:
    """A model's layers at one context. warmup, tail: steps that are left out"""

    name: str
    file: str
    context: int
    layers: list[lab.Stream]
    warmup: int
    tail: int


def traces(paths: list[Path]) -> Iterator[Source]:
    for path in paths:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            layers = selections.load(file)
            steps = len(layers[0].steps)
            yield Source("trace", file.name, int(layers[0].contexts[0]), layers,
                         steps // 6, steps // 10)  # fmt: skip


def generated(quick: bool, seed: int) -> Iterator[Source]:
    """One request; the middle layers of each profile."""
    before, counted, tail = (20, 60, 150) if quick else (100, 200, 400)
    contexts = (32 << 10,) if quick else (32 << 10, 64 << 10)
    for name, context in itertools.product(("deepseek-v3.2", "glm-5.1"), contexts):
        locality = Locality.load(name)
        made = [
            lab.generate(locality, layer, [context], before + counted + tail, seed=seed)
            for layer in locality.spread(1 if quick else 3)
        ]
        streams = [stream for stream, _ in made]
        yield Source("generator", name, context, streams, made[0][1] + before, tail)


def rows_of(rule: Worth | None, ratio: float, source: Source) -> int:
    """Hot rows of a layer: those of LRU, less what the rule's state takes; a step's at least."""
    rows = int(ratio * source.context)
    if rule is not None:
        rows -= -(-rule.state_bytes(rows, source.context) // FP8_ROW_BYTES)
    return max(rows, source.layers[0].steps.shape[2])


def told(source: Source, rival: str) -> list[lab.Stream]:
    """The layers, with the clues that the rival takes."""
    if rival != "layer_before":
        return source.layers
    nothing = np.full_like(source.layers[0].steps, -1)
    lists = [nothing, *(stream.steps for stream in source.layers[:-1])]
    # Hints follow a step: those of the next one's turn.
    hints = [np.concatenate([one[1:], nothing[:1]]) for one in lists]
    slots = max(stream.num_slots for stream in source.layers)
    return [replace(stream, num_slots=slots, clues=Clues(hint))
            for stream, hint in zip(source.layers, hints, strict=True)]  # fmt: skip


def needs_clues(rule: Worth | None) -> bool:
    return rule is not None and (rule.hint_age is not None or rule.weak_age > 0)


def first_uses(source: Source) -> float:
    """Counted lookups per layer and step of slots that no earlier step has selected."""
    found, counted = 0, slice(source.warmup, len(source.layers[0].steps) - source.tail)
    for stream in source.layers:
        flat = stream.steps.reshape(len(stream.steps), -1)
        slots, place = np.unique(flat, return_index=True)
        step = place[slots >= 0] // flat.shape[1]
        found += ((step >= counted.start) & (step < counted.stop)).sum()
    return found / len(source.layers) / (counted.stop - counted.start)


def measure(report: harness.Report, source: Source, cost: CostModel, progress) -> None:
    """Every rival at every ratio on one source."""
    topk = source.layers[0].steps.shape[2]
    has_hints = all(stream.clues.hints is not None for stream in source.layers)
    lookups = cost.model.topk * cost.deployment.queries
    for ratio, (rival, policy) in itertools.product(RATIOS, RIVALS.items()):
        rule = RULES.get(rival, LAYER_BEFORE if rival == "layer_before" else None)
        alone = rival == "layer_before" and len(source.layers) < 2
        if alone or needs_clues(rule) and not has_hints:
            continue
        progress(f"{source.name} {source.file} {source.context}: {ratio} {rival}")
        rows = rows_of(rule, ratio, source)
        found = lab.run(told(source, rival), "shared", policy, rows,
                        warmup=source.warmup, tail=source.tail)  # fmt: skip
        waits = cost.step(BATCH, CONTEXT, found.mean / topk * lookups).parts["transfer"]
        config = {"source": source.name, "file": source.file, "context": source.context,
                  "ratio": ratio, "policy": rival}  # fmt: skip
        report.add(harness.simulated(
            "policy", config, "misses", "rows/layer/step", found.by_layer.tolist(), rows=rows,
            link_rows=found.link_rows, wait_ms=1e3 * waits, lookups=topk,
            first=first_uses(source) if rival == "lru" else None,
        ))  # fmt: skip


def compare(report: harness.Report) -> None:
    """Add to each row what LRU misses there."""
    for row in report.select("policy"):
        of = {key: row["config"][key] for key in ("source", "file", "context", "ratio")}
        (lru,) = report.select("policy", policy="lru", **of)
        row["misses_vs_lru"] = row["mean"] / lru["mean"]
        row["link_vs_lru"] = row["link_rows"] / lru["mean"]
        row["first_share"] = lru["first"] / lru["mean"]


def summarise(report: harness.Report) -> None:
    """The worst of the long contexts, by source: of the policy for which it is least, and Belady's.

    A policy that fetches more rows than LRU anywhere is no winner.
    """
    for source in ("trace", "generator"):
        worst: dict[str, tuple[float, float]] = {}
        rows = report.select("policy", source=source)
        rows = [row for row in rows if row["config"]["context"] >= LONG]
        points = {(row["config"]["file"], row["config"]["ratio"]) for row in rows}
        for rival in RIVALS:
            found = [row for row in rows if row["config"]["policy"] == rival]
            if found and len(found) >= len(points):
                worst[rival] = (max(row["misses_vs_lru"] for row in found),
                                max(row["link_vs_lru"] for row in found))  # fmt: skip
        if not worst:
            continue
        ending = "" if source == "trace" else "_generator"
        thrifty = [n for n in worst if n not in ("lru", "belady") and worst[n][1] < 1 + ROUNDING]
        best = min(thrifty, key=lambda name: worst[name][0], default="lru")
        print(f"\n{source}: the best policy is {best}")
        report.summarise(f"misses_vs_lru{ending}", worst[best][0])
        report.summarise(f"link_bytes_vs_lru{ending}", worst[best][1])
        report.summarise(f"belady_vs_lru{ending}", worst["belady"][0])
        first = min(row["first_share"] for row in rows), max(row["first_share"] for row in rows)
        report.summarise(f"first_share_least{ending}", first[0])
        report.summarise(f"first_share_most{ending}", first[1])
        for rival, (misses, link) in worst.items():
            report.summarise(f"{rival}_misses{ending}", misses)
            report.summarise(f"{rival}_link{ending}", link)


def print_tables(report: harness.Report) -> None:
    columns = {name: name for name in ("file", "context", "ratio", "policy", "rows")}
    columns |= {"misses": "mean:.1f", "of LRU's": "misses_vs_lru:.3f", "link": "link_vs_lru:.3f",
                "first": "first_share:.2f", "waits, ms": "wait_ms:.1f"}  # fmt: skip
    for source in ("trace", "generator"):
        rows = report.select("policy", source=source)
        harness.print_table(rows, columns, f"{source}: rows a layer and step")


def main(argv: list[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--traces", type=Path, nargs="*", default=[], metavar="PATH",
                        help="files or folders of what a model has selected")  # fmt: skip
    args = parser.parse_args(argv)
    report, progress = harness.Report(), harness.Progress()
    cost = CostModel(load("model", "deepseek-v3.2"), load("gpu", "h200"), load("link", "pcie5"),
                     load("deployment", "ess-paper-32k"))  # fmt: skip
    for source in itertools.chain(traces(args.traces), generated(args.quick, args.seed)):
        measure(report, source, cost, progress)
    compare(report)
    summarise(report)
    print_tables(report)
    panels = [
        harness.Panel(report.select("policy", source=source, ratio=ratio), "policy",
                      "misses_vs_lru", ("file", "context"), kind="bar",
                      axes={"title": f"{source}, hot ratio {ratio}", "ylabel": "misses / LRU's"})
        for source, ratio in itertools.product(("trace", "generator"), RATIOS)
        if report.select("policy", source=source)
    ]  # fmt: skip
    harness.finish(report, args, *panels, traces=[str(path.name) for path in args.traces])


if __name__ == "__main__":
    main()
