"""The indexer with pooled keys on the CPU (SGLang's IndexerKPool): GLM-5.3-Flash.

Tokens of a pool that is not complete wait in the DSA pool's tail buffers, by request and position.
"""

import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool
from sglang.srt.state_capturer.indexer_topk import maybe_capture_indexer_topk

from sglang_ess.cpu.dsa_pool import leaf_of
from sglang_ess.cpu.indexer import PREFILL_PRODUCTS, rotate
from sglang_ess.cpu.ops.index_scores import (
    gather_context_keys,
    index_scores_dense,
    index_scores_paged,
)
from sglang_ess.cpu.ops.pooled_keys import pool_keys, select_pooled
from sglang_ess.cpu.ops.rows import quantize_index
from sglang_ess.layout import PAGE_SLOTS, index_page_bytes


def kpool_indexer_forward(
    indexer, x, q_lora, positions, forward_batch, layer_id, return_indices=True
) -> torch.Tensor | None:
    """The forward of SGLang's IndexerKPool on this platform.

    x [T, hidden], q_lora [T, q_lora_rank], positions [T]
    Effect: the keys of pools that this pass completes are stored, those of open pools kept.
    Returns [T, index_topk + index_kpool - 1] int32 slots, -1 pads; None if return_indices is
    False.
    """
    pool, layer = leaf_of(get_token_to_kv_pool(), layer_id)
    metadata = get_attn_backend().get_indexer_metadata(layer_id, forward_batch)
    key = indexer.k_norm(indexer.wk(x)[0])
    gate = F.linear(x, indexer.index_kpool_compress_gate.to(x.dtype))
    store = _store_decode if metadata.spans is None else _store_extend
    store(indexer, pool, layer, metadata, key, gate)
    if not return_indices:
        return None
    query = indexer.wq_b(q_lora)[0].view(-1, indexer.n_heads, indexer.head_dim)
    gates = F.linear(x.float(), indexer.weights_proj.weight.float())
    weights = gates * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    pages = pool.get_index_k_with_scale_buffer(layer)
    if _exact(pages):
        query = query.float()
    else:
        quantised, scale = quantize_index(rotate(query), power_of_two=True)
        query, weights = quantised.float(), weights * scale
    select = _decode_slots if metadata.spans is None else _prefill_slots
    slots = select(indexer, pages, metadata, query, weights)
    return maybe_capture_indexer_topk(layer_id, slots)


def _exact(pages: torch.Tensor) -> bool:
    return pages.shape[1] == index_page_bytes(fp32=True)


def _store(pool, layer, slots, pooled) -> None:
    """Store the keys of complete pools: pooled [N, 128], slots [N] of each pool's tokens."""
    if not _exact(pool.get_index_k_with_scale_buffer(layer)):
        pooled = rotate(pooled)
    pool.store_index_k(layer, slots, pooled)


def _store_extend(indexer, pool, layer, metadata, key, gate) -> None:
    size, (tail_k, tail_gate) = indexer.index_kpool, pool.get_compress_tail_buffers(layer)
    width, start = tail_k.shape[1], 0
    for row, prefix, tokens in metadata.spans:
        base = prefix // size * size
        waiting = torch.arange(base, prefix) % width
        own = slice(start, start + tokens)
        keys = torch.cat([tail_k[row, waiting].to(key.dtype), key[own]])
        gates = torch.cat([tail_gate[row, waiting].to(gate.dtype), gate[own]])
        full = len(keys) // size * size
        pooled = pool_keys(
            keys[:full].unflatten(0, (-1, size)), gates[:full].unflatten(0, (-1, size)),
            indexer.index_kpool_compress_ape,
        )  # fmt: skip
        slots = metadata.req_to_token[row, base : base + full : size].long()
        _store(pool, layer, slots, pooled)
        rest = torch.arange(base + full, prefix + tokens) % width
        tail_k[row, rest] = keys[full:].to(tail_k.dtype)
        tail_gate[row, rest] = gates[full:].to(tail_gate.dtype)
        start += tokens


def _store_decode(indexer, pool, layer, metadata, key, gate) -> None:
    size, (tail_k, tail_gate) = indexer.index_kpool, pool.get_compress_tail_buffers(layer)
    width, rows, at = tail_k.shape[1], metadata.req_rows, metadata.lengths.long() - 1
    tail_k[rows, at % width] = key.to(tail_k.dtype)
    tail_gate[rows, at % width] = gate.to(tail_gate.dtype)
    closes = (at + 1) % size == 0
    rows, at = rows[closes], at[closes]
    if not len(rows):
        return
    members = (at.unsqueeze(1) - size + 1 + torch.arange(size)) % width
    picked = rows.unsqueeze(1), members
    pooled = pool_keys(
        tail_k[picked].to(key.dtype), tail_gate[picked].to(gate.dtype),
        indexer.index_kpool_compress_ape,
    )  # fmt: skip
    _store(pool, layer, metadata.req_to_token[rows, at].long(), pooled)


def _prefill_slots(indexer, pages, metadata, query, weights) -> torch.Tensor:
    """Slots of a prefill batch, request by request in blocks of queries."""
    size, topk = indexer.index_kpool, indexer.index_topk
    out = torch.empty(query.shape[0], indexer.topk_output_width, dtype=torch.int32)
    start = 0
    for row, prefix, tokens in metadata.spans:
        pools = (prefix + tokens) // size
        keys = query.new_empty(0, query.shape[2])
        if pools > topk // size:
            slots = metadata.req_to_token[row, : pools * size : size]
            keys = gather_context_keys(pages, slots // size)
        block = max(1, PREFILL_PRODUCTS // (query.shape[1] * max(pools, 1)))
        for first in range(start, start + tokens, block):
            last = min(first + block, start + tokens)
            seen = (prefix + last - start) // size
            scores = query.new_empty(last - first, 0)
            if seen > topk // size:
                scores = index_scores_dense(query[first:last], weights[first:last], keys[:seen])
            out[first:last] = select_pooled(
                scores, metadata.lengths[first:last], metadata.req_rows[first:last],
                metadata.req_to_token, topk, size,
            )  # fmt: skip
        start += tokens
    return out


def _decode_slots(indexer, pages, metadata, query, weights) -> torch.Tensor:
    """Slots of a decode batch; no Python loop over requests."""
    size, topk = indexer.index_kpool, indexer.index_topk
    scores = query.new_empty(query.shape[0], 0)
    if metadata.max_length // size > topk // size:
        page = PAGE_SLOTS * size  # tokens whose pooled keys fill a page
        table = metadata.req_to_token[metadata.req_rows, : metadata.max_length : page] // page
        complete = metadata.lengths // size
        scores = index_scores_paged(query, weights, pages, table.contiguous(), complete)
    return select_pooled(
        scores, metadata.lengths, metadata.req_rows, metadata.req_to_token, topk, size
    )
