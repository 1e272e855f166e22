"""Rules for which lists of a verify step make rows young, against a plain list of slots."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim import policies
from sglang_ess.sim.policies.verified_lru import RULES, VerifiedLru
from tests.sim import oracles

SLOTS, REQUESTS = 64, 2


def steps_of(seed, queries, width=6, count=40):
    """Lists that return by recency, and how many are kept; some have pads."""
    stream = oracles.stack_stream(count, REQUESTS * queries, width, SLOTS, seed)
    kept = np.random.default_rng(seed).integers(1, queries + 1, (count, REQUESTS))
    return stream, kept


def run(policy, stream, kept):
    found = []
    for topk, lengths in zip(stream, kept, strict=True):
        found.append(list(policy.step(topk)))
        policy.accepted(lengths)
    return found


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 4), more=st.integers(0, 20))
def test_a_plain_list_agrees(rule, seed, queries, more):
    stream, kept = steps_of(seed, queries)
    rows = min(SLOTS, max(len(np.unique(topk[topk >= 0])) for topk in stream) + more)
    found = run(VerifiedLru(rows, SLOTS, queries, rule), stream, kept)
    assert found == run(oracles.VerifiedLru(rows, queries, rule), stream, kept)


def test_all_lists_is_what_serves():
    stream, kept = steps_of(3, 3)
    rows = 44
    expected = policies.misses("lru", stream, rows, SLOTS)
    assert run(VerifiedLru(rows, SLOTS, 3, "all"), stream, kept) == expected.tolist()


def test_with_all_kept_or_one_query_the_rules_are_one():
    for queries in (1, 3):
        stream, _ = steps_of(5, queries)
        kept = np.full((len(stream), REQUESTS), queries)
        rules = ("all", "kept", "kept, misses young") + ("first",) * (queries == 1)
        found = [run(VerifiedLru(44, SLOTS, queries, rule), stream, kept) for rule in rules]
        assert all(one == found[0] for one in found)


@pytest.mark.parametrize(("again", "costs"), [(2, (1, 0)), (3, (0, 1))])
def test_a_rejected_list_is_the_oldest_or_not(again, costs):
    """Four rows. The first step rejects its list of slots 3 and 4; then slot 5 takes a row."""
    stream = np.array([[[1, 2], [3, 4]], [[1, 5]] * 2, [[1, again]] * 2], np.int32)
    kept = np.array([[1], [2], [2]])
    for rule in RULES:
        expected = [[2, 2], [1, 0], [costs[rule != "all"], 0]]
        assert run(VerifiedLru(4, 8, 2, rule), stream, kept) == expected, rule


def test_what_a_rejected_list_alone_fetched_goes_before_older_rows():
    """Slots 1 and 2 are two steps older than slot 3, which only a rejected list had."""
    stream = np.array([[[1, 2]] * 2, [[4, 5], [4, 3]], [[6, 4]] * 2, [[6, 1]] * 2], np.int32)
    kept = np.array([[2], [1], [2], [2]])
    last = {rule: run(VerifiedLru(5, 8, 2, rule), stream, kept)[-1][0] for rule in RULES}
    assert last == {"all": 1, "kept": 0, "kept, misses young": 1, "first": 0}


def test_refusals():
    with pytest.raises(ValueError, match="rule must be one of all, kept"):
        VerifiedLru(4, 8, 2, "some")
    with pytest.raises(ValueError, match="must fit the hot rows"):
        VerifiedLru(3, 8, 2, "kept").step(np.array([[1, 2], [3, 4]], np.int32))
