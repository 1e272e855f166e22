"""Compiles the CPU platform's numba kernels, or loads them, before the first request."""

import torch

from sglang_ess.cpu.ops import index_scores, runner_ups, sparse_mla, topk_select
from sglang_ess.layout import (
    FP8_ROW_BYTES,
    INDEX_DIM,
    LATENT_DIM,
    PAGE_SLOTS,
    ROPE_DIM,
    index_page_bytes,
)
from sglang_ess.tiers import HotCache, lru, rank_order, staging
from sglang_ess.tiers import row_words as rows

KERNELS = (
    sparse_mla._sparse_mla_kernel,
    index_scores._index_scores_kernel,
    topk_select._topk_select_kernel,
    runner_ups._runner_ups_kernel,
    staging._translate,
    rows._gather_words,
    rank_order.publish,
    rank_order.reached,
    *(getattr(lru, name) for name in lru.ENTRY_POINTS),
)


def warm_up() -> bool:
    """Call each kernel once, on one token, so that numba compiles it or loads it from its cache.

    Rows and pages are bytes, and their format is a run-time value. So one call covers every format.
    Returns whether numba compiled anything; False if its cache had every kernel.
    """
    one = torch.ones(1, dtype=torch.int32)
    slots = torch.zeros(1, 1, dtype=torch.int32)
    host_rows = torch.zeros(1, FP8_ROW_BYTES, dtype=torch.uint8)
    q_nope, q_rope = torch.zeros(1, 1, LATENT_DIM), torch.zeros(1, 1, ROPE_DIM)
    sparse_mla.sparse_mla(q_nope, q_rope, host_rows, slots, 1.0)
    pages = torch.zeros(1, index_page_bytes(fp32=False), dtype=torch.uint8)
    scores = index_scores.index_scores_paged(
        torch.zeros(1, 1, INDEX_DIM), torch.zeros(1, 1), pages, slots, one
    )
    requests = torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(1, PAGE_SLOTS, dtype=torch.int32)
    found = topk_select.topk_select(scores, one, requests, table, 1)
    runner_ups.runner_ups(scores, one, requests, table, found, 1)
    _warm_up_tiers(host_rows, slots)
    rank_order.warm_up()
    return any(kernel.stats.cache_misses for kernel in KERNELS)


def _warm_up_tiers(rows: torch.Tensor, topk: torch.Tensor) -> None:
    """rows: [1, row_bytes] uint8, a host tier of one slot; topk: [1, 1] int32, that slot."""
    cache, slots = HotCache(rows, 1), topk[0].long()
    cache.fetch(cache.plan(topk))
    cache.warm(topk)
    cache.install(slots, rows)
    cache.check_rows(slots.numpy(), "warm-up")
    cache.invalidate(slots)
    prefill = staging.Staging([rows], 1)
    prefill.begin([(0, 0, 1)], topk)
    prefill.rows(0, 0)
    prefill.places_of(0, topk)
