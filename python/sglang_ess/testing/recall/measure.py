"""`python -m sglang_ess.testing.recall.measure`: how often the recall model is right, in torch.

By length of the document, depth of the fact and selection of keys: all of them, the indexer's
top-k, half of it, and the last k in its place.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from sglang_ess.testing import recall as model
from sglang_ess.testing.recall.documents import BYTES_A_FACT, KINDS, RecallQuestion, make_document
from sglang_ess.testing.recall.model import WEIGHTS
from sglang_ess.testing.recall.network import Network, Selection
from sglang_ess.testing.tiny_tokenizer import VOCAB_SIZE

TOPK = model.SHAPE.index_topk
SELECTIONS = {
    "full attention": None,
    "top-k": Selection(TOPK),
    "top-k halved": Selection(TOPK // 2),
    "last k": Selection(TOPK, last=True),
}
LENGTHS = (1024, 2048, 4096, 8192, 14_336)  # with questions and answers within 16K
DEPTHS = 5  # bands of the needle table


class RecallAnswer(NamedTuple):
    """Whether a question was answered right; length: of the document, in bytes."""

    length: int
    question: RecallQuestion
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
) -> list[RecallAnswer]:
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
            found.append(RecallAnswer(length, question, right))
    return found


def recall(found: Iterable[RecallAnswer], kind: str | None = None) -> float:
    """Share of right answers, of one kind or of all."""
    rights = [one.right for one in found if kind in (None, one.question.kind)]
    return sum(rights) / len(rights)


def by_depth(found: Iterable[RecallAnswer]) -> list[float | None]:
    """Recall in each of DEPTHS equal bands of depth, the document's start first."""
    bands: list[list[bool]] = [[] for _ in range(DEPTHS)]
    for one in found:
        bands[min(int(one.question.depth * DEPTHS), DEPTHS - 1)].append(one.right)
    return [sum(band) / len(band) if band else None for band in bands]


def load_network(weights: Path = WEIGHTS) -> Network:
    """The network with the tensors of a checkpoint's model.safetensors, float32."""
    network = Network(model.SHAPE, VOCAB_SIZE)
    tensors = load_file(weights)
    draft = f"model.layers.{model.SHAPE.layers}."
    own = {n.replace(draft, "draft."): t.float() for n, t in tensors.items()}
    network.load_state_dict({name: own[name] for name in network.state_dict()})
    return network


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_ess.testing.recall.measure", description=__doc__
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="model.safetensors")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="bytes")
    parser.add_argument("--documents", type=int, default=4, help="for each length [4]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    network = load_network(options.weights)
    rows = []
    for length in options.lengths:
        for name, selection in SELECTIONS.items():
            kinds = KINDS * max(1, min(8, length // 512))
            found = answers(
                network, length, options.documents, selection, kinds=kinds, seed=options.seed
            )
            row = {"length": length, "selection": name, "answers": len(found)}
            row |= {"recall": recall(found)} | {kind: recall(found, kind) for kind in KINDS}
            row["by_depth"] = by_depth(found)
            rows.append(row)
            each = " ".join(f"{kind} {row[kind]:.3f}" for kind in KINDS)
            bands = " ".join("-" if band is None else f"{band:.2f}" for band in row["by_depth"])
            print(
                f"{length:6d} bytes, {name:14s} recall {row['recall']:.3f} of {len(found)} "
                f"({each}); by depth {bands}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
