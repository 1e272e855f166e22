"""The hot tiers of all index groups on a CUDA device: a DeviceTier for each number of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from ess_kernels.plan_fetch import PlanBuffers
from sglang_ess.tiers.contract import Device, HotTiers
from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache, DeviceTier, TierScratch
from sglang_ess.tiers.index_groups import IndexGroups

T = TypeVar("T")


class DeviceTiers:
    """The DeviceTiers of a pool, as one. Implements contract.HotTiers.

    groups     the index groups; host_rows: [slots, ...] of each layer
    num_rows, topk, max_queries, device: as DeviceTier
    parts      (groups, DeviceTier of these groups): one for each number of layers
    caches     by group
    Figures are by group in the pool's order, whichever tier has the group.
    """

    def __init__(
        self,
        groups: IndexGroups,
        host_rows: Sequence[torch.Tensor],
        num_rows: int,
        topk: int,
        max_queries: int,
        device: Device,
    ):
        self.scratch = TierScratch.new(topk, max_queries, device)
        self.parts: list[tuple[list[int], DeviceTier]] = []
        for same in groups.by_size().values():
            rows = [[host_rows[layer] for layer in groups.members(group)] for group in same]
            tier = DeviceTier(rows, num_rows, topk, max_queries, device, self.scratch)
            self.parts.append((same, tier))
        by_group = {
            group: cache
            for same, tier in self.parts
            for group, cache in zip(same, tier.caches, strict=True)
        }
        self.caches: list[DeviceHotCache] = [by_group[group] for group in range(len(groups))]

    def _by_group(self, found: Sequence[Sequence[T]]) -> list[T]:
        """found: of each tier, one for each of its groups. Returns them by group."""
        by_group = {
            group: one
            for (same, _), ones in zip(self.parts, found, strict=True)
            for group, one in zip(same, ones, strict=True)
        }
        return [by_group[group] for group in range(len(self.caches))]

    @property
    def rows(self) -> list[torch.Tensor]:
        """The hot rows of all layers, or of all arenas."""
        return [rows for _, tier in self.parts for rows in tier.rows]

    @property
    def nbytes(self) -> int:
        """Device bytes of all groups, including scratch."""
        return self.scratch.nbytes + sum(tier.nbytes for _, tier in self.parts)

    def buffers_for(self, queries: int, width: int) -> PlanBuffers:
        """Buffers for a plan [queries, width] of a whole batch, of any group."""
        return self.parts[0][1].buffers_for(queries, width)

    def has_room(self, num_queries: int, width: int) -> bool:
        """DeviceTier.has_room: every tier has as many hot rows."""
        return self.parts[0][1].has_room(num_queries, width)

    def reserve(self, slots: torch.Tensor, first_slot: int = 0) -> None:
        """DeviceTier.reserve of each tier."""
        for _, tier in self.parts:
            tier.reserve(slots, first_slot)

    def install(self, slots: torch.Tensor, min_age: int = 0, first_slot: int = 0) -> None:
        """DeviceTier.install of each tier."""
        for _, tier in self.parts:
            tier.install(slots, min_age, first_slot)

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64 in every layer."""
        for _, tier in self.parts:
            tier.invalidate(slots)

    def set_split(self, split: np.ndarray) -> None:
        """Set whether each group lists hits and misses apart: split [groups] bool."""
        for same, tier in self.parts:
            tier.set_split(split[same])

    # --- figures --------------------------------------------------------------------------

    def is_mirrored(self) -> bool:
        """Return whether the copies of the last mirror() are complete."""
        return all(tier.is_mirrored() for _, tier in self.parts)

    def mirror(self) -> None:
        """Start copies of counters, words and ages to the host, unless some are under way."""
        for _, tier in self.parts:
            tier.mirror()

    def counters(self) -> np.ndarray:
        """Wait for the last mirror(). Returns the counters [groups, NUM_COUNTERS] int64."""
        return np.array(self._by_group([list(tier.read()[0]) for _, tier in self.parts]))

    def totals(self) -> tuple[int, int, int] | None:
        """misses, evictions and evicted_age in rows of all layers, as of the last mirror().

        None while a copy is under way; nobody waits for it.
        """
        found = [tier.totals() for _, tier in self.parts]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        misses, evictions, ages = (sum(one) for one in zip(*known, strict=True))
        return misses, evictions, ages

    def figures(self) -> list[dict[str, int]]:
        """DeviceTier.figures, by group."""
        return self._by_group([tier.figures() for _, tier in self.parts])


if TYPE_CHECKING:

    def _is_hot_tiers(tiers: DeviceTiers) -> HotTiers:
        return tiers
