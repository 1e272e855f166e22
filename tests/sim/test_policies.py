"""The lab's replacement policies: golden counts, oracles in plain Python, a brute-force optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim.policies import POLICIES, belady, fifo, misses
from tests.sim import oracles

SLOTS, SIZES = 64, (16, 20, 28, 40, 64)
STREAM = oracles.stack_stream()
# Misses of STREAM from an empty tier, by size. Belady's are the fewest there can be.
GOLDEN = {
    "lru": [128, 96, 62, 49, 47],
    "fifo": [135, 108, 74, 51, 47],
    "clock": [129, 100, 64, 50, 47],
    "aged_clock": [128, 96, 63, 49, 47],
    "random": [134, 107, 73, 51, 47],
    "belady": [89, 65, 50, 47, 47],
}
ONLINE = sorted(set(POLICIES) - {"belady"})


def total(policy, rows, steps=STREAM, num_slots=SLOTS, seed=0):
    return int(misses(policy, steps, rows, num_slots, seed).sum())


def oracle(policy, rows, steps, seed=0):
    """Misses [steps, queries] of the oracle."""
    extra = {"belady": (steps,), "random": (seed,)}.get(policy, ())
    other = getattr(oracles, policy.title().replace("_", ""))(rows, *extra)
    return np.array([other.step(topk) for topk in steps])


@st.composite
def small_streams(draw, max_slots=24, max_steps=30, max_width=5):
    """(steps [steps, queries, K], rows, slots): repeats and pads; every step fits the rows."""
    num_slots = draw(st.integers(2, max_slots))
    queries, width = draw(st.integers(1, 3)), draw(st.integers(1, max_width))
    count, seed = draw(st.integers(1, max_steps)), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    span = draw(st.integers(1, num_slots))
    steps = random.integers(span, size=(count, queries, width))
    steps += random.integers(num_slots - span + 1, size=(count, 1, 1))
    steps[random.random(steps.shape) < 0.1] = -1
    steps = steps.astype(np.int32)
    largest = max(len(set(topk[topk >= 0].tolist())) for topk in steps)
    rows = draw(st.integers(max(1, largest), num_slots))
    return steps, rows, num_slots


@pytest.mark.parametrize("policy", POLICIES)
def test_golden_counts(policy):
    """The change of a count shows here; what it should be, the oracles say."""
    counts = [total(policy, rows) for rows in SIZES]
    assert counts == GOLDEN[policy], f'"{policy}": {counts},'
    assert all(count >= best for count, best in zip(counts, GOLDEN["belady"], strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None)
@given(case=small_streams(), seed=st.integers(0, 2**40))
def test_oracles_agree(policy, case, seed):
    steps, rows, num_slots = case
    found, expected = (
        misses(policy, steps, rows, num_slots, seed),
        oracle(policy, rows, steps, seed),
    )
    if policy == "belady":  # which query a miss falls to is up to the ties
        found, expected = found.sum(1), expected.sum(1)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_oracles_agree_on_a_long_stream(policy):
    steps = oracles.stack_stream(steps=200, seed=1)
    found, expected = (
        misses(policy, steps, 24, SLOTS, 5).sum(1),
        oracle(policy, 24, steps, 5).sum(1),
    )
    assert np.array_equal(found, expected)


@settings(max_examples=80, deadline=None)
@given(case=small_streams(max_slots=7, max_steps=9, max_width=3))
def test_belady_is_the_optimum(case):
    steps, rows, num_slots = case
    best = oracles.fewest_misses(steps, rows)
    assert total("belady", rows, steps, num_slots) == best
    assert all(total(policy, rows, steps, num_slots) >= best for policy in ONLINE)


@pytest.mark.parametrize("policy", POLICIES)
def test_all_resident_misses_only_what_is_new(policy):
    assert total(policy, SLOTS) == len(np.unique(STREAM[STREAM >= 0]))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_repeat_misses_once_and_pads_never(policy):
    steps = np.array([[[3, 3, -1], [-1, 3, 4]], [[4, -1, -1], [3, 4, 4]]], np.int32)
    assert misses(policy, steps, 2, 8).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("policy", POLICIES)
def test_no_miss_evicts_what_its_step_uses(policy):
    """With rows for one step only, each step has all its slots hot: the next repeats it."""
    sets = np.array([[0, 1, 2, 3], [2, 3, 4, 5], [9, 2, 8, 0]], np.int32)
    steps = np.repeat(sets, 2, axis=0)[:, None]
    assert misses(policy, steps, 4, 10).sum(1).tolist() == [4, 0, 2, 0, 3, 0]


@settings(max_examples=40, deadline=None)
@given(slots=st.lists(st.integers(0, 11), min_size=1, max_size=60))
def test_lru_never_misses_more_with_more_rows(slots):
    """Steps of one lookup. (Those of several enter in an order that depends on what hits.)"""
    steps = np.array(slots, np.int32).reshape(-1, 1, 1)
    counts = [total("lru", rows, steps, 12) for rows in range(1, 13)]
    assert counts == sorted(counts, reverse=True)
    assert GOLDEN["lru"] == sorted(GOLDEN["lru"], reverse=True)


def test_random_is_its_seed():
    found = [misses("random", STREAM, 20, SLOTS, seed) for seed in (7, 7, 8)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


@pytest.mark.parametrize("policy", POLICIES)
def test_refusals(policy):
    steps = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    with pytest.raises(ValueError, match="must fit the hot rows: got 6, limit 5"):
        misses(policy, steps, 5, 8)
    for rows in (0, 9):
        with pytest.raises(ValueError, match=f"hot rows must be 1 to 8.*got {rows}"):
            misses(policy, steps, rows, 8)


def test_refusals_of_names_and_futures():
    with pytest.raises(ValueError, match="policy must be one of lru, .*got 'mru'"):
        misses("mru", STREAM, 20, SLOTS)
    cache = belady.Belady(20, SLOTS, STREAM[:2])
    with pytest.raises(ValueError, match="steps must be those it was made with"):
        cache.step(STREAM[1])
    cache.step(STREAM[0]), cache.step(STREAM[1])
    with pytest.raises(ValueError, match="got another at 2, limit 2"):
        cache.step(STREAM[1])


class TestCorruption:
    """What the checks above see when a policy is wrong."""

    def test_a_belady_that_does_not_know_the_future_is_seen(self, monkeypatch):
        monkeypatch.setitem(POLICIES, "belady", POLICIES["lru"])
        with pytest.raises(AssertionError):
            test_golden_counts("belady")
        with pytest.raises(AssertionError):
            test_belady_is_the_optimum()

    def test_a_victim_of_its_own_step_is_seen(self, monkeypatch):
        def nobody_is_pinned(missed, free, step, slot_row, row_slot, row_step, ends, links):
            row_step[:] = -1
            return right(missed, free, step, slot_row, row_slot, row_step, ends, links)

        right = fifo.place
        monkeypatch.setattr(fifo, "place", nobody_is_pinned)
        with pytest.raises(AssertionError):
            test_no_miss_evicts_what_its_step_uses("fifo")
