"""gather_rows against torch."""

import pytest
import torch

from ess_kernels.gather_rows import gather_rows, gather_rows_reference


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 700), (1025,)])
def test_matches_the_reference(device, shape):
    generator = torch.Generator().manual_seed(len(shape))
    slots = torch.randint(-3, 500, shape, generator=generator, dtype=torch.int32)
    table = torch.randperm(500, generator=generator).int()
    table[::7] = -1
    got = gather_rows(slots.to(device), table.to(device))
    assert got.dtype == torch.int32
    assert torch.equal(got.cpu(), gather_rows_reference(slots, table))


@pytest.mark.parametrize(
    "queries", [slice(0, 0), slice(0, 2), slice(2, 9), slice(0, 9), slice(8, 9)]
)
@pytest.mark.parametrize("width", [1, 300])
def test_some_queries_of_a_batch(device, queries, width):
    """What the others ask for may be anywhere: it is not read."""
    slots = torch.arange(9 * width, dtype=torch.int32).view(9, width) % 400 - 3
    table = torch.randperm(400).int() + 1
    want = gather_rows_reference(slots, table, queries)
    others = torch.ones(9, dtype=torch.bool)
    others[queries] = False
    slots[others] = 2**31 - 1
    got = gather_rows(slots.to(device), table.to(device), queries)
    assert torch.equal(got.cpu(), want)
    assert not got[others.to(device)].any() and (got.cpu()[queries] != 0).all()


def test_other_dtypes_are_refused(device):
    slots = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="must be int32: got torch.int64"):
        gather_rows(slots, slots.int())
