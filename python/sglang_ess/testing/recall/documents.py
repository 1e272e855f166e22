"""Long documents with facts in them, and questions about these: what the recall model learns.

The text is Python's own documentation, as pydoc carries it. Facts are sentences put between its
lines. A question needs one fact, two facts of which one leads to the other, or a passage of the
text word for word. An answer is right if its value is, byte for byte.
"""

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("code", "hop", "quote")
HEAD_BYTES, QUOTE_BYTES = 16, 40  # of a passage: what the question shows, what the answer adds
CONTEXT_BYTES = 12  # that tell each byte of a passage
CODE_DIGITS = 5
BYTES_A_FACT = 200  # a document has a fact, about which nobody asks, for each so many bytes
TRAINED_SHARE = 0.9  # of the text; the rest is for documents that no training saw
STOP = "\n"  # ends an answer


class RecallQuestion(NamedTuple):
    """prompt follows the document's text, answer follows the prompt; value: what must be right
    depth: where in the document the answer begins to be found, 0 (its start) to 1
    """

    kind: str
    prompt: str
    answer: str
    value: str
    depth: float

    def is_right(self, output: str) -> bool:
        """Whether a model's output has the value where the answer has it."""
        begin = self.answer.rfind(self.value)
        return output[begin : begin + len(self.value)] == self.value


@dataclass(frozen=True)
class Document:
    """ASCII text, one token a byte."""

    text: str
    questions: tuple[RecallQuestion, ...]


@functools.cache
def texts() -> tuple[str, str]:
    """(text for training, text for tests): Python's documentation, printable ASCII and line ends.

    Source: pydoc_data.topics of the Python that runs.
    """
    from pydoc_data.topics import topics  # 0.5 MB

    whole = "\n".join(topics[name] for name in sorted(topics))
    whole = re.sub(r"[^\n\x20-\x7e]", "", whole)
    cut = int(len(whole) * TRAINED_SHARE)
    return whole[:cut], whole[cut:]


def make_document(
    rng: random.Random,
    length: int,
    kinds: Sequence[str],
    *,
    others: int = 2,
    depth: float | None = None,
    trained: bool = False,
) -> Document:
    """A document of about `length` bytes with one question for each of `kinds`.

    others: facts about which no question asks; depth: where the asked facts are, 0 to 1 (None:
    anywhere; a hop's second fact is anywhere); trained: from the text that training sees
    Raises: ValueError if the length leaves no room for the facts.
    """
    asked = [_fact(rng, kind) for kind in kinds if kind != "quote"]
    facts: list[tuple[str, float | None]] = [(one.sentences[0], depth) for one in asked]
    facts += [(sentence, None) for one in asked for sentence in one.sentences[1:]]
    facts += [(rng.choice(_fact(rng, "hop").sentences), None) for _ in range(others)]
    text = texts()[0 if trained else 1]
    room = length - sum(len(sentence) + 1 for sentence, _ in facts)
    if room < 2 * (HEAD_BYTES + QUOTE_BYTES) or room > len(text):
        raise ValueError(
            f"length must leave {2 * (HEAD_BYTES + QUOTE_BYTES)} to {len(text)} bytes of text "
            f"beside {len(facts)} facts: got {length}, which leaves {room}"
        )
    start = rng.randrange(len(text) - room + 1)
    whole = _with_facts(rng, text[start : start + room], facts)
    questions, remaining = [], iter(asked)
    taken = [(at, at + len(one)) for one, _ in facts for at in [whole.index(one)]]
    told = _told(whole) if "quote" in kinds else None
    for kind in kinds:
        if kind == "quote":
            question, place = _quote(rng, whole, told, taken, depth)
            questions.append(question)
            taken.append(place)
        else:
            questions.append(next(remaining).question(whole))
    return Document(whole, tuple(questions))


class _Fact(NamedTuple):
    kind: str
    sentences: tuple[str, ...]
    asks: str
    answer: str
    value: str

    def question(self, text: str) -> RecallQuestion:
        depth = text.index(self.sentences[0]) / len(text)
        return RecallQuestion(
            self.kind, _prompt(self.asks), f" {self.answer}{STOP}", self.value, depth
        )


def _prompt(asks: str) -> str:
    return f"\nQ: {asks}\nA:"


def _name(rng: random.Random) -> str:
    syllables = rng.choice((2, 3))
    parts = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(syllables)]
    return "".join([*parts, rng.choice("bcdfghjklmnprstvwz")]).capitalize()


def _fact(rng: random.Random, kind: str) -> _Fact:
    name, code = _name(rng), f"{rng.randrange(10**CODE_DIGITS):0{CODE_DIGITS}}"
    says = f"The code of {name} is {code}."
    if kind == "code":
        return _Fact(kind, (says,), f"What is the code of {name}?", says, code)
    keeps = _name(rng)
    leads = f"The keeper of {keeps} is {name}."
    asks = f"What is the code of the keeper of {keeps}?"
    return _Fact(kind, (leads, says), asks, f"{leads} {says}", code)


def _with_facts(rng, body, facts) -> str:
    """Put each sentence between two lines or sentences of the body, at its depth if it has one."""
    cuts = [match.end() for match in re.finditer(r"\.\s|\n", body)] or [0]

    def place(depth):
        if depth is None:
            return rng.choice(cuts)
        return min(cuts, key=lambda cut: abs(cut - depth * len(body)))

    places = sorted(((place(depth), rng.random(), sentence) for sentence, depth in facts))
    parts, last = [], 0
    for at, _, sentence in places:
        parts += [body[last:at], sentence, rng.choice("  \n")]
        last = at
    return "".join([*parts, body[last:]])


def _quote(rng, text, told, taken, depth) -> tuple[RecallQuestion, tuple[int, int]]:
    """Ask for a passage of one line, apart from what is taken, whose beginning occurs once.

    Each of its bytes is told by the CONTEXT_BYTES before it, or, where the text has no such
    passage, as many as can be. It has no run of spaces, as tables have. told: see _told()
    Returns the question and where its passage is.
    """
    span = HEAD_BYTES + QUOTE_BYTES
    last = len(text) - span
    count = np.cumsum(np.pad(told, (1, 0)))
    missing = QUOTE_BYTES - (count[span:] - count[HEAD_BYTES : len(text) + 1 - QUOTE_BYTES])
    if depth is None:
        aims = np.array([rng.random() for _ in range(last + 1)])
    else:
        aims = np.abs(np.arange(last + 1) / max(last, 1) - depth)
    for at in map(int, np.lexsort((aims, missing))):
        head, value = text[at : at + HEAD_BYTES], text[at + HEAD_BYTES : at + span]
        free = all(end <= at or begin >= at + span for begin, end in taken)
        plain = "\n" not in head + value and "   " not in head + value
        if free and plain and text.count(head) == 1:
            break
    prompt, answer = _prompt(f'What follows "{head}"?'), f' "{head}{value}"{STOP}'
    return RecallQuestion("quote", prompt, answer, value, at / len(text)), (at, at + span)


def _told(text: str) -> np.ndarray:
    """[bytes] int64: 1 where the CONTEXT_BYTES before a byte are nowhere followed by another."""
    followed: dict[str, set[str]] = {}
    for at in range(CONTEXT_BYTES, len(text)):
        followed.setdefault(text[at - CONTEXT_BYTES : at], set()).add(text[at])
    return np.array(
        [
            at >= CONTEXT_BYTES and len(followed[text[at - CONTEXT_BYTES : at]]) == 1
            for at in range(len(text))
        ],
        np.int64,
    )


class Sample(NamedTuple):
    """A sequence to learn from: token ids, the weight of predicting each, its position; [length].

    weights float32: 1 in an answer, TEXT_WEIGHT elsewhere, 0 in padding
    """

    ids: np.ndarray
    weights: np.ndarray
    positions: np.ndarray


TEXT_WEIGHT = 0.1
QUESTION_BYTES = 150  # of a sequence for each question it asks
_ASKED_BYTES = {"code": 68, "hop": 112, "quote": 108}  # about: a question and its answer


def sample(rng: random.Random, length: int, span: int, pad: int) -> Sample:
    """A document and questions with their answers, of `length` tokens in all.

    Between paragraphs, positions jump, and the last is up to `span`: a short sequence then
    teaches distances of a long one.
    """
    kinds = [rng.choice(KINDS) for _ in range(min(length // QUESTION_BYTES, 24))]
    others = rng.randint(1, len(kinds))
    facts = others + sum({"code": 1, "hop": 2, "quote": 0}[kind] for kind in kinds)
    room = max(length - sum(_ASKED_BYTES[kind] for kind in kinds), 32 * facts + 120)
    document = make_document(rng, room, kinds, others=others, trained=True)
    parts = [(document.text, TEXT_WEIGHT)]
    for question in document.questions:
        parts += [(question.prompt, TEXT_WEIGHT), (question.answer, 1.0)]
    ids = np.frombuffer("".join(part for part, _ in parts).encode(), np.uint8).astype(np.int64)
    weights = np.repeat(
        np.array([weight for _, weight in parts], np.float32), [len(part) for part, _ in parts]
    )
    ids, weights = ids[-length:], weights[-length:]  # the text may lose its beginning
    missing = length - len(ids)
    positions = np.arange(length) + _jumps(rng, ids, length, span)
    return Sample(
        np.pad(ids, (0, missing), constant_values=pad), np.pad(weights, (0, missing)), positions
    )


def _jumps(rng, ids, length, span) -> np.ndarray:
    """[length] int64: by how much each position is moved, at most span - length."""
    moved = np.zeros(length, np.int64)
    ends = np.flatnonzero(ids == ord("\n")) + 1
    ends = ends[ends < len(ids)]
    if span <= length or not len(ends) or rng.random() < 0.1:
        return moved
    room = rng.randrange(span - length + 1)
    cuts = rng.sample(list(ends), min(len(ends), rng.choice((1, 2, 4))))
    shares = np.array([rng.random() + 1e-3 for _ in cuts])
    for cut, share in zip(cuts, shares / shares.sum(), strict=True):
        moved[cut:] += int(room * share)
    return moved
