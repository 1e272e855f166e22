"""The policy lab: compare organisations of hot rows, and policies, on the same top-k streams.

An organisation says how requests divide the hot rows of a layer: each has equally many (`fixed`,
as in HiSparse), each has a number in proportion to its context (`ratio`, as in ESS), or they
share them (`shared`). Hot rows may differ by layer in each organisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch

from sglang_ess.sim import policies
from sglang_ess.sim.engine.decode_rank import acceptance_probability, draw_kept
from sglang_ess.sim.model.locality import Locality, TopkStream
from sglang_ess.sim.policies.keyed import Worth
from sglang_ess.tiers.balance.budgets import Budgets, allot
from sglang_ess.tiers.balance.ghost_cache import GhostCache, MissCurve

FLOOR_MARGIN = 1.1  # fewest hot rows of a layer / the largest step seen or estimated
CURVE_SIZES = 40


@dataclass(frozen=True)
class Stream:
    """The lookups of one layer: decode steps of several requests.

    steps      [steps, requests * queries, K] int32: slots, -1 pads; a request's queries adjoin
    contexts   [requests] int64: tokens. Requests may name the same slots: a shared prefix.
    num_slots  slots of the host tier
    kept       [steps, requests] int64: queries of a verify step whose tokens were kept; None: all
    clues      what the layer knows beside its lists; its hints have one list for each query
    Raises: ValueError for another shape of steps, or a slot that is not below num_slots.
    """

    steps: np.ndarray
    contexts: np.ndarray
    num_slots: int
    kept: np.ndarray | None = None
    clues: policies.Clues = policies.NO_CLUES

    def __post_init__(self) -> None:
        if self.steps.ndim != 3 or self.steps.shape[1] % len(self.contexts):
            raise ValueError(
                f"steps must be [steps, requests * queries, K] of {len(self.contexts)} requests: "
                f"got {list(self.steps.shape)}."
            )
        if self.steps.size and self.steps.max() >= self.num_slots:
            raise ValueError(f"slots must be below {self.num_slots}: got {self.steps.max()}.")

    @property
    def queries(self) -> int:
        """Queries of one request in a step."""
        return int(self.steps.shape[1]) // len(self.contexts)

    def of(self, request: int) -> np.ndarray:
        """Return the request's steps [steps, queries, K]."""
        return self.steps[:, self._queries_of(request)]

    def clues_of(self, request: int) -> policies.Clues:
        """Return what is known of the request's queries."""
        of = self._queries_of(request)
        return policies.Clues(*(None if clue is None else clue[:, of] for clue in self.clues))

    def _queries_of(self, request: int) -> slice:
        return slice(request * self.queries, (request + 1) * self.queries)


@dataclass(frozen=True)
class Outcome:
    """Misses of a run.

    misses   [layers, steps, requests] int64, of all steps
    ahead    [layers, steps] int64: rows fetched ahead of a miss, of all requests
    warmup   number of first steps that the properties below leave out; tail: of last steps
    lookups  of one step of a layer, pads included
    rows     [layers]: hot rows of a layer, all requests together
    """

    misses: np.ndarray
    ahead: np.ndarray
    warmup: int
    tail: int
    lookups: int
    rows: np.ndarray

    @property
    def counted(self) -> np.ndarray:
        """misses without the steps of warm-up and tail."""
        return self.misses[:, self.warmup : self.misses.shape[1] - self.tail]

    @property
    def mean(self) -> float:
        """Misses per request, layer and step."""
        return float(self.counted.mean())

    @property
    def link_rows(self) -> float:
        """Rows over the link per request, layer and step: misses, and what was fetched ahead."""
        ahead = self.ahead[:, self.warmup : self.ahead.shape[1] - self.tail]
        return self.mean + float(ahead.mean() / self.misses.shape[2])

    @property
    def by_layer(self) -> np.ndarray:
        """Misses per request and step [layers]."""
        found: np.ndarray = self.counted.mean(axis=(1, 2))
        return found

    @property
    def by_request(self) -> np.ndarray:
        """Misses per layer and step [requests]."""
        found: np.ndarray = self.counted.mean(axis=(0, 1))
        return found

    @property
    def ratio(self) -> float:
        """Misses per lookup."""
        return float(self.counted.sum(axis=2).mean() / self.lookups)


# --- organisations ----------------------------------------------------------------------


def fixed(rows: int, contexts: np.ndarray) -> np.ndarray:
    """Hot rows of each request [requests]: equally many."""
    return np.full(len(contexts), rows // len(contexts))


def ratio(rows: int, contexts: np.ndarray) -> np.ndarray:
    """Hot rows of each request [requests]: in proportion to its context."""
    shares: np.ndarray = rows * contexts // contexts.sum()
    return shares


Divide = Callable[[int, np.ndarray], np.ndarray]  # (rows of a layer, contexts) -> of each request
# None: all requests share the rows.
ORGANISATIONS: dict[str, Divide | None] = {
    "fixed": fixed,
    "ratio": ratio,
    "shared": None,
}


def run(
    streams: Iterable[Stream],
    organisation: str,
    policy: str | Worth,
    rows: int | Sequence[int],
    *,
    warmup: int = 0,
    tail: int = 0,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Outcome:
    """Count the misses of every layer's stream, starting with empty tiers.

    policy  a name of policies.POLICIES or policies.RULES, or a rule
    rows    hot rows of a layer, all requests together: one number, or one for each layer
    warmup  number of first steps that the outcome's figures leave out
    tail    number of last steps that they leave out. Belady's figure is steady only with a tail,
            because Belady knows that the stream ends.
    seed    for the random policy; progress: called after each layer
    Raises: ValueError for an unknown organisation or policy, for a step that does not fit its
    rows, for a warmup and tail that leave no step, and for rows of another number of layers.
    """
    if organisation not in ORGANISATIONS:
        raise ValueError(
            f"organisation must be one of {', '.join(ORGANISATIONS)}: got {organisation!r}."
        )
    each = rows if isinstance(rows, Sequence | np.ndarray) else None
    used: list[int] = []
    counts, lookups = [], 0
    for layer, stream in enumerate(streams):
        if min(warmup, tail) < 0 or warmup + tail >= len(stream.steps):
            raise ValueError(
                f"warmup and tail must leave some of {len(stream.steps)} steps: got {warmup} and "
                f"{tail}."
            )
        if each is not None and layer >= len(each):
            raise ValueError(f"rows must be one for each layer: got {len(each)} for more layers.")
        used.append(cast(int, rows) if each is None else int(each[layer]))
        counts.append(_layer(stream, ORGANISATIONS[organisation], policy, used[-1], seed))
        lookups = stream.steps[0].size
        progress()
    if each is not None and len(used) != len(each):
        raise ValueError(f"rows must be one for each layer: got {len(each)} for {len(used)}.")
    misses, ahead = (np.array(part) for part in zip(*counts, strict=True))
    return Outcome(misses, ahead, warmup, tail, lookups, np.array(used))


def _layer(
    stream: Stream, divide: Divide | None, policy: str | Worth, rows: int, seed: int
) -> policies.Counts:
    """Count one layer's misses [steps, requests], and the rows [steps] fetched ahead."""
    shape = len(stream.steps), len(stream.contexts), stream.queries
    if divide is None:
        rows = min(rows, stream.num_slots)
        found = policies.count(policy, stream.steps, rows, stream.num_slots, seed, stream.clues)
        return policies.Counts(found.misses.reshape(shape).sum(axis=2), found.ahead)
    own = np.minimum(divide(rows, stream.contexts), stream.num_slots)
    each = [
        policies.count(
            policy, stream.of(i), int(count), stream.num_slots, seed + i, stream.clues_of(i)
        )
        for i, count in enumerate(own)
    ]
    misses = np.stack([one.misses.sum(axis=1) for one in each], axis=1)
    return policies.Counts(misses, np.sum([one.ahead for one in each], axis=0))


# --- curves -----------------------------------------------------------------------------


def ghost_curve(stream: Stream, sizes: Sequence[int], rate: float, warmup: int = 0) -> MissCurve:
    """Estimate the shared LRU's miss curve as the server does. sizes: hot rows, ascending."""
    ghost = GhostCache(stream.num_slots, rate, sizes)
    for number, topk in enumerate(stream.steps):
        if number == warmup:
            ghost.forget()
        ghost.access(torch.from_numpy(topk))
    return ghost.curve()


def budgets(
    streams: Iterable[Stream], rows: int, *, warmup: int, steps: int, rate: float = 1.0
) -> Budgets:
    """Choose shared hot rows for each layer, `rows` on average, as the server does.

    It uses the LRU curves of `steps` steps after the warm-up, sampled at `rate`. Each layer gets
    at least FLOOR_MARGIN times the rows that a step of any layer needs.
    Raises: BudgetError if `rows` is below that.
    """
    parts = [Stream(s.steps[: warmup + steps], s.contexts, s.num_slots) for s in streams]
    cap = max(part.num_slots for part in parts)
    grid = np.unique(np.geomspace(rows / 16, cap, CURVE_SIZES).round().astype(int)).tolist()
    curves = [ghost_curve(part, grid, rate, warmup) for part in parts]
    floor = int(max(curve.union for curve in curves) * FLOOR_MARGIN)
    return allot(curves, rows * len(curves), floor, cap)


def exact_curve(stream: Stream, sizes: Sequence[int], warmup: int = 0) -> np.ndarray:
    """Count the misses a step [sizes] of a shared production HotCache, one run for each size."""
    runs = (run([stream], "shared", "lru", rows, warmup=warmup) for rows in sizes)
    return np.array([found.counted.sum(axis=2).mean() for found in runs])


class Drafts(NamedTuple):
    """Which lists of a verify step are right.

    accepted  mean tokens that a request keeps of a step
    alike     share of the steps after which the positions of the rejected lists select the same
              again, with the right tokens. After the others they select other lists, which are as
              far from the rejected ones as two successors of one query (TopkStream.next)
    """

    accepted: float
    alike: float = 0.0


# --- streams ----------------------------------------------------------------------------


def generate(
    locality: Locality,
    layer_index: int,
    contexts: Sequence[int],
    steps: int,
    *,
    queries: int = 1,
    drafts: Drafts | None = None,
    prefix: int = 0,
    seed: int = 0,
) -> tuple[Stream, int]:
    """Generate a stream of one layer. Returns it and the number of its warm-up steps.

    The warm-up looks up every position once, least recently selected first. After it a tier is
    as if the requests had been decoding for long. `steps` steps follow. Contexts do not grow.
    drafts: the queries of a step are one token and drafts, some of which are rejected; None: all
        are kept
    prefix: tokens at the start of all requests, on the same slots; each request selects among
    them independently
    Raises: ValueError for a prefix longer than the shortest context.
    """
    tokens_of = np.asarray(contexts, np.int64)
    topk, longest = locality.topk, int(tokens_of.max())
    if not 0 <= prefix <= tokens_of.min():
        raise ValueError(f"prefix must be 0 to {tokens_of.min()} tokens: got {prefix}.")
    own = tokens_of - prefix
    slots = ((np.cumsum(own) - own)[:, None] + np.arange(longest)).astype(np.int32)
    slots[:, :prefix] = np.arange(prefix)
    source = TopkStream(locality, layer_index, len(contexts), longest, seed)
    warmup = -(-longest // topk)
    found = np.full((warmup + steps, len(contexts) * queries, topk), -1, np.int32)
    for request, tokens in enumerate(tokens_of.tolist()):
        source.begin(request, tokens)
        order = np.full(warmup * topk, -1, np.int32)
        order[-tokens:] = slots[request, source.by_recency(request)]  # all end together
        found[:warmup, request * queries] = order.reshape(warmup, topk)
    rows, rng = np.arange(len(contexts)), np.random.default_rng(seed)
    kept = np.ones((len(found), len(rows)), np.int64)  # a warm-up step has one list a request
    accepted, alike = drafts or Drafts(queries)
    probability = acceptance_probability(queries, accepted)
    for step in range(warmup, warmup + steps):
        kept[step] = draw_kept(rng, len(rows), queries, probability)
        same = rng.random(len(rows)) < alike
        found[step] = source.next(rows, tokens_of, slots, queries, kept[step], same)
    num_slots = int(own.sum()) + prefix
    return Stream(found, tokens_of, num_slots, None if drafts is None else kept), warmup
