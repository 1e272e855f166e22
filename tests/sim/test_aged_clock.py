"""The aged clock: oracle and invariants under every rule; LRU's misses on fitted streams."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim import policies
from sglang_ess.sim.model.locality import Locality, TopkStream
from sglang_ess.sim.planning import lab
from sglang_ess.sim.policies import aged_clock
from sglang_ess.sim.policies.aged_clock import AGE, HAND, ROUNDS, RULE, SCANNED, AgedClock, Rule
from sglang_ess.tiers import HotCache
from tests.sim import oracles, test_policies

CONTEXT, RATIO, FIRST, STEPS = 32 << 10, 0.2, 100, 250  # the first steps are not counted
RULES = st.builds(
    Rule,
    chunk=st.integers(1, 8),
    span=st.integers(1, 16),
    density=st.integers(0, 5),
    barren=st.integers(0, 6),
    lower=st.integers(0, 4),
    grow=st.integers(0, 4),
    max_age=st.integers(0, 50),
)


@settings(max_examples=100, deadline=None)
@given(case=test_policies.small_streams(), rule=RULES)
def test_the_oracle_agrees_under_every_rule(case, rule):
    """Scans of a few rows: several rounds, laps that end within a scan, blocks in turn."""
    steps, rows, num_slots = case
    cache, oracle = AgedClock(rows, num_slots, rule), oracles.AgedClock(rows, rule)
    for topk in steps:
        assert cache.step(topk).tolist() == oracle.step(topk)
        assert (cache.words[HAND], cache.words[AGE]) == (oracle.hand, oracle.age)


@settings(max_examples=100, deadline=None)
@given(case=test_policies.small_streams(), rule=RULES, seed=st.integers(0, 2**32 - 1))
def test_invariants(case, rule, seed):
    """Slots are freed between the steps: the rows of all that a step uses stay, or are new."""
    steps, rows, num_slots = case
    cache, random = AgedClock(rows, num_slots, rule), np.random.default_rng(seed)
    for topk in steps:
        cache.invalidate(np.flatnonzero(random.random(num_slots) < 0.1))
        before = cache.slot_row.copy()
        misses = cache.step(topk).sum()
        used = np.unique(topk[topk >= 0])
        hits = used[before[used] >= 0]
        assert np.array_equal(cache.slot_row[hits], before[hits])
        assert misses == len(used) - len(hits) and (cache.slot_row[used] >= 0).all()
        hot = np.flatnonzero(cache.slot_row >= 0)
        assert np.array_equal(cache.row_slot[cache.slot_row[hot]], hot)
        assert (cache.row_slot >= 0).sum() == len(hot)
        assert 0 <= cache.words[AGE] <= rule.max_age and 0 <= cache.words[HAND] < rows
        assert cache.words[SCANNED] >= misses and (cache.words[ROUNDS] > 0) == (misses > 0)


def test_blocks_scan_one_behind_the_other_and_find_free_rows():
    """Four rows, scans of two: the second query scans behind the first, and free rows are found."""
    rule = Rule(chunk=2, span=2, density=0, barren=0, lower=1, max_age=9)
    cache = AgedClock(4, 8, rule)
    cache.step(np.array([[0], [1]], np.int32))
    assert cache.slot_row[:2].tolist() == [0, 2] and cache.words[HAND] == 0
    cache.step(np.array([[2, 3]], np.int32))  # the age is 9: only free rows are eligible
    assert cache.slot_row[2:4].tolist() == [1, 3]
    cache.invalidate(np.array([2]))
    cache.step(np.array([[4]], np.int32))
    assert cache.slot_row[4] == 1 and cache.slot_row[[0, 1, 3]].tolist() == [0, 2, 3]


def excess(name, requests, rule=RULE):
    """Misses next to those of LRU, less 1, of requests that share a tier of the fitted stream."""
    locality = Locality.load(name)
    layer = locality.spread(1)[0]
    stream, warmup = lab.generate(locality, layer, [CONTEXT] * requests, STEPS)
    rows = int(RATIO * stream.num_slots)
    lru = policies.misses("lru", stream.steps, rows, stream.num_slots)
    cache = AgedClock(rows, stream.num_slots, rule)
    own = np.array([cache.step(topk) for topk in stream.steps])
    counted = slice(warmup + FIRST, None)
    return own[counted].sum() / lru[counted].sum() - 1


@pytest.mark.slow
@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5.1"])
def test_it_misses_as_lru_does(name, requests):
    assert -0.01 < excess(name, requests) < 0.01


@pytest.mark.parametrize(
    "wrong", [{"max_age": 0}, {"max_age": 4}, {"density": 0}, {"lower": 1}, {"lower": 0}], ids=str
)
def test_an_age_that_does_not_follow_the_tier_is_seen(wrong):
    """No age, a bounded one, one that never grows, and ones that fall by half or to 0 at once."""
    assert excess("glm-5.1", 1, RULE._replace(**wrong)) > 0.015


def test_requests_that_come_and_go():
    """A request ends and frees its rows, an idle time later another begins with none."""
    locality, requests, life, idle = Locality.load("glm-5.1"), 3, 60, 20
    tokens = CONTEXT // 2
    slots = np.arange(requests * tokens, dtype=np.int32).reshape(requests, tokens)
    source = TopkStream(locality, 0, requests, tokens)
    rows = int(RATIO * slots.size)
    lru, own = HotCache(None, rows, slots.size), AgedClock(rows, slots.size)
    counts, phases = [], np.arange(requests) * (life + idle) // requests
    for step in range(4 * (life + idle)):
        ages = (step + phases) % (life + idle)
        for request in np.flatnonzero(ages == life):
            lru.invalidate(torch.from_numpy(slots[request]).long())
            own.invalidate(slots[request])
        for request in np.flatnonzero((ages == 0) | (step == 0)):
            source.begin(request, tokens)
        active = np.flatnonzero(ages < life)
        lengths = np.full(len(active), tokens)
        topk = source.next(active, lengths, slots, 1)
        lru.plan(torch.from_numpy(topk))
        counts.append((lru.query_misses.sum(), own.step(topk).sum()))
    least, found = np.sum(counts[life:], axis=0)
    assert 0.99 < found / least < 1.02


def test_a_victim_of_its_own_step_is_seen(monkeypatch):
    """Without the stamps of the step's hits and fills, a block takes rows that are in use."""

    def nobody_is_stamped(slots, first, count, age, step, slot_row, row_slot, row_step):
        row_step[:] = -1
        return right(slots, first, count, age, step, slot_row, row_slot, row_step)

    right = aged_clock.scan
    monkeypatch.setattr(aged_clock, "scan", nobody_is_stamped)
    monkeypatch.setattr(aged_clock, "place", aged_clock.place.py_func)
    with pytest.raises(AssertionError):
        test_policies.test_no_miss_evicts_what_its_step_uses("aged_clock")
