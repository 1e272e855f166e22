"""The hot tiers of all index groups on the CPU: HotCaches of groups that share rows of arenas."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_ess.tiers import lru
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.hot_cache import HotCache


class HotGroups:
    """One HotCache an index group. Implements contract.HotTiers.

    caches: by group. Those of one arena were made in this order.
    """

    def __init__(self, caches: Sequence[HotCache]):
        self.caches = list(caches)

    @property
    def arenas(self) -> list[HotArena]:
        """The arenas of the groups: one for each number of layers that a group has."""
        return list({id(cache.arena): cache.arena for cache in self.caches}.values())

    @property
    def spare(self) -> int:
        """Rows without an owner."""
        return sum(arena.spare for arena in self.arenas)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Hot rows of each group now."""
        return tuple(cache.num_rows for cache in self.caches)

    @property
    def nbytes(self) -> int:
        """Device bytes, without the shared buffers and the ghosts."""
        return sum(cache.nbytes for cache in self.caches)

    def resize(self, sizes: Sequence[int]) -> int:
        """Give each group sizes[group] hot rows, between steps. Returns rows that moved.

        Groups that shrink go first.
        Raises: ValueError, before any row moves, for a size outside its limits or more rows than
        the groups of as many layers have.
        """
        changes = [
            (new - cache.num_rows, new, cache)
            for new, cache in zip(sizes, self.caches, strict=True)
        ]
        for _, new, cache in changes:
            cache.check_size(new)
        for arena in self.arenas:
            arena.check_spare(sum(more for more, _, cache in changes if cache.arena is arena))
        for _, new, cache in sorted(changes, key=lambda change: change[0]):
            cache.resize(new)
        return sum(max(0, change) for change, _, _ in changes)

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64 in every layer."""
        for cache in self.caches:
            cache.invalidate(slots)

    def figures(self) -> list[dict[str, int]]:
        """For each group: its counters, "steps", "occupied", "rows" (hot rows) and "layers"."""
        return [
            cache.counters
            | {
                "steps": cache.steps,
                "occupied": cache.occupied,
                "rows": cache.num_rows,
                "layers": cache.num_layers,
            }
            for cache in self.caches
        ]

    def totals(self) -> tuple[int, int, int]:
        """misses, evictions and evicted_age since the start, in rows of all layers."""
        misses, evictions, evicted_age = (
            sum(int(cache.state[counter]) * cache.num_layers for cache in self.caches)
            for counter in (lru.MISSES, lru.EVICTIONS, lru.EVICTED_AGE)
        )
        return misses, evictions, evicted_age

    def check_integrity(self) -> None:
        """Check every row of the arenas and every cache. Raises: RuntimeError."""
        for arena in self.arenas:
            arena.check_integrity([one.num_rows for one in self.caches if one.arena is arena])
        for cache in self.caches:
            cache.check_integrity()
