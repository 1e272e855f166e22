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


def test_other_dtypes_are_refused(device):
    slots = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="must be int32: got torch.int64"):
        gather_rows(slots, slots.int())
