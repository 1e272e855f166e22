"""The slots that just missed the top-k, and the scores of all, against float64 and a plain sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.cpu.ops.index_scores import index_scores_paged
from sglang_ess.cpu.ops.runner_ups import runner_ups
from sglang_ess.cpu.ops.topk_select import topk_select
from tests.cpu.test_indexer_ops import paged_context, score_values


def by_a_sort(scores, length, tokens, topk, count):
    """(slots in context order, {slot: score}) by one stable sort of a query's scores."""
    k = len(topk)
    order = sorted(range(length), key=lambda j: (-scores[j], j))
    return [tokens[j] for j in sorted(order[k : k + count])], dict(
        zip(tokens, scores, strict=False)
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(score_values, min_size=1, max_size=90),
    st.integers(1, 30),
    st.integers(0, 40),
    st.integers(0, 2**31 - 1),
)
def test_runner_ups_match_a_stable_sort(values, k, count, seed):
    scores, length = torch.tensor(values).unsqueeze(0) + 0.0, len(values)
    table = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[None, :95].int()
    queries = torch.tensor([length]).int(), torch.zeros(1, dtype=torch.long), table
    topk = topk_select(scores, *queries, k)
    found, out = runner_ups(scores, *queries, topk, count)
    expected, known = by_a_sort(scores[0].tolist(), length, table[0].tolist(), topk[0], count)
    assert found[0].tolist() == expected + [-1] * (count - len(expected))
    for slot, score in zip(torch.cat([topk, found], 1)[0].tolist(), out[0].tolist(), strict=True):
        assert np.isnan(score) if slot < 0 else score == known[slot]


@pytest.mark.parametrize("fp32", [False, True])
def test_scores_match_float64(fp32):
    """From the stored keys: sum_h w relu(q . k) in NumPy, for mixed lengths in one batch."""
    lengths, k, count = [1, 40, 65, 300, 517], 48, 32
    pages, page_table, contexts = paged_context(lengths, fp32)
    rng = np.random.default_rng(2)
    query, weights = rng.normal(size=(5, 8, 128)), rng.normal(size=(5, 8))
    q, w = torch.from_numpy(query).float(), torch.from_numpy(weights).float()
    lens, rows = torch.tensor(lengths).int(), torch.arange(5)
    table = torch.arange(5 * 600).view(5, 600).int()
    scores = index_scores_paged(q, w, pages, page_table, lens)
    topk = topk_select(scores, lens, rows, table, k)
    found, out = runner_ups(scores, lens, rows, table, topk, count)
    slots = torch.cat([topk, found], 1).numpy()
    for i, (length, keys) in enumerate(zip(lengths, contexts, strict=True)):
        products = np.einsum("hd,jd->hj", q[i].double().numpy(), keys.double().numpy())
        right = w[i].double().numpy() @ np.maximum(products, 0)
        chosen = slots[i] >= 0
        assert chosen.sum() == min(length, k + count) and len(set(slots[i][chosen])) == chosen.sum()
        assert np.isnan(out[i].numpy()[~chosen]).all()
        assert np.allclose(out[i].numpy()[chosen], right[slots[i][chosen] - 600 * i], atol=2e-3)
        left = np.setdiff1d(np.arange(length), slots[i][chosen] - 600 * i)
        assert right[left].max(initial=-np.inf) <= out[i].numpy()[chosen].min() + 2e-3
