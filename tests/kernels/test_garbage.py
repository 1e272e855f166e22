"""New memory in these tests is not zero, so a kernel that leaves something out shows."""

import torch

from ess_kernels.scatter import scatter_rows


def test_new_memory_holds_no_zeros():
    assert torch.empty(5).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
    assert (torch.empty(5, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.empty(5, dtype=torch.uint8).view(torch.float8_e4m3fn).float().isnan().all()


def test_a_row_that_nobody_writes_shows(device):
    rows, target = torch.zeros(3, 1, 576, device=device), torch.empty(4, 1, 576, device=device)
    scatter_rows(rows, torch.tensor([0, 1, 3], device=device), target)
    assert target.isnan().any(dim=-1).flatten().tolist() == [False, False, True, False]
