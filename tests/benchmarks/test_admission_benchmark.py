"""benchmarks/sim/admission.py: what its summary compares, and that its rules differ."""

import pytest

from benchmarks.harness import Report
from benchmarks.sim import admission as benchmark
from benchmarks.sim.admission import OFF, ON, SETS, Point, WorkingSetsAlone
from sglang_ess.admission.policy import (
    HOT_TIER,
    Admission,
    AdmissionLimits,
    Candidate,
    Decision,
    Step,
)


def test_each_rule_is_compared_at_its_worst_and_best_point():
    found = {}
    for hot_rows, speeds in ((100, (50, 200, 190)), (200, (400, 100, 500)), (300, (10, 10, 10))):
        for rule, speed in zip((OFF, SETS, ON), speeds, strict=True):
            found[Point("pcie4", 1.0, hot_rows, rule)] = {"tokens_per_s": float(speed)}
    report = Report()
    benchmark.summarise(report, found)
    assert report.summary == pytest.approx(
        {
            "worst_on": 0.95,
            "worst_working_sets": 0.25,
            "best_on": 3.8,
            "best_on_against_better": 1.25,
        }
    )


def test_a_point_is_a_scenario():
    scenario = benchmark.scenario_of(Point("pcie5", 0.5, 12345, ON), requests=7)
    assert (scenario.link, scenario.memory.link_share) == ("pcie5", 0.5)
    assert (scenario.memory.hot_rows, scenario.arrivals.requests) == (12345, 7)


def observed(policy=Admission) -> Admission:
    """Two run on the rows of one working set and a half, where misses are worth it."""
    admission = policy(AdmissionLimits(hot_rows=450, topk=100, layers=1, row_bytes=1000), 1e7)
    for n in (1, 2):
        for _ in range(12):
            admission.observe(Step(1, n, 0.030, 0, 0, 0))
    return admission


def test_the_rule_of_working_sets_admits_what_fits():
    queue = [Candidate(10_000, cold=False)] * 4
    assert observed(WorkingSetsAlone).admit(2, queue) == Decision(0, HOT_TIER)
    assert observed().admit(2, queue).count > 0
