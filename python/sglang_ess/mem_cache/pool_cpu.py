"""The two-tier pool on the CPU platform: both tiers are this machine's memory."""

from __future__ import annotations

import time

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import unwrap_write_loc

from sglang_ess.config import EssConfig
from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool
from sglang_ess.layout import GIB, PLAN_QUERIES_CPU
from sglang_ess.mem_cache.pool import EssTokenToKVPool
from sglang_ess.tiers import HotCache, HotLayers, PlanBuffers, lru, throttled_link
from sglang_ess.tiers.balance.budgets import Budgets
from sglang_ess.tiers.balance.rebalance import Rebalancer
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.row_words import as_words
from sglang_ess.tiers.staging import Staging
from sglang_ess.tiers.throttled_link import ThrottledLink
from sglang_ess.tiers.topk_observer import TopkObserver
from sglang_ess.tiers.topk_sample import TopkSample
from sglang_ess.trace.trace_recorder import TraceRecorder


class CpuEssTokenToKVPool(EssTokenToKVPool, CpuDsaTokenToKVPool):
    """EssTokenToKVPool whose device is the CPU; its "device" bytes are counted all the same.

    plan_buffers  scratch of plans, shared by the layers
    trace         recorder of --ess-trace, or None

    SGLang's setters drop the hot rows of the slots they write; write(), attention's own, refreshes
    them instead.
    """

    trace: TraceRecorder | None = None
    rebalancer: Rebalancer | None

    def _create_tiers(self) -> None:
        config = EssConfig.from_env() or EssConfig()
        topk, hot_rows = self.capacity.geometry.topk, self.capacity.hot_rows
        host_rows = [rows.squeeze(1) for rows in self.kv_buffer]
        self.plan_buffers = PlanBuffers(PLAN_QUERIES_CPU * topk)
        self._link = None if config.link_gib is None else ThrottledLink(config.link_gib * GIB)
        if config.trace:
            self.trace = TraceRecorder(config.trace, *self._trace_facts())
        new_cache = HotCache if self.trace is None else self.trace.hot_cache
        arena = HotArena(self.layer_num * hot_rows, host_rows[0])
        self.tier = HotLayers(
            [
                new_cache(rows, hot_rows, buffers=self.plan_buffers, link=self._link, arena=arena)
                for rows in host_rows
            ]
        )
        if self.capacity.geometry.ghosts:
            self.rebalancer = Rebalancer(self.tier, topk)
        self.sample = TopkSample(self.layer_num, topk)
        self.staging = Staging(host_rows, self.capacity.staging_rows)
        self.request_misses = np.zeros(1, np.int64)

    def _trace_facts(self) -> tuple:
        """The pool's part of a trace's header: layers, top-k, slots, and facts for readers."""
        rows, topk = self.kv_buffer[0], self.capacity.geometry.topk
        meta = {"row_bytes": rows[0].nbytes, "page_slots": self.page_size}
        return self.layer_num, topk, len(rows), meta | {"plan_queries": PLAN_QUERIES_CPU}

    @property
    def topk_observers(self) -> list[TopkObserver]:
        return [self.sample] if self.trace is None else [self.sample, self.trace]

    def _rebalance(self, num_queries: int) -> Budgets | None:
        return None if self.rebalancer is None else self.rebalancer.step()

    def warm(self, layer_id: int, topk: torch.Tensor) -> None:
        self.hot_cache(layer_id).warm(topk)

    # --- writes -------------------------------------------------------------------------

    def write(self, layer, loc, cache_k_nope, cache_k_rope, min_age: int) -> None:
        """set_mla_kv_buffer that leaves the slots loc [n] int64 hot where there is room.

        min_age: see HotCache.install, which refreshes a slot that is hot in any case
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

    def invalidate_slots(self, loc: torch.Tensor) -> None:
        self.tier.invalidate(loc.view(-1).long())

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, layer_id_override=None) -> None:
        super().set_kv_buffer(layer, loc_info, cache_k, cache_v, layer_id_override)
        self._written(layer, loc_info, layer_id_override)

    def set_mla_kv_buffer(
        self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None
    ) -> None:
        super().set_mla_kv_buffer(layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override)
        self._written(layer, loc_info, layer_id_override)

    def _written(self, layer, loc_info, layer_id_override) -> None:
        loc, _, _ = unwrap_write_loc(loc_info)
        layer_id = layer.layer_id if layer_id_override is None else layer_id_override
        self.hot_cache(layer_id).invalidate(loc)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        super().move_kv_cache(tgt_loc, src_loc)
        self.invalidate_slots(tgt_loc)

    # --- figures ------------------------------------------------------------------------

    def measure_link(self) -> float:
        source = as_words(self.kv_buffer[0].squeeze(1))
        rows = np.random.default_rng(0).integers(
            0, len(source), throttled_link.PROBE_ROWS, np.int32
        )
        places = np.arange(len(rows), dtype=np.int32)
        target = np.empty((len(rows), source.shape[1]), source.dtype)

        def fetch() -> int:
            since = time.perf_counter()
            lru.copy_rows(source, target, rows, places, len(rows))
            if self._link is not None:
                self._link.carried(target.nbytes, time.perf_counter() - since)
            return target.nbytes

        return throttled_link.measure(fetch)

    @property
    def _scratch_bytes(self) -> int:
        ghosts = self.rebalancer.nbytes if self.rebalancer is not None else 0
        return ghosts + self.plan_buffers.nbytes
