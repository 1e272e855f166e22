"""invalidate against its reference, for one group and for all of them at once."""

import pytest
import torch

from ess_kernels.hot_state import HotState
from ess_kernels.invalidate import invalidate, invalidate_reference
from ess_kernels.plan_fetch import install
from tests.support.hot_state import check_state

GROUPS, SLOTS, ROWS = 3, 400, 300
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 256, 300])
def test_slots_are_dropped_from_every_group(dtype, count):
    """Hot ones, cold ones, repeats and negative ones; a group that is dropped from alone too."""
    random = torch.Generator().manual_seed(count)
    states = HotState.new(GROUPS, SLOTS, ROWS, DEVICE)
    install(states, torch.randperm(SLOTS, generator=random)[:280].to(DEVICE))
    slots = torch.randint(-2, SLOTS, (count,), generator=random).to(dtype)
    models = [states.group(i).cpu() for i in range(GROUPS)]
    invalidate(states, slots.to(DEVICE))
    invalidate(states.group(1), torch.arange(7, dtype=dtype, device=DEVICE))
    for i, model in enumerate(models):
        invalidate_reference(model, slots)
        if i == 1:
            invalidate_reference(model, torch.arange(7))
        check_state(states.group(i))
        for name in ("slot_row", "row_slot", "row_stamp", "words"):
            assert torch.equal(getattr(states.group(i).cpu(), name), getattr(model, name)), name


def test_other_dtypes_are_refused():
    states = HotState.new(1, 8, 4, DEVICE)
    with pytest.raises(ValueError, match="slots must be torch.int32 or torch.int64"):
        invalidate(states, torch.zeros(2, device=DEVICE))
