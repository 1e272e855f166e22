"""The DSA indexer on the CPU: stores index keys, scores the context, selects the top-k slots."""

from functools import cache

import torch
import torch.nn.functional as F
from sglang.srt.model_executor.forward_context import (
    get_attn_backend,
    get_token_to_kv_pool,
)
from sglang.srt.state_capturer.indexer_topk import maybe_capture_indexer_topk

from sglang_ess.cpu.attention_backend import own_tokens
from sglang_ess.cpu.ops.index_scores import (
    gather_context_keys,
    index_scores_dense,
    index_scores_paged,
)
from sglang_ess.cpu.ops.rows import quantize_index
from sglang_ess.cpu.ops.runner_ups import runner_ups
from sglang_ess.cpu.ops.topk_select import topk_select
from sglang_ess.layout import INDEX_DIM, index_page_bytes

# Floats of intermediate products in prefill: 16 MiB, which fit into the L3 cache of a server CPU.
PREFILL_PRODUCTS = 4 << 20


@cache
def _hadamard() -> torch.Tensor:
    """Orthonormal 128 x 128 Hadamard matrix (Sylvester), float32."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < INDEX_DIM:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * INDEX_DIM**-0.5


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Spread outliers before quantising, as SGLang's rotate_activation does. Same dtype out."""
    return (x.float() @ _hadamard()).to(x.dtype)


def _project(indexer, x, q_lora, positions):
    """Query [T, H, 128] and key [T, 128] after norm and rope, in the model's dtype."""
    query = indexer.wq_b(q_lora)[0].view(-1, indexer.n_heads, indexer.head_dim)
    key = indexer.k_norm(indexer.wk(x)[0])
    rope = indexer.rope_head_dim
    q_rope, k_rope = indexer.rotary_emb(positions, query[..., :rope], key[..., :rope].unsqueeze(1))
    # SGLang's torch-native yarn rope adds a leading dimension of 1 to half-split results.
    query = torch.cat([q_rope.view(-1, indexer.n_heads, rope), query[..., rope:]], dim=-1)
    key = torch.cat([k_rope.view(-1, rope), key[..., rope:]], dim=-1)
    return query, key


def _prefill_slots(layer_id, metadata, query, weights, topk) -> torch.Tensor:
    """Top-k slots [T, topk] of a prefill batch, request by request in blocks of queries."""
    pages = get_token_to_kv_pool().get_index_k_with_scale_buffer(layer_id)
    out = torch.empty(query.shape[0], topk, dtype=torch.int32)
    start = 0
    for row, prefix, tokens in metadata.spans:
        total = prefix + tokens
        slots = metadata.req_to_token[row, :total]
        keys = gather_context_keys(pages, slots) if total > topk else query.new_empty(0, INDEX_DIM)
        block = max(1, PREFILL_PRODUCTS // (query.shape[1] * total))
        for first in range(start, start + tokens, block):
            last = min(first + block, start + tokens)
            seen = prefix + last - start
            scores = query.new_empty(last - first, 0)
            if seen > topk:
                scores = index_scores_dense(query[first:last], weights[first:last], keys[:seen])
            out[first:last] = topk_select(
                scores,
                metadata.lengths[first:last],
                metadata.req_rows[first:last],
                metadata.req_to_token,
                topk,
            )
        start += tokens
    return out


def decode_slots(layer_id, metadata, query, weights, topk) -> torch.Tensor:
    """Top-k slots of a decode batch [B, topk]; no Python loop over requests.

    Public, because a hook may wrap it (ess_patches.topk_stream).
    Effect: observers that want the scores of the lists get them (--ess-trace-scores).
    """
    pool = get_token_to_kv_pool()
    observers = [one for one in getattr(pool, "topk_observers", ()) if one.runner_ups is not None]
    scores = query.new_empty(query.shape[0], 0)
    if metadata.max_length > topk or observers:
        pages = pool.get_index_k_with_scale_buffer(layer_id)
        scores = index_scores_paged(query, weights, pages, metadata.page_table, metadata.lengths)
    queries = metadata.lengths, metadata.req_rows, metadata.req_to_token
    slots = topk_select(scores, *queries, topk)
    for observer in observers:
        group, _ = pool.place(layer_id)
        scored = runner_ups(scores, *queries, slots, observer.runner_ups)
        observer.decode_scores(group, slots, *scored)
    return slots


def indexer_forward(
    indexer, x, q_lora, positions, forward_batch, layer_id, return_indices=True
) -> torch.Tensor | None:
    """The forward of SGLang's Indexer on this platform; upstream's forward_native raises.

    x [T, hidden], q_lora [T, q_lora_rank], positions [T]
    Effect: the T new index keys are stored in the pool.
    Returns [T, index_topk] int32 slots, -1 pads; None if return_indices is False. Tokens that pad
    the batch, the last ones, store nothing and select nothing.
    Source: DeepSeek-V3.2-Exp's indexer; quantisation as SGLang does it on CUDA.
    """
    pool = get_token_to_kv_pool()
    metadata = get_attn_backend().get_indexer_metadata(layer_id, forward_batch)
    pages = pool.get_index_k_with_scale_buffer(layer_id)
    tokens, padded, loc = own_tokens(forward_batch, metadata), len(x), forward_batch.out_cache_loc
    if tokens == 0:  # an idle rank's
        none = torch.full((padded, indexer.index_topk), -1, dtype=torch.int32)
        return none if return_indices else None
    x, q_lora, positions, loc = x[:tokens], q_lora[:tokens], positions[:tokens], loc[:tokens]
    query, key = _project(indexer, x, q_lora, positions)
    # In float32, as torch.mm(out_dtype=float32) on CUDA. The weight is bf16 in every model.
    gates = F.linear(x.float(), indexer.weights_proj.weight.float())
    weights = gates * (indexer.n_heads**-0.5 * indexer.softmax_scale)
    if pages.shape[1] == index_page_bytes(fp32=True):
        query = query.float()
    else:
        key = rotate(key)
        quantised, scale = quantize_index(rotate(query), power_of_two=True)
        query, weights = quantised.float(), weights * scale
    pool.store_index_k(layer_id, loc, key)
    if not return_indices:
        return None
    select = _prefill_slots if metadata.page_table is None else decode_slots
    slots = select(layer_id, metadata, query, weights, indexer.index_topk)
    if tokens < padded:
        slots = F.pad(slots, (0, 0, 0, padded - tokens), value=-1)
    return maybe_capture_indexer_topk(layer_id, slots)
