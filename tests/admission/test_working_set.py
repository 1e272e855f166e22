"""WorkingSetWindow against sets of Python ints; WorkingSets by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.admission import working_set
from sglang_ess.admission.working_set import (
    PRIOR_TOPKS,
    WINDOW,
    WindowCounts,
    WorkingSets,
    WorkingSetWindow,
    prior_growth,
    prior_lists,
)

SLOTS, SAMPLES, TOPK, STEPS = 40, 4, 5, 3

topks = st.lists(
    st.lists(st.integers(-3, SLOTS + 3), min_size=TOPK, max_size=TOPK), min_size=0, max_size=SAMPLES
)
steps_of_owners = st.lists(
    st.tuples(topks, st.permutations(range(SAMPLES + 1))), min_size=STEPS, max_size=5 * STEPS
)


def as_rows(rows):
    return np.array(rows, np.int32).reshape(len(rows), len(rows[0]) if rows else TOPK)


def expected_counts(steps):
    """What a full window of (rows, owners) must return, by sets."""
    slots = {}
    for row, owner in enumerate(steps[0][1]):
        if all(row < len(owners) and owners[row] == owner for _, owners in steps):
            seen, slots[owner] = set(), []
            for rows, _ in steps:
                seen = seen | {slot for slot in rows[row] if 0 <= slot < SLOTS}
                slots[owner].append(seen)
    return WindowCounts(
        {owner: len(sets[-1]) for owner, sets in slots.items()},
        len(set().union(*(sets[-1] for sets in slots.values()))),
        tuple(sum(len(sets[step]) for sets in slots.values()) for step in range(STEPS)),
    )


@settings(max_examples=200, deadline=None)
@given(steps_of_owners, st.booleans())
def test_counts_equal_sets(steps, are_steady):
    """Any rows, owners that come, go and change place, and values that are no slots."""
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, STEPS)
    held = []
    for rows, order in steps:
        owners = list(range(len(rows))) if are_steady else order[: len(rows)]
        held.append((rows, owners))
        counts = window.add(as_rows(rows), owners)
        if len(held) < STEPS:
            assert counts is None
        else:
            assert counts == expected_counts(held)
            held = []


def test_sharing_is_union_by_sum():
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, 1)
    counts = window.add(as_rows([[1, 2, 3, 4], [3, 4, 5, 6]]), [7, 8])
    assert counts.rows == {7: 4, 8: 4}
    assert counts.union == 6
    assert counts.sharing == 6 / 8


def test_nothing_counted_is_nothing_shared():
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, 2)
    window.add(as_rows([[1, 2]]), [7])
    counts = window.add(as_rows([[1, 2]]), [8])
    assert counts == WindowCounts({}, 0, (0, 0))
    assert counts.sharing == 1.0


def test_a_row_that_left_does_not_count_when_it_is_back():
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, 3)
    for owners in ([1, 2], [1, 3], [1, 2]):
        counts = window.add(as_rows([[0], [1]]), owners)
    assert counts.rows == {1: 1}


def test_reset_forgets_the_window_under_way():
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, 2)
    assert window.add(as_rows([[1, 2]]), [1]) is None
    window.reset()
    assert window.add(as_rows([[3, 4]]), [1]) is None
    assert window.add(as_rows([[3, 4]]), [1]).rows == {1: 2}


def test_the_sample_may_be_overwritten_after_add():
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, 2)
    sample = as_rows([[1, 2]])
    window.add(sample, [1])
    sample[:] = 30
    sample[0, 0] = 31
    assert window.add(as_rows([[1, 2]]), [1]).rows == {1: 2}


def test_a_narrower_sample_leaves_nothing_of_the_last():
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, 1)
    window.add(as_rows([[1, 2, 3, 4, 5]]), [1])
    assert window.add(as_rows([[6, 7]]), [1]).rows == {1: 2}


def test_stamps_wrap_around():
    """2^31 stamps later the count is the same."""
    window = WorkingSetWindow(SLOTS, SAMPLES, TOPK, 1)
    rows = as_rows([[1, 2, 3], [3, 4, 5]])
    window._base = np.iinfo(np.int32).max - 3 * SAMPLES
    for _ in range(6):
        assert window.add(rows, [1, 2]) == WindowCounts({1: 3, 2: 3}, 5, (6,))
    assert window._base < 100


@pytest.mark.parametrize(
    ("rows", "owners"),
    [
        (np.zeros((SAMPLES + 1, 1)), range(SAMPLES + 1)),
        (np.zeros((1, TOPK + 1)), [0]),
        (np.zeros((2, 1)), [0]),
        (np.zeros((2, 1)), [3, 3]),
    ],
)
def test_refuses_another_shape(rows, owners):
    with pytest.raises(ValueError, match="sampled top-k must be"):
        WorkingSetWindow(SLOTS, SAMPLES, TOPK).add(rows.astype(np.int32), owners)


def test_refuses_no_slots():
    with pytest.raises(ValueError, match="must be at least 1"):
        WorkingSetWindow(0, SAMPLES, TOPK)


# --- estimates -------------------------------------------------------------------------------


def test_before_any_measurement():
    sets = WorkingSets(topk=100)
    assert sets.estimate(50) == 50
    assert sets.estimate(10_000) == PRIOR_TOPKS * 100
    assert sets.estimate(10_000, known=450) == 450
    assert sets.estimate(200, known=450) == 200


def test_measured_by_length():
    sets = WorkingSets(topk=100)
    sets.observe([(1500, 220), (1500, 180), (40_000, 500)], sharing=0.8, running=1)
    assert sets.estimate(1200) == 200
    assert sets.estimate(40_000) == 500
    assert sets.mean == 300
    assert sets.sharing == 0.8


def test_the_nearest_length_is_scaled():
    sets = WorkingSets(topk=100)
    sets.observe([(1500, 200)], sharing=1.0, running=1)
    assert sets.estimate(100_000) == 200  # both select from more than a window takes
    assert sets.estimate(150) == 100  # half of what a long one's window takes
    assert sets.estimate(3) == 2
    sets.observe([(100, 90)], sharing=1.0, running=1)
    assert sets.estimate(100) == 90


def test_windows_are_averaged():
    sets = WorkingSets(topk=100)
    sets.observe([(1500, 200)], sharing=1.0, running=1)
    sets.observe([(1500, 400)], sharing=0.5, running=1)
    weight = working_set.WINDOW_WEIGHT
    assert sets.estimate(1500) == sets.mean == 200 + weight * 200
    assert sets.sharing == 1 - weight * 0.5


def test_an_empty_window_changes_nothing():
    sets = WorkingSets(topk=100)
    sets.observe([], sharing=1.0, running=1)
    sets.observe([(100, 0)], sharing=0.1, running=1)
    assert (sets.mean, sets.sharing, sets.estimate(1000)) == (300, 1.0, 300)


# --- what a hot tier misses ------------------------------------------------------------------


def test_the_prior_growth_is_hisparses():
    """HiSparse misses 614, 274 and 137 rows of 2,048 at 2K, 4K and 8K slots (LMSYS blog)."""
    new = np.diff(prior_growth()) / prior_growth()[0] * 2048
    assert new[:3] == pytest.approx([614, 453, 376], rel=0.01)
    assert 1 / prior_growth()[0] == pytest.approx(2.7, rel=0.02)
    sets = WorkingSets(2048)
    missed = [float(sets.missed(2048 / prior_growth()[0], rows)) for rows in (2048, 4096)]
    assert missed == pytest.approx([614, 274], rel=0.12)


def test_a_tier_that_holds_some_steps_misses_what_one_more_adds():
    sets = WorkingSets(100)
    growth = np.array([100, 140, 170, 190, 200, 210, 220, 230, 240, 250, 260, 270])
    for _ in range(40):  # until the prior is forgotten
        sets.observe([(10_000, 270)], 1.0, 1, growth)
    # One request, then three in as many rows, then half of it shared.
    assert sets.missed(270, 140) == pytest.approx(30)
    assert sets.missed(3 * 270, 3 * 140) == pytest.approx(90)
    sets.sharing = 0.5
    assert sets.missed(2 * 270, 140) == pytest.approx(30)
    sets.sharing = 1.0
    assert sets.missed(270, 99) == pytest.approx(100), "less than a step's: all"
    assert sets.missed(270, 1000) == pytest.approx(10), "as far as windows see"
    assert sets.missed(np.array([270, 540]), 280) == pytest.approx([10, 60])


def test_ages_name_the_rows_that_are_held():
    sets = WorkingSets(100)
    assert sets.held_steps(12) == sets.held_steps(40) == 1.0
    assert sets.held_steps(0.5) == sets.held_steps(1) == pytest.approx(prior_growth()[0])
    assert sets.held_steps(2.5) == pytest.approx(prior_growth()[1:3].mean())


def test_a_window_of_another_length_says_nothing_of_growth():
    sets = WorkingSets(100)
    sets.observe([(10_000, 270)], 1.0, 1, (100, 200))
    assert (sets.growth == prior_growth()).all()
    assert len(sets.growth) == WINDOW


# --- speculative decoding --------------------------------------------------------------------


def test_the_lists_of_a_step_count_together():
    """Two lists a request and step, side by side; what both have counts once."""
    window = WorkingSetWindow(SLOTS, SAMPLES, 2 * TOPK, 2)
    window.add(as_rows([[1, 2, 3, -1, 4, 2, 3, -1], [1, 9, -1, -1, 9, 10, -1, -1]]), [7, 8])
    counts = window.add(as_rows([[1, 2, 3, 4, 5, 2, 3, 4], [1, 9, 10, -1, 9, 10, 1, -1]]), [7, 8])
    assert counts == WindowCounts({7: 5, 8: 3}, 7, (7, 8))


@pytest.mark.parametrize("queries", [2, 4])
def test_before_any_measurement_drafts_widen_the_working_set(queries):
    """As the lists of successive tokens do: more than one list has, less than as many times."""
    one, sets = WorkingSets(100), WorkingSets(100, queries)
    assert one.step_rows == 100 and one.mean == PRIOR_TOPKS * 100
    assert one.step_rows < sets.step_rows < queries * 100
    assert one.mean < sets.mean < queries * one.mean
    assert sets.estimate(10**6) == sets.mean
    assert sets.estimate(50) == 50
    # Warm-up ids are those of some 12 lists, of which a window now has `queries` times as many.
    assert sets.estimate(10**6, known=100) == pytest.approx(100 * sets.mean / one.mean)
    assert len(sets.growth) == WINDOW and sets.growth[-1] == 1
    # After a step: as much as `queries` lists have of all that 12 such steps have.
    union = prior_lists(queries * WINDOW)
    assert sets.growth[0] == union[queries - 1] / union[-1]
    assert sets.growth[1] == union[2 * queries - 1] / union[-1]
    assert one.growth[queries - 1] / one.growth[0] == pytest.approx(union[queries - 1])


def test_the_rows_of_a_step_are_measured():
    sets = WorkingSets(100, queries=4)
    growth = np.linspace(150, 400, WINDOW)  # one request: 150 of 400 lookups of a step are distinct
    for _ in range(40):
        sets.observe([(10_000, 400)], 1.0, 1, growth)
    assert sets.step_rows == pytest.approx(150)
    for _ in range(40):
        sets.observe([(10_000, 400)] * 2, 1.0, 2, 2 * growth)
    assert sets.step_rows == pytest.approx(150), "the growth of several is their sum"
    for _ in range(40):
        sets.observe([(60, 60)], 1.0, 1, np.full(WINDOW, 60))
    assert sets.step_rows == pytest.approx(100), "a longer request may follow"
    one = WorkingSets(100)
    one.observe([(60, 60)], 1.0, 1, np.full(WINDOW, 60))
    assert one.step_rows == 100
