"""Index scores against float64, top-k selection against a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.cpu.ops import rows
from sglang_ess.cpu.ops.index_scores import (
    gather_context_keys,
    index_scores_dense,
    index_scores_paged,
    index_scores_reference,
)
from sglang_ess.cpu.ops.topk_select import topk_select, topk_select_reference
from sglang_ess.layout import PAGE_SLOTS, index_page_bytes


def paged_context(lengths, fp32, seed=0):
    """(pages, page table, keys of each request): every request on pages of its own."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // PAGE_SLOTS) for n in lengths]
    order = torch.randperm(sum(counts) + 5, generator=g)
    pages = torch.zeros(sum(counts) + 5, index_page_bytes(fp32), dtype=torch.uint8)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    taken, contexts = 0, []
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = order[taken : taken + count]
        taken += count
        table[i, :count] = own
        slots = (own.unsqueeze(1) * PAGE_SLOTS + torch.arange(PAGE_SLOTS)).flatten()[:length]
        rows.store_index_keys(pages, slots, torch.randn(length, 128, generator=g))
        contexts.append(gather_context_keys(pages, slots))
    return pages, table, contexts


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("heads", [1, 6, 8, 64])
def test_paged_scores_match_float64(heads, fp32):
    lengths = [1, 63, 64, 65, 200, 517]
    pages, table, contexts = paged_context(lengths, fp32)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(len(lengths), heads, 128, generator=g)
    weights = torch.randn(len(lengths), heads, generator=g)
    scores = index_scores_paged(q, weights, pages, table, torch.tensor(lengths).int())
    for i, (length, keys) in enumerate(zip(lengths, contexts, strict=True)):
        expected = index_scores_reference(q[i : i + 1], weights[i : i + 1], keys)[0]
        # 128 products a head in float32: 2**-24 x sqrt(128) x the size of the sum.
        bound = 1e-6 * (q[i].norm() * keys.norm(dim=1).max() * weights[i].abs().sum())
        assert (scores[i, :length] - expected).abs().max() <= bound
        dense = index_scores_dense(q[i : i + 1], weights[i : i + 1], keys)[0]
        assert (dense - expected).abs().max() <= bound


def test_scores_use_the_right_requests_pages():
    """Swapping two requests' page tables must change the scores."""
    pages, table, _ = paged_context([130, 130], fp32=True)
    q, weights = torch.randn(2, 4, 128), torch.rand(2, 4)
    lengths = torch.tensor([130, 130]).int()
    right = index_scores_paged(q, weights, pages, table, lengths)
    wrong = index_scores_paged(q, weights, pages, table.flip(0).contiguous(), lengths)
    assert not torch.allclose(right[:, :130], wrong[:, :130], atol=1e-2)


score_values = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, float("-inf"), float("inf"), 1e-42, -1e-42]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(score_values, min_size=1, max_size=90),
    st.integers(1, 40),
    st.integers(0, 2**31 - 1),
)
def test_topk_matches_a_stable_sort(values, k, seed):
    # -0.0 and 0.0 are equal to a sort and not to bits; the indexer adds to +0.0 first.
    scores = torch.tensor(values).unsqueeze(0) + 0.0
    length = torch.tensor([len(values)], dtype=torch.int32)
    g = torch.Generator().manual_seed(seed)
    table = torch.randperm(200, generator=g)[: len(values) + 3].int().unsqueeze(0)
    row = torch.tensor([0])
    got = topk_select(scores, length, row, table, k)
    assert torch.equal(got, topk_select_reference(scores, length, row, table, k))


def test_topk_of_a_batch_of_mixed_lengths_and_ties():
    g = torch.Generator().manual_seed(5)
    scores = torch.randint(0, 6, (64, 3000), generator=g).float()
    lengths = torch.randint(1, 3000, (64,), generator=g).int()
    req_rows = torch.randint(0, 8, (64,), generator=g)
    table = torch.randint(0, 1 << 30, (8, 3100), generator=g).int()
    got = topk_select(scores, lengths, req_rows, table, 128)
    assert torch.equal(got, topk_select_reference(scores, lengths, req_rows, table, 128))


def test_topk_without_scores_takes_the_whole_context():
    table = torch.arange(100, 140).int().unsqueeze(0)
    lengths = torch.tensor([1, 7, 8], dtype=torch.int32)
    got = topk_select(torch.empty(3, 0), lengths, torch.zeros(3, dtype=torch.long), table, 8)
    assert got[0].tolist() == [100] + [-1] * 7
    assert got[1].tolist() == [*range(100, 107), -1]
    assert got[2].tolist() == [*range(100, 108)]
