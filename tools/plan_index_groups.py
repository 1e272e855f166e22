"""What ESS gives a model whose layers share top-k, and what early fetches of its rows save.

    python -m tools.plan_index_groups [--model glm-5.2 ...] [--json PATH]

For each model and context the planner (`sglang-ess plan`) answers twice: with the fetches of an
index group's later layers behind the layers before them, and with each layer's in its turn. Gains
are in tokens/s over one tier at the same device memory. transfer: what a decode step waits for
rows. "same batch" is a step of the first answer's batch and hot rows with each fetch in its turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.harness import Report, argument_parser, finish, simulated
from sglang_ess.sim.cli import plan
from sglang_ess.sim.model.miss_table import MissTable
from sglang_ess.sim.planning.planner import Answer, Planner

CONTEXTS = (32768, 131072)
EARLY, IN_TURN = "early", "in turn"


def answers(model: str, gpu: str, context: int, itl_ms: float) -> Iterator[tuple[str, Answer]]:
    """(how rows are fetched, the planner's answer) for both ways, on the same misses."""
    words = ["--model", model, "--gpu", gpu, "--context", str(context), "--itl-ms", str(itl_ms)]
    options = plan._parser().parse_args(words)
    question = plan.ask(options)
    misses: MissTable = plan.misses_of(question, options, lambda what, total: lambda done: None)
    for name, early in ((EARLY, True), (IN_TURN, False)):
        deployment = replace(question.deployment, early_fetch=early)
        yield name, Planner(replace(question, deployment=deployment), misses).advise()


def add(report: Report, at: dict, answer: Answer) -> None:
    """Rows of one answer. Raises: ValueError if ESS or one tier keeps no target."""
    ess, one_tier = answer.ess, answer.one_tier
    if ess is None or one_tier is None or answer.gain is None:
        raise ValueError(f"{at} must fit with ESS and with one tier: got {answer.reason}")
    more = {"hot_ratio": ess.ratio, "tokens_per_second": ess.tokens_per_second}
    for metric, unit, value in (
        ("gain", "of one tier", answer.gain),
        ("batch", "requests", ess.batch),
        ("one_tier_batch", "requests", one_tier.batch),
        ("step", "ms", ess.step_ms),
        ("transfer", "ms a step", ess.parts["transfer"]),
        ("same_batch_in_turn", "ms a step", ess.in_turn_ms),
    ):
        report.add(simulated("plan", at, metric, unit, [value], **more))


def summarise(report: Report, model: str, context: int) -> None:
    key = f"{model.replace('-', '').replace('.', '')}_{context // 1024}k"
    here = {"model": model, "context": context}
    for fetches in (EARLY, IN_TURN):
        word = fetches.replace(" ", "_")
        for metric in ("gain", "transfer"):
            value = report.figure("plan", metric, **here, fetches=fetches)
            report.summarise(f"{key}_{metric}_{word}", value)
    same = report.figure("plan", "same_batch_in_turn", **here, fetches=EARLY)
    report.summarise(f"{key}_transfer_same_batch_in_turn", same)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", nargs="+", default=["glm-5.2", "hy4"], help="[glm-5.2 hy4]")
    parser.add_argument("--gpu", default="h200", help="[h200]")
    parser.add_argument("--itl-ms", type=float, default=60.0, help="of a token [60]")
    args = parser.parse_args()
    report = Report()
    for model in args.model:
        for context in CONTEXTS:
            for fetches, answer in answers(model, args.gpu, context, args.itl_ms):
                add(report, {"model": model, "context": context, "fetches": fetches}, answer)
            summarise(report, model, context)
    finish(report, args, gpu=args.gpu, itl_ms=args.itl_ms)


if __name__ == "__main__":
    main()
