"""What a decode step has to fetch: where the simulated server gets its misses from.

TierFetches runs the production HotCache row by row on sampled layers; the others are for a
deployment that keeps all rows on the device, and for what-if numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sglang_ess.admission.feed import Totals
from sglang_ess.sim.engine.admission_gate import SAMPLES
from sglang_ess.sim.model.decode_tiers import DecodeTiers


@dataclass(frozen=True)
class Fetched:
    """One decode step of a rank.

    misses  [model layers] float64 rows per request; rows: of all its requests and layers
    """

    misses: np.ndarray
    rows: int


class Fetches(Protocol):
    """totals: since the start; sample_layers: that topk has, numbered from 0."""

    totals: Totals
    sample_layers: int

    def join(self, request: int, tokens: int, cold: bool) -> None:
        """A request with so many tokens decodes from the next step on; cold: with no warm-up."""

    def leave(self, request: int) -> None:
        """It does not any more, and its slots may be another's."""

    def step(self, batch: int) -> Fetched:
        """One decode step of the `batch` requests that joined."""

    def topk(self, layer: int) -> np.ndarray | None:
        """[min(batch, SAMPLES), K] int32: what the last step's first requests selected, all
        queries of a request in its row; None if no rows are simulated.
        """


class ConstantFetches:
    """The same misses in every layer and step; with 0, one tier."""

    sample_layers = 1

    def __init__(self, num_layers: int, misses: float = 0.0):
        self._misses = np.full(num_layers, float(misses))
        self.totals = Totals()

    def join(self, request: int, tokens: int, cold: bool) -> None:
        pass

    def leave(self, request: int) -> None:
        pass

    def step(self, batch: int) -> Fetched:
        rows = round(batch * self._misses.sum())
        self.totals = Totals(self.totals.misses + rows)
        return Fetched(self._misses, rows)

    def topk(self, layer: int) -> None:
        return None


class TierFetches:
    """Production hot tiers of sampled layers, each of which stands for as many others.

    tiers       DecodeTiers with a shared hot tier
    num_layers  of the model, with rows
    accepted    tokens that a request's context grows by in a step, on average
    """

    def __init__(self, tiers: DecodeTiers, num_layers: int, accepted: float = 1.0):
        self._tiers, self._accepted, self._steps = tiers, accepted, 0
        self.sample_layers = len(tiers.layers)
        self._scale = num_layers / self.sample_layers
        self._sample_of = np.arange(num_layers) * self.sample_layers // num_layers
        self.totals = Totals()

    def join(self, request: int, tokens: int, cold: bool) -> None:
        self._tiers.join(request, tokens, "cold" if cold else "recent")

    def leave(self, request: int) -> None:
        self._tiers.leave(request)

    def step(self, batch: int) -> Fetched:
        # Whole tokens, whose mean is `accepted`: all requests of a rank grow alike here.
        self._steps += 1
        grown = int(self._steps * self._accepted) - int((self._steps - 1) * self._accepted)
        misses = self._tiers.step(grown)[self._sample_of] / batch
        rows = round(batch * float(misses.sum()))
        counters = self._tiers.counters()
        self.totals = Totals(
            self.totals.misses + rows,
            round(self._scale * sum(layer["evictions"] for layer in counters)),
            round(self._scale * sum(layer["evicted_age"] for layer in counters)),
        )
        return Fetched(misses, rows)

    def topk(self, layer: int) -> np.ndarray:
        return self._tiers.last_topk(layer, SAMPLES)

    @property
    def requests(self) -> Sequence[int]:
        return self._tiers.requests
