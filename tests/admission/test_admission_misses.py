"""Admission where misses cost little, or are worth it."""

from dataclasses import replace

import numpy as np
import pytest

from sglang_ess.admission.policy import Admission, Decision
from tests.admission.test_admission import LIMITS, LINK, WARM, make, settle, settled


@pytest.mark.parametrize(("link", "fit"), [(LINK, 20), (1e9, 30)])
def test_the_hot_tier_binds_only_where_misses_hurt(link, fit):
    """Ten run in 50 ms steps; missing all takes 100 ms over one link, 1 ms over the other."""
    admission = Admission(replace(LIMITS, hot_rows=6000), link)
    admission.observe_working_sets([(10_000, 300)], 1.0)
    settle(admission, settled(10, seconds=0.05))
    waiting = [WARM] * 20
    assert 10 + admission.admit(10, waiting).count == fit


def test_cheap_misses_are_no_thrashing():
    admission = Admission(LIMITS, 1e9)
    settle(admission, settled(4, seconds=0.05, missed=200, evictions=200, age=1))
    assert admission.eviction_age == 1 and not admission.is_thrashing
    assert admission.keep(4) == 4


# Ten working sets of 300 rows fit. Beyond, a request's misses rise from 12 rows to all, 110.
SOME = replace(LIMITS, hot_rows=3000)


def steady(link, seconds, batches=(5, 10), **changes):
    """Has seen these batches, whose steps take seconds(n) of computing, and 12 rows a request."""
    admission = Admission(replace(SOME, **changes), link)
    admission.observe_working_sets([(10_000, 300)], 1.0)
    for n in batches:
        fetch = 12 * n * SOME.row_bytes / link
        settle(admission, settled(n, seconds=seconds(n) + fetch, missed=12 * n))
    return admission


def rate(admission, n):
    return float(admission._rate(np.array([n]), np.array([300.0 * n]), SOME.hot_rows)[0])


def test_requests_join_for_as_long_as_more_comes_out():
    """30 ms and 0.1 ms a request, 0.04 ms a missed row: past ten the misses are worth it."""
    admission = steady(2.5e7, lambda n: 0.030 + 0.0001 * n)
    count, reason = vars(admission.admit(10, [WARM] * 100)).values()
    best, rates = 10 + count, [rate(admission, n) for n in range(1, 111)]
    assert reason == "hot tier" and 15 < best < 30
    assert rates[best - 1] >= 0.98 * max(rates) > 1.1 * rates[9]
    assert rates[best - 2] < 0.98 * max(rates), "no more than it takes"
    assert admission.admit(10, [WARM] * 3).count == 3


def test_the_misses_of_a_larger_batch_count_against_the_target():
    """As above, with 50 ms a step: what each missed so far would allow far more."""
    admission = steady(2.5e7, lambda n: 0.030 + 0.0001 * n, itl_seconds=0.050)
    count, reason = vars(admission.admit(10, [WARM] * 100)).values()
    assert reason == "link" and count > 0
    assert (10 + count) / rate(admission, 10 + count) <= 0.0505
    assert (11 + count) / rate(admission, 11 + count) >= 0.0495


def test_requests_do_not_join_where_their_misses_take_more_than_they_bring():
    assert steady(LINK / 5, lambda n: 0.030).admit(10, [WARM] * 100) == Decision(0, "hot tier")
    slow = steady(2.5e7, lambda n: 0.003 * n)
    assert slow.admit(10, [WARM] * 100) == Decision(0, "hot tier"), "each computes as long"


def test_a_queue_that_is_long_enough_is_worth_missing_all():
    """Six on the rows of two thrash, 11 ms each; among a hundred the fixed 60 ms are nothing."""
    admission = steady(LINK, lambda n: 0.060 + 0.0001 * n, batches=(2, 4))
    admission.limits = replace(SOME, hot_rows=600)
    few, many = (admission.admit(4, [WARM] * n).count for n in (4, 100))
    assert few == 1 and many > 50
    assert admission.admit(4, [WARM] * 100, within=4).count == 1, "the others have no slots"


def test_one_more_shows_what_a_larger_batch_costs():
    """Ten of 30 ms: 20 may take as long, or twice that."""
    admission = steady(2.5e7, lambda n: 0.030, batches=(10,))
    assert admission.admit(10, [WARM] * 100) == Decision(1, "hot tier")
    assert admission.admit(11, [WARM] * 100) == Decision(0, "hot tier"), "not before it is seen"


def test_misses_that_are_worth_it_are_no_thrashing():
    """Twenty on the rows of ten: 30 rows a request are missed, evicted after two steps."""
    missing = dict(missed=20 * 30, evictions=20 * 30, age=2)
    cheap, dear = steady(2.5e7, lambda n: 0.030), steady(LINK / 5, lambda n: 0.030)
    settle(cheap, settled(20, seconds=0.030 + 600 / 2.5e4, **missing))
    settle(dear, settled(20, seconds=0.030 + 600 / 2e3, **missing))
    assert cheap.eviction_age == dear.eviction_age == 2
    assert not cheap.is_thrashing and cheap.keep(20) == 20
    assert dear.is_thrashing and 8 <= dear.keep(20) <= 12


def test_ids_of_a_prompt_name_the_least_that_it_needs():
    admission = make()
    admission.observe_working_sets([(10_000, 300)], 1.0)
    known = [replace(WARM, working_set=rows) for rows in (100, 2000)]
    estimates = [admission._sets.estimate(c.tokens, c.working_set) for c in known]
    assert estimates == [300, 2000]
