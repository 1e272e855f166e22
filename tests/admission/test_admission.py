"""Admission: each rule alone, and properties over random states. Closed loops are in
test_admission_loops.py, what misses are worth in test_admission_misses.py.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.admission import policy as module
from sglang_ess.admission.policy import (
    Admission,
    AdmissionLimits,
    Candidate,
    Decision,
    Step,
)
from sglang_ess.admission.step_fit import StepFit

# Prior: 300 rows a request, so 20 fill the hot tier. A cold joiner fetches 100 rows, 10 ms.
LIMITS = AdmissionLimits(hot_rows=6000, topk=100, layers=1, row_bytes=1000)
LINK = 1e7
LONG = Candidate(tokens=10_000)
WARM = replace(LONG, cold=False)


def make(limits=LIMITS, **changes):
    return Admission(replace(limits, **changes), LINK)


def settled(running, seconds=0.0, missed=0, evictions=0, age=10, steps=1):
    """A step; age: of each eviction."""
    return Step(steps, running, seconds, missed, evictions, evictions * age)


def thrashing(running):
    return settled(running, missed=running * 50, evictions=running * 50, age=1)


def observe(admission, step, times):
    for _ in range(times):
        admission.observe(step)


def settle(admission, step):
    """As many observations as make joiners warm, and a verdict possible."""
    observe(admission, step, module.JOIN_STEPS + module.THRASH_STEPS)


# --- hot tier ----------------------------------------------------------------------------------


def test_working_sets_fill_the_hot_tier():
    admission = make()
    assert admission.admit(0, [LONG] * 30) == Decision(20, "hot tier")
    assert admission.deferred == {"hot tier": 1, "link": 0, "thrash": 0}
    assert admission.working_set_rows == 300


def test_short_requests_and_known_working_sets_take_what_they_have():
    assert make().admit(0, [Candidate(tokens=60)] * 150) == Decision(100, "hot tier")
    assert make().admit(0, [Candidate(10_000, working_set=600)] * 30) == Decision(10, "hot tier")
    assert make().admit(0, [LONG] * 20) == Decision(20, None)


def test_what_runs_counts_with_its_mean():
    admission = make()
    admission.admit(0, [Candidate(10_000, working_set=500)] * 10)
    assert admission.hot_tier_demand == 0
    assert admission.admit(10, [LONG] * 10) == Decision(3, "hot tier")
    assert admission.hot_tier_demand == pytest.approx(10 * 5900 / 13)


def test_measured_sets_and_sharing_replace_the_prior():
    admission = make()
    admission.observe_working_sets([(10_000, 200), (10_000, 200)], sharing=0.5)
    assert admission.admit(0, [LONG] * 100) == Decision(60, "hot tier")
    assert admission.admit(60, []) == Decision(0, None)
    assert admission.hot_tier_demand == 6000


def test_a_hot_tier_of_all_slots_never_binds():
    admission = make(num_slots=6000)
    assert admission.admit(0, [LONG] * 100) == Decision(100, None)
    assert admission.admit(100, [LONG]) == Decision(1, None)


# --- link --------------------------------------------------------------------------------------


def test_without_a_target_the_link_does_not_bind():
    admission = make()
    settle(admission, settled(2, seconds=10.0))
    assert admission.admit(2, [LONG] * 5) == Decision(5, None)


def test_starts_slowly():
    """Nothing is known of compute(n): one, then no more than twice what was observed."""
    admission = make(itl_seconds=1.0)
    assert admission.admit(0, [LONG] * 10) == Decision(1, "link")
    settle(admission, settled(1, seconds=0.01))
    assert admission.admit(1, [LONG] * 10) == Decision(1, "link")
    settle(admission, settled(2, seconds=0.01))
    assert admission.admit(2, [LONG] * 10) == Decision(2, "link")


def observed_line(**changes):
    """20 ms + 1 ms a request, seen at n = 4, 8 and 12, and 1 ms for its 10 steady misses."""
    admission = make(**changes)
    for n in (4, 8, 12):
        settle(admission, settled(n, seconds=0.020 + 0.002 * n, missed=10 * n))
    return admission


def test_the_step_is_predicted():
    admission = observed_line()
    admission.admit(12, [])
    assert admission.step_seconds == pytest.approx(0.044, rel=0.02)
    admission.admit(16, [])
    assert admission.step_seconds == pytest.approx(0.052, rel=0.03)
    admission.link(LINK / 2)
    assert admission.step_seconds == pytest.approx(0.052 + 0.016, rel=0.03)


def test_the_predicted_step_keeps_the_target():
    assert observed_line(itl_seconds=0.0545).admit(12, [WARM] * 8) == Decision(4, "link")


def test_cold_joiners_take_the_link_in_their_first_step():
    # 12 + 1: 46 ms and 10 ms for the cold one; two of them: 48 + 20.
    assert observed_line(itl_seconds=0.057).admit(12, [LONG] * 8) == Decision(1, "link")


def test_no_variation_is_taken_as_proportional():
    admission = make(itl_seconds=0.100)
    settle(admission, settled(10, seconds=0.080))
    assert admission.admit(10, [WARM] * 8).count == 2


def test_one_is_tried_where_the_slope_is_unknown():
    """30 ms at n = 1 may be 30 ms at n = 2: else a target of 50 ms would mean one for ever."""
    admission = make(itl_seconds=0.050)
    settle(admission, settled(1, seconds=0.030))
    assert admission.admit(1, [WARM] * 8) == Decision(1, "link")
    assert admission.admit(2, [WARM] * 8) == Decision(0, "link"), "not before it is observed"
    settle(admission, settled(2, seconds=0.032))
    assert admission.admit(2, [WARM] * 8) == Decision(2, "link")
    admission = make(itl_seconds=0.050)
    settle(admission, settled(1, seconds=0.046))
    assert admission.admit(1, [WARM] * 8) == Decision(0, "link"), "0.9 of the target is taken"
    admission = make(itl_seconds=0.050)
    settle(admission, settled(2, seconds=0.040))
    assert admission.admit(2, [WARM] * 8) == Decision(1, "link"), "one, where slow start has two"


@given(
    st.floats(0, 0.1),
    st.floats(0, 0.01),
    st.lists(st.integers(1, 200), min_size=2, max_size=8, unique=True).filter(
        lambda n: max(n) >= 2 * min(n)
    ),
)
def test_the_fit_finds_the_line(intercept, slope, sizes):
    fit = StepFit()
    for n in sizes:
        fit.add(n, intercept + slope * n, steps=5)
    seconds = [fit.seconds(n) for n in range(1, 201)]
    assert (np.diff(seconds) >= -1e-9).all()
    for n in sizes:  # the ridge draws it to the proportional: by less than a third here
        assert fit.seconds(n) == pytest.approx(intercept + slope * n, rel=0.33, abs=1e-9)


def test_a_falling_line_is_flat():
    fit = StepFit()
    fit.add(10, 0.05, 1)
    fit.add(20, 0.03, 1)
    assert fit.seconds(100) == pytest.approx(fit.seconds(1)) == pytest.approx(0.04, rel=0.01)


def test_tokens_of_one_step_share_its_time():
    """1.7 tokens a step: the target of a token is 1.7 times that of a step."""
    step = settled(8, seconds=0.040)
    admission = make(itl_seconds=0.030)
    settle(admission, step)
    assert admission.admit(8, [WARM]) == Decision(0, "link")
    admission = make(itl_seconds=0.030)
    settle(admission, replace(step, tokens=1.7))  # 51 ms a step, 5 ms a request
    assert admission.admit(8, [WARM] * 4) == Decision(2, "link")
    settle(admission, replace(step, tokens=1.0))
    assert admission.admit(8, [WARM]).count == 0, "the drafts are no longer accepted"


def test_a_cold_joiner_fetches_the_union_of_its_lists():
    """Of 4 lists of 100 rows, 150 distinct rows a step: 15 ms instead of 10."""

    def admitted(queries, itl):
        admission = make(itl_seconds=itl, hot_rows=10**6, queries=queries)
        growth = np.linspace(min(queries, 1.5) * 100, 400, 12)
        for _ in range(30):
            admission.observe_working_sets([(10_000, 400)], 1.0, growth)
        settle(admission, settled(4, seconds=0.020))
        return admission.admit(4, [LONG]).count

    assert admitted(1, 0.036) == admitted(4, 0.041) == 1  # 5 ms of compute a request
    assert admitted(4, 0.038) == 0


def test_misses_are_judged_by_what_a_step_selects():
    """13 misses a request and step are an eighth of one list, and less than that of two lists."""
    step = settled(10, seconds=1e-4, missed=130, evictions=130, age=1)
    admission = make(queries=1)
    settle(admission, step)
    assert admission.is_thrashing
    admission = make(queries=2)
    settle(admission, step)
    assert not admission.is_thrashing
    settle(admission, settled(10, seconds=1e-4, missed=200, evictions=200, age=1))
    assert admission.is_thrashing


# --- queue -------------------------------------------------------------------------------------


def test_a_request_that_fits_nowhere_runs_alone():
    huge = Candidate(10**6, working_set=10**6)
    admission = make(itl_seconds=1e-6)
    assert admission.admit(0, [huge, LONG]) == Decision(1, "hot tier")
    assert admission.admit(1, [LONG]) == Decision(0, "hot tier")
    assert admission.admit(0, [LONG]) == Decision(1, None)


def test_nobody_overtakes():
    huge, tiny = Candidate(10**6, working_set=5900), Candidate(1)
    assert make().admit(1, [tiny, huge, tiny]) == Decision(1, "hot tier")


def test_a_refusal_lasts_until_the_load_has_fallen():
    admission = make()
    assert admission.admit(20, [LONG]).reason == "hot tier"
    assert admission.admit(19, [LONG]).reason == "hot tier"
    assert admission.admit(18, [LONG]).reason == "hot tier"
    assert admission.admit(17, [LONG] * 5) == Decision(3, "hot tier")
    admission = make()
    assert admission.admit(19, [LONG]) == Decision(1, None), "open without a refusal"


def test_a_refusal_by_the_link_lasts_too():
    admission = observed_line(itl_seconds=0.0545)
    assert admission.admit(16, [WARM]).reason == "link"
    assert admission.admit(15, [WARM]).reason == "link"  # over 50 ms; 90 % are 49
    assert admission.admit(13, [WARM] * 9) == Decision(3, "link")


def test_load_at_the_limit_does_not_flap():
    """One leaves and one waits, for ever, with noisy measurements: rarely is the door opened."""
    rng = np.random.default_rng(0)
    admission, running, openings, was_open = make(), 20, 0, False
    for step in range(1000):
        running -= step % 10 == 0 and running > 0
        admission.observe_working_sets([(10_000, int(300 + rng.normal(0, 15)))] * 4, 1.0)
        count = admission.admit(running, [LONG] * 4).count
        openings += count > 0 and not was_open
        was_open = count > 0
        running += count
    assert 16 <= running <= 22
    assert openings <= 60, "less than one opening per leaver"


# --- thrash ------------------------------------------------------------------------------------


def test_a_thrashing_hot_tier_sheds():
    admission = make()
    settle(admission, thrashing(10))
    assert admission.is_thrashing
    assert admission.eviction_age == 1
    assert admission.keep(10) == 9
    assert admission.retractions == 1
    assert admission.keep(9) == 9, "not again in the cooldown"
    assert admission.admit(9, [LONG]) == Decision(0, "thrash")
    assert admission.admit(8, [LONG] * 3) == Decision(1, "thrash")
    assert admission.deferred["thrash"] == 2


def test_sheds_what_the_working_sets_say_and_never_the_last():
    admission = make()
    admission.observe_working_sets([(10_000, 1000)], 1.0)
    settle(admission, thrashing(10))
    assert admission.keep(10) == 6
    admission = make(hot_rows=1000)
    admission.observe_working_sets([(10_000, 1000)], 1.0)
    settle(admission, thrashing(10))
    assert admission.keep(10) == 1
    settle(admission, replace(thrashing(1), steps=module.COOLDOWN_STEPS))
    assert admission.keep(1) == 1
    assert not admission.is_thrashing


def test_sheds_again_after_the_cooldown_only():
    admission = make()
    settle(admission, thrashing(16))
    assert admission.keep(16) == 14
    steps = 0
    while admission.keep(14) == 14:
        admission.observe(thrashing(14))
        steps += 1
    assert steps == module.COOLDOWN_STEPS
    assert admission.retractions == 3


@pytest.mark.parametrize(
    "step",
    [
        settled(10, missed=500),
        settled(10, missed=500, evictions=500, age=4),
        settled(10, missed=100, evictions=100, age=1),
    ],
    ids=["no evictions", "old rows", "few misses"],
)
def test_health(step):
    admission = make()
    settle(admission, step)
    assert not admission.is_thrashing
    assert admission.keep(10) == 10


def test_one_verdict_takes_steps():
    admission = make()
    observe(admission, thrashing(10), module.JOIN_STEPS + module.THRASH_STEPS - 1)
    assert not admission.is_thrashing
    admission.observe(thrashing(10))
    assert admission.is_thrashing
    settle(admission, settled(10))
    assert not admission.is_thrashing
    assert admission.eviction_age is None


def test_the_cap_rises_in_health_and_more_slowly_after_each_shed():
    def steps_until_open(admission, running):
        for step in range(10_000):
            if admission.admit(running, [replace(LONG, working_set=1)]).count:
                return step
            admission.observe(settled(running))
        raise AssertionError("capped for ever")

    admission, times = make(), []
    for _ in range(3):
        settle(admission, thrashing(10))
        observe(admission, thrashing(10), module.COOLDOWN_STEPS)
        assert admission.keep(10) == 9
        times.append(steps_until_open(admission, 9))
    assert times == [module.COOLDOWN_STEPS * factor for factor in (1, 2, 4)]
    for running in range(10, 20):
        steps_until_open(admission, running)
    assert module.COOLDOWN_STEPS <= steps_until_open(admission, 20) <= 30


def test_cold_joiners_do_not_count():
    """Their misses are neither the steady ones nor a thrash."""
    admission = make()
    settle(admission, settled(4, missed=40))
    before = admission.step_seconds
    observe(admission, thrashing(8), module.JOIN_STEPS)
    admission.admit(4, [])
    assert admission.step_seconds == before
    assert admission.eviction_age is None


def test_joins_that_never_pause_do_not_hide_a_thrash():
    admission = make()
    for step in range(200):
        admission.observe(thrashing(10 + step % 2))
    assert admission.is_thrashing


# --- properties --------------------------------------------------------------------------------

candidates = st.builds(
    Candidate,
    tokens=st.integers(1, 20_000),
    working_set=st.none() | st.integers(1, 2000),
    cold=st.booleans(),
)
queues = st.lists(candidates, max_size=30)
histories = st.lists(
    st.builds(
        settled,
        running=st.integers(1, 40),
        seconds=st.floats(0, 0.2),
        missed=st.integers(0, 4000),
        evictions=st.integers(0, 4000),
        age=st.integers(0, 20),
        steps=st.integers(0, 12),
    ),
    max_size=12,
)
measured = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(1, 20_000), st.integers(1, 900)), max_size=4),
              st.floats(0.1, 1)),
    max_size=3,
)  # fmt: skip


def after(limits, history, windows):
    admission = Admission(limits, LINK)
    for step in history:
        admission.observe(step)
    for samples, sharing in windows:
        admission.observe_working_sets(samples, sharing)
    return admission


@settings(max_examples=100, deadline=None)
@given(histories, measured, st.integers(0, 40), queues, queues, st.none() | st.floats(0.01, 0.3))
def test_those_behind_change_nothing(history, windows, running, queue, behind, itl):
    limits = replace(LIMITS, itl_seconds=itl)
    alone = after(limits, history, windows).admit(running, queue)
    longer = after(limits, history, windows).admit(running, queue + behind)
    assert longer.count >= alone.count
    if alone.reason != "hot tier":  # a longer queue may be worth the misses of all
        assert alone.reason is None or longer == alone


@settings(max_examples=100, deadline=None)
@given(histories, measured, queues.filter(len), st.integers(1, 10**4), st.floats(1e-6, 0.3))
def test_floor_of_one(history, windows, queue, hot_rows, itl):
    admission = after(replace(LIMITS, hot_rows=hot_rows, itl_seconds=itl), history, windows)
    for running in (40, 3, 0):
        count = admission.admit(running, queue).count
    assert count >= 1
    assert admission.keep(1) == 1
    assert 1 <= admission.keep(12) <= 12


@settings(max_examples=100, deadline=None)
@given(histories, measured, st.integers(0, 40), queues, st.data())
def test_a_looser_target_never_admits_fewer(history, windows, running, queue, data):
    tight, loose = sorted(data.draw(st.lists(st.floats(1e-3, 0.5), min_size=2, max_size=2)))
    counts = [
        after(replace(LIMITS, itl_seconds=itl), history, windows).admit(running, queue).count
        for itl in (tight, loose, None)
    ]
    assert counts == sorted(counts)


@settings(max_examples=100, deadline=None)
@given(measured, st.integers(0, 40), queues, st.lists(st.integers(1, 10**4), min_size=2))
def test_more_hot_rows_hold_no_fewer(windows, running, queue, hot_rows):
    """Where steps are not known yet. Once they are, few hot rows may be worth ignoring."""
    counts = [
        after(replace(LIMITS, hot_rows=rows), [], windows).admit(running, queue).count
        for rows in sorted(hot_rows)
    ]
    assert counts == sorted(counts)


@pytest.mark.parametrize("field_name", ["hot_rows", "topk", "layers", "row_bytes", "itl_seconds"])
def test_refuses_limits_that_are_not_positive(field_name):
    with pytest.raises(ValueError, match=f"{field_name} must be positive: got 0"):
        make(**{field_name: 0})


def test_refuses_no_bandwidth():
    with pytest.raises(ValueError, match="link bandwidth must be positive: got 0"):
        Admission(LIMITS, 0)
