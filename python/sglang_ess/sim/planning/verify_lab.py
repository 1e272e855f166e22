"""What verify steps of speculative decoding miss, by which of their lists make rows young.

The rules are those of policies/verified_lru.py. Streams are generated (lab.generate with drafts) or
recorded (--ess-trace of a server with speculation).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.planning.lab import Drafts, Stream, generate
from sglang_ess.sim.policies.verified_lru import RULES, VerifiedLru
from sglang_ess.trace.trace import Event, Kind, Record, Trace


@dataclass(frozen=True)
class VerifyCost:
    """What verify steps miss. misses: of a request, layer and step; tokens: kept by one, mean."""

    misses: float
    tokens: float

    @property
    def per_token(self) -> float:
        """Misses of a layer for each kept token."""
        return self.misses / self.tokens


def verify_cost(
    stream: Stream, rule: str, rows: int, *, warmup: int = 0, tail: int = 0
) -> VerifyCost:
    """Count the misses of a shared LRU tier whose ages follow a rule.

    rows: hot rows of the layer; warmup, tail: first and last steps that do not count
    Raises: ValueError for a stream without kept, and as VerifiedLru.
    """
    if stream.kept is None:
        raise ValueError("a stream of verify steps must say what each kept: got none.")
    tier = VerifiedLru(min(rows, stream.num_slots), stream.num_slots, stream.queries, rule)
    misses = np.zeros(len(stream.steps), np.int64)
    for step, (topk, kept) in enumerate(zip(stream.steps, stream.kept, strict=True)):
        misses[step] = tier.step(topk).sum()
        tier.accepted(kept)
    counted = slice(warmup, len(misses) - tail)
    mean = float(misses[counted].mean()) / len(stream.contexts)
    return VerifyCost(mean, float(stream.kept[counted].mean()))


class Verifying(NamedTuple):
    """Requests that verify drafts together. tokens: context of each; queries: of each in a step"""

    tokens: int
    queries: int
    drafts: Drafts
    requests: int = 2


def by_rule(
    locality: Locality, setting: Verifying, ratio: float, steps: tuple[int, int], layers: int,
    seed: int = 0,
) -> dict[str, list[VerifyCost]]:  # fmt: skip
    """Count the misses of generated streams under each rule: one figure for each of `layers`.

    ratio: hot rows of all slots; steps: before those that count, and these
    layers: of the locality, spread over all of them
    """
    found: dict[str, list[VerifyCost]] = {rule: [] for rule in RULES}
    for layer in locality.spread(layers):
        stream, warmup = generate(
            locality, layer, [setting.tokens] * setting.requests, sum(steps),
            queries=setting.queries, drafts=setting.drafts, seed=seed,
        )  # fmt: skip
        rows, warmup = int(ratio * stream.num_slots), warmup + steps[0]
        for rule, costs in found.items():
            costs.append(verify_cost(stream, rule, rows, warmup=warmup))
    return found


# --- traces -----------------------------------------------------------------------------


def traced_cost(trace: Trace, rule: str, rows: int) -> VerifyCost:
    """Count the misses of a trace's verify steps with `rows` hot rows in each layer.

    Decode writes make their slots hot; prompts do not. A step whose ACCEPTED is missing does not
    count.
    Raises: ValueError for a trace without verify steps, and as VerifiedLru and Trace.frames.
    """
    # How many queries a request has is known at the end of the first step.
    tiers = [VerifiedLru(min(rows, trace.slots), trace.slots, 1, rule) for _ in range(trace.layers)]
    layers = [_TracedLayer(tier) for tier in tiers]
    verifies = tokens = 0
    for event in trace.events():
        if event.kind == Kind.ACCEPTED:
            whole = [layer.verified(event.slots, event.argument) for layer in layers]
            if all(whole):
                verifies += len(event.slots)
                tokens += int(event.slots.sum())
        elif event.kind != Kind.GAP:
            layers[event.layer].see(event)
    if not verifies:
        raise ValueError(f"a trace must have verify steps: got none in {trace.path}.")
    misses = sum(layer.misses for layer in layers) / verifies / trace.layers
    return VerifyCost(misses, tokens / verifies)


class _TracedLayer:
    """A layer's tier, and the lists of the step under way."""

    def __init__(self, tier: VerifiedLru):
        self.tier, self.misses = tier, 0
        self._lists: list[np.ndarray] = []

    def see(self, event: Event) -> None:
        """Apply an event of this layer."""
        if event.kind == Kind.PLAN:
            if not event.argument:
                self._lists.clear()
            self._lists.append(event.slots)
        elif event.kind == Kind.INSTALL and not event.argument:
            self.tier.use(event.slots.astype(np.int32))
        elif event.kind == Kind.WARM:
            self.tier.use(np.unique(event.slots[event.slots >= 0]).astype(np.int32))
        elif event.kind == Kind.INVALIDATE:
            self.tier.forget(event.slots)

    def verified(self, kept: np.ndarray, queries: int) -> bool:
        """Look the step's lists up, `queries` of each request. Returns whether there are some."""
        lists, self._lists, self.tier.queries = self._lists, [], queries
        if not lists:
            return False
        self.misses += int(self.tier.step(np.concatenate(lists)).sum())
        self.tier.accepted(kept)
        return True


@dataclass(frozen=True)
class Kinship:
    """Mean shares of a list's positions that another list of its request and layer has too.

    rejected    a rejected list, and the one that its position selects with the right token
    successive  a kept list, and that of the position before
    pairs       of rejected lists
    """

    rejected: float
    successive: float
    pairs: int


def kinship(trace: Trace) -> Kinship:
    """Measure how alike a trace's lists are, of positions past its top-k.

    Raises: ValueError for a trace without rejected lists; as Trace.frames.
    """
    right: dict[tuple[str, int, int], np.ndarray] = {}
    num_kept = 0
    for record in trace.kept():
        num_kept += len(record.positions) == trace.topk
        if len(record.positions) == trace.topk:
            right[_place(record)] = record.positions
    shares: dict[str, list[float]] = defaultdict(list)
    for (name, layer, length), positions in right.items():
        if (name, layer, length - 1) in right:
            shares["successive"].append(_share(positions, right[name, layer, length - 1]))
    for record in trace:
        same = right.get(_place(record))
        if same is not None and len(record.positions) == trace.topk:
            shares["all"].append(_share(record.positions, same))
    # A kept list is among all lists too, and is its own right one.
    pairs = len(shares["all"]) - num_kept
    if pairs <= 0:
        raise ValueError(f"a trace must have rejected lists: got none in {trace.path}.")
    rejected = (sum(shares["all"]) - num_kept) / pairs
    return Kinship(rejected, float(np.mean(shares["successive"])), pairs)


def _place(record: Record) -> tuple[str, int, int]:
    return record.request_id, record.layer, record.length


def _share(positions: np.ndarray, others: np.ndarray) -> float:
    return len(np.intersect1d(positions, others, assume_unique=True)) / len(positions)
