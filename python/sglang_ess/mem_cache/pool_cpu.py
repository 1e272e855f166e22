"""The two-tier pool on the CPU platform: both tiers are this machine's memory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool, unwrap_write_loc

from sglang_ess.config import EssConfig
from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool
from sglang_ess.layout import GIB, PLAN_QUERIES_CPU
from sglang_ess.mem_cache import agreement
from sglang_ess.mem_cache.host_share import trace_file
from sglang_ess.mem_cache.pool import IDLE_STEPS, EssTokenToKVPool, slots_at
from sglang_ess.tiers import (
    HotCache,
    HotGroups,
    PlanBuffers,
    RowCorruption,
    lru,
    throttled_link,
)
from sglang_ess.tiers.balance.rebalance import Rebalancer
from sglang_ess.tiers.draft_window import DraftWindow
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.row_words import as_words
from sglang_ess.tiers.staging import Staging
from sglang_ess.tiers.throttled_link import ThrottledLink
from sglang_ess.tiers.topk_observer import TopkObserver
from sglang_ess.tiers.topk_sample import TopkSample
from sglang_ess.tiers.warmup_window import WARMUP_QUERIES
from sglang_ess.trace.trace_recorder import TraceRecorder


class CpuEssTokenToKVPool(EssTokenToKVPool, CpuDsaTokenToKVPool):
    """EssTokenToKVPool whose device is the CPU; its "device" bytes are counted all the same.

    plan_buffers  scratch of plans, shared by the layers
    trace         recorder of --ess-trace on the rank that writes the host tier, or None
    draft_window  what --ess-early-fetch makes hot between verify steps, or None

    SGLang's setters drop the hot rows of the slots they write. Attention writes by write_step and
    write_prompt, which refresh them instead.

    Ranks that share the host tier go through RankOrder at every write. The transfer engine of a
    decode server needs no such order. It puts a prompt's rows into the tier through the mappings of
    the ranks: a share of the layers through each, or the same bytes through all. A request joins
    when every rank has polled that its own transfer is done (SGLang takes the minimum over the
    group), so no rank reads a row that is still arriving.
    """

    trace: TraceRecorder | None = None
    draft_window: DraftWindow | None = None
    rebalancers: list[Rebalancer]

    def _create_tiers(self) -> None:
        config = EssConfig.from_env() or EssConfig()
        topk = self.capacity.geometry.topk
        host_rows = [rows.squeeze(1) for rows in self.kv_buffer]
        self.plan_buffers = PlanBuffers(PLAN_QUERIES_CPU * topk)
        self._link = None if config.link_gib is None else ThrottledLink(config.link_gib * GIB)
        if config.trace and self.host_tier.group.is_writer:
            self.trace = TraceRecorder(
                trace_file(config.trace),
                *self._trace_facts(),
                runner_ups=config.trace_scores or None,
            )
        self.tier = HotGroups(self._new_caches(host_rows))
        if config.early_fetch:
            self.draft_window = DraftWindow(self.hot_caches, topk, config.early_fetch)
        self.rebalancers = []
        if self.capacity.geometry.ghosts:
            self.rebalancers = [
                Rebalancer(
                    HotGroups([self.hot_caches[group] for group in groups]), topk,
                    agree=agreement.of_attention_leader,
                )
                for groups in self.groups.by_size().values()
                if len(groups) > 1
            ]  # fmt: skip
        self.sample = TopkSample(len(self.groups), topk, width=self.capacity.geometry.queries)
        self.staging = Staging(host_rows, self.capacity.staging_rows)
        self.request_misses = np.zeros(1, np.int64)
        self._canary, self._canary_rate = random.Random(0), config.canary_rate

    def _new_caches(self, host_rows: list[torch.Tensor]) -> list[HotCache]:
        hot_rows, by_size = self.capacity.hot_rows, self.groups.by_size()
        new_cache = HotCache if self.trace is None else self.trace.hot_cache
        arenas = {
            size: HotArena(len(groups) * hot_rows, host_rows[:size])
            for size, groups in by_size.items()
        }
        return [
            new_cache(
                [host_rows[layer] for layer in self.groups.members(group)], hot_rows,
                buffers=self.plan_buffers, link=self._link, arena=arenas[size],
            )
            for group, size in enumerate(self.groups.sizes)
        ]  # fmt: skip

    def _trace_facts(self) -> tuple:
        """The pool's part of a trace's header: groups, top-k, slots, and facts for readers."""
        rows, topk = self.kv_buffer[0], self.capacity.geometry.topk
        meta = {"row_bytes": rows[0].nbytes, "page_slots": self.page_size}
        meta |= {"plan_queries": PLAN_QUERIES_CPU, "group_layers": self.groups.sizes}
        return len(self.groups), topk, len(rows), meta

    @property
    def topk_observers(self) -> list[TopkObserver]:
        optional = self.trace, self.draft_window
        return [self.sample, *(one for one in optional if one is not None)]

    def warm(self, group: int, topk: torch.Tensor) -> None:
        """HotCache.warm of an index group with topk [queries, K] int32."""
        self.hot_caches[group].warm(topk)

    def warm_request(self, table_row: torch.Tensor, positions: Sequence[torch.Tensor]) -> None:
        for group, queries in enumerate(positions):
            for part in slots_at(table_row, queries).split(WARMUP_QUERIES):
                self.warm(group, part)

    # --- writes -------------------------------------------------------------------------

    def write_step(self, layer, loc, cache_k_nope, cache_k_rope) -> None:
        """set_mla_kv_buffer of a decode step: the slots loc [n] get hot rows if there is room.

        The first layer of an index group decides which are; the others fill the same hot rows.
        """
        super().set_mla_kv_buffer(layer, loc, cache_k_nope, cache_k_rope)
        group, position = self.place(layer.layer_id)
        rows = self._host_rows(layer.layer_id - self.start_layer, loc)
        if position == 0:
            self.hot_caches[group].install(loc, rows)
        else:
            self.hot_caches[group].refill(position, rows)

    def write_prompt(self, layer, loc, cache_k_nope, cache_k_rope) -> None:
        """set_mla_kv_buffer of a prefill pass, whose slots take free and long unused hot rows only.

        They become hot when the last layer of the index group has written its rows.
        """
        super().set_mla_kv_buffer(layer, loc, cache_k_nope, cache_k_rope)
        group, position = self.place(layer.layer_id)
        last = self.groups.sizes[group] - 1
        if position == 0 < last:
            self.hot_caches[group].invalidate(loc)
        if position == last:
            self.install(group, loc, IDLE_STEPS)

    def install(self, group: int, loc: torch.Tensor, min_age: int) -> None:
        """Give the slots loc [n] int64, written in every layer, hot rows; see HotCache.install."""
        # In parts: a long prefill chunk must not make the plan buffers grow.
        for part in loc.split(PLAN_QUERIES_CPU * self.capacity.geometry.topk):
            rows = [self._host_rows(layer, part) for layer in self.groups.members(group)]
            self.hot_caches[group].install(part, rows, min_age)

    def _host_rows(self, layer_index: int, loc: torch.Tensor) -> torch.Tensor:
        """A copy of the host rows of the slots loc in a layer."""
        # Not rows[loc]: for few rows that is 100 times slower on the CPU.
        return torch.index_select(self.kv_buffer[layer_index].squeeze(1), 0, loc)

    def invalidate_slots(self, loc: torch.Tensor) -> None:
        self.tier.invalidate(loc.view(-1).long())

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, layer_id_override=None) -> None:
        write = super().set_kv_buffer
        self.host_tier.order.write(write, layer, loc_info, cache_k, cache_v, layer_id_override)
        self._written(layer, loc_info, layer_id_override)

    def set_mla_kv_buffer(
        self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None
    ) -> None:
        super().set_mla_kv_buffer(layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override)
        self._written(layer, loc_info, layer_id_override)

    def _write_mla_kv_buffer(self, dst_buffer, loc, cache_k_nope, cache_k_rope) -> None:
        """Every rank goes on with the host rows, which the writer has computed and written.

        Raises: RowCorruption at --ess-canary-rate, if this rank would have written other rows.
        """
        write = super()._write_mla_kv_buffer
        order = self.host_tier.order
        order.write(write, dst_buffer, loc, cache_k_nope, cache_k_rope)
        if not order.is_writer and self._canary.random() < self._canary_rate:
            self._compare(dst_buffer, loc, self._packed(cache_k_nope, cache_k_rope))

    def _compare(self, host_rows: torch.Tensor, loc: torch.Tensor, own: torch.Tensor) -> None:
        """Sharing is right because all ranks of the group compute the same rows, bit for bit: the
        projection that makes them is not split, and an all-reduce gives every rank the same sums.
        """
        written = torch.index_select(host_rows.squeeze(1), 0, loc)
        differ = (written.view(torch.uint8) != own.view(torch.uint8)).any(1)
        slots = loc[differ & (loc > 0)]  # slot 0 is padding's
        if len(slots):
            raise RowCorruption(
                f"ranks that share a host tier must compute the same rows: got another one of slot "
                f"{int(slots[0])} on rank {self.host_tier.group.rank} than on rank 0, which writes "
                f"({len(slots)} of {len(loc)} rows). Stop this server, keep its log and report it; "
                "--disable-ess serves without a shared tier."
            )

    def _written(self, layer, loc_info, layer_id_override) -> None:
        loc, _, _ = unwrap_write_loc(loc_info)
        layer_id = layer.layer_id if layer_id_override is None else layer_id_override
        group, _ = self.place(layer_id)
        self.hot_caches[group].invalidate(loc)

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Rows are moved once for all ranks, index keys by each rank."""
        order = self.host_tier.order
        order.begin()
        order.write(MLATokenToKVPool.move_kv_cache, self, tgt_loc, src_loc)
        self.index_key_cache.move(tgt_loc, src_loc)
        self.invalidate_slots(tgt_loc)

    def _load_rows(self, copies, indices: torch.Tensor) -> None:
        order = self.host_tier.order
        order.begin()
        order.write(super()._load_rows, copies, indices)

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
        ghosts = sum(one.nbytes for one in self.rebalancers)
        return ghosts + self.plan_buffers.nbytes
