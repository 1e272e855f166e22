"""Deliberate corruptions, installed in an engine's process: tests must notice each."""

import torch


def _wrap_attention(corrupt) -> None:
    import sglang_ess.cpu.attention_backend as backend

    attend = backend.sparse_mla

    def faulty(q_nope, q_rope, rows, slots, scale):
        return attend(q_nope, q_rope, rows, corrupt(slots), scale)

    backend.sparse_mla = faulty


def _replace_one(slots, replacement) -> torch.Tensor:
    """Of each query's valid slots, the middle one replaced."""
    middle = (slots >= 0).sum(1, keepdim=True) // 2
    return slots.scatter(1, middle.long(), replacement(slots.gather(1, middle.long())))


def swap_neighbour() -> None:
    """Every query reads one selected row's neighbour in its place."""
    _wrap_attention(lambda slots: _replace_one(slots, lambda slot: slot ^ 1))


def read_foreign_row() -> None:
    """Every query reads one row of the query half a batch away: another request's, mostly."""
    _wrap_attention(
        lambda slots: _replace_one(slots, lambda slot: slot.roll(slot.shape[0] // 2 + 1, 0))
    )


def shift_index_page() -> None:
    """The decode indexer scores each request's first page of keys twice, its second never."""
    import sglang_ess.cpu.indexer as indexer

    score = indexer.index_scores_paged

    def faulty(query, weights, pages, page_table, lengths):
        wrong = page_table.clone()
        wrong[:, 1] = wrong[:, 0]
        return score(query, weights, pages, wrong, lengths)

    indexer.index_scores_paged = faulty


def forget_last_key() -> None:
    """The newest index key of each pass is never stored."""
    from sglang_ess.cpu.pool import CpuDsaTokenToKVPool

    store = CpuDsaTokenToKVPool.store_index_k
    CpuDsaTokenToKVPool.store_index_k = lambda self, layer, loc, keys: store(
        self, layer, loc[:-1], keys[:-1]
    )
