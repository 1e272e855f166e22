"""The sample of a decode step's top-k: whole requests, in the order of the batch."""

import pytest
import torch

from sglang_ess.tiers.topk_sample import SAMPLES, TopkSample

TOPK = 3


def lists_of(requests, width, first=0):
    """[requests * width, TOPK]: each value names its request, its query and its column."""
    request, query, column = torch.meshgrid(
        torch.arange(requests), torch.arange(width), torch.arange(TOPK), indexing="ij"
    )
    return (first + 100 * request + 10 * query + column).view(-1, TOPK).int()


@pytest.mark.parametrize("width", [1, 2, 6])
@pytest.mark.parametrize("requests", [0, 1, SAMPLES - 1, SAMPLES, SAMPLES + 5])
def test_a_row_has_all_lists_of_one_request(width, requests):
    sample = TopkSample(4, TOPK, width=width)
    assert sample.rows.shape == (4, SAMPLES, width * TOPK)
    lists = lists_of(requests, width)
    sample.decode_topk(sample.groups[1], lists)
    sampled = min(requests, SAMPLES)
    assert torch.equal(sample.rows[1, :sampled], lists.view(requests, width * TOPK)[:sampled])
    others = torch.ones(4, SAMPLES, dtype=torch.bool)
    others[1, :sampled] = False
    assert (sample.rows[others] == -1).all(), "neither other requests nor other groups"


def test_a_smaller_batch_leaves_the_rest():
    """Readers take as many rows as the batch has requests."""
    sample = TopkSample(1, TOPK, width=2)
    sample.decode_topk(0, lists_of(5, 2))
    sample.decode_topk(0, lists_of(2, 2, first=1000))
    assert sample.rows[0, :3, 0].tolist() == [1000, 1100, 200]


def test_four_groups_are_sampled_evenly():
    sample = TopkSample(61, TOPK)
    assert sample.groups == (7, 22, 38, 53)
    assert [group for group in range(61) if sample.watches(group)] == list(sample.groups)
    sample.decode_topk(8, lists_of(1, 1))
    assert (sample.rows == -1).all()
    assert TopkSample(2, TOPK).groups == (0, 1)
