"""Checks of a HotState that hold between any two of its operations."""

import torch

from ess_kernels import hot_state
from ess_kernels.hot_state import FREE_STAMP, HotState
from ess_kernels.rebuild_order import OrderScratch, Owned, rebuild_order, rebuild_order_reference


def rows_of(state: HotState, owned: Owned | None = None) -> torch.Tensor:
    """A layer's rows, ascending; owned: where it has them of an arena."""
    start, count = state.words[hot_state.START], state.words[hot_state.ROWS]
    rows = torch.arange(state.num_rows) if owned is None else owned.rows.cpu()
    return rows[start : start + count].long().sort().values


def check_state(state: HotState, owned: Owned | None = None) -> None:
    """Every invariant that one layer's state shows. state, owned: on any device."""
    s = state.cpu()
    w, rows = s.words.tolist(), rows_of(s, owned)
    assert len(rows) == w[hot_state.ROWS] and len(rows.unique()) == len(rows)
    free, order = (part[w[hot_state.START] :][: len(rows)] for part in (s.free, s.order))
    owned = rows[s.row_slot[rows] >= 0]
    hot = (s.slot_row >= 0).nonzero().flatten()
    free = free[: w[hot_state.NUM_FREE]].long()
    assert (s.slot_row >= hot_state.NOT_HOT).all(), "a claim was left behind"
    assert len(owned) == len(hot) and torch.equal(
        s.slot_row[s.row_slot[owned].long()].long(), owned
    ), "slot and row must map to each other"
    assert torch.equal(torch.cat([owned, free]).sort().values, rows), (
        "a row must be free or owned, once"
    )
    assert (s.row_stamp[free] == FREE_STAMP).all() and (s.row_stamp[owned] < FREE_STAMP).all()
    assert w[hot_state.POPS] == 0
    assert 0 <= w[hot_state.CURSOR] <= w[hot_state.LENGTH] <= len(rows)
    rest = order[w[hot_state.CURSOR] : w[hot_state.LENGTH]].long()
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


def rebuild_checked(
    state: HotState, need: int, scratch: OrderScratch, owned: Owned | None = None
) -> None:
    """rebuild_order of one layer, compared with its reference."""
    model, ages = state.cpu(), scratch.counts.shape[1]
    model_owned = owned and Owned(owned.rows.cpu().clone(), owned.ages.cpu().clone())
    rebuild_order(state, need, scratch, owned)
    rebuild_order_reference(model, need, model_owned, ages)
    got, start = state.cpu(), int(model.words[hot_state.START])
    assert torch.equal(got.words, model.words)
    assert torch.equal(got.row_stamp, model.row_stamp)
    if owned is not None:
        assert torch.equal(owned.ages.cpu(), model_owned.ages)
    length, built = (int(model.words[i]) for i in (hot_state.LENGTH, hot_state.BUILT))
    listed = [s.order[start : start + length].long() for s in (got, model)]
    assert torch.equal(listed[0].sort().values, listed[1].sort().values)
    if int(model.words[hot_state.CURSOR]) == 0:  # else rows were used since the list was made
        old = [(built - model.row_stamp[rows].long()).clamp(max=ages - 1) for rows in listed]
        assert torch.equal(*old), "rows of equal age alone may change places"
