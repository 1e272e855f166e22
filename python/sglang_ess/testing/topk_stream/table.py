"""A table of top-k streams: generate it with the simulator's generator, save it, load it.

A table holds some consecutive steps of each stream, and a seam: a permutation of positions that
continues the stream after its last step. It maps the LRU stack (Mattson et al., 1970) of the
positions before the first step to the stack after the last one. Played again under the seam, the
steps select other positions, but each was unselected as long as in the generator's own stream.

So a short table plays for thousands of steps, and every LRU of any size misses in each round as
in the first, because it sees recency only. A table that began again without a seam, or ran
forward and backward, would not do: near the turn all rows are hot, or all are gone.

The production HotCache was measured on six layers of deepseek-v3.2 at 8K to 128K tokens, ratios
0.1 to 0.5, four rounds of 128 steps. Its misses differ from those of the generator's own stream by
2 % at most, in a single layer by 5 %, which is the sampling error of 128 steps. Rounds differ by
less than 0.4 % (2 % at ratio 0.5).

Limits: rounds differ only in their positions, requests differ only in their current step, and of
its generated tokens a request selects only the newest.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_ess.sim.model.locality import Locality, TopkStream

if TYPE_CHECKING:
    import torch

    from ess_kernels.replay_topk import ReplayTable

FORMAT = 1
SEAM_POWERS = 6  # on a device the stream repeats after 2 ** 6 rounds
DEFAULT_STEPS = 128
DEFAULT_STREAMS = 1
CONTEXTS = (8192, 32768, 65536, 131072)  # default for a top-k of CONTEXTS_TOPK
CONTEXTS_TOPK = 2048
WORD_BYTES = 4


@dataclass(frozen=True)
class StreamTable:
    """Top-k streams by nominal context.

    contexts  nominal contexts in tokens, ascending, each larger than top-k + 1
    steps     for each context [streams, layers, steps, K] int32: positions in 0 to context - 2,
              distinct within a row
    seams     for each context [streams, layers, context - 1] int32: the permutation that maps
              this round's positions to the next round's
    note      origin of the table, in words
    Raises: ValueError, one line, for arrays that break these rules.
    """

    contexts: tuple[int, ...]
    steps: tuple[np.ndarray, ...]
    seams: tuple[np.ndarray, ...]
    note: str

    def __post_init__(self) -> None:
        check_contexts(self.contexts, self.topk)
        for context, steps, seams in zip(self.contexts, self.steps, self.seams, strict=True):
            self._check_one(context, steps, seams)

    def _check_one(self, context: int, steps: np.ndarray, seams: np.ndarray) -> None:
        shapes = self.steps[0].shape, (*self.steps[0].shape[:2], context - 1)
        if (steps.shape, seams.shape) != shapes or {steps.dtype, seams.dtype} != {
            np.dtype(np.int32)
        }:
            raise ValueError(
                f"a stream table's arrays must be int32 of shapes {shapes[0]} and {shapes[1]}: "
                f"got {steps.dtype} {steps.shape} and {seams.dtype} {seams.shape}."
            )
        ordered = np.sort(steps, axis=-1)
        within = 0 <= ordered.min() and ordered.max() < context - 1
        if not within or (np.diff(ordered, axis=-1) == 0).any():
            raise ValueError(
                f"a step must select positions 0 to {context - 2}, each once: got "
                f"{ordered.min()} to {ordered.max()}, or one twice."
            )
        if (np.sort(seams, axis=-1) != np.arange(context - 1, dtype=np.int32)).any():
            raise ValueError(f"a seam must have each of {context - 1} positions once: got others.")

    @property
    def streams(self) -> int:
        return self.steps[0].shape[0]

    @property
    def layers(self) -> int:
        return self.steps[0].shape[1]

    @property
    def num_steps(self) -> int:
        return self.steps[0].shape[2]

    @property
    def topk(self) -> int:
        return self.steps[0].shape[3]

    @property
    def device_bytes(self) -> int:
        return device_bytes(self.contexts, self.layers, self.topk, self.streams, self.num_steps)

    def save(self, path: str | Path) -> None:
        """Write the table as .npz. An existing file is replaced atomically."""
        path = Path(path)
        arrays: dict[str, Any] = {f"steps_{i}": steps for i, steps in enumerate(self.steps)}
        arrays |= {f"seam_{i}": seams for i, seams in enumerate(self.seams)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(
                    file, format=FORMAT, contexts=np.array(self.contexts, np.int64),
                    topk=self.topk, note=self.note, **arrays,  # type: ignore[arg-type]
                )  # fmt: skip
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> StreamTable:
        """Read a table. Raises: ValueError, one line, for a file that is no table of FORMAT."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) != FORMAT:
                    raise ValueError(f"format {int(file['format'])}")
                contexts = tuple(int(context) for context in file["contexts"])
                steps = tuple(file[f"steps_{i}"] for i in range(len(contexts)))
                seams = tuple(file[f"seam_{i}"] for i in range(len(contexts)))
                return StreamTable(contexts, steps, seams, str(file["note"]))
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path} must be a table of top-k streams, format {FORMAT}: got {reason}. Make it "
                "with python -m sglang_ess.topk_stream."
            ) from None

    def on(self, device: torch.device | str) -> ReplayTable:
        """Copy the table to a device, with the powers of its seams. It takes device_bytes."""
        import torch

        from ess_kernels.replay_topk import ReplayTable

        powers = [_powers(seams).ravel() for seams in self.seams]
        starts = np.cumsum([0] + [len(part) for part in powers[:-1]])
        return ReplayTable(
            contexts=torch.tensor(self.contexts, dtype=torch.int32, device=device),
            steps=torch.from_numpy(np.stack(self.steps)).to(device),
            seams=torch.from_numpy(np.concatenate(powers)).to(device),
            seam_starts=torch.from_numpy(starts).to(device),
            powers=SEAM_POWERS,
        )


def device_bytes(
    contexts: Sequence[int],
    layers: int,
    topk: int = CONTEXTS_TOPK,
    streams: int = DEFAULT_STREAMS,
    steps: int = DEFAULT_STEPS,
) -> int:
    """Return the bytes of a table on the device. 4 layers of 32K tokens at top-k 2048: 7.0 MiB."""
    each = streams * layers * WORD_BYTES
    tables = len(contexts) * steps * topk
    seams = SEAM_POWERS * sum(context - 1 for context in contexts)
    return each * (tables + seams) + len(contexts) * (WORD_BYTES + 8)


def check_contexts(contexts: Sequence[int], topk: int) -> None:
    """Check contexts. Raises: ValueError if they do not ascend or are too short for the top-k."""
    if not contexts or list(contexts) != sorted(set(contexts)) or contexts[0] < topk + 2:
        raise ValueError(
            f"contexts of a stream table must ascend from top-k + 2, {topk + 2}: got "
            f"{', '.join(map(str, contexts)) or 'none'}."
        )


def default_contexts(topk: int) -> tuple[int, ...]:
    """Return CONTEXTS for DeepSeek-V3.2's top-k, and in proportion for another top-k."""
    return tuple(context * topk // CONTEXTS_TOPK for context in CONTEXTS)


def scaled(locality: Locality, topk: int) -> Locality:
    """Return the locality of a model whose top-k and contexts are scaled alike."""
    if topk == locality.topk:
        return locality
    share = topk / locality.topk
    reach = tuple(share * each for each in locality.layers.reach)
    tokens = max(1, round(share * locality.reference_tokens))
    layers = replace(locality.layers, reach=reach)
    return replace(locality, topk=topk, reference_tokens=tokens, layers=layers)


def generate(
    locality: Locality,
    contexts: Sequence[int],
    layers: int,
    streams: int = DEFAULT_STREAMS,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    note: str = "",
) -> StreamTable:
    """Generate a table with the generator of sim/model/locality.py, one query a step.

    layers: number of layers, spread evenly over the locality's by their reach. If the locality
    has fewer, its layers repeat.
    Raises: ValueError for contexts as check_contexts, or a count below 1.
    """
    check_contexts(contexts, locality.topk)
    for name, value in (("layers", layers), ("streams", streams), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}.")
    spread = locality.spread(layers)
    chosen = [spread[i % len(spread)] for i in range(layers)]
    tables, seams = [], []
    for context in contexts:
        parts = [_generate(locality, layer, context - 1, streams, steps, seed) for layer in chosen]
        tables.append(np.stack([part[0] for part in parts], axis=1))
        seams.append(np.stack([part[1] for part in parts], axis=1))
    facts = {"layers": chosen, "seed": seed}
    note = note or f"generated: {json.dumps(facts)}"
    return StreamTable(tuple(contexts), tuple(tables), tuple(seams), note)


def _generate(locality, layer, tokens, streams, steps, seed) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps [streams, steps, K], seams [streams, tokens]) of one layer."""
    stream = TopkStream(locality, layer, streams, tokens, seed)
    positions = np.tile(np.arange(tokens, dtype=np.int32), (streams, 1))
    table = np.empty((streams, steps, locality.topk), np.int32)
    seams = np.empty((streams, tokens), np.int32)
    for row in range(streams):
        stream.begin(row, tokens)
        order = stream.by_recency(row)
        for step in range(steps):
            table[row, step] = stream.next(np.array([row]), np.array([tokens]), positions, 1)[0]
        seams[row] = seam(order, table[row])
    return table, seams


def seam(order: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Return the permutation [tokens] int32 that continues the steps with a next round.

    order [tokens]: positions before the first step, least recently selected first; the last K of
    them are the selection before it. steps [steps, K]
    A position that is selected at both ends maps to itself, because selected positions have no
    order among them.
    """
    last = np.full(len(order), -1, np.int64)
    for step, selected in enumerate(steps):
        last[selected] = step
    after = order[np.argsort(last[order], kind="stable")]
    found = np.empty(len(order), np.int32)
    found[order] = after
    topk = steps.shape[1]
    stays = np.intersect1d(order[-topk:], after[-topk:])
    found[stays] = stays
    found[np.setdiff1d(order[-topk:], stays)] = np.setdiff1d(after[-topk:], stays)
    return found


def _powers(seams: np.ndarray) -> np.ndarray:
    """Return the powers 1, 2, 4, ... of seams [streams, layers, n] as [.., SEAM_POWERS, n]."""
    powers = [seams]
    for _ in range(SEAM_POWERS - 1):
        powers.append(np.take_along_axis(powers[-1], powers[-1], axis=-1))
    return np.stack(powers, axis=2)
