"""Checks of a HotState that hold between any two of its operations."""

from ess_kernels import hot_state
from ess_kernels.hot_state import FREE, MAX_AGE_LIMIT, HotState


def check_state(state: HotState) -> None:
    """Every invariant that one group's state shows. state: on any device."""
    s = state.cpu()
    words = s.words.tolist()
    owned = (s.row_slot >= 0).nonzero().flatten()
    hot = (s.slot_row >= 0).nonzero().flatten()
    assert (s.slot_row >= hot_state.NOT_HOT).all(), "a claim was left behind"
    assert (s.row_slot >= -1).all()
    assert len(owned) == len(hot), "as many slots must be hot as rows are owned"
    back = s.slot_row[s.row_slot[owned].long()].long()
    assert (back == owned).all(), "slot and row must map to each other"
    free = s.row_slot < 0
    assert ((s.row_stamp == FREE) == free).all(), "a row must be free or owned, by both its words"
    assert (s.row_stamp[~free] >= 0).all()
    assert words[hot_state.OCCUPIED] == len(owned)
    assert words[hot_state.SCANNED] == words[hot_state.SEEN] == words[hot_state.CUT] == 0
    assert 0 <= words[hot_state.HAND] < s.num_rows
    assert 0 <= words[hot_state.AGE_LIMIT] <= MAX_AGE_LIMIT
    assert int(s.counters[hot_state.SHORT]) == 0
