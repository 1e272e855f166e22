"""`python -m sglang_ess.plan`: does ESS help a model, a GPU, a context and a latency target?

The command prints the settings to serve with, their expected figures and those without ESS, or
the reason why ESS does not help. All figures are simulated. For a question that cannot be
answered it prints one line on stderr and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_ess.errors import program_name
from sglang_ess.layout import GIB
from sglang_ess.sim.inputs.files import names
from sglang_ess.sim.inputs.specs import Deployment, Model, SpecError, changed, load
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.miss_table import LAYERS, REQUESTS, MissTable
from sglang_ess.sim.planning.planner import Advice, Answer, Planner, Question, QuestionError
from sglang_ess.sim.planning.store_size import stored_bytes
from sglang_ess.trace.trace import read_trace

REFUSED = 2
NODE, SEVERAL_NODES = "node-8", "ess-paper-32k"  # deployments of up to 8 GPUs, and of more
# Queries a step -> accepted tokens, from table 2 of ESS. Others must be given by --accept.
ACCEPTED = {1: 1.0, 2: 1.7, 4: 2.8}
TITLES = {"ess": "ESS", "one-tier": "one tier"}


def main(argv: Sequence[str] | None = None) -> int:
    options = argument_parser().parse_args(argv)
    try:
        question = ask(options)
        with _bar() as bar:
            planner = Planner(question, misses_of(question, options, bar))
            answer = planner.advise()
        if options.json:
            document = as_dict(question, options, answer)
            options.json.write_text(json.dumps(document, indent=1) + "\n")
        if options.plot:
            plot(options.plot, planner, question)
    except (ValueError, OSError) as error:
        print(f"sglang-ess: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    _print(question, options, answer)
    return 0


def argument_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog=program_name("plan"), description=__doc__.partition("\n\n")[0]
    )
    add = parser.add_argument
    for spec, folder, default in (
        ("model", "models", None), ("gpu", "gpus", None), ("link", "links", "pcie5"),
        ("deployment", "deployments", None),
    ):  # fmt: skip
        known = f"{', '.join(names(folder))}, or a .toml file"
        needed = spec in ("model", "gpu")
        add(f"--{spec}", required=needed, default=default, help=known)
    numbers: tuple[tuple[str, type, str, str], ...] = (
        ("context", int, "N", "tokens of a request; or give --input and --output"),
        ("input", int, "N", "prompt tokens of a request"),
        ("output", int, "N", "tokens that a request generates"),
        ("gpus", int, "N", "decode GPUs, which share the experts [8]"),
        ("tp", int, "N", "GPUs that share a request's heads and one host tier [1: DP attention]"),
        ("mtp", int, "Q", "queries of a request in a step: 1 + draft tokens [2]"),
        ("accept", float, "T", "tokens a request gains in a step [1, 1.7, 2.8 for --mtp 1, 2, 4]"),
        ("host-gib", float, "G", "host memory for latent rows, of a node / its GPUs [200]"),
        ("kv-gib", float, "G", "device memory of one GPU for KV [what the weights leave]"),
        ("documents", int, "N", "prompts that --ess-store will keep: how large a store they take"),
        ("requests", int, "N", "most requests that one GPU, or the N of --tp, will serve at once"),
    )
    for flag, kind, value, text in numbers:
        add(f"--{flag}", type=kind, metavar=value, help=text)
    per_token = "mean time between two tokens of a request: step time / accepted tokens"
    add("--itl-ms", type=float, required=True, metavar="MS", help=per_token)
    add("--overlap", choices=("auto", "da", "dba", "off"), help="of fetches with compute [auto]")
    add(
        "--no-early-fetch", action="store_true",
        help="fetch each layer's rows in its turn, also in models whose layers share a top-k",
    )  # fmt: skip
    add(
        "--share-fetch", action="store_true",
        help="each GPU of --tp fetches its share of the missed rows and pushes it to the others",
    )  # fmt: skip
    profiles = f"{', '.join(names('localities'))}, a .toml file, or what --ess-trace wrote"
    add("--locality", metavar="PROFILE|TRACE", help=profiles)
    add(
        "--json",
        type=Path,
        metavar="PATH",
        help="write question, answer and flags here",
    )
    add("--plot", type=Path, metavar="PATH", help="write a PNG of tokens/s by batch here")
    add("--seed", type=int, default=0, metavar="S", help="of the generated top-k [0]")
    return parser


# --- the question -----------------------------------------------------------------------


def ask(options: argparse.Namespace) -> Question:
    """Make the question of the options. Raises: ValueError, one line, for a bad name or number."""
    model, gpu, link = (load(kind, getattr(options, kind)) for kind in ("model", "gpu", "link"))
    context, longest = _lengths(options)
    return Question(
        model, gpu, link, _deployment(options), context, options.itl_ms / 1000, longest,
        options.requests,
    )  # fmt: skip


def _lengths(options: argparse.Namespace) -> tuple[int, int]:
    """Return a request's tokens: the mean while it decodes, and at its end."""
    given = options.input is not None, options.output is not None
    if (options.context is not None) == any(given) or any(given) != all(given):
        raise QuestionError(
            "lengths must be --context, or --input and --output: give one of the two."
        )
    if options.context is not None:
        return options.context, options.context
    if options.input < 1 or options.output < 1:
        raise QuestionError(
            f"--input and --output must be 1 or more: got {options.input} and {options.output}."
        )
    return options.input + options.output // 2, options.input + options.output


def _deployment(options: argparse.Namespace) -> Deployment:
    """Load the deployment and apply the options to it."""
    gpus = options.gpus
    if gpus is not None and not 1 <= gpus <= 4096:
        raise QuestionError(f"--gpus must be 1 to 4096: got {gpus}.")
    for name in ("host_gib", "kv_gib"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            flag = name.replace("_", "-")
            raise QuestionError(
                f"--{flag} must be more than 0: got {value:g}. Leave it out if unsure."
            )
    name = options.deployment or (NODE if (gpus or 8) <= 8 else SEVERAL_NODES)
    found: Deployment = load("deployment", name)
    values: dict[str, Any] = {}
    if options.deployment is None:
        values["kv_gib"], values["overlap"] = None, "auto"
    if gpus is not None:
        values |= {"decode_ranks": gpus, "expert_gpus": gpus}
        local = found.gpus_per_node if gpus > found.gpus_per_node else 1
        values |= {"remote_share": 1 - local / gpus}
        values |= {"gpus_per_node": min(gpus, found.gpus_per_node)}
    if options.tp is not None:
        gpus = gpus or found.decode_ranks * found.tensor_parallel
        values |= {"tensor_parallel": options.tp, "decode_ranks": _ranks(gpus, options.tp)}
    if options.mtp is not None:
        values |= {"queries": options.mtp, "accepted_tokens": _accepted(options)}
    elif options.accept is not None:
        values["accepted_tokens"] = options.accept
    for name in ("host_gib", "kv_gib", "overlap"):
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    if options.no_early_fetch:
        values["early_fetch"] = False
    if options.share_fetch:
        values["share_fetch"] = True
    return changed(found, **values)


def _ranks(gpus: int, tensor_parallel: int) -> int:
    """Decode ranks of as many GPUs. Raises: QuestionError if the GPUs make no whole ranks."""
    if not 1 <= tensor_parallel <= gpus or gpus % tensor_parallel:
        raise QuestionError(f"--tp must divide --gpus, {gpus}: got {tensor_parallel}.")
    return gpus // tensor_parallel


def _accepted(options: argparse.Namespace) -> float:
    if options.accept is None and options.mtp not in ACCEPTED:
        known = ", ".join(map(str, ACCEPTED))
        raise QuestionError(f"--accept must be given for --mtp {options.mtp}: known for {known}.")
    return options.accept if options.accept is not None else ACCEPTED[options.mtp]


def misses_of(
    question: Question, options: argparse.Namespace, bar: Callable[[str, int], Any]
) -> MissTable:
    """Make the miss table of the profile or trace in --locality, or of the model's own profile.

    bar(what, total): returns a function to call with the units done
    """
    model, queries = question.model, question.deployment.queries
    chosen = options.locality or _profile(options.model, model)
    if chosen not in names("localities") and not chosen.endswith(".toml"):
        if not Path(chosen).is_file():
            known = ", ".join(names("localities"))
            raise SpecError(f"--locality must be {known}, a .toml file or a trace: got {chosen}.")
        trace = read_trace(Path(chosen))
        return MissTable.from_trace(
            trace, model.groups, question.context, queries, bar("replaying", 0)
        )
    locality = Locality.load(chosen)
    if locality.topk != model.topk:
        raise SpecError(
            f"locality must have the model's top-k of {model.topk}: got {locality.topk}."
        )
    done = bar("measuring misses", LAYERS * REQUESTS)
    return MissTable.from_profile(
        locality, model.groups, question.context, queries, seed=options.seed,
        progress=lambda: done(1),
    )  # fmt: skip


def _profile(name: str, model: Model) -> str:
    """Name the model's own profile, one of its family, or the first of as many index groups."""
    known = names("localities")
    family = [other for other in known if other.split("-")[0] == name.split("-")[0]]
    alike = [other for other in known if Locality.load(other).num_layers == len(model.groups)]
    return name if name in known else (family or alike or known)[0]


@contextmanager
def _bar() -> Iterator[Callable[[str, int], Any]]:
    """Give bar(what, total): a tqdm bar for work of over two seconds. total 0: unknown."""
    from tqdm import tqdm

    made: list[Any] = []

    def bar(what: str, total: int) -> Any:
        one = tqdm(total=total or None, desc=what, delay=2, disable=None, leave=False)
        made.append(one)
        return one.update

    try:
        yield bar
    finally:
        for one in made:
            one.close()


# --- output -----------------------------------------------------------------------------


def flags(question: Question, answer: Answer) -> list[str]:
    """Return the arguments of sglang_ess.launch_server that serve as answer.best says."""
    if answer.best is None:
        return []
    drafts = _draft_flags(question.deployment.queries)
    if not answer.helps:
        return ["--disable-ess", *drafts]
    advice, deployment = answer.best, question.deployment
    overlap = deployment.overlap if deployment.overlap in ("da", "dba", "off") else "auto"
    # One GiB more, because the pool also counts a page of padding. The flag is for a whole node.
    limit = deployment.host_gib * deployment.rank_gpus
    host_gib = min(math.ceil(advice.host_gib) + 1, limit) * deployment.host_tiers
    return [
        "--ess-hot-gib", f"{advice.hot_gib:.2f}",
        "--ess-host-gib", f"{host_gib:g}",
        "--ess-itl-ms", f"{question.itl_seconds * 1000:g}",
        "--ess-overlap", overlap,
        "--cuda-graph-max-bs-decode", str(advice.batch), *drafts,
    ]  # fmt: skip


def _draft_flags(queries: int) -> list[str]:
    """Return SGLang's arguments by which the MTP layer drafts queries - 1 tokens, in a chain."""
    if queries == 1:
        return []
    return [
        "--speculative-algorithm", "NEXTN", "--speculative-eagle-topk", "1",
        "--speculative-num-steps", str(queries - 1), "--speculative-num-draft-tokens", str(queries),
    ]  # fmt: skip


def as_dict(question: Question, options: argparse.Namespace, answer: Answer) -> dict[str, Any]:
    """Return the document that --json writes."""
    specs = {name: getattr(options, name) for name in ("model", "gpu", "link", "locality")}
    specs |= {"context": question.context, "longest": question.slots_tokens}
    specs |= {"itl_ms": question.itl_seconds * 1000, "requests": question.max_requests}
    stored = {"store_bytes": store_bytes(question, options)} if options.documents else {}
    return {
        "kind": "simulated",
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "seed": options.seed,
        "question": specs | {"deployment": asdict(question.deployment)},
        **asdict(answer),
        **stored,
        "flags": flags(question, answer),
    }


def lines(answer: Answer, deployment: Deployment) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: a name, and a cell for ESS and for one tier."""
    gpus, host_tiers = deployment.tensor_parallel, deployment.host_tiers
    found = [advice for advice in (answer.ess, answer.one_tier) if advice]

    def row(name: str, cell: Callable[[Advice], str]) -> tuple[str, ...]:
        return (name, *map(cell, found))

    rank = "a GPU" if gpus == 1 else f"a rank of {gpus} GPUs"
    yield row(f"requests {rank}", lambda p: str(p.batch))
    yield row("tokens/s a GPU", lambda p: f"{p.tokens_per_second:,.0f}")
    yield row("tokens/s a node", lambda p: f"{p.tokens_per_second_per_node:,.0f}")
    yield row("ITL, ms", lambda p: f"{p.itl_ms:.1f}")
    yield row("decode step, ms", lambda p: f"{p.step_ms:.1f}")
    yield row("  waiting for rows, ms", lambda p: f"{p.parts['transfer']:.1f}")
    if any(p.in_turn_ms > p.parts["transfer"] for p in found):
        yield row("    without early fetches", lambda p: f"{p.in_turn_ms:.1f}")
    yield row("hot rows a layer", lambda p: f"{p.hot_rows:,}")
    yield row("  for each request", lambda p: f"{p.hot_rows / p.batch:,.0f}")
    yield row("  of the slots", lambda p: f"{p.ratio:.2f}")
    yield row("misses a request and layer", lambda p: f"{p.misses:.0f}")
    yield row("device GiB of hot rows", lambda p: f"{p.hot_gib:.1f}" if p.hot_gib else "-")
    if any(p.draft_gib for p in found):
        yield row("device GiB of the draft's KV", lambda p: f"{p.draft_gib:.1f}")
    yield row("device GiB of KV in all", lambda p: f"{p.device_gib:.1f}")
    yield row(f"host GiB {rank}", lambda p: f"{p.host_gib:.0f}" if p.host_gib else "-")
    if host_tiers > 1:
        yield row(
            "host GiB a node", lambda p: f"{p.host_gib * host_tiers:,.0f}" if p.host_gib else "-"
        )


def store_bytes(question: Question, options: argparse.Namespace) -> int:
    """Bytes of a store that keeps --documents prompts."""
    tokens = options.input or question.slots_tokens
    drafts = question.deployment.queries > 1
    return (options.documents or 0) * stored_bytes(question.model, tokens, drafts)


def _print(question: Question, options: argparse.Namespace, answer: Answer) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    found = [advice for advice in (answer.ess, answer.one_tier) if advice]
    title = f"{options.model}, {options.gpu}, {options.link}, {question.context:,} tokens"
    if found:
        table = Table("", title=title, caption="simulated", box=box.SIMPLE)
        for advice in found:
            table.add_column(TITLES[advice.tier], justify="right")
        for name, *cells in lines(answer, question.deployment):
            table.add_row(name, *cells)
        Console().print(table)
    print("\n".join(verdict(question, answer)))
    if options.documents:
        size = store_bytes(question, options) / GIB
        print(f"--ess-store PATH:{math.ceil(size)}GiB keeps {options.documents:,} such prompts.")


def verdict(question: Question, answer: Answer) -> Iterator[str]:
    """Yield the lines below the table: whether ESS helps, how to serve, and notes."""
    if not answer.helps:
        yield f"ESS does not help here because {answer.reason}"
    elif answer.gain is None:
        yield "ESS helps: without it no request fits."
    else:
        yield f"ESS helps: {answer.gain:+.0%} tokens/s at the same device memory."
    if arguments := flags(question, answer):
        yield ""
        yield f"python -m sglang_ess.launch_server ... {' '.join(arguments)}"
    if question.deployment.share_fetch:
        yield "--share-fetch is not written for GPUs yet: these are the figures it would have."
    if answer.helps and question.deployment.overlap not in ("da", "dba", "off"):
        yield "--ess-overlap auto needs --ess-overlap-costs: without that file nothing overlaps."


def plot(path: Path, planner: Planner, question: Question) -> None:
    """Write a PNG: tokens/s and ITL by batch, with ESS and without."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for found in (planner.ess_candidates(), planner.one_tier_candidates()):
        tried = list(found)
        for axes, name in zip(panels, ("tokens_per_second", "itl_ms"), strict=True):
            if tried:
                axes.plot(
                    [advice.batch for advice in tried], [getattr(advice, name) for advice in tried],
                    label=TITLES[tried[0].tier],
                )  # fmt: skip
    panels[0].set_ylabel("tokens/s a GPU (simulated)")
    panels[1].set_ylabel("ms between tokens")
    panels[1].axhline(question.itl_seconds * 1000, color="gray", linestyle=":", label="target")
    for axes in panels:
        axes.set_xlabel("requests a rank")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
