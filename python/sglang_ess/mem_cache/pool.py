"""SGLang's DSA pool with its latent rows on the host and a hot tier in front of them.

One slot is one host row per layer, so addressing, allocation, the radix cache and PD
registration stay SGLang's. Index keys stay on the device for every slot. This module holds what
both devices share; pool_cpu.py and pool_cuda.py hold the tiers.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.host_share import tier_group
from sglang_ess.tiers import HostTier
from sglang_ess.tiers.balance.rebalance import Rebalancer
from sglang_ess.tiers.contract import HotTiers
from sglang_ess.tiers.topk_observer import TopkObserver
from sglang_ess.tiers.topk_sample import TopkSample

logger = logging.getLogger(__name__)

# A prompt's new row may evict a hot row that no decode step has used for this many steps.
# SparseServe's working set is what the last 12 steps used: 64 is far outside it.
IDLE_STEPS = 64


def slots_at(table_row: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The slots of positions [queries, K] int32, -1 pads, by a row of SGLang's request table."""
    slots = table_row[positions.clamp(min=0).long()].int()
    return torch.where(positions < 0, positions, slots)


@dataclass(frozen=True)
class PoolFigures:
    """Counters of a pool's hot tier since the start.

    groups: one dict an index group: `lookups`, `misses`, `evictions`, `evicted_age` (sum, in
        steps), `installs`, `steps`, and now: `rows` (hot rows it has), `occupied` (of these, in
        use), `layers` (of the group: each miss fetched a row for each)
    rebalances, rows_moved: how often hot rows moved between layers, and how many
    """

    groups: Sequence[dict[str, int]]
    rebalances: int
    rows_moved: int


class EssTokenToKVPool(DSATokenToKVPool):
    """DSATokenToKVPool in two tiers; the base of the pools of both devices.

    capacity     how many slots and hot rows there are
    groups       the index groups of the layers
    host_tier    every slot's row of every layer; kv_buffer is its [slots, 1, row width] by layer
    tier         the hot tier; hot_caches are those of its index groups
    staging      buffers from which a prefill pass reads its rows
    sample       the last decode step's top-k of a few index groups and requests, on the host
    rebalancers  move hot rows between index groups of as many layers; empty where each keeps its
        own, as on CUDA
    request_misses [requests + 1] int64: rows fetched for the request that owns this row of the
        request table; its reader sets it back to 0. None where misses are not counted by request

    Every write of a host row drops or refreshes the slot's hot row, so no path leaves a stale one.
    """

    capacity: capacity.Capacity
    host_tier: HostTier
    tier: HotTiers
    staging: Any
    sample: TopkSample
    rebalancers: Sequence[Rebalancer] = ()
    request_misses: np.ndarray | None = None

    def _create_buffers(self) -> None:
        self.capacity = capacity.decided()
        self.groups = self.capacity.geometry.index_groups
        slots = self.size + self.page_size
        row_shape = 1, self.kv_cache_dim
        group = tier_group()
        self.host_tier = HostTier(self.layer_num, slots, row_shape, self.store_dtype, group)
        self.kv_buffer = self.host_tier.rows
        with group.together():
            self._create_tiers()

    @abstractmethod
    def _create_tiers(self) -> None:
        """Make the hot tier, the staging buffers and the sample, once the host tier is there."""

    @property
    @abstractmethod
    def topk_observers(self) -> list[TopkObserver]:
        """The observers that the attention backend shows each layer's top-k list."""

    # --- decode steps -------------------------------------------------------------------

    def before_decode_step(self) -> None:
        """Let hot rows move between layers, before anything of the step is planned."""
        for rebalancer in self.rebalancers:
            if (budgets := rebalancer.step()) is not None:
                logger.info(
                    "ESS: hot rows move between layers: %d to %d each, %.1f misses/step expected",
                    min(budgets.rows),
                    max(budgets.rows),
                    budgets.misses,
                )

    @property
    def hot_caches(self) -> Sequence[Any]:
        """The hot tier of each index group: HotCache, or DeviceHotCache on CUDA."""
        return self.tier.caches

    def place(self, layer_id: int) -> tuple[int, int]:
        """(index group, position in the group) of a layer."""
        return self.groups.places[layer_id - self.start_layer]

    @abstractmethod
    def warm_request(self, table_row: torch.Tensor, positions: Sequence[torch.Tensor]) -> None:
        """Warm every index group for one request.

        table_row [context] int32: the request's slots by position, on the device
        positions: for each group [queries, K] int32 on the host, -1 pads, the last query newest
        """

    # --- slots whose rows change --------------------------------------------------------

    @abstractmethod
    def invalidate_slots(self, loc: torch.Tensor) -> None:
        """Drop the hot rows of the slots loc, any shape, in every layer.

        Call it when slots are freed, and after a write of host rows that bypasses SGLang's setters.
        """

    def load_cpu_copy(self, kv_cache_cpu, indices, *args, **kwargs) -> None:
        """Upstream's restore of a retracted request's rows, into the host tier."""
        super().load_cpu_copy(kv_cache_cpu, indices, *args, **kwargs)
        self.invalidate_slots(indices)

    def empty_hot_tier(self) -> None:
        """Drop every hot row; counters go on."""
        self.invalidate_slots(torch.arange(self.size + self.page_size))

    # --- figures ------------------------------------------------------------------------

    def figures(self) -> PoolFigures:
        """The counters; on CUDA those of the last copy to the host."""
        rebalances = sum(one.rebalances for one in self.rebalancers)
        moved = sum(one.rows_moved for one in self.rebalancers)
        return PoolFigures(self.tier.figures(), rebalances, moved)

    def totals(self) -> tuple[int, int, int] | None:
        """Rows fetched, rows evicted and the sum of their ages in steps, of all layers since the
        start; None where the device has not reported since the last call.
        """
        return self.tier.totals()

    @abstractmethod
    def measure_link(self) -> float:
        """Bytes per second of a fetch of scattered rows from the host tier, measured now."""

    @property
    def device_bytes(self) -> int:
        """All that the pool holds on the device: index keys, hot rows, maps, staging, plans."""
        index_keys = sum(buffer.nbytes for buffer in self.index_k_with_scale_buffer)
        return index_keys + self.tier.nbytes + self.staging.nbytes + self._scratch_bytes

    @property
    @abstractmethod
    def _scratch_bytes(self) -> int:
        """Device bytes other than index keys, the hot tier and staging."""
