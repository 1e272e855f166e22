"""One tier against two, on a GPU or on the CPU platform: the same requests, judged alike.

Every engine of a comparison runs script(), its requests admitted in the same batches. Where the
same kernels read the same rows in the same order, results must be equal bit for bit. Where
attention comes in parts, or a batch was another one, they differ by rounding: the yardstick for
that is what one tier differs from itself when it computes a request in another batch.
"""

import pickle
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from tests.support.parity import prompts_of

RETRACT = "retract"
# Differences that are rounding whatever one tier did. float32: rows that are computed again, after
# a retraction, may round to the next bfloat16 or e4m3, which moves logprobs by some 1e-5.
# bfloat16: half of what one step (2^-8 of it) in a logit of 8 is, though the head is in float32.
LEAST = {"float32": 1e-4, "bfloat16": 2**-6}
MARGIN = 4  # times one tier's difference from itself
MOST = 0.25  # a baseline further from itself than this cannot judge anybody


@dataclass(frozen=True)
class Load:
    """Prompt lengths and output length of a script, in tokens.

    long, medium: more than top-k, and long more than a prefill chunk; six: of a batch larger
    than any decode graph
    """

    long: int
    medium: int
    six: tuple[int, ...]
    new: int


def script(served, load: Load) -> dict[str, list]:
    """Outputs by group: cold and chunked, alone, prefix hits, six at once, reused slots,
    retractions (where an engine has retract_group installed).

    Raises: RuntimeError if a request ended before its length, as SGLang has it do at a NaN.
    """
    long, medium = prompts_of([load.long, load.medium])
    six = prompts_of(load.six, seed=2)
    outputs = {"pair": served.together("pair", [long, medium], load.new, start=0)}
    outputs["single"] = served.together("single", [long], load.new)
    tails = [long + [1], long + [2] * 9, medium + [3] * 70, medium[: load.medium // 2] + [4]]
    outputs["shared"] = served.together("shared", tails, load.new)
    outputs["six"] = served.together("six", six, load.new, start=0)
    served.flush()
    others = prompts_of([load.long - 7, load.medium, *load.six[-1:]], seed=3)
    outputs["reused"] = served.together("reused", others, load.new, start=0)
    outputs[RETRACT] = served.together(RETRACT, [*others[:2], *six[:2]], 2 * load.new)
    for name, group in outputs.items():
        for output in group:
            if (reason := output.meta["finish_reason"])["type"] != "length":
                raise RuntimeError(f"a request of {name} must run to its length: got {reason}")
    return outputs


@dataclass(frozen=True)
class Difference:
    """Two outputs of one request.

    agreed: output tokens before the first that differs, of `tokens`
    worst, mean: |logprob difference| over those and that one: a tie turned over by rounding has
        two tokens of nearly one logprob; nothing behind it can be compared
    prompt: the same, the worst of the prompt's; first: where the first difference of all is
    """

    where: str
    agreed: int
    tokens: int
    worst: float
    mean: float
    prompt: float
    first: str

    @property
    def is_none(self) -> bool:
        return self.agreed == self.tokens and self.worst == self.prompt == 0.0

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.agreed} of {self.tokens} tokens agree; logprobs differ by "
            f"{self.worst:.2g} at most, {self.mean:.2g} on average, the prompt's by "
            f"{self.prompt:.2g}; first at {self.first}"
        )


def difference(where: str, one, other) -> Difference:
    same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
    agreed = same.index(False) if False in same else len(same)
    output = np.abs(one.logprobs - other.logprobs)[: agreed + 1]
    prompt = np.abs(one.prompt_logprobs - other.prompt_logprobs)
    places = [f"prompt token {i + 1}" for i in np.flatnonzero(prompt)[:1]]
    places += [f"output token {i}" for i in np.flatnonzero(output)[:1]]
    places += [f"output token {agreed}"] * (agreed < len(same))
    return Difference(
        where,
        agreed,
        len(same),
        float(output.max(initial=0.0)),
        float(output.mean()),
        float(prompt.max(initial=0.0)),
        [*places, "none"][0],
    )


def differences(outputs, expected) -> list[Difference]:
    """Of every request, in the order in which they ran."""
    return [
        difference(f"{name}[{i}]", one, other)
        for name in expected
        for i, (one, other) in enumerate(zip(outputs[name], expected[name], strict=True))
    ]


def noise(expected) -> Difference:
    """One tier against itself: a prompt cold beside another one, then alone as a prefix hit."""
    (alone,), (beside, _) = expected["single"], expected["pair"]
    bare = np.empty(0)
    alone, beside = (type(o)(**vars(o) | {"prompt_logprobs": bare}) for o in (alone, beside))
    return difference("noise", alone, beside)


def check_same(found: list[Difference], dtype: str, yardstick: Difference, exact: bool) -> None:
    """Raises: AssertionError that names every request beyond what it may differ by.

    exact: bit for bit. Prompts are in any case, but where retraction made other batches.
    """
    most = max(LEAST[dtype], MARGIN * yardstick.worst)
    max_mean = max(LEAST[dtype] / MARGIN, MARGIN * yardstick.mean)
    assert most < MOST, f"one tier must agree with itself within {MOST}: got {yardstick}"
    wrong = []
    for one in found:
        retracted = one.where.startswith(RETRACT)
        rounding = one.worst <= most and one.mean <= max_mean
        if not (one.is_none if exact and not retracted else rounding):
            wrong.append(one)
        elif one.prompt and not retracted:
            wrong.append(one)
    agreed, tokens = (sum(getattr(one, name) for one in found) for name in ("agreed", "tokens"))
    rule = "not at all" if exact else f"by {most:.2g} at most, {max_mean:.2g} on average"
    assert not wrong, f"logprobs must differ {rule}: got\n" + "\n".join(map(str, wrong))
    assert agreed > tokens / 2, f"half of the tokens must be comparable: got {agreed} of {tokens}"


def summary(found: list[Difference]) -> str:
    """One line over all requests."""
    equal = sum(one.is_none for one in found)
    worst = max(found, key=lambda one: max(one.worst, one.prompt))
    return f"{equal} of {len(found)} requests bit for bit" + (
        "" if equal == len(found) else f"; worst: {worst}"
    )


def recorded_layers(file: Path) -> list[tuple]:
    """What exactness_patches.layers wrote: (mode, layer, output sums, selection sums)."""
    events = []
    if file.exists():
        with file.open("rb") as stream:
            while True:
                try:
                    events.append(pickle.load(stream))
                except EOFError:
                    break
    return events


def first_layer(events: list[tuple], expected: list[tuple]) -> str:
    """Where two recordings part for the first time: call, mode, layer, query, and in what."""
    if not events or not expected:
        return "layers were not recorded"
    for number, (one, other) in enumerate(zip_longest(events, expected)):
        if one == other:
            continue
        if one is None or other is None or one[:2] != other[:2] or len(one[2]) != len(other[2]):
            shown = [None if call is None else (*call[:2], len(call[2])) for call in (one, other)]
            return f"call {number} was another one (mode, layer, queries): got {shown}"
        (mode, layer, out, topk), (_, _, out_expected, topk_expected) = one, other
        query = next(i for i in range(len(out)) if _parts(one, i) != _parts(other, i))
        same_topk = topk is None or topk[query] == topk_expected[query]
        return (
            f"call {number} ({mode}, {len(out)} queries), layer {layer}, query {query}: "
            f"{'the same' if same_topk else 'another'} selection, "
            f"{'the same' if out[query] == out_expected[query] else 'another'} output"
        )
    return f"all {len(events)} recorded calls are the same"


def _parts(call: tuple, query: int) -> list:
    return [None if sums is None else sums[query] for sums in call[2:]]
