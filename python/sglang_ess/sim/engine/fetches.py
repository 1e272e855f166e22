"""Where a simulated server's misses come from.

TierFetches runs the production HotCache row by row on sampled layers. ConstantFetches serves a
deployment that keeps all rows on the device, and assumed numbers of misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sglang_ess.admission.feed import Totals
from sglang_ess.sim.model.decode_tiers import DecodeTiers
from sglang_ess.tiers.index_groups import IndexGroups
from sglang_ess.tiers.topk_sample import SAMPLES


@dataclass(frozen=True)
class Fetched:
    """Fetches of one decode step of a rank.

    misses  [model layers] float64: rows per request; rows: of all requests and layers
    """

    misses: np.ndarray
    rows: int


class Fetches(Protocol):
    """Source of fetches. totals: since the start; sample_layers: number of layers of topk()."""

    totals: Totals
    sample_layers: int

    def join(self, request: int, tokens: int, cold: bool) -> None:
        """Let a request of `tokens` tokens decode from the next step on. cold: no warm-up."""

    def leave(self, request: int) -> None:
        """Let the request decode no more. Its slots may go to another."""

    def step(self, batch: int) -> Fetched:
        """Run a decode step of the `batch` requests that have joined."""

    def topk(self, layer_index: int) -> np.ndarray | None:
        """Return what the first requests of the last step selected, or None without rows.

        Shape: [min(batch, SAMPLES), queries * K] int32; layer_index counts the sampled layers
        """


class ConstantFetches:
    """The same misses in every layer and step. 0 stands for one tier."""

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

    def topk(self, layer_index: int) -> None:
        return None


class TierFetches:
    """Production hot tiers of sampled layers, each of which stands for equally many index groups.

    A group is planned once. Each of its layers fetches the missed rows.

    tiers     DecodeTiers with a shared hot tier
    groups    the model's index groups, or its number of layers if each is one
    accepted  mean tokens by which a request grows in a step
    """

    def __init__(self, tiers: DecodeTiers, groups: IndexGroups | int, accepted: float = 1.0):
        if isinstance(groups, int):
            groups = IndexGroups.single(groups)
        self._tiers, self._accepted, self._steps = tiers, accepted, 0
        self.sample_layers = len(tiers.layers)
        samples = np.arange(len(groups)) * self.sample_layers // len(groups)
        self._sample_of = np.repeat(samples, groups.sizes)  # of each layer of the model
        self._scale = groups.layers / self.sample_layers
        self.totals = Totals()

    def join(self, request: int, tokens: int, cold: bool) -> None:
        self._tiers.join(request, tokens, "cold" if cold else "recent")

    def leave(self, request: int) -> None:
        self._tiers.leave(request)

    def step(self, batch: int) -> Fetched:
        # Whole tokens with the mean `accepted`. All requests of a rank grow alike here.
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

    def topk(self, layer_index: int) -> np.ndarray:
        return self._tiers.last_topk(layer_index, SAMPLES)

    @property
    def requests(self) -> Sequence[int]:
        return self._tiers.requests
