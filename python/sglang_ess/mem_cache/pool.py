"""SGLang's DSA pool with its latent rows on the host and a hot tier in front of them.

One slot is one host row per layer, so addressing, allocation, the radix cache and PD
registration stay SGLang's. Index keys stay on the device for every slot.
"""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, unwrap_write_loc

from sglang_ess.config import EssConfig
from sglang_ess.layout import GIB, PLAN_QUERIES_CPU
from sglang_ess.mem_cache import capacity
from sglang_ess.tiers import HostTier, HotCache, HotLayers, PlanBuffers, lru
from sglang_ess.tiers import throttled_link as link
from sglang_ess.tiers.balance.budgets import Budgets
from sglang_ess.tiers.balance.rebalance import AgeRebalancer, Rebalancer
from sglang_ess.tiers.contract import HotTiers
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.row_words import as_words
from sglang_ess.tiers.staging import Staging
from sglang_ess.tiers.topk_sample import TopkSample
from sglang_ess.trace.trace_recorder import hot_cache_factory

logger = logging.getLogger(__name__)

# Rows that no decode step used for this many steps give way to a prompt's new rows.
# SparseServe's working set is what the last 12 steps used (papers.md 2): far outside it.
IDLE_STEPS = 64


class EssTokenToKVPool(DSATokenToKVPool):
    """DSATokenToKVPool in two tiers.

    kv_buffer    the host tier, layer by layer: [slots, 1, row width]
    hot_caches   the hot tier, layer by layer
    staging      where a prefill pass finds its rows
    sample       of the last decode step's top-k, on the host
    rebalancer   moves hot rows between layers; None where each keeps its own
    request_misses [requests + 1] int64: rows fetched for the request that has this row of
        the request table; whoever reads it at the end of a request sets it back to 0. None
        where nobody counts them.

    Every write goes to the host tier and drops the slots' hot rows (invariants 1 and 3), so
    no path can leave a stale one; write(), attention's own, refreshes them instead.
    """

    rebalancer: Rebalancer | AgeRebalancer | None = None

    def _create_buffers(self) -> None:
        self.capacity = capacity.decided()
        slots = self.size + self.page_size
        self.host_tier = HostTier(self.layer_num, slots, (1, self.kv_cache_dim), self.store_dtype)
        self.kv_buffer = self.host_tier.rows
        self._create_tiers()

    def _create_tiers(self) -> None:
        """The hot tier and prefill's staging, on the host; a GPU's are in cuda/pool.py."""
        self.plan_buffers = PlanBuffers(PLAN_QUERIES_CPU * self.capacity.geometry.topk)
        config = EssConfig.from_env()
        throttled = None
        if config is not None and config.link_gib is not None:
            throttled = link.ThrottledLink(config.link_gib * GIB)
        self._link = throttled
        new_cache = hot_cache_factory(config.trace if config else "", *self._trace_facts())
        hot_rows, layers = self.capacity.hot_rows, self.layer_num
        arena = HotArena(layers * hot_rows, self.kv_buffer[0].squeeze(1))
        caches = [
            new_cache(
                rows.squeeze(1),
                hot_rows,
                buffers=self.plan_buffers,
                link=throttled,
                arena=arena,
            )
            for rows in self.kv_buffer
        ]
        self.tier: HotTiers = HotLayers(caches)
        self.hot_caches = self.tier.caches
        if self.capacity.geometry.ghosts:
            self.rebalancer = Rebalancer(self.tier, self.capacity.geometry.topk)
        self.sample = TopkSample(self.layer_num, self.capacity.geometry.topk)
        self.staging = Staging(
            [rows.squeeze(1) for rows in self.kv_buffer], self.capacity.staging_rows
        )
        self.request_misses = np.zeros(1, np.int64)

    def _trace_facts(self) -> tuple:
        """What a trace's header says of the pool: layers, top-k, slots, and more for readers."""
        rows, topk = self.kv_buffer[0], self.capacity.geometry.topk
        meta = {"row_bytes": rows[0].nbytes, "page_slots": self.page_size}
        return self.layer_num, topk, len(rows), meta | {"plan_queries": PLAN_QUERIES_CPU}

    def before_decode_step(self, num_queries: int = 0) -> None:
        """Hot rows change their layer here, if at all, before anything of a step is planned.

        num_queries: of the step, its padding included; this tier does not ask
        """
        if self.rebalancer is not None and (budgets := self._rebalance(num_queries)) is not None:
            logger.info(
                "ESS: hot rows move between layers: %d to %d each, %.1f misses/step expected",
                min(budgets.rows),
                max(budgets.rows),
                budgets.misses,
            )

    def _rebalance(self, num_queries: int) -> Budgets | None:
        """New budgets, on their way."""
        return self.rebalancer.step()

    def totals(self) -> tuple[int, int, int] | None:
        """Rows fetched, rows evicted and their ages (sum, in steps), of all layers since the
        start; None where the device has not reported since the last call.
        """
        return self.tier.totals()

    def measure_link(self) -> float:
        """Bytes per second of a fetch of scattered rows from the host tier, measured now."""
        source = as_words(self.kv_buffer[0].squeeze(1))
        rows = np.random.default_rng(0).integers(0, len(source), link.PROBE_ROWS, np.int32)
        places = np.arange(len(rows), dtype=np.int32)
        target = np.empty((len(rows), source.shape[1]), source.dtype)

        def fetch() -> int:
            since = time.perf_counter()
            lru.copy_rows(source, target, rows, places, len(rows))
            if self._link is not None:
                self._link.carried(target.nbytes, time.perf_counter() - since)
            return target.nbytes

        return link.measure(fetch)

    def hot_cache(self, layer_id: int) -> HotCache:
        return self.hot_caches[layer_id - self.start_layer]

    @property
    def device_bytes(self) -> int:
        """All that the pool holds on the device: index keys, hot rows, maps, staging, plans."""
        index_keys = sum(buffer.nbytes for buffer in self.index_k_with_scale_buffer)
        ghosts = self.rebalancer.nbytes if self.rebalancer is not None else 0
        return (
            index_keys + self.tier.nbytes + ghosts + self.staging.nbytes + self.plan_buffers.nbytes
        )

    def write(self, layer, loc, cache_k_nope, cache_k_rope, min_age: int) -> None:
        """set_mla_kv_buffer that leaves the slots loc [n] int64 hot where there is room.

        min_age: see HotCache.install, which updates a hot slot in any case (invariant 3)
        """
        super().set_mla_kv_buffer(layer, loc, cache_k_nope, cache_k_rope)
        self.install(layer.layer_id, loc, min_age)

    def install(self, layer_id: int, loc: torch.Tensor, min_age: int) -> None:
        """Give the slots loc [n] int64, just written, hot rows; see HotCache.install."""
        host_rows = self.kv_buffer[layer_id - self.start_layer].squeeze(1)
        # In parts: a long prefill chunk must not make the plan buffers grow.
        for part in loc.split(PLAN_QUERIES_CPU * self.capacity.geometry.topk):
            # Not host_rows[part]: for few rows that is 100 times slower on the CPU.
            rows = torch.index_select(host_rows, 0, part)
            self.hot_cache(layer_id).install(part, rows, min_age)

    def warm(self, layer_id: int, topk: torch.Tensor) -> None:
        """HotCache.warm of a layer with topk [queries, K] int32 on the host."""
        self.hot_cache(layer_id).warm(topk)

    # --- SGLang's write paths -----------------------------------------------------------

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, layer_id_override=None) -> None:
        super().set_kv_buffer(layer, loc_info, cache_k, cache_v, layer_id_override)
        self._written(layer, loc_info, layer_id_override)

    def set_mla_kv_buffer(
        self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None
    ) -> None:
        super().set_mla_kv_buffer(layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override)
        self._written(layer, loc_info, layer_id_override)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        super().move_kv_cache(tgt_loc, src_loc)
        self.invalidate_slots(tgt_loc)

    def load_cpu_copy(self, kv_cache_cpu, indices, *args, **kwargs) -> None:
        super().load_cpu_copy(kv_cache_cpu, indices, *args, **kwargs)
        self.invalidate_slots(indices)

    def _written(self, layer, loc_info, layer_id_override) -> None:
        loc, _, _ = unwrap_write_loc(loc_info)
        layer_id = layer.layer_id if layer_id_override is None else layer_id_override
        self.hot_cache(layer_id).invalidate(loc)

    def invalidate_slots(self, loc: torch.Tensor) -> None:
        """For whoever writes host rows of the slots loc without SGLang's setters."""
        self.tier.invalidate(loc.view(-1).long())

    def empty_hot_tier(self) -> None:
        """No slot is hot any more; counters go on."""
        everything = torch.arange(self.size + self.page_size)
        self.invalidate_slots(everything)
