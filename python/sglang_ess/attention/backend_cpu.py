"""The CPU platform's attention backend over two tiers of latent rows."""

import logging

import numpy as np
import torch

from sglang_ess.attention.passes import Canary, EarlyFetch, GroupStep, attend_passes
from sglang_ess.config import EssConfig
from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend, attend_all
from sglang_ess.layout import PLAN_QUERIES_CPU
from sglang_ess.tiers.shared_fetch import SharedFetch
from sglang_ess.tiers.warmup_window import warm_spans

logger = logging.getLogger(__name__)


class CpuTwoTierBackend(CpuSparseMlaBackend):
    """Decode reads hot rows, prefill reads staged ones, in the order in which one tier has them."""

    def __init__(self, model_runner):
        pool = model_runner.token_to_kv_pool
        super().__init__(model_runner, pool.topk_observers, pool.groups)
        config = EssConfig.from_env()
        self._warms, self._canary = config.warmup == "on", Canary(config.canary_rate)
        self._warm_spans: list[tuple[int, int]] = []
        self._fetches = EarlyFetch()
        if config.fetch_share == "on":
            sharing = SharedFetch.over_gloo(pool.host_tier.group)
            logger.info(
                "ESS: %d ranks fetch a share of the missed rows each (--ess-fetch-share).",
                sharing.size,
            )
            for cache in pool.hot_caches:
                cache.sharing = sharing
        self._step: GroupStep | None = None  # of the index group under way
        pool.request_misses = np.zeros(len(self.req_to_token), np.int64)

    def init_forward_metadata(self, forward_batch) -> None:
        super().init_forward_metadata(forward_batch)
        self._fetches.drop()
        spans = self.forward_metadata.spans
        if spans is None:
            if len(self.forward_metadata.lengths):  # an idle rank decodes nothing
                self.token_to_kv_pool.before_decode_step()
            self.token_to_kv_pool.host_tier.order.begin()
            return
        self.token_to_kv_pool.staging.begin(spans, self.req_to_token)
        self.token_to_kv_pool.host_tier.order.begin()
        # Decode does not want the rows that a chunk in the middle of a prompt selects.
        if self._warms and forward_batch.contains_last_prefill_chunk:
            self._warm_spans = warm_spans([tokens for _, _, tokens in spans])
        else:
            self._warm_spans = []

    def _write(self, layer, loc, k, k_rope) -> None:
        pool, decodes = self.token_to_kv_pool, self.forward_metadata.spans is None
        (pool.write_step if decodes else pool.write_prompt)(layer, loc, k, k_rope)

    def _attend(self, layer, q, q_rope, topk) -> torch.Tensor:
        if self.forward_metadata.spans is None:
            return self._attend_hot(layer, q, q_rope, topk)
        return self._attend_staged(layer, q, q_rope, topk)

    def _attend_staged(self, layer, q, q_rope, topk) -> torch.Tensor:
        """Prefill: attend through the staging buffers, then warm the hot tier.

        An index group is warmed when its last layer has written the rows of the new tokens.
        """
        pool, outs = self.token_to_kv_pool, []
        for i, group in enumerate(pool.staging.groups):
            rows = pool.staging.rows(layer.layer_id - pool.start_layer, i)
            places = pool.staging.places_of(i, topk[group.queries])
            outs.append(attend_all(layer, q[group.queries], q_rope[group.queries], rows, places))
        index_group, position = pool.place(layer.layer_id)
        if position == pool.groups.sizes[index_group] - 1:
            for first, end in self._warm_spans:
                pool.warm(index_group, topk[first:end])
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_hot(self, layer, q, q_rope, topk) -> torch.Tensor:
        """Decode: attend from the hot tier, in blocks of whole requests that one plan may have."""
        pool, outs = self.token_to_kv_pool, []
        group, position = pool.place(layer.layer_id)
        cache, width = pool.hot_caches[group], self.forward_metadata.width
        block_size = max(1, PLAN_QUERIES_CPU // width) * width
        blocks = [slice(first, first + block_size) for first in range(0, len(q), block_size)]
        if position == 0:
            lists = [topk[block] for block in blocks]  # Tensor.split takes several times as long
            self._step = GroupStep(cache, lists, self._fetches, self._canary)
        step = self._step
        assert step is not None and step.cache is cache, "a group's first layer begins its step"
        for i, block in enumerate(blocks):
            plans = step.passes(i, position, layer.layer_id)
            rows = cache.arena.layers[position]
            outs.append(attend_passes(plans, rows, layer, q[block], q_rope[block]))
            if position == 0 and cache.query_misses.any():
                requests = self.forward_metadata.req_rows[block][::width].numpy()
                misses = cache.query_misses.reshape(-1, width).sum(1)
                pool.request_misses[requests] += misses * cache.num_layers
        return outs[0] if len(outs) == 1 else torch.cat(outs)
