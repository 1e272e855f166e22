"""Deliberate corruptions of a running engine: tests must notice each.

install() puts all of them in an engine's process, asleep; EngineProcess.switched(fault=name)
wakes one.
"""

import torch

from tests.support import switches


def install() -> None:
    _attention()
    _index_keys()
    _rows()
    _experts()
    _rounding()


def _is(fault) -> bool:
    return switches.value("fault") == fault


def _attention() -> None:
    """swap_neighbour: every query reads one selected row's neighbour in its place.

    read_foreign_row: one row of the query half a batch away, another request's mostly.
    no_sink: attention sinks take no share.
    """
    import sglang_ess.cpu.attention_backend as backend

    attend, apply_sink = backend.sparse_mla, backend.apply_sink

    def faulty(q_nope, q_rope, rows, slots, scale):
        if _is("swap_neighbour"):
            slots = _replace_one(slots, lambda slot: slot ^ 1)
        if _is("read_foreign_row"):
            slots = _replace_one(slots, lambda slot: slot.roll(slot.shape[0] // 2 + 1, 0))
        return attend(q_nope, q_rope, rows, slots, scale)

    def faulty_sink(out, lse, sink):
        return out if _is("no_sink") else apply_sink(out, lse, sink)

    backend.sparse_mla, backend.apply_sink = faulty, faulty_sink


def _replace_one(slots, replacement) -> torch.Tensor:
    """Of each query's valid slots, the middle one replaced."""
    middle = (slots >= 0).sum(1, keepdim=True) // 2
    return slots.scatter(1, middle.long(), replacement(slots.gather(1, middle.long())))


def _index_keys() -> None:
    """shift_index_page: decode scores a request's first page of keys twice, its second never.

    forget_last_key: the newest index key of each pass is never stored.
    """
    import sglang_ess.cpu.indexer as indexer
    import sglang_ess.cpu.kpool_indexer as kpool_indexer
    from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool

    score, store = indexer.index_scores_paged, CpuDsaTokenToKVPool.store_index_k

    def faulty_score(query, weights, pages, page_table, lengths):
        if _is("shift_index_page"):
            page_table = page_table.clone()
            page_table[:, 1] = page_table[:, 0]
        return score(query, weights, pages, page_table, lengths)

    def faulty_store(pool, layer, loc, keys):
        if _is("forget_last_key"):
            loc, keys = loc[:-1], keys[:-1]
        return store(pool, layer, loc, keys)

    indexer.index_scores_paged = kpool_indexer.index_scores_paged = faulty_score
    CpuDsaTokenToKVPool.store_index_k = faulty_store


def install_linear() -> None:
    """Of models with linear attention layers and pooled index keys.

    stale_state: a decode step's states are not kept. late_gate: each token of a pool weighs as
    the one before it.
    """
    import sglang_ess.cpu.kda_backend as linear
    import sglang_ess.cpu.kpool_indexer as kpool_indexer

    attend, pool = linear.kda, kpool_indexer.pool_keys

    def faulty_attend(q, k, v, decay, beta, states, sequences):
        decodes = len(q) == len(sequences[1])
        kept = states.clone() if decodes and _is("stale_state") else states
        return attend(q, k, v, decay, beta, kept, sequences)

    def faulty_pool(keys, gates, ape):
        return pool(keys, gates.roll(1, -2) if _is("late_gate") else gates, ape)

    linear.kda, kpool_indexer.pool_keys = faulty_attend, faulty_pool


def _rows() -> None:
    """cut_rows: latents lose a tenth before they are rounded; e4m3 may take a 16th."""
    from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool

    write = CpuDsaTokenToKVPool._write_mla_kv_buffer

    def faulty(pool, buffer, loc, latent, rope):
        return write(pool, buffer, loc, latent * 0.9 if _is("cut_rows") else latent, rope)

    CpuDsaTokenToKVPool._write_mla_kv_buffer = faulty


def _experts() -> None:
    """next_expert: every expert of a token is the one after the router's."""
    import sglang.srt.layers.moe.topk as moe

    select = moe.select_experts

    def faulty(hidden_states, router_logits, *args, **kwargs):
        output = select(hidden_states, router_logits, *args, **kwargs)
        if _is("next_expert"):
            output.topk_ids.add_(1).remainder_(router_logits.shape[1])
        return output

    moe.select_experts = faulty


def _rounding() -> None:
    """round_otherwise: no fault but another machine, whose every product of matrices is the
    float32 number above or below ours, by chance, before it is rounded to the model's dtype.
    """
    linear, bmm = torch.nn.functional.linear, torch.bmm

    def rounded(product, dtype):
        sign = torch.randint(0, 2, product.shape).mul_(2).sub_(1)
        return (product * (1 + 2**-23 * sign)).to(dtype)

    def other_linear(x, weight, bias=None):
        if not _is("round_otherwise"):
            return linear(x, weight, bias)
        bias = bias if bias is None else bias.float()
        return rounded(linear(x.float(), weight.float(), bias), x.dtype)

    def other_bmm(a, b, **kwargs):
        if kwargs or not _is("round_otherwise"):
            return bmm(a, b, **kwargs)
        return rounded(bmm(a.float(), b.float()), a.dtype)

    torch.nn.functional.linear, torch.bmm = other_linear, other_bmm
