"""How often the recall model is right, in torch: by length, depth and selection of keys."""

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch

from sglang_ess.testing.recall.documents import KINDS, Question, make_document
from sglang_ess.testing.recall.network import Network, Selection

BYTES_A_FACT = 200  # a document has a fact, about which nobody asks, for each so many bytes


class Answer(NamedTuple):
    """Whether a question was answered right; length: of the document, in bytes."""

    length: int
    question: Question
    right: bool


@torch.no_grad()
def answers(
    network: Network,
    length: int,
    documents: int,
    selection: Selection | None,
    *,
    kinds: Iterable[str] = KINDS * 2,
    depth: float | None = None,
    seed: int = 0,
) -> list[Answer]:
    """Ask one question of each of `kinds` about each document, the answers before it given.

    An answer is right if greedy decoding of it is: each of its bytes, up to the end of the value,
    is the most likely after those before.
    """
    found = []
    for number in range(documents):
        rng = random.Random(f"{seed}/{length}/{number}")
        document = make_document(
            rng, length, tuple(kinds), others=length // BYTES_A_FACT, depth=depth
        )
        parts = [document.text]
        for question in document.questions:
            parts += [question.prompt, question.answer]
        ids = torch.tensor(list("".join(parts).encode()))[None]
        step = network.step(torch.arange(ids.shape[1])[None], selection=selection)
        with torch.autocast("cpu", torch.bfloat16):
            likely = network.lm_head(network.hidden(ids, step)).argmax(-1)[0]
        end = len(document.text)
        for question in document.questions:
            begin = end + len(question.prompt)
            end = begin + len(question.answer)
            output = bytes(min(int(i), 255) for i in likely[begin - 1 : end - 1]).decode("latin1")
            last = question.answer.rfind(question.value) + len(question.value)
            right = output[:last] == question.answer[:last]
            found.append(Answer(length, question, right))
    return found


def recall(found: Iterable[Answer], kind: str | None = None) -> float:
    """Share of right answers, of one kind or of all."""
    rights = [one.right for one in found if kind in (None, one.question.kind)]
    return sum(rights) / len(rights)
