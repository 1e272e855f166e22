"""The policy lab: organisations of the same hot rows, and policies, on the same top-k streams.

An organisation says whose the hot rows of a layer are: each request's own and as many for each
(`fixed`, as in HiSparse), each request's own in proportion to its context (`ratio`, as in ESS),
or all requests' together (`shared`). Rows that differ by layer make per-layer budgets of any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_ess.sim import policies
from sglang_ess.sim.model.locality import Locality, TopkStream
from sglang_ess.tiers.balance.budgets import Budgets, allot
from sglang_ess.tiers.balance.ghost_cache import GhostCache, MissCurve

FLOOR_MARGIN = 1.1  # over the largest step seen, or estimated, of any layer
CURVE_SIZES = 40


@dataclass(frozen=True)
class Stream:
    """What one layer looks up: decode steps of several requests.

    steps      [steps, requests * queries, K] int32 slots, -1 pads; a request's queries adjoin
    contexts   [requests] int64 tokens; slots may be anyone's: a shared prefix is the same slots
    num_slots  of the host tier: every slot is less
    Raises: ValueError for steps that are not so many queries of each request.
    """

    steps: np.ndarray
    contexts: np.ndarray
    num_slots: int

    def __post_init__(self) -> None:
        if self.steps.ndim != 3 or self.steps.shape[1] % len(self.contexts):
            raise ValueError(
                f"steps must be [steps, requests * queries, K] of {len(self.contexts)} requests: "
                f"got {list(self.steps.shape)}."
            )
        if self.steps.size and self.steps.max() >= self.num_slots:
            raise ValueError(
                f"slots must be below {self.num_slots}, the slots: got {self.steps.max()}."
            )

    @property
    def queries(self) -> int:
        """Of one request in a step."""
        return self.steps.shape[1] // len(self.contexts)

    def of(self, request: int) -> np.ndarray:
        """The request's steps [steps, queries, K]."""
        first = request * self.queries
        return self.steps[:, first : first + self.queries]


@dataclass(frozen=True)
class Outcome:
    """What a run missed.

    misses    [layers, steps, requests] int64, the warm-up's included
    warmup    first steps that the figures below leave out; tail: last ones
    lookups   of one step of a layer, pads included
    rows      [layers] hot rows of a layer, all requests together
    """

    misses: np.ndarray
    warmup: int
    tail: int
    lookups: int
    rows: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        """misses without the warm-up's and the tail's."""
        return self.misses[:, self.warmup : self.misses.shape[1] - self.tail]

    @property
    def mean(self) -> float:
        """Misses per request, layer and step."""
        return float(self.counted.mean())

    @property
    def by_layer(self) -> np.ndarray:
        """Misses per request and step [layers]."""
        return self.counted.mean(axis=(1, 2))

    @property
    def by_request(self) -> np.ndarray:
        """Misses per layer and step [requests]."""
        return self.counted.mean(axis=(0, 1))

    @property
    def ratio(self) -> float:
        """Misses per lookup."""
        return float(self.counted.sum(axis=2).mean() / self.lookups)


# --- organisations ----------------------------------------------------------------------


def fixed(rows: int, contexts: np.ndarray) -> np.ndarray:
    """Hot rows of each request [requests]: as many for each."""
    return np.full(len(contexts), rows // len(contexts))


def ratio(rows: int, contexts: np.ndarray) -> np.ndarray:
    """Hot rows of each request [requests]: in proportion to its context."""
    return rows * contexts // contexts.sum()


# Hot rows of each request; None: the rows are all requests'.
ORGANISATIONS: dict[str, Callable[[int, np.ndarray], np.ndarray] | None] = {
    "fixed": fixed,
    "ratio": ratio,
    "shared": None,
}


def run(
    streams: Iterable[Stream],
    organisation: str,
    policy: str,
    rows: int | Sequence[int],
    *,
    warmup: int = 0,
    tail: int = 0,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Outcome:
    """Misses of every layer's stream, from empty tiers.

    rows    hot rows of a layer, all requests together: one number, or one for each layer
    warmup  first steps that the outcome's figures leave out
    tail    last ones, if Belady's figure is to be a steady one: to it, what the stream does not
            use again is never used again
    seed    of the random policy; progress: called after each layer
    Raises: ValueError for an unknown organisation or policy, for a step that does not fit the
    rows it has, for a warmup and tail that leave no step, and for rows of other layers than
    there are.
    """
    if organisation not in ORGANISATIONS:
        raise ValueError(
            f"organisation must be one of {', '.join(ORGANISATIONS)}: got {organisation!r}."
        )
    misses, used, lookups = [], [], 0
    for layer, stream in enumerate(streams):
        if min(warmup, tail) < 0 or warmup + tail >= len(stream.steps):
            raise ValueError(
                f"warmup and tail must leave some of {len(stream.steps)} steps: got {warmup} and "
                f"{tail}."
            )
        if np.ndim(rows) and layer >= len(rows):
            raise ValueError(f"rows must be one for each layer: got {len(rows)} for more layers.")
        used.append(int(rows[layer] if np.ndim(rows) else rows))
        misses.append(_layer(stream, ORGANISATIONS[organisation], policy, used[-1], seed))
        lookups = stream.steps[0].size
        progress()
    if np.ndim(rows) and len(used) != len(rows):
        raise ValueError(f"rows must be one for each layer: got {len(rows)} for {len(used)}.")
    return Outcome(np.array(misses), warmup, tail, lookups, np.array(used))


def _layer(stream: Stream, divide, policy: str, rows: int, seed: int) -> np.ndarray:
    """Misses [steps, requests] of one layer."""
    shape = len(stream.steps), len(stream.contexts), stream.queries
    if divide is None:
        rows = min(rows, stream.num_slots)
        found = policies.misses(policy, stream.steps, rows, stream.num_slots, seed)
        return found.reshape(shape).sum(axis=2)
    own = np.minimum(divide(rows, stream.contexts), stream.num_slots)
    return np.stack(
        [
            policies.misses(policy, stream.of(i), int(count), stream.num_slots, seed + i).sum(1)
            for i, count in enumerate(own)
        ],
        axis=1,
    )


# --- curves -----------------------------------------------------------------------------


def ghost_curve(stream: Stream, sizes: Sequence[int], rate: float, warmup: int = 0) -> MissCurve:
    """The shared LRU's curve as the server would estimate it; sizes in hot rows, ascending."""
    ghost = GhostCache(stream.num_slots, rate, sizes)
    for number, topk in enumerate(stream.steps):
        if number == warmup:
            ghost.forget()
        ghost.access(torch.from_numpy(topk))
    return ghost.curve()


def budgets(
    streams: Iterable[Stream], rows: int, *, warmup: int, steps: int, rate: float = 1.0
) -> Budgets:
    """Shared hot rows of each layer, `rows` on average, as the server's ghosts would have them.

    From the LRU curves of `steps` steps after the warm-up, sampled at `rate`. No layer gets fewer
    than a step of any layer needs, with FLOOR_MARGIN to spare.
    Raises: BudgetError if `rows` are fewer than that.
    """
    parts = [Stream(s.steps[: warmup + steps], s.contexts, s.num_slots) for s in streams]
    cap = max(part.num_slots for part in parts)
    grid = np.unique(np.geomspace(rows / 16, cap, CURVE_SIZES).round().astype(int)).tolist()
    curves = [ghost_curve(part, grid, rate, warmup) for part in parts]
    floor = int(max(curve.union for curve in curves) * FLOOR_MARGIN)
    return allot(curves, rows * len(curves), floor, cap)


def exact_curve(stream: Stream, sizes: Sequence[int], warmup: int = 0) -> np.ndarray:
    """Misses a step [sizes] of the production HotCache, shared, one run for each size."""
    runs = (run([stream], "shared", "lru", rows, warmup=warmup) for rows in sizes)
    return np.array([found.counted.sum(axis=2).mean() for found in runs])


# --- streams ----------------------------------------------------------------------------


def generate(
    locality: Locality,
    layer: int,
    contexts: Sequence[int],
    steps: int,
    *,
    queries: int = 1,
    prefix: int = 0,
    seed: int = 0,
) -> tuple[Stream, int]:
    """A stream of the locality's layer, and how many of its first steps are warm-up.

    The warm-up looks up every position once, least recently selected first: after it a tier
    holds what it would if the requests had been decoding for long. `steps` more follow; the
    contexts do not grow. prefix: tokens that all requests begin with, on the same slots; which
    of them a request selects has nothing to do with the others' selections.
    Raises: ValueError for a prefix longer than the shortest context.
    """
    contexts = np.asarray(contexts, np.int64)
    topk, longest = locality.topk, int(contexts.max())
    if not 0 <= prefix <= contexts.min():
        raise ValueError(f"prefix must be 0 to {contexts.min()} tokens: got {prefix}.")
    own = contexts - prefix
    slots = ((np.cumsum(own) - own)[:, None] + np.arange(longest)).astype(np.int32)
    slots[:, :prefix] = np.arange(prefix)
    source = TopkStream(locality, layer, len(contexts), longest, seed)
    warmup = -(-longest // topk)
    found = np.full((warmup + steps, len(contexts) * queries, topk), -1, np.int32)
    for request, tokens in enumerate(contexts.tolist()):
        source.begin(request, tokens)
        order = np.full(warmup * topk, -1, np.int32)
        order[-tokens:] = slots[request, source.by_recency(request)]  # all end together
        found[:warmup, request * queries] = order.reshape(warmup, topk)
    rows = np.arange(len(contexts))
    for step in range(warmup, warmup + steps):
        found[step] = source.next(rows, contexts, slots, queries)
    return Stream(found, contexts, int(own.sum()) + prefix), warmup
