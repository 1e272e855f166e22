"""Are the answers right? A trained model finds facts in long documents: one tier, two, and faults.

    python -m benchmarks.serving.recall [--quick] [--json FILE] [--plot FILE]

The model is sglang_ess.recall_model, fp8 rows; the documents are Python's documentation that its
training did not see, with facts put in. A document is prefilled; then all questions about it are
one batch of prefix hits (SGLang hands a batch of token ids to the scheduler at once, so batches are
the same in all systems). Answers are greedy and end with the line.
 (a) needle: recall by length, depth and kind of question. One tier; two tiers at hot ratio 0.1 of
     the slots, which hold one document of the largest length; with the indexer's top-k replaced
     by the last k positions; with half the top-k; where it is affordable with all positions; and
     with drafts. same_answers: the share of requests whose tokens are those of one tier.
 (b) faults: how many answers a hot tier changes that serves a wrong row (recall_changes.CHANGES).
     Half of the slots are hot, and each document takes slots of the one before.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.harness import OtherLoad, Panel, Report, measured
from benchmarks.serving import two_tier
from benchmarks.serving.engines import RecordedEngine
from benchmarks.serving.recall_changes import (
    CHANGE_VAR,
    LAST_K,
    NONE,
    STALE,
    WRONG_BEST,
    WRONG_RANDOM,
    run_changed_scheduler,
)
from benchmarks.serving.shared import finish_parts, parser_with_threads, run_module, run_parts
from benchmarks.serving.speculative import drafting
from benchmarks.serving.two_tier_figures import HEADLINE, ONE_TIER
from sglang_ess.cpu import set_thread_defaults
from sglang_ess.layout import PAGE_SLOTS as PAGE
from sglang_ess.testing import recall as model
from sglang_ess.testing.recall.documents import BYTES_A_FACT, KINDS, STOP, Document, make_document
from tools.worker import Worker

ANSWER = 96  # tokens; the longest answer has 60
ROOM = 256  # tokens of a context for a question and its answer
DRAFT_ROOM = 4 * PAGE  # slots that SGLang sets aside for the drafts of a step
HALVED, FULL_ATTENTION, DRAFTS = "half k", "all positions", "drafts"
DRAFT_QUERIES = 4
ALL = "all"  # kinds of question
# With their summary figures; stale rows outlast their fault, so they come last.
FAULT_FIGURES = {"faults_none": NONE, "faults_wrong_row": WRONG_BEST,
                 "faults_wrong_row_any": WRONG_RANDOM, "faults_stale_row": STALE}  # fmt: skip
FAULT_LENGTH, FAULT_ASKED = 2048, 4  # of a context; questions of each kind about a document
HOT_RATIO = 0.1
FAULTY, FAULTY_RATIO = "half hot", 0.5  # rows of an earlier document last into the next one


class System(NamedTuple):
    """An engine's tiers and server arguments; change: what is awake in it; longest: context
    that it is asked about
    """

    engine: str
    ess: dict[str, Any]
    args: dict[str, Any] = {}
    change: str = NONE
    longest: int = model.SHAPE.context


def with_topk(k: int) -> dict[str, str]:
    return {"json_model_override_args": json.dumps({"index_topk": k})}


TWO_TIERS = {"hot_ratio": HOT_RATIO}
AFFORDABLE = 4096  # context of which all positions are attended to
SYSTEMS = {
    ONE_TIER: System(ONE_TIER, {"enabled": False}),
    HEADLINE: System(HEADLINE, TWO_TIERS),
    LAST_K: System(HEADLINE, TWO_TIERS, change=LAST_K),
    HALVED: System(HALVED, TWO_TIERS, with_topk(model.SHAPE.index_topk // 2)),
    FULL_ATTENTION: System(FULL_ATTENTION, {"enabled": False}, with_topk(AFFORDABLE),
                           longest=AFFORDABLE),
    DRAFTS: System(DRAFTS, TWO_TIERS, drafting(DRAFT_QUERIES), longest=AFFORDABLE),
    FAULTY: System(FAULTY, {"hot_ratio": FAULTY_RATIO}, longest=FAULT_LENGTH),
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What one run measures.

    lengths: contexts in tokens, a document, a question and its answer; each with a document at
        every depth and `asked` questions of each kind
    systems: of SYSTEMS; fault_questions: of (b)
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    asked: int
    systems: tuple[str, ...]
    fault_questions: int


QUICK = Grid((2048, 16384), (0.5,), 1, (ONE_TIER, HEADLINE, LAST_K), fault_questions=12)
FULL = Grid((2048, 4096, 8192, 16384), (0.05, 0.275, 0.5, 0.725, 0.95), 2,
            (ONE_TIER, HEADLINE, LAST_K, HALVED, FULL_ATTENTION, DRAFTS),
            fault_questions=200)  # fmt: skip


class RecallEngine(RecordedEngine):
    """A RecordedEngine that answers questions, with one of recall_changes.CHANGES or none."""

    def __init__(self, record: str, server_args: dict[str, Any]):
        set_thread_defaults()
        self._change = Path(f"{record}.change")
        self._change.write_text(NONE)
        os.environ[CHANGE_VAR] = str(self._change)
        super().__init__(record, server_args, run_changed_scheduler)

    def ask(self, change: str, text: list[int], prompts: list[list[int]]) -> dict[str, Any]:
        """Prefill a document, the radix cache empty before, then answer the prompts as one batch.

        Returns token_ids; lookups and misses by layer; kept: tokens of all decode steps;
        request_steps: their batch sizes added up.
        """
        self._change.write_text(change)
        self.generate([text], 1)
        run = self.generate(prompts, ANSWER, fresh=False, stop=STOP.encode())
        passes = run["passes"]
        decode = [one for one in passes if one["mode"] == "DECODE"]
        found = {"token_ids": run["token_ids"], "kept": sum(one["kept"] for one in decode)}
        for key in ("lookups", "misses"):  # counted since the start
            found[key] = np.subtract(passes[-1][key], passes[0][key]).tolist()
        return found | {"request_steps": sum(one["batch"] for one in decode)}


class Bench(two_tier.Bench):
    Engine = RecallEngine

    def recall_model(self) -> str:
        path = str(self.directory / "recall-model")
        if not Path(path).exists():
            run_module("sglang_ess.recall_model", "--out", path)
        return path

    def systems(self, length: int, contexts: int, names: Iterable[str]) -> dict[str, Worker]:
        """The engines of these systems, by name; some share one.

        length: of a context, of which the slots hold `contexts`
        """
        engines: dict[str, Worker] = {}
        slots = contexts * length + DRAFT_ROOM
        for one in (SYSTEMS[name] for name in names):
            args = {"max_total_tokens": slots, "context_length": length} | one.args
            if one.engine not in engines:
                ess = {"admission": "off"} | one.ess
                name = f"{slots} {one.engine}"
                engines[one.engine] = self.engine(name, self.recall_model(), ess, **args)
        return engines


def document_of(seed: int, length: int, number: int, asked: int, depth=None) -> Document:
    """One that leaves room for a question and its answer in a context of `length` tokens."""
    rng, size = random.Random(f"{seed}/{length}/{number}"), length - ROOM
    return make_document(rng, size, KINDS * asked, others=size // BYTES_A_FACT, depth=depth)


def tokens_of(document: Document) -> tuple[list[int], list[list[int]]]:
    """The document, and the document with each question; one token a byte."""
    text = list(document.text.encode())
    return text, [text + list(one.prompt.encode()) for one in document.questions]


def rights(document: Document, found: dict) -> list[bool]:
    """Of each question, whether its answer is right."""
    outputs = [bytes(min(i, 255) for i in ids).decode("latin1") for ids in found["token_ids"]]
    return [one.is_right(text) for one, text in zip(document.questions, outputs, strict=True)]


def same(found: dict, expected: dict) -> list[bool]:
    """Of each request, whether both have answered it with the same tokens."""
    pairs = zip(found["token_ids"], expected["token_ids"], strict=True)
    return [one == other for one, other in pairs]


def needle(bench: Bench) -> None:
    """Part (a)."""
    grid, load = bench.grid, OtherLoad()
    engines = bench.systems(max(grid.lengths), 1, grid.systems)
    with bench.running(engines.values()):
        for length in grid.lengths:
            asked = [document_of(bench.seed, length, number, grid.asked, depth)
                     for number, depth in enumerate(grid.depths)]  # fmt: skip
            answers: dict[str, list[dict]] = {}
            for name in grid.systems:
                one = SYSTEMS[name]
                if length > one.longest:
                    continue
                engine = engines[one.engine]
                answers[name] = [engine.call("ask", one.change, *tokens_of(d)) for d in asked]
                rows = needle_rows(name, length, grid.depths, asked, answers)
                bench.add(rows, load)
                bench.progress(f"{length} tokens, {name}: recall {rows[0]['mean']:.3f}")


def needle_rows(
    system: str,
    length: int,
    depths: Sequence[float],
    asked: Sequence[Document],
    answers: dict[str, list[dict]],
) -> list[dict]:
    """Rows of a system at one length. asked: a document a depth; answers: by system, so far."""
    config, found = {"system": system, "length": length}, answers[system]
    right = [rights(*pair) for pair in zip(asked, found, strict=True)]
    kinds = [[question.kind for question in document.questions] for document in asked]

    def recall(name, of, of_kinds, **more):
        rows = []
        for kind in (ALL, *KINDS):
            samples = [r for r, k in zip(of, of_kinds, strict=True) if kind in (ALL, k)]
            rows.append(measured(name, config | more | {"asks": kind}, "recall", "share", samples))
        return rows

    rows = recall("recall", sum(right, []), sum(kinds, []))
    for depth, of, of_kinds in zip(depths, right, kinds, strict=True):
        rows += recall("needle", of, of_kinds, depth=depth)
    if system != ONE_TIER:
        equal = [same(*pair) for pair in zip(found, answers[ONE_TIER], strict=True)]
        rows.append(measured("recall", config, "same_answers", "share", sum(equal, [])))
    lookups, misses = (np.sum([one[key] for one in found], 0) for key in ("lookups", "misses"))
    if np.size(lookups):
        rows.append(measured("recall", config, "hit_rate", "ratio", 1 - misses / lookups))
    accepted = [one["kept"] / one["request_steps"] for one in found if one["request_steps"]]
    rows.append(measured("recall", config, "accept_length", "tokens/step", accepted))
    return rows


def faults(bench: Bench) -> None:
    """Part (b)."""
    grid, load = bench.grid, OtherLoad()
    count = -(-grid.fault_questions // (FAULT_ASKED * len(KINDS)))
    asked = [document_of(bench.seed + 1, FAULT_LENGTH, n, FAULT_ASKED) for n in range(count)]
    prompts = [tokens_of(document) for document in asked]
    engines = bench.systems(FAULT_LENGTH, 2, (ONE_TIER, FAULTY))
    with bench.running(engines.values()):
        expected = [engines[ONE_TIER].call("ask", NONE, *some) for some in prompts]
        for change in FAULT_FIGURES.values():
            found = [engines[FAULTY].call("ask", change, *some) for some in prompts]
            rows = fault_rows(change, asked, found, expected, grid.fault_questions)
            bench.add(rows, load)
            bench.progress(f"{change}: {rows[0]['median']:.0f} answers changed")


def fault_rows(
    change: str, asked: Sequence[Document], found: list[dict], expected: list[dict], count: int
) -> list[dict]:
    """Of the first `count` questions: answers that differ from one tier's, and recall."""
    config = {"fault": change, "length": FAULT_LENGTH, "questions": count}
    changed = [not one for pair in zip(found, expected, strict=True) for one in same(*pair)]
    right = [one for pair in zip(asked, found, strict=True) for one in rights(*pair)]
    return [
        measured("faults", config, "changed", "answers", [sum(changed[:count])]),
        measured("faults", config, "recall", "share", right[:count]),
    ]


def short(length: int) -> str:
    return f"{length // 1024}k"


def summarise(report: Report) -> None:
    """Fill report.summary. Recall is a mean over questions."""
    longest = max(FULL.lengths)

    def recall(system, length):
        return report.figure("recall", "recall", "mean", system=system, length=length, asks=ALL)

    for length in FULL.lengths:
        report.summarise(f"recall_{short(length)}", recall(HEADLINE, length))
        report.summarise(f"recall_{short(length)}_one_tier", recall(ONE_TIER, length))
        hits = report.figure("recall", "hit_rate", "mean", system=HEADLINE, length=length)
        report.summarise(f"hit_rate_{short(length)}", hits)
    report.summarise("recall_last_k", recall(LAST_K, longest))
    report.summarise("recall_half_k", recall(HALVED, longest))
    report.summarise("recall_all_positions_4k", recall(FULL_ATTENTION, AFFORDABLE))
    equal = [row["mean"] for row in report.select("recall", "same_answers", system=HEADLINE)]
    report.summarise("same_answers", min(equal) if equal else None)
    accepted = report.figure("recall", "accept_length", "mean", system=DRAFTS, length=AFFORDABLE)
    report.summarise("accept_length", accepted)
    for key, change in FAULT_FIGURES.items():
        report.summarise(key, report.figure("faults", "changed", fault=change))
    asked = report.select("faults", "changed")
    report.summarise("fault_questions", asked[-1]["config"]["questions"] if asked else None)


def print_tables(report: Report) -> None:
    rows = [row for row in report.select("recall", "recall", kind="measured", asks=ALL)]
    found = harness.pivot(rows, ("system",), "length", "mean")
    lengths = sorted({row["config"]["length"] for row in rows})
    columns = {"system": "system"} | {short(n): (lambda row, n=n: row.get(n)) for n in lengths}
    harness.print_table(found, columns, "recall by context")
    found = harness.pivot(report.select("faults", kind="measured"), ("fault",), value="mean")
    columns = {"fault": "fault", "answers changed": "changed", "recall": "recall"}
    harness.print_table(found, columns, "faults of the hot tier")


def panels(report: Report) -> tuple[Panel, ...]:
    """The needle picture of two tiers and of the last k; recall by length."""
    axes = {"xlabel": "context, tokens", "ylabel": "depth of the fact"}
    needles = [
        Panel(report.select("needle", "recall", system=name, asks=ALL), "length", "mean", "depth",
              kind="heat", axes=axes | {"title": f"recall, {name}"})
        for name in (HEADLINE, LAST_K)
    ]  # fmt: skip
    lines = Panel(report.select("recall", "recall", asks=ALL), "length", "mean", "system",
                  axes={"xscale": "log", "xlabel": axes["xlabel"], "ylabel": "recall",
                        "ylim": (0, 1.02)})  # fmt: skip
    return (*needles, lines)


def main(argv: list[str] | None = None) -> int:
    options = parser_with_threads(__doc__).parse_args(argv)
    grid = QUICK if options.quick else FULL
    bench = run_parts(Bench, grid, (needle, faults), options.seed, options.threads)
    summarise(bench.report)
    print_tables(bench.report)
    return finish_parts(bench, options, *panels(bench.report), threads=options.threads,
                        model=asdict(model.SHAPE), hot_ratio=HOT_RATIO)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
