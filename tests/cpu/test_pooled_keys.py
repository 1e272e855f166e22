"""Pooled index keys against SGLang's Triton kernels in Triton's interpreter, and transformers."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextIndexer

from sglang_ess.cpu.indexer import rotate
from sglang_ess.cpu.ops.pooled_keys import pool_keys, select_pooled
from sglang_ess.cpu.ops.rows import load_index_keys, store_index_keys
from sglang_ess.layout import index_page_bytes

POOL = 4


def test_keys_equal_transformers():
    keys, gates, ape = torch.randn(40, 128), torch.randn(40, 128), torch.randn(POOL, 128)
    indexer = SimpleNamespace(head_dim=128, index_kpool=POOL, index_kpool_compress_ape=ape)
    packed = torch.cat([keys, gates, torch.ones(40, 1)], 1)[None]
    expected, places, _ = Glm5NextTextIndexer.get_pooled_states(indexer, packed)
    assert torch.equal(places[0], torch.arange(40).view(-1, POOL))
    ours = pool_keys(keys.view(-1, POOL, 128), gates.view(-1, POOL, 128), ape)
    torch.testing.assert_close(ours, expected[0])


def test_stored_keys_equal_sglang():
    """fp8 pages. Triton's interpreter rounds some e4m3 otherwise: see test_rows."""
    from sglang.srt.layers.attention.dsa import kpool_fp8_index as theirs

    g = torch.Generator().manual_seed(0)
    keys = torch.randn(70, POOL, 128, generator=g).bfloat16()
    gates = torch.randn(70, POOL, 128, generator=g).bfloat16()
    ape, slots = torch.randn(POOL, 128, generator=g), torch.randperm(192, generator=g)[:70]
    pages = [torch.zeros(3, index_page_bytes(fp32=False), dtype=torch.uint8) for _ in range(2)]
    theirs.kpool_softmax_rotate_write_cache(
        SimpleNamespace(index_page_size=64, index_head_dim=128),
        pages[0], keys, gates, ape, slots, round_scale=True,
    )  # fmt: skip
    store_index_keys(pages[1], slots, rotate(pool_keys(keys, gates, ape)), power_of_two=True)
    one, other = (load_index_keys(page, slots) for page in pages)
    step = torch.maximum(one.abs(), other.abs()) / 8
    assert ((one - other).abs() <= step).float().mean() > 0.93
    untouched = torch.tensor(sorted(set(range(192)) - set(slots.tolist())))
    assert not load_index_keys(pages[1], untouched).any()


def tokens_of(requests, context, seed=0):
    """A table of slots in pages of 64 * POOL, shuffled."""
    page = 64 * POOL
    pages = torch.randperm(requests * (context // page), generator=torch.Generator().manual_seed(0))
    slots = pages.view(requests, -1, 1) * page + torch.arange(page)
    return slots.view(requests, context).int()


@pytest.mark.parametrize("topk", [16, 64])
def test_selection_equals_sglang(topk):
    """Whole pools first, then the tail, then -1: as SGLang's torch expansion and Triton tail."""
    from sglang.srt.layers.attention.dsa import kpool_fp8_index as theirs

    table = tokens_of(3, 512)
    lengths = torch.tensor([1, 3, 4, 15, 16, 17, 63, 66, 67, 300, 509, 512], dtype=torch.int32)
    rows = torch.arange(len(lengths)) % 3
    scores = torch.randn(len(lengths), 128, generator=torch.Generator().manual_seed(1))
    ours = select_pooled(scores, lengths, rows, table, topk, POOL)
    complete, budget = lengths // POOL, topk // POOL
    masked = scores.masked_fill(torch.arange(128) >= complete[:, None], -torch.inf)
    groups = masked.topk(budget).indices.sort().values
    valid = groups < complete[:, None]
    order = (~valid).int().sort(stable=True).indices  # SGLang counts valid groups from the left
    groups, valid = groups.gather(1, order), valid.gather(1, order)
    whole = theirs.expand_pooled_groups_to_topk(groups, valid, topk, POOL, table[rows])
    expected = theirs.append_kpool_tail_to_topk(whole, lengths, complete, POOL, table[rows])
    assert ours.shape == (len(lengths), topk + POOL - 1)
    assert torch.equal(ours, expected)
