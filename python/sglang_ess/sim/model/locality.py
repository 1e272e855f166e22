"""Which rows a sparse-attention model selects, step by step: a generator of top-k streams.

A layer is an LRU stack model (Mattson et al., 1970) with a share that has no locality. With
each query `churn` of the top-k leaves the selection. Of the positions that enter instead, the
share `uniform` comes from anywhere in the context; the others were selected before, and come
back by how long ago they left: exponentially, with mean `reach` departures. So

    misses(rows) of an LRU  =  uniform part x (1 - rows / context)  +  returns that take longer

which is the form of the published miss curves: a steep fall to about 10K rows, then a straight
line to none at all rows (papers.md 1.6). The figures in data/localities/ are fitted by
tools/fit_locality.py so that the production HotCache misses as published. Nothing but its
recency tells one position from another, so no policy that does not see the future beats LRU here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_ess.sim.inputs.files import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Checked,
    find,
    read,
    spec,
)
from sglang_ess.sim.model import locality_kernels as kernels

LOG_REACHES = 4  # mean reaches that the log of departures holds: 98 % of an exponential
SETTLE_REACHES = 8
RECENT_QUERIES = 32  # of a prompt's end: ESS's warm-up window (papers.md 1.5)


@dataclass(frozen=True)
class Layers(Checked):
    """The layers of a model. churn, uniform: shares; reach: departures, at the reference context;
    uniform and reach [layers].
    """

    churn: float = spec(SHARE)
    uniform: tuple[float, ...] = spec(FRACTION)
    reach: tuple[float, ...] = spec(POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        if len(self.uniform) != len(self.reach):
            raise ValueError(
                f"uniform and reach must have a number for each layer: got {len(self.uniform)} "
                f"and {len(self.reach)}."
            )


@dataclass(frozen=True)
class Locality(Checked):
    """What a model's queries select: a file of data/localities.

    topk              rows a query selects
    reference_tokens  the context at which reaches were fitted
    context_exponent  reach grows as (context / reference_tokens) to this power
    """

    topk: int = spec(POSITIVE)
    reference_tokens: int = spec(POSITIVE)
    context_exponent: float = spec(NOT_NEGATIVE)
    layers: Layers = spec()

    @property
    def num_layers(self) -> int:
        return len(self.layers.reach)

    def reach(self, layer: int, tokens):
        """Mean departures until a position comes back, in a context of so many tokens."""
        scale = (tokens / self.reference_tokens) ** self.context_exponent
        return self.layers.reach[layer] * scale

    def spread(self, count: int) -> tuple[int, ...]:
        """`count` layers that stand for all: the middle ones of as many equal parts by reach."""
        order = sorted(range(self.num_layers), key=lambda layer: self.layers.reach[layer])
        count = min(count, len(order))
        return tuple(sorted(order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)))

    @staticmethod
    def load(name: str | Path) -> Locality:
        """Of data/localities, by name, or of a .toml file. Raises: SpecError, one line."""
        return read(find("localities", name), Locality)


class TopkStream:
    """The top-k of one layer for up to num_requests requests, each with a state of its own.

    A request has a row: begin() starts it, next() gives every row asked for its next step.
    The same seed, layer, row and order of calls give the same stream.
    """

    def __init__(
        self, locality: Locality, layer: int, num_requests: int, max_tokens: int, seed: int = 0
    ):
        self.locality, self.layer = locality, layer
        longest = locality.reach(layer, max_tokens)
        log_length = 1 << int(np.ceil(np.log2(max(2.0, LOG_REACHES * longest))))
        self._parameters = (locality.layers.churn, locality.layers.uniform[layer])
        self._selected = np.empty((num_requests, locality.topk), np.int32)
        self._where = np.empty((num_requests, max_tokens), np.int32)
        self._logs = np.empty((num_requests, log_length), np.int32)
        self._tails = np.zeros(num_requests, np.int64)
        self._lengths = np.zeros(num_requests, np.int64)
        self._randoms = np.zeros((num_requests, 1), np.uint64)
        self._begun = np.zeros(num_requests, np.int64)
        self._seed = seed

    def begin(self, row: int, tokens: int) -> None:
        """Start a request of so many tokens, as if it had been decoding for long."""
        self._begun[row] += 1
        entropy = (self._seed, self.layer, row, int(self._begun[row]))
        random, log = self._randoms[row], self._logs[row]
        random[:] = np.random.SeedSequence(entropy).generate_state(1, np.uint64) | np.uint64(1)
        state = self._selected[row], self._where[row], log
        tail = kernels.begin(*state, tokens, random)
        # The log's share of positions that have come back since settles as it turns over.
        reach = self.locality.reach(self.layer, tokens)
        self._tails[row] = kernels.advance_often(
            *state, tail, tokens, *self._parameters, reach, random, SETTLE_REACHES * reach
        )
        self._lengths[row] = tokens

    def by_recency(self, row: int) -> np.ndarray:
        """The request's positions [tokens] int32, least recently selected first: the end of it is
        what a tier that has served it for long would hold.
        """
        return kernels.by_recency(
            self._selected[row], self._where[row], self._logs[row], self._tails[row],
            self._lengths[row],
        )  # fmt: skip

    def next(
        self, rows: np.ndarray, lengths: np.ndarray, slots: np.ndarray, queries: int
    ) -> np.ndarray:
        """Top-k slots [rows * queries, K] int32 of the requests' next step, -1 pads.

        rows [n] int64; lengths [n] int64: tokens each has by now; slots [requests, tokens] int32
        """
        topk = np.empty((len(rows) * queries, self.locality.topk), np.int32)
        reaches = self.locality.reach(self.layer, lengths)
        kernels.step(
            rows, self._selected, self._where, self._logs, self._tails, self._lengths[rows],
            lengths, slots, self._parameters, reaches, self._randoms, topk,
        )  # fmt: skip
        self._lengths[rows] = lengths
        return topk


def similarity(topk: Sequence[np.ndarray]) -> float:
    """Mean share of a query's top-k that the one before it has too: ESS's r (papers.md 1.6)."""
    shares = [
        len(np.intersect1d(before, after)) / len(after)
        for before, after in zip(topk, topk[1:], strict=False)
    ]
    return float(np.mean(shares))
