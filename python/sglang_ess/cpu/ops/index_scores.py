"""Indexer scores: s[t, j] = sum_h w[t, h] * relu(q[t, h] . k[j]) over a query's context.

The lightning indexer of DeepSeek-V3.2. Every decode step scans all index keys of a context (132 B
each in fp8), so this part of attention grows with the context.
"""

import numpy as np
import torch
from numba import prange

from sglang_ess.cpu.ops._numba import e4m3_to_float, jit, parallel_jit
from sglang_ess.cpu.ops.rows import load_index_keys
from sglang_ess.layout import INDEX_DIM, PAGE_SLOTS, index_page_bytes

KEY_BYTES = PAGE_SLOTS * INDEX_DIM  # of an fp8 page; its scales follow
FP32_PAGE_BYTES = index_page_bytes(fp32=True)


@jit
def _key_scores(q, weights, key):
    """sum_h weights[h] * relu(q[h] . key), four heads abreast. q [H, 128], key [128]."""
    total = np.float32(0)
    num_heads, h = q.shape[0], 0
    while h + 4 <= num_heads:
        s0 = s1 = s2 = s3 = np.float32(0)
        q0, q1, q2, q3 = q[h], q[h + 1], q[h + 2], q[h + 3]
        for d in range(INDEX_DIM):
            s0 += q0[d] * key[d]
            s1 += q1[d] * key[d]
            s2 += q2[d] * key[d]
            s3 += q3[d] * key[d]
        zero = np.float32(0)
        total += weights[h] * max(s0, zero) + weights[h + 1] * max(s1, zero)
        total += weights[h + 2] * max(s2, zero) + weights[h + 3] * max(s3, zero)
        h += 4
    while h < num_heads:
        s0 = np.float32(0)
        q0 = q[h]
        for d in range(INDEX_DIM):
            s0 += q0[d] * key[d]
        total += weights[h] * max(s0, np.float32(0))
        h += 1
    return total


@jit
def _page_scores(q, weights, page, count, out):
    """out[:count] = scores of a page's first count keys; page [page bytes] uint8."""
    if page.shape[0] == FP32_PAGE_BYTES:
        keys = page.view(np.float32)
        for j in range(count):
            out[j] = _key_scores(q, weights, keys[j * INDEX_DIM : (j + 1) * INDEX_DIM])
        return
    scales = page[KEY_BYTES:].view(np.float32)
    key = np.empty(INDEX_DIM, np.float32)
    bits = key.view(np.uint32)
    for j in range(count):
        e4m3_to_float(page[j * INDEX_DIM : (j + 1) * INDEX_DIM], scales[j], bits, key, 0)
        out[j] = _key_scores(q, weights, key)


@parallel_jit
def _index_scores_kernel(q, weights, pages, page_table, lengths, out):
    num_queries, num_pages = page_table.shape
    # One work item a page: a single long request still uses every core.
    for item in prange(num_queries * num_pages):
        t, p = item // num_pages, item % num_pages
        start = p * PAGE_SLOTS
        count = min(PAGE_SLOTS, lengths[t] - start)
        if count > 0:
            _page_scores(
                q[t], weights[t], pages[page_table[t, p]], count, out[t, start : start + count]
            )


def index_scores_reference(q, weights, keys) -> torch.Tensor:
    """The scores in float64: q [T, H, 128], weights [T, H], keys [L, 128] of one context."""
    products = torch.einsum("thd,jd->thj", q.double(), keys.double()).relu()
    return torch.einsum("th,thj->tj", weights.double(), products)


def index_scores_paged(
    q: torch.Tensor,
    weights: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Decode: the scores of one query a request over the request's pages.

    q [B, H, 128] float32; weights [B, H] float32
    pages [num_pages, page bytes] uint8: 8448 B fp8 or 32768 B fp32
    page_table [B, P] int32, the pages of each request in order
    lengths [B] int32, valid keys of each request, at most P * 64
    Returns [B, P * 64] float32; columns at and past a request's length are unspecified.
    """
    scores = torch.empty(q.shape[0], page_table.shape[1] * PAGE_SLOTS)
    _index_scores_kernel(
        q.contiguous().numpy(),
        weights.contiguous().numpy(),
        pages.numpy(),
        page_table.numpy(),
        lengths.numpy(),
        scores.numpy(),
    )
    return scores


def index_scores_dense(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Prefill: the scores of a block of queries over one context's keys, by GEMM.

    q [T, H, 128], weights [T, H], keys [L, 128] (scale applied), all float32
    Returns [T, L] float32 without a causal mask. Needs T * H * L floats of memory meanwhile.
    """
    num_tokens, num_heads, _ = q.shape
    products = torch.mm(q.reshape(-1, INDEX_DIM), keys.T).relu_()
    products = products.view(num_tokens, num_heads, keys.shape[0])
    return torch.bmm(weights.unsqueeze(1), products).squeeze(1)


def gather_context_keys(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Index keys of one context's slots [L] -> [L, 128] float32, for index_scores_dense."""
    return load_index_keys(pages, slots.long())
