"""Pooled index keys: one key stands for `pool` consecutive tokens (GLM-5.3-Flash's index_kpool).

The pool's key is a weighted mean of its tokens' keys; each dimension has weights of its own. A
query selects whole pools, and always sees the tokens after the last complete pool, the tail.
"""

import torch

from sglang_ess.cpu.ops.topk_select import topk_select


def pool_keys(keys: torch.Tensor, gates: torch.Tensor, ape: torch.Tensor) -> torch.Tensor:
    """Keys of complete pools: sum over a pool's tokens of softmax(gate + ape) * key.

    keys, gates [..., pool, 128]; ape [pool, 128], by the token's place in its pool
    Returns [..., 128] in keys' dtype; the arithmetic is float32.
    Source: SGLang's kpool_softmax_rotate_write_cache, transformers' get_pooled_states.
    """
    weights = torch.softmax(gates.float() + ape.float(), dim=-2)
    return (weights * keys.float()).sum(-2).to(keys.dtype)


def select_pooled(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    req_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    topk: int,
    pool: int,
) -> torch.Tensor:
    """Slots of each query's topk / pool best pools, and of its tail.

    scores [T, pools] float32, as topk_select takes them
    lengths [T] int32: positions that each query sees, in tokens
    req_rows [T] int64, req_to_token [requests, max context] int32; a pool's slots are consecutive
    Returns [T, topk + pool - 1] int32: the pools' slots in context order, then the tail's, then
    -1. SGLang puts the tail there, too, and leaves the pools' order open.
    """
    complete = lengths // pool
    longest = int(lengths.max()) if len(lengths) else 0
    rows, query_rows = torch.unique(req_rows, return_inverse=True)
    first_slots = req_to_token[rows, : max(longest, 1) : pool].contiguous()
    chosen = topk_select(scores, complete, query_rows, first_slots, topk // pool)
    out = torch.full((len(lengths), topk + pool - 1), -1, dtype=torch.int32)
    places = torch.arange(pool, dtype=torch.int32)
    slots = torch.where(chosen.unsqueeze(-1) >= 0, chosen.unsqueeze(-1) + places, -1)
    out[:, :topk] = slots.view(len(lengths), topk)
    if pool == 1:
        return out
    tail = places[:-1]
    positions = complete.unsqueeze(1) * pool + tail
    real = positions < lengths.unsqueeze(1)
    columns = (complete * pool).clamp_max(topk).unsqueeze(1) + tail
    safe = torch.where(real, positions, 0).long()
    values = torch.where(real, req_to_token[req_rows.unsqueeze(1), safe], -1)
    return out.scatter_(1, columns.long(), values.int())
