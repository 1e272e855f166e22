"""The hot tiers of all layers on the CPU: HotCaches that share the rows of one arena."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_ess.tiers import lru
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.hot_cache import HotCache


class HotLayers:
    """One HotCache a layer, all of one arena. Implements contract.HotTiers.

    caches: by layer_index, made in this order with the same arena
    """

    def __init__(self, caches: Sequence[HotCache]):
        self.caches = list(caches)
        self.arena: HotArena = self.caches[0].arena

    @property
    def sizes(self) -> tuple[int, ...]:
        """Hot rows of each layer now."""
        return tuple(cache.num_rows for cache in self.caches)

    @property
    def nbytes(self) -> int:
        """Device bytes, without the shared buffers and the ghosts."""
        return sum(cache.nbytes for cache in self.caches)

    def resize(self, sizes: Sequence[int]) -> int:
        """Give each layer sizes[layer_index] hot rows, between steps. Returns rows that moved.

        Layers that shrink go first. Raises: ValueError as HotCache.resize.
        """
        changes = [
            (new - cache.num_rows, cache) for new, cache in zip(sizes, self.caches, strict=True)
        ]
        for _, cache in sorted(changes, key=lambda change: change[0]):
            cache.resize(sizes[cache.number])
        return sum(max(0, change) for change, _ in changes)

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64 in every layer."""
        for cache in self.caches:
            cache.invalidate(slots)

    def figures(self) -> list[dict[str, int]]:
        """For each layer: its counters, "steps", "occupied" and "rows" (hot rows it has)."""
        return [
            cache.counters
            | {"steps": cache.steps, "occupied": cache.occupied, "rows": cache.num_rows}
            for cache in self.caches
        ]

    def totals(self) -> tuple[int, int, int]:
        """misses, evictions and evicted_age of all layers since the start."""
        states = [cache.state for cache in self.caches]
        misses, evictions, evicted_age = (
            sum(int(state[counter]) for state in states)
            for counter in (lru.MISSES, lru.EVICTIONS, lru.EVICTED_AGE)
        )
        return misses, evictions, evicted_age

    def check_integrity(self) -> None:
        """Check every row of the arena and every cache. Raises: RuntimeError."""
        self.arena.check_integrity(list(self.sizes))
        for cache in self.caches:
            cache.check_integrity()
