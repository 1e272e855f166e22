"""ESS's Table 2 from its baselines: nothing predicted is fitted, and the targets are met."""

import dataclasses
import json

import pytest

from benchmarks.sim import ess_fit, published, reproduce_ess
from benchmarks.sim.ess_fit import PAPER, Point, fit_compute, fit_overlap, require_unseen
from benchmarks.sim.published import BASELINES, ESS_ROWS, K
from benchmarks.sim.reproduce_ess import POINTS, Reproduction, interpolated
from sglang_ess.sim.inputs.specs import load


@pytest.fixture(scope="module")
def made():
    return Reproduction(interpolated, POINTS)


def test_the_tables_are_whole():
    assert (len(BASELINES), len(ESS_ROWS)) == (4, 14)
    assert len(published.FIGURE5) == published.LAYERS
    assert published.FIGURE5.mean() == pytest.approx(182, abs=1)
    gains = {row: row.throughput / BASELINES[0].throughput - 1 for row in ESS_ROWS}
    best = max(gain for row, gain in gains.items() if (row.queries, row.context) == (2, 32 * K))
    assert best == pytest.approx(published.GAIN_32K, abs=1e-3)
    assert ESS_ROWS[-1].throughput / BASELINES[-1].throughput - 1 == pytest.approx(
        published.GAIN_128K, abs=1.2e-3
    )


def test_misses_pass_through_the_figures():
    for context, curve in published.FIGURE9.items():
        for ratio, misses in curve.items():
            assert published.mean_misses(context, ratio) == pytest.approx(misses)
            assert published.layer_misses(context, ratio).mean() == pytest.approx(misses)
    assert published.mean_misses(32 * K, 1.0) == 0
    assert 80 < published.mean_misses(32 * K, 0.35) < 103


def test_the_fit_uses_baselines_and_figure_1_alone():
    names = [point.name for point in POINTS]
    assert len(names) == len(set(names)) == 3 + 4
    assert {n for n in names if not n.startswith("figure 1")} <= {r.name for r in BASELINES}


@pytest.mark.parametrize("row", [ESS_ROWS[0], ESS_ROWS[-1]])
def test_an_ess_row_is_refused_by_the_fit(row):
    with pytest.raises(AssertionError, match=f"predicted rows must not be fitted: got {row.name}"):
        fit_compute(load("calibration", "ess-paper"), [*POINTS, Point.of(row)])
    renamed = dataclasses.replace(Point.of(row), name="something else")
    with pytest.raises(AssertionError, match="fitted rows must have no ESS"):
        fit_compute(load("calibration", "ess-paper"), [*POINTS, renamed])


def test_a_prediction_of_a_fitted_row_is_refused(made):
    with pytest.raises(AssertionError, match="predicted rows must not be fitted: got a."):
        require_unseen(["a", "b"], ["a", "c"])
    corrupt = Reproduction.__new__(Reproduction)
    corrupt.__dict__ |= made.__dict__ | {"points": [*made.points, Point.of(ESS_ROWS[3])]}
    with pytest.raises(AssertionError, match="32K batch 160"):
        corrupt.errors()


def test_the_calibration_file_is_the_fit(made):
    kept = load("calibration", "ess-paper")
    for name in (*ess_fit.COMPUTE, *ess_fit.OVERLAP):
        assert getattr(made.calibration, name) == pytest.approx(getattr(kept, name), rel=0.005)


def test_a_fit_does_not_depend_on_where_it_begins(made, monkeypatch):
    for name in ("COMPUTE", "OVERLAP"):
        start = getattr(ess_fit, name)
        monkeypatch.setattr(ess_fit, name, {key: 0.5 * value for key, value in start.items()})
    again = fit_overlap(fit_compute(load("calibration", "ess-paper"), POINTS))
    assert dataclasses.astuple(again) == pytest.approx(
        dataclasses.astuple(made.calibration), rel=1e-3
    )


def test_fitted_rows_and_figure_7_come_back(made):
    assert made.fit_error() < 0.005
    for mode, figures in published.FIGURE7.items():
        for misses, us in zip(published.FIGURE7_MISSES, figures, strict=True):
            found = ess_fit.figure7_us(made.calibration, mode, misses)
            assert found == pytest.approx(us, abs=6)


def test_predicted_rows_meet_the_targets(made):
    errors = abs(made.errors())
    assert len(errors) == len(ESS_ROWS)
    assert errors.mean() <= 0.03
    assert errors.max() <= 0.07
    assert 0.6 < made.gain(32 * K) < 0.8
    assert 1.0 < made.gain(128 * K) < 1.4
    on, off, best = (made.gain_64k(choices) for choices in ((True,), (False,), (True, False)))
    assert off < best < on


def test_two_batch_overlap_at_128k_does_not_fit_the_baselines(made):
    on = ess_fit.Reading(long_changes={"two_batch_overlap": True})
    assert PAPER.model(made.calibration, 2, 128 * K).deployment.two_batch_overlap is False
    assert Reproduction(interpolated, POINTS, on).fit_error() > 10 * made.fit_error()


def test_the_command_writes_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce_ess, "generated", lambda row, count, seed: interpolated(row))
    monkeypatch.setattr(
        reproduce_ess, "other_readings",
        lambda misses, other, name: {f"misses {name}": Reproduction(other, POINTS)},
    )  # fmt: skip
    found, plot = tmp_path / "found.json", tmp_path / "found.png"
    status = reproduce_ess.main(["--quick", "--json", str(found), "--plot", str(plot)])
    content = json.loads(found.read_text())
    assert status == bool(reproduce_ess.missed_targets(content["summary"]))
    assert all(row["kind"] == "simulated" for row in content["rows"])
    table = [row for row in content["rows"] if row["name"] == "table2"]
    roles = {row["config"]["ratio"] == 1: row["role"] for row in table}
    assert roles == {True: "fit", False: "predicted"}
    assert len(table) == len(published.TABLE2)
    assert plot.stat().st_size > 10_000
    assert "paper tok/s" in capsys.readouterr().out


def test_a_missed_target_is_named():
    good = {"mean_abs_error": 0.03, "max_abs_error": 0.07, "best_batch_mtp4": 128}
    assert reproduce_ess.missed_targets(good) == []
    for name, value in (
        ("mean_abs_error", 0.031), ("max_abs_error", float("nan")), ("best_batch_mtp4", 160)
    ):  # fmt: skip
        assert reproduce_ess.missed_targets(good | {name: value}) == [name]
