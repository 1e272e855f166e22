"""The CPU platform's attention backend over two tiers of latent rows."""

from functools import partial

import numpy as np
import torch

from sglang_ess.attention.passes import attend_hot
from sglang_ess.config import EssConfig
from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend, attend_rows
from sglang_ess.layout import PLAN_QUERIES_CPU
from sglang_ess.mem_cache.pool import IDLE_STEPS
from sglang_ess.tiers.contract import CANARY_ROWS
from sglang_ess.tiers.warmup_window import warm_spans


class CpuTwoTierBackend(CpuSparseMlaBackend):
    """Decode reads hot rows, prefill reads staged ones; each query's rows in one-tier's order."""

    def __init__(self, model_runner):
        super().__init__(model_runner)
        config = EssConfig.from_env()
        self._warms, self._canary_rate = config.warmup == "on", config.canary_rate
        self._random = np.random.default_rng(0)
        self._warm_spans: list[tuple[int, int]] = []
        pool = self.token_to_kv_pool
        pool.request_misses = np.zeros(len(self.req_to_token), np.int64)
        # Of --ess-trace; each layer's HotCache has it.
        self._recorder = getattr(pool.hot_caches[0], "recorder", None)

    def init_forward_metadata(self, forward_batch) -> None:
        super().init_forward_metadata(forward_batch)
        spans = self.forward_metadata.spans
        if self._recorder is not None:
            self._begin_step(forward_batch.rids)
        if spans is None:
            self.token_to_kv_pool.before_decode_step()
            return
        self.token_to_kv_pool.staging.begin(spans, self.req_to_token)
        # The rows that a chunk in the middle of a prompt selects are not what decode wants.
        if self._warms and forward_batch.contains_last_prefill_chunk:
            self._warm_spans = warm_spans([tokens for _, _, tokens in spans])
        else:
            self._warm_spans = []

    def _write(self, layer, loc, k, k_rope) -> None:
        min_age = 0 if self.forward_metadata.spans is None else IDLE_STEPS
        self.token_to_kv_pool.write(layer, loc, k, k_rope, min_age)

    def _attend(self, layer, forward_batch, q, q_rope, topk) -> torch.Tensor:
        if self.forward_metadata.spans is None:
            return self._attend_hot(layer, forward_batch, q, q_rope, topk)
        return self._attend_staged(layer, q, q_rope, topk)

    def _attend_staged(self, layer, q, q_rope, topk) -> torch.Tensor:
        """Prefill: through the staging buffers; then warm-up."""
        pool, outs = self.token_to_kv_pool, []
        for i, group in enumerate(pool.staging.groups):
            rows = pool.staging.rows(layer.layer_id - pool.start_layer, i)
            places = pool.staging.places_of(i, topk[group.queries])
            part = attend_rows(layer, q[group.queries], q_rope[group.queries], rows, places)
            outs.append(part[0])
        for first, end in self._warm_spans:
            pool.hot_cache(layer.layer_id).warm(topk[first:end])
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_hot(self, layer, forward_batch, q, q_rope, topk) -> torch.Tensor:
        """Decode: from the hot tier."""
        pool, cache = self.token_to_kv_pool, self.token_to_kv_pool.hot_cache(layer.layer_id)
        pool.sample.take(layer.layer_id - pool.start_layer, topk)
        check = partial(self._check, cache, layer.layer_id)
        outs = []
        for first in range(0, len(q), PLAN_QUERIES_CPU):
            block = slice(first, first + PLAN_QUERIES_CPU)

            def attend(queries, rows, dtype, q=q[block], q_rope=q_rope[block]):
                parts = (part[queries].to(dtype) for part in (q, q_rope))
                return attend_rows(layer, *parts, cache.rows, rows)

            outs.append(attend_hot(cache, topk[block], attend, check, q.dtype, first > 0))
            if cache.query_misses.any():
                requests = self.forward_metadata.req_rows[block].numpy()
                pool.request_misses[requests] += cache.query_misses
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _begin_step(self, rids) -> None:
        """Tell the trace whose queries the next plans are of: a decode step's."""
        metadata = self.forward_metadata
        if metadata.spans is not None:
            self._recorder.end_step()
            return
        self._recorder.begin_step(
            rids,
            metadata.req_rows.numpy(),
            metadata.lengths.numpy(),
            metadata.req_to_token.numpy(),
        )

    def _check(self, cache, layer_id, plan) -> None:
        """The canary: now and then compare rows that are about to be read (invariant 2)."""
        if self._canary_rate and self._random.random() < self._canary_rate:
            rows = plan.rows.numpy()
            rows = rows[rows >= 0]
            if len(rows):
                picks = self._random.choice(rows, CANARY_ROWS).astype(np.int64)
                cache.check_rows(picks, f"layer {layer_id}")
