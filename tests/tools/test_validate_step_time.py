"""tools/validate_step_time: planted coefficients come back, and only half is ever fitted."""

import numpy as np
import pytest

from benchmarks.harness import Report, plot, print_summary
from benchmarks.serving.engines import DROPPED_PASSES, SETTLED_PASSES
from benchmarks.serving.two_tier_figures import Window
from tests.benchmarks.test_two_tier_benchmark import decode_passes
from tools import validate_step_time
from tools.validate_step_time import PAGE, TERMS, Point, errors, fit, halves, judge, terms

PLANTED = np.array([8e-3, 4e-4, 6e-8, 9e-7])  # seconds of TERMS
PLANS = [validate_step_time.QUICK, validate_step_time.FULL]


def points_of(plan=validate_step_time.FULL, noise=0.0, seed=0) -> list[Point]:
    """Steps that take what PLANTED says, and noise; rows in no relation to the tokens."""
    random, found = np.random.default_rng(seed), []
    for ratio in plan.ratios:
        for batch, context in plan.shapes:
            rows = 0.0 if ratio == 1 else batch * random.uniform(50, 400)
            at = [Point(f"ess {ratio}", batch, context, batch * context, rows, (1.0,))]
            (seconds,) = terms(at) @ PLANTED * random.normal(1, noise)
            found.append(Point(*[getattr(at[0], name) for name in CONFIG], (seconds,) * 3))
    return found


CONFIG = ("system", "batch", "context", "tokens", "rows")


@pytest.mark.parametrize("plan", PLANS)
def test_the_fit_recovers_planted_coefficients(plan):
    fitted, predicted = halves(points_of(plan), seed=1)
    assert fit(fitted) == pytest.approx(PLANTED, rel=1e-6)
    assert np.abs(errors(predicted, fit(fitted))).max() < 1e-9


def test_halves_part_the_points_and_follow_the_seed():
    points = points_of()
    fitted, predicted = halves(points, seed=0)
    assert sorted(map(id, fitted + predicted)) == sorted(map(id, points))
    assert 0 <= len(fitted) - len(predicted) <= 1
    assert halves(points, seed=0) == (fitted, predicted)
    assert halves(points, seed=1) != (fitted, predicted)


def test_what_is_predicted_is_not_fitted():
    """Steps of the predicted half that take twice as long leave the fit, and are errors of half."""
    points = points_of()
    _, predicted = halves(points, seed=0)
    slow = [
        Point(*[getattr(p, name) for name in CONFIG], tuple(2 * step for step in p.steps))
        if p in predicted
        else p
        for p in points
    ]
    report = Report(machine={})
    assert judge(report, slow, seed=0) == pytest.approx(PLANTED, rel=1e-6)
    assert report.summary["mean_abs_error"] == pytest.approx(0.5)
    assert report.summary["max_abs_error"] == pytest.approx(0.5)


def test_rows_and_summary():
    points, report = points_of(noise=0.03), Report(machine={})
    coefficients = judge(report, points, seed=0)
    assert coefficients == pytest.approx(PLANTED, rel=0.5) and (coefficients >= 0).all()
    assert len(report.rows) == 2 * len(points)
    assert [row["kind"] for row in report.rows[:2]] == ["measured", "simulated"]
    found = [
        row["error"]
        for row in report.rows
        if row["kind"] == "simulated" and row["config"]["half"] == "predicted"
    ]
    summary = report.summary
    assert summary["mean_abs_error"] == pytest.approx(np.abs(found).mean())
    assert summary["max_abs_error"] == pytest.approx(np.abs(found).max())
    assert (summary["points"], summary["predicted_points"]) == (len(points), len(found))
    assert 0.005 < summary["mean_abs_error"] < 0.06 and 0 < summary["swapped_mean_abs_error"]
    assert summary["fixed_ms"] == pytest.approx(1e3 * coefficients[TERMS.index("fixed")])
    assert summary["token_ns"] == pytest.approx(1e9 * coefficients[TERMS.index("token")])


def test_no_coefficient_is_negative():
    """A row that seems to save time costs nothing instead."""
    points = [
        Point(*[getattr(p, name) for name in CONFIG], (p.seconds - 1e-6 * p.rows,))
        for p in points_of()
    ]
    assert fit(points)[TERMS.index("row")] == 0


@pytest.mark.parametrize("same", ["batch", "rows"])
def test_points_that_do_not_tell_the_terms_apart_are_refused(same):
    value = {"batch": 4, "rows": 0.0}[same]
    points = [
        Point(**{name: getattr(p, name) for name in CONFIG} | {same: value}, steps=p.steps)
        for p in points_of()
    ]
    with pytest.raises(ValueError, match="points must differ in batch, context and rows fetched"):
        fit(points)


def test_a_point_of_windows():
    passes = decode_passes(4, steps=8, step=0.5, misses=3, context_tokens=4000)
    point = Point.of("ess 0.1", 4, 1000, [Window(passes)] * 2)
    assert (point.rows, point.tokens) == (6, 4000)
    assert point.seconds == pytest.approx(0.5) and len(point.steps) == 16
    with pytest.raises(ValueError, match="ess 0.1 must decode 3 requests: got 4"):
        Point.of("ess 0.1", 3, 1000, [Window(passes)])


@pytest.mark.parametrize("plan", PLANS)
class TestPlans:
    def test_points_suffice_for_halves(self, plan):
        assert len(plan.shapes) * len(plan.ratios) >= 4 * len(TERMS)
        assert len({context for _, context in plan.shapes}) > 1
        fit(halves(points_of(plan), seed=0)[0])

    def test_every_request_has_its_slots_to_the_end(self, plan):
        steps = plan.rounds * (plan.steps + DROPPED_PASSES + 1) + SETTLED_PASSES
        assert plan.new_tokens > steps
        for batch, context in plan.shapes:
            assert plan.slots >= batch * (context + plan.new_tokens + PAGE)


def test_tables_and_plot(tmp_path, capsys):
    report = Report(machine={})
    judge(report, points_of(noise=0.05), seed=0)
    panels = validate_step_time.output(report)
    print_summary(report)
    printed = capsys.readouterr().out
    assert "mean_abs_error" in printed and "predicted ms" in printed
    assert printed.count("ess 0.") + printed.count("ess 1.") == report.summary["predicted_points"]
    plot(tmp_path / "a.png", *panels)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
