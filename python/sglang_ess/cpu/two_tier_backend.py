"""The CPU platform's attention backend over two tiers of latent rows."""

from functools import partial

import numpy as np
import torch

from sglang_ess.attention.passes import attend_hot
from sglang_ess.capacity import PLAN_QUERIES
from sglang_ess.config import EssConfig
from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend
from sglang_ess.cpu.ops.rows import LATENT_DIM, ROPE_DIM
from sglang_ess.cpu.ops.sparse_mla import sparse_mla
from sglang_ess.pool import IDLE_STEPS
from sglang_ess.tiers.trace import TraceWriter, slots_to_positions

WARMUP_QUERIES = 32  # ESS: "the last 32 windows of prefill" (papers.md 1.5)
CANARY_ROWS = 16


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
        self._trace = None
        if config.trace:
            topk = pool.capacity.geometry.topk
            self._trace = TraceWriter(
                config.trace, pool.layer_num, topk, meta={"page_slots": pool.page_size}
            )
            self._trace_scratch = np.zeros(pool.host_tier.num_slots, np.uint8)

    def init_forward_metadata(self, forward_batch) -> None:
        super().init_forward_metadata(forward_batch)
        spans = self.forward_metadata.spans
        if spans is None:
            return
        self.token_to_kv_pool.staging.begin(spans, self.req_to_token)
        # The rows that a chunk in the middle of a prompt selects are not what decode wants.
        if self._warms and forward_batch.contains_last_prefill_chunk:
            ends = np.cumsum([tokens for _, _, tokens in spans]).tolist()
            counts = [min(tokens, WARMUP_QUERIES) for _, _, tokens in spans]
            self._warm_spans = [(e - n, e) for e, n in zip(ends, counts, strict=True)]
        else:
            self._warm_spans = []

    def forward_extend(
        self,
        q,
        k,
        v,
        layer,
        forward_batch,
        save_kv_cache=True,
        q_rope=None,
        k_rope=None,
        topk_indices=None,
        **kwargs,
    ):
        """As CpuSparseMlaBackend.forward_extend, through the staging buffers."""
        pool, cache = self.token_to_kv_pool, self.token_to_kv_pool.hot_cache(layer.layer_id)
        self._write(layer, forward_batch, k, k_rope, save_kv_cache, IDLE_STEPS)
        q, q_rope = _by_head(layer, q, q_rope)
        staging, index = pool.staging, layer.layer_id - pool.start_layer
        outs = []
        for i, group in enumerate(staging.groups):
            rows, topk = staging.rows(index, i), staging.translate(i, topk_indices[group.queries])
            outs.append(
                sparse_mla(q[group.queries], q_rope[group.queries], rows, topk, layer.scaling)[0]
            )
        for first, end in self._warm_spans:
            cache.warm(topk_indices[first:end])
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.view(-1, out.shape[1] * LATENT_DIM)

    def forward_decode(
        self,
        q,
        k,
        v,
        layer,
        forward_batch,
        save_kv_cache=True,
        q_rope=None,
        k_rope=None,
        topk_indices=None,
        **kwargs,
    ):
        """As CpuSparseMlaBackend.forward_extend, from the hot tier."""
        pool, cache = self.token_to_kv_pool, self.token_to_kv_pool.hot_cache(layer.layer_id)
        self._write(layer, forward_batch, k, k_rope, save_kv_cache, 0)
        q, q_rope = _by_head(layer, q, q_rope)
        if self._trace is not None and self._trace.recording:
            self._record(layer.layer_id - pool.start_layer, forward_batch.rids, topk_indices)
        check = partial(self._check, cache, layer.layer_id)
        outs = []
        for first in range(0, len(q), PLAN_QUERIES):
            block = slice(first, first + PLAN_QUERIES)

            def attend(queries, rows, q=q[block], q_rope=q_rope[block]):
                return sparse_mla(q[queries], q_rope[queries], cache.rows, rows, layer.scaling)

            outs.append(attend_hot(cache, topk_indices[block], attend, check, first > 0))
            if cache.query_misses.any():
                requests = self.forward_metadata.req_rows[block].numpy()
                pool.request_misses[requests] += cache.query_misses
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.view(-1, out.shape[1] * LATENT_DIM)

    def _write(self, layer, forward_batch, k, k_rope, save_kv_cache, min_age) -> None:
        if save_kv_cache:
            loc = forward_batch.out_cache_loc
            self.token_to_kv_pool.write(layer, loc, k, k_rope, min_age)

    def _record(self, layer, rids, topk) -> None:
        """One decode step of one layer into the trace, slots as request positions."""
        metadata = self.forward_metadata
        lengths = metadata.lengths.numpy()
        positions = slots_to_positions(
            topk.numpy(),
            metadata.req_rows.numpy(),
            lengths,
            metadata.req_to_token.numpy(),
            self._trace_scratch,
        )
        self._trace.record(layer, rids, lengths, positions)

    def _check(self, cache, layer_id, plan) -> None:
        """The canary: now and then compare rows that are about to be read (invariant 2)."""
        if self._canary_rate and self._random.random() < self._canary_rate:
            rows = plan.rows.numpy()
            rows = rows[rows >= 0]
            if len(rows):
                picks = self._random.choice(rows, CANARY_ROWS).astype(np.int64)
                cache.check_rows(picks, f"layer {layer_id}")


def _by_head(layer, q, q_rope):
    heads = layer.tp_q_head_num
    return q.view(-1, heads, LATENT_DIM), q_rope.view(-1, heads, ROPE_DIM)
