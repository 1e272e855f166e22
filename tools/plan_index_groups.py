"""What ESS gives a model whose layers share top-k, and what early fetches of its rows save.

    python -m tools.plan_index_groups [--model glm-5.2 ...] [--json PATH]

For each model, context and number of GPUs the planner (`sglang-ess plan`) answers twice: with the
fetches of an index group's later layers behind the layers before them, and with each layer's in
its turn. glm-5 has GLM-5.2's geometry, but each layer selects. Gains are in tokens/s over one tier
at the same device memory. transfer: what a decode step waits for rows. same_batch_in_turn: of a
step of the same batch and hot rows with each fetch in its turn.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from benchmarks.harness import Report, argument_parser, finish, simulated
from sglang_ess.sim.cli import plan
from sglang_ess.sim.model.miss_table import MissTable
from sglang_ess.sim.planning.planner import Answer, Planner

CONTEXTS, GPUS = (32768, 131072), (8, 16)
MODELS = ("glm-5", "glm-5.2", "hy4")
EARLY, IN_TURN = "early", "in turn"


def answers(model: str, gpus: int, context: int, args: Namespace) -> Iterator[tuple[str, Answer]]:
    """(how rows are fetched, the planner's answer) for both ways, on the same misses."""
    words = ["--model", model, "--gpu", args.gpu, "--gpus", str(gpus), "--context", str(context)]
    words += ["--itl-ms", str(args.itl_ms), "--seed", str(args.seed)]
    options = plan.argument_parser().parse_args(words)
    question = plan.ask(options)
    misses: MissTable = plan.misses_of(question, options, lambda what, total: lambda done: None)
    shares = question.model.index_groups is not None
    for name, early in (((EARLY, True),) if shares else ()) + ((IN_TURN, False),):
        deployment = replace(question.deployment, early_fetch=early)
        yield name, Planner(replace(question, deployment=deployment), misses).advise()


def add(report: Report, name: str, at: dict, answer: Answer) -> None:
    """Rows of one answer. Raises: ValueError if ESS or one tier keeps no target."""
    ess, one_tier = answer.ess, answer.one_tier
    if ess is None or one_tier is None or answer.gain is None:
        raise ValueError(f"{at} must fit with ESS and with one tier: got {answer.reason}")
    more = {"hot_ratio": ess.ratio, "tokens_per_second": ess.tokens_per_second}
    for metric, unit, value in (
        ("gain", "over one tier", answer.gain),
        ("batch", "requests", ess.batch),
        ("one_tier_batch", "requests", one_tier.batch),
        ("step", "ms", ess.step_ms),
        ("transfer", "ms a step", ess.parts["transfer"]),
        ("same_batch_in_turn", "ms a step", ess.in_turn_ms),
    ):
        report.add(simulated(name, at, metric, unit, [value], **more))


def summarise(report: Report, name: str, model: str, context: int) -> None:
    key = f"{model.replace('-', '').replace('.', '')}_{context // 1024}k"
    here = {"model": model, "context": context}
    for fetches in (EARLY, IN_TURN):
        word = fetches.replace(" ", "_")
        for metric in ("gain", "transfer"):
            value = report.figure(name, metric, **here, fetches=fetches)
            report.summarise(f"{key}_{metric}_{word}", value)
    same = report.figure(name, "same_batch_in_turn", **here, fetches=EARLY)
    report.summarise(f"{key}_transfer_same_batch_in_turn", same)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", nargs="+", default=MODELS, help=f"[{' '.join(MODELS)}]")
    parser.add_argument("--gpu", default="h200", help="[h200]")
    parser.add_argument("--itl-ms", type=float, default=60.0, help="of a token [60]")
    args = parser.parse_args()
    report = Report()
    for model in args.model:
        for gpus, context in itertools.product(GPUS, CONTEXTS):
            name = f"on {gpus} GPUs"
            for fetches, answer in answers(model, gpus, context, args):
                at = {"model": model, "context": context, "fetches": fetches}
                add(report, name, at, answer)
            if gpus == GPUS[0]:
                summarise(report, name, model, context)
    finish(report, args, gpu=args.gpu, itl_ms=args.itl_ms)


if __name__ == "__main__":
    main()
