"""Checks of a HotState that hold between any two of its operations."""

import torch

from ess_kernels import hot_state
from ess_kernels.hot_state import FREE_STAMP, HotState


def check_state(state: HotState) -> None:
    """Every invariant that one layer's state shows. state: on any device."""
    s = state.cpu()
    w = s.words.tolist()
    owned = (s.row_slot >= 0).nonzero().flatten()
    hot = (s.slot_row >= 0).nonzero().flatten()
    free = s.free[: w[hot_state.NUM_FREE]].long()
    assert (s.slot_row >= hot_state.NOT_HOT).all(), "a claim was left behind"
    assert len(owned) == len(hot) and torch.equal(
        s.slot_row[s.row_slot[owned].long()].long(), owned
    ), "slot and row must map to each other"
    assert torch.equal(torch.cat([owned, free]).sort().values, torch.arange(s.num_rows)), (
        "a row must be free or owned, once"
    )
    assert (s.row_stamp[free] == FREE_STAMP).all() and (s.row_stamp[owned] < FREE_STAMP).all()
    assert w[hot_state.POPS] == 0
    assert 0 <= w[hot_state.CURSOR] <= w[hot_state.LENGTH] <= s.num_rows
    rest = s.order[w[hot_state.CURSOR] : w[hot_state.LENGTH]].long()
    assert len(rest.unique()) == len(rest)
    valid = rest[s.row_stamp[rest] <= w[hot_state.BUILT]]
    assert w[hot_state.VALID] <= len(valid), "more rows promised than the list has"
    assert (s.row_slot[valid] >= 0).all()
    stamps = s.row_stamp[valid]
    assert torch.equal(stamps, stamps.sort().values), "the list must be in LRU order"


def victims(before: HotState, after: HotState) -> torch.Tensor:
    """Rows that changed their slot and had one, sorted."""
    changed = (before.row_slot >= 0) & (before.row_slot != after.row_slot)
    return changed.nonzero().flatten()
