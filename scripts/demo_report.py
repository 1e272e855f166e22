"""What scripts/demo.py measured, as text and as pictures."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sglang_ess.testing.recall.documents import KINDS, RecallQuestion

DEPTHS = 4  # parts of a document: the columns of the needle picture


class Asked(NamedTuple):
    """A question about a document. length: of the document, rounded, in bytes; text: the prompt"""

    length: int
    question: RecallQuestion
    text: str


@dataclass(frozen=True)
class Answer:
    """One answer. cached_tokens: prompt tokens found in the radix cache; token_ids: generated."""

    prompt_tokens: int
    cached_tokens: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Served:
    """Results of one server.

    facts: "ess" of /server_info
    alone, together: answers to one question at a time and to all at once, in the questions' order
    running: most requests that decoded together; seconds: duration of the questions asked at once
    lookups, misses: of all decode steps, by layer; empty one-tier
    """

    facts: dict
    alone: list[Answer]
    together: list[Answer]
    running: int
    seconds: float
    lookups: dict[int, int]
    misses: dict[int, int]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(answer.token_ids) for answer in self.together) / self.seconds

    @property
    def cached_share(self) -> float:
        """Share of prompt tokens found in the radix cache, for the questions asked at once."""
        cached, prompts = (
            sum(getattr(answer, name) for answer in self.together)
            for name in ("cached_tokens", "prompt_tokens")
        )
        return cached / prompts

    @property
    def hit_rates(self) -> dict[int, float]:
        return {n: 1 - self.misses[n] / self.lookups[n] for n in self.lookups if self.lookups[n]}


# --- right answers ----------------------------------------------------------------------


def rights(asked: Sequence[Asked], answers: Sequence[Answer]) -> list[bool]:
    """Whether each answer has the value that its document gives."""
    pairs = zip(asked, answers, strict=True)
    return [one.question.is_right(answer.text) for one, answer in pairs]


def share(right: Sequence[bool]) -> str:
    return f"{sum(right)} of {len(right)}"


class Needles(NamedTuple):
    """Right answers by place. cells: {(length, part of the document): whether each was right}"""

    lengths: list[int]
    cells: dict[tuple[int, int], list[bool]]

    def rate(self, length: int, part: int) -> float | None:
        """Share of right answers, None if none was asked."""
        right = self.cells.get((length, part))
        return statistics.mean(right) if right else None


def needles(asked: Sequence[Asked], right: Sequence[bool]) -> Needles:
    """Group the answers by the document's length and by where in it the answer begins."""
    cells: dict[tuple[int, int], list[bool]] = {}
    for one, is_right in zip(asked, right, strict=True):
        part = min(int(one.question.depth * DEPTHS), DEPTHS - 1)
        cells.setdefault((one.length, part), []).append(is_right)
    return Needles(sorted({one.length for one in asked}), cells)


def depth_names() -> list[str]:
    """["0-25%", ...]"""
    step = 100 // DEPTHS
    return [f"{low}-{low + step}%" for low in range(0, 100, step)]


def needle_table(found: Needles) -> str:
    """Right answers of those asked: a row for each length, a column for each part."""
    lines = [f"    {'document':<12}" + "".join(f"{name:>10}" for name in depth_names())]
    for length in found.lengths:
        cells = [found.cells.get((length, part), []) for part in range(DEPTHS)]
        shown = [f"{sum(right)}/{len(right)}" if right else "-" for right in cells]
        lines.append(f"    {length:<6} bytes" + "".join(f"{cell:>10}" for cell in shown))
    return "\n".join(lines)


# --- text -------------------------------------------------------------------------------


def table(results: dict[str, Served], asked: Sequence[Asked]) -> str:
    """The comparison as text, with a column for each server."""

    def mib(served: Served, tier: str) -> str:
        return f"{served.facts[f'{tier}_bytes'] / 2**20:.1f} MiB"

    def of_kind(served: Served, kind: str) -> str:
        right = zip(asked, rights(asked, served.alone), strict=True)
        return share([is_right for one, is_right in right if one.question.kind == kind])

    rows = {
        "right answers": lambda served: share(rights(asked, served.alone)),
        **{f"    {kind}": lambda served, kind=kind: of_kind(served, kind) for kind in KINDS},
        "right answers, all at once": lambda served: share(rights(asked, served.together)),
        "device bytes of the KV pool": lambda served: mib(served, "device"),
        "host bytes": lambda served: mib(served, "host"),
        "slots": lambda served: str(served.facts["slots"]),
        "requests running together, most": lambda served: str(served.running),
        "prompt tokens found in the cache": lambda served: f"{served.cached_share:.0%}",
        "output tokens/s, all at once": lambda served: f"{served.tokens_per_second:.0f}",
        "hit rate of the hot tier": _hit_rate,
    }
    lines = [("", list(results))]
    lines += [
        (label, [cell(served) for served in results.values()]) for label, cell in rows.items()
    ]
    return "\n".join(f"{label:<34}" + "".join(f"{c:>14}" for c in cells) for label, cells in lines)


def _hit_rate(served: Served) -> str:
    lookups = sum(served.lookups.values())
    return f"{1 - sum(served.misses.values()) / lookups:.1%}" if lookups else "-"


def different(first: Sequence[Answer], second: Sequence[Answer]) -> list[int]:
    """Numbers of the requests whose tokens differ, counted from 1."""
    pairs = enumerate(zip(first, second, strict=True), 1)
    return [number for number, (a, b) in pairs if a.token_ids != b.token_ids]


def bars(hit_rates: dict[int, float]) -> str:
    return "\n".join(
        f"    layer {layer}  {'#' * round(40 * rate):<40} {rate:.1%}"
        for layer, rate in sorted(hit_rates.items())
    )


def samples(asked: Sequence[Asked], answers: Sequence[Answer]) -> str:
    """The last question of each kind, with its answer."""
    of_kind = {one.question.kind: (one, answer) for one, answer in zip(asked, answers, strict=True)}
    lines = []
    for one, answer in of_kind.values():
        wrong = (
            "" if one.question.is_right(answer.text) else f"    (wrong: {one.question.answer!r})"
        )
        found = f"{one.length} bytes, {one.question.depth:.0%} into them"
        lines += [f"    {one.question.kind} ({found})", f"      {one.question.prompt.strip()}"]
        lines[-1] = lines[-1].replace("\n", "\n      ") + answer.text + wrong
    return "\n".join(lines)


# --- pictures ---------------------------------------------------------------------------


def draw_needles(found: Needles, path: Path) -> None:
    """Draw the share of right answers by length and depth."""
    figure, axes = _figure((6, 2.2 + 0.4 * len(found.lengths)))
    rates = [[found.rate(length, part) for part in range(DEPTHS)] for length in found.lengths]
    shown = [[float("nan") if rate is None else rate for rate in row] for row in rates]
    image = axes.imshow(shown, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for row, length in enumerate(found.lengths):
        for part in range(DEPTHS):
            right = found.cells.get((length, part), [])
            text = f"{sum(right)}/{len(right)}" if right else "-"
            axes.text(part, row, text, ha="center", va="center")
    axes.set_xticks(range(DEPTHS), depth_names())
    axes.set_yticks(range(len(found.lengths)), [f"{length:,}" for length in found.lengths])
    axes.set(xlabel="where in the document the answer is", ylabel="document, bytes")
    axes.set_title("Right answers, served with ESS", fontsize=9)
    figure.colorbar(image, label="share right")
    figure.savefig(path, dpi=130)


def draw_hit_rates(hit_rates: dict[int, float], hot_ratio: float, path: Path) -> None:
    figure, axes = _figure((6, 3.5))
    layers = sorted(hit_rates)
    drawn = axes.bar(layers, [hit_rates[layer] for layer in layers])
    axes.bar_label(drawn, fmt=lambda rate: f"{rate:.0%}")
    axes.set(xlabel="layer", ylabel="hit rate", ylim=(0, 1), xticks=layers)
    axes.set_title(f"Top-k rows found in the hot tier ({hot_ratio:.0%} of the slots)", fontsize=9)
    figure.savefig(path, dpi=130)


def _figure(size: tuple[float, float]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def draw(ess: Served, found: Needles, out: Path) -> Iterable[Path]:
    """Write both pictures into out. Returns their paths, none if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ()
    pictures = out / "needle.png", out / "hit_rate.png"
    draw_needles(found, pictures[0])
    draw_hit_rates(ess.hit_rates, ess.facts["hot_ratio"], pictures[1])
    return pictures


# --- all of it --------------------------------------------------------------------------


def report(results: dict[str, Served], asked: Sequence[Asked], out: Path) -> int:
    """Print the comparison, draw the pictures into out.

    results: one-tier, then ESS
    Returns: the exit status, 0 if the outputs are identical, else 1.
    """
    one_tier, ess = results.values()
    found = needles(asked, rights(asked, ess.alone))
    print(f"\n{table(results, asked)}\n\nquestions and answers, with ESS:")
    print(samples(asked, ess.alone))
    print("\nright answers by length and by where in the document they are, with ESS:")
    print(f"{needle_table(found)}\n\nhit rate by layer:\n{bars(ess.hit_rates)}")
    for picture in draw(ess, found, out):
        print(f"    picture: {picture}")
    wrong = different(one_tier.alone, ess.alone)
    lengths = [answer.prompt_tokens for answer in ess.alone]
    print(
        f"\n{len(ess.alone)} requests of {min(lengths)} to {max(lengths)} prompt tokens, greedy, "
        "asked one by one"
    )
    if wrong:
        print(f"outputs identical: no: requests {', '.join(map(str, wrong))} differ")
        return 1
    print("outputs identical: yes")
    # This does not test ESS: bf16 rounding depends on the batch size, one-tier too.
    same = len(ess.together) - len(different(one_tier.together, ess.together))
    print(
        f"(asked at once, where batches and so bf16 rounding differ: {same} of {len(ess.together)})"
    )
    return 0
