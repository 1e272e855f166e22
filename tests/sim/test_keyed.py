"""Rules that evict what is worth least, against their definition in plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim import policies
from sglang_ess.sim.policies import RULES, Clues, keyed
from sglang_ess.sim.policies.keyed import Keyed, Worth
from tests.sim import oracles
from tests.sim.test_policies import small_streams

# Half-lives at which no two patterns of uses are worth exactly the same.
TESTED = {
    "last use": Worth(),
    "average": Worth((3.7,)),
    "average of all": Worth((3.7,), remember=True),
    "two averages": Worth((1.3, 11.9), (1.0, 0.17), remember=True),
    "probation": Worth(miss_age=3),
    "weak first": Worth(weak_age=2.5),
    "hinted": Worth(hint_age=1.5, hints=2),
    "hinted average": Worth((3.7,), remember=True, hint_age=4.1, hints=3),
    "ahead": Worth(hint_age=1.5, hints=3, ahead=2, margin=1),
    "average ahead": Worth((1.3, 11.9), (1.0, 0.17), True, 2.3, 4, ahead=3, margin=0.9),
    "all": Worth((2.9,), remember=True, hint_age=1.1, hints=3, miss_age=1.7, weak_age=0.7, ahead=2),
}


def clues(steps, num_slots, seed, width=4):
    """Hints with pads and repeats, and strengths, of random numbers."""
    random = np.random.default_rng(seed)
    hints = random.integers(-1, num_slots, size=(len(steps), 2, width)).astype(np.int32)
    return Clues(hints, random.random(steps.shape).astype(np.float32))


def oracle(rule, steps, rows, given):
    other = oracles.Keyed(rows, rule)
    misses, ahead = [], []
    for step, topk in enumerate(steps):
        misses.append(other.step(topk, given.strengths[step]))
        ahead.append(other.hint(given.hints[step]) if rule.hint_age is not None else 0)
    return np.array(misses), np.array(ahead)


@pytest.mark.parametrize("rule", TESTED.values(), ids=TESTED)
@settings(max_examples=40, deadline=None)
@given(case=small_streams(), seed=st.integers(0, 2**32 - 1))
def test_the_definition_agrees(rule, case, seed):
    steps, rows, num_slots = case
    given = clues(steps, num_slots, seed)
    found = policies.count(rule, steps, rows, num_slots, clues=given)
    misses, ahead = oracle(rule, steps, rows, given)
    assert np.array_equal(found.misses, misses)
    assert np.array_equal(found.ahead, ahead)


@pytest.mark.parametrize("rule", TESTED.values(), ids=TESTED)
def test_the_definition_agrees_on_a_long_stream(rule):
    steps = oracles.stack_stream(steps=200, seed=1)
    given = clues(steps, 64, 5)
    found = policies.count(rule, steps, 26, 64, clues=given)
    misses, ahead = oracle(rule, steps, 26, given)
    assert np.array_equal(found.misses, misses) and np.array_equal(found.ahead, ahead)
    assert (ahead.sum() > 0) == (rule.ahead > 0)


@settings(max_examples=40, deadline=None)
@given(case=small_streams())
def test_the_last_use_alone_is_the_production_lru(case):
    steps, rows, num_slots = case
    found = policies.misses(Worth(), steps, rows, num_slots)
    assert np.array_equal(found, policies.misses("lru", steps, rows, num_slots))


@pytest.mark.parametrize("rule", [*TESTED.values(), *RULES.values()])
@settings(max_examples=20, deadline=None)
@given(case=small_streams(), seed=st.integers(0, 2**32 - 1))
def test_rows_and_slots_stay_one_to_one(rule, case, seed):
    """No row has two slots, the step's slots stay hot after its hints, and the counts add up."""
    steps, rows, num_slots = case
    given, cache = clues(steps, num_slots, seed), Keyed(rows, num_slots, rule)
    for step, topk in enumerate(steps):
        before = set(np.flatnonzero(cache.slot_row >= 0).tolist())
        wanted = set(topk[topk >= 0].tolist())
        cache.strengths = given.strengths[step]
        assert cache.step(topk).sum() == len(wanted - before)
        asked = set(np.flatnonzero(cache.slot_row >= 0).tolist())
        ahead = cache.hint(given.hints[step])
        hot = np.flatnonzero(cache.slot_row >= 0)
        assert wanted <= set(hot.tolist())
        assert len(set(hot.tolist()) - asked) == ahead
        assert np.array_equal(cache.row_slot[cache.slot_row[hot]], hot)
        assert (cache.row_slot >= 0).sum() == len(hot) == min(cache.occupied, rows)


def test_a_visitor_goes_before_what_is_used_again_and_again():
    """Slots 0 and 1 in every fourth step; between them, others once each: LRU drops both."""
    steps = np.array([[0, 1] if i % 4 == 0 else [2 + i, 40 + i] for i in range(40)], np.int32)
    found = {
        name: policies.misses(rule, steps[:, None], 6, 80)[8:].sum()
        for name, rule in (("lru", Worth()), ("average", Worth((8.0,), remember=True)))
    }
    assert found == {"lru": 64, "average": 48}


def test_what_is_fetched_ahead_does_not_miss():
    steps = np.arange(24, dtype=np.int32).reshape(12, 1, 2)
    following = np.concatenate([steps[1:], steps[-1:]])
    rule = Worth(hint_age=0.5, hints=2, ahead=2)
    found = policies.count(rule, steps, 4, 24, clues=Clues(following))
    assert found.misses.sum() == 2 and found.ahead.sum() == 22
    late = policies.count(rule._replace(margin=9), steps, 4, 24, clues=Clues(following))
    assert late.ahead.sum() == 2  # the free rows alone


class TestCorruption:
    def test_a_step_that_does_not_pin_is_seen(self, monkeypatch):
        right = keyed.victims
        monkeypatch.setattr(keyed, "victims", lambda count, step, *rest: right(count, -5, *rest))
        with pytest.raises(AssertionError):
            test_rows_and_slots_stay_one_to_one.hypothesis.inner_test(
                Worth(hint_age=1, hints=4, ahead=4, miss_age=9), (oracles.stack_stream(), 20, 64), 1
            )
