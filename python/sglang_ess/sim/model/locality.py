"""Generate top-k streams: which rows a model with sparse attention selects, step by step.

Each layer is an LRU stack model (Mattson et al., 1970) plus a share without locality. With every
query the share `churn` of the top-k leaves the selection and as many positions enter it. The
share `uniform` of those comes from anywhere in the context. The others were selected before and
return by how long ago they left: exponentially, with mean `reach` departures. So an LRU misses

    misses(rows)  =  uniform part x (1 - rows / context)  +  returns that take longer

This is the form of the curves in figure 9 of ESS: a steep fall to about 10K rows, then a straight
line to zero at all rows. tools/fit_locality.py fits the localities in sim/data/ so that
the production HotCache misses as published. Positions differ in their recency only, so no
policy beats LRU here unless it sees the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

LOG_REACHES = 4  # length of the log of departures in reaches: it holds 98 % of an exponential
SETTLE_REACHES = 8  # departures in reaches before a new request is in its steady state
RECENT_QUERIES = 32  # last queries of a prompt that warm the tier, as in ESS


@dataclass(frozen=True)
class Layers(Checked):
    """Locality of each layer of a model.

    churn    share of the top-k that leaves with each query, in all layers
    uniform  [layers] share of the entering positions without locality
    reach    [layers] mean departures until a position returns, at the reference context
    Raises: ValueError if uniform and reach differ in length.
    """

    churn: float = spec(SHARE)
    uniform: tuple[float, ...] = spec(FRACTION)
    reach: tuple[float, ...] = spec(POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.uniform) != len(self.reach):
            raise ValueError(
                f"uniform and reach must have a number for each layer: got {len(self.uniform)} "
                f"and {len(self.reach)}."
            )


@dataclass(frozen=True)
class Locality(Checked):
    """Locality of a model's queries: a file of sim/data/localities.

    topk              rows that a query selects
    reference_tokens  context at which `reach` was fitted
    context_exponent  reach grows as (context / reference_tokens) to this power
    """

    topk: int = spec(POSITIVE)
    reference_tokens: int = spec(POSITIVE)
    context_exponent: float = spec(NOT_NEGATIVE)
    layers: Layers = spec()

    @property
    def num_layers(self) -> int:
        return len(self.layers.reach)

    def reach(self, layer_index: int, tokens: Any) -> Any:
        """Mean departures until a position returns, in a context of `tokens` (number or array)."""
        scale = (tokens / self.reference_tokens) ** self.context_exponent
        return self.layers.reach[layer_index] * scale

    def spread(self, count: int) -> tuple[int, ...]:
        """Choose `count` layers that stand for all: the middle ones of `count` parts by reach."""
        order = sorted(range(self.num_layers), key=lambda layer: self.layers.reach[layer])
        count = min(count, len(order))
        return tuple(sorted(order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)))

    @staticmethod
    def load(name: str | Path) -> Locality:
        """Load a file of sim/data/localities by its name, or a .toml file. Raises: SpecError."""
        return read(find("localities", name), Locality)


class TopkStream:
    """The top-k of one layer for up to num_requests requests, each with its own state.

    Each request has a row of the state. begin() starts a row; next() gives the next step of some
    rows. The same seed, layer, row and order of calls give the same stream.
    """

    def __init__(
        self,
        locality: Locality,
        layer_index: int,
        num_requests: int,
        max_tokens: int,
        seed: int = 0,
    ):
        self.locality, self.layer_index = locality, layer_index
        longest = locality.reach(layer_index, max_tokens)
        log_length = 1 << int(np.ceil(np.log2(max(2.0, LOG_REACHES * longest))))
        self._parameters = (locality.layers.churn, locality.layers.uniform[layer_index])
        self._selected = np.empty((num_requests, locality.topk), np.int32)
        self._where = np.empty((num_requests, max_tokens), np.int32)
        self._logs = np.empty((num_requests, log_length), np.int32)
        self._tails = np.zeros(num_requests, np.int64)
        self._lengths = np.zeros(num_requests, np.int64)
        self._randoms = np.zeros((num_requests, 1), np.uint64)
        self._begun = np.zeros(num_requests, np.int64)
        self._seed = seed

    def begin(self, row: int, tokens: int) -> None:
        """Start a request of `tokens` tokens as if it had been decoding for long."""
        self._begun[row] += 1
        entropy = (self._seed, self.layer_index, row, int(self._begun[row]))
        random, log = self._randoms[row], self._logs[row]
        random[:] = np.random.SeedSequence(entropy).generate_state(1, np.uint64) | np.uint64(1)
        state = self._selected[row], self._where[row], log
        tail = kernels.begin(*state, tokens, random)
        # Run until the share of the log's positions that have returned is steady.
        reach = self.locality.reach(self.layer_index, tokens)
        self._tails[row] = kernels.advance_often(
            *state, tail, tokens, *self._parameters, reach, random, SETTLE_REACHES * reach
        )
        self._lengths[row] = tokens

    def by_recency(self, row: int) -> np.ndarray:
        """The request's positions [tokens] int32, least recently selected first.

        A tier that has served the request for long holds the last ones.
        """
        order: np.ndarray = kernels.by_recency(
            self._selected[row], self._where[row], self._logs[row], self._tails[row],
            self._lengths[row],
        )  # fmt: skip
        return order

    def next(
        self, rows: np.ndarray, lengths: np.ndarray, slots: np.ndarray, queries: int,
        kept: np.ndarray | None = None, alike: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Return the top-k slots [n * queries, K] int32 of the next step of n rows, -1 pads.

        rows [n] int64; lengths [n] int64: their tokens by now; slots [requests, tokens] int32:
        slot of each position of each request
        kept: [n] int64 queries of each request whose tokens a verify step keeps; None: all. The
            next step goes on from the last of these
        alike: [n] bool: what the others selected, the queries at their positions select again.
            Otherwise these differ from them as much as any two successors of one query; None: so
        """
        if kept is None:
            kept = np.full(len(rows), queries, np.int64)
        if alike is None:
            alike = np.zeros(len(rows), np.bool_)
        topk = np.empty((len(rows) * queries, self.locality.topk), np.int32)
        reaches = self.locality.reach(self.layer_index, lengths)
        kernels.step(
            rows, self._selected, self._where, self._logs, self._tails, self._lengths[rows],
            lengths, slots, self._parameters, reaches, self._randoms, kept, alike,
            topk,
        )  # fmt: skip
        self._lengths[rows] = lengths
        return topk


def similarity(topk: Sequence[np.ndarray]) -> float:
    """Mean share of a query's top-k that the query before it selected too: r in ESS, figure 2."""
    shares = [
        len(np.intersect1d(before, after)) / len(after)
        for before, after in zip(topk, topk[1:], strict=False)
    ]
    return float(np.mean(shares))
