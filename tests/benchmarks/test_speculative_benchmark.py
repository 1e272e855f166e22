"""benchmarks/serving/speculative: its figures, sizes and systems; a slow run of the real thing."""

import json
import subprocess
import sys

import pytest

from benchmarks.harness import ROOT, Report, computed, failed, finish
from benchmarks.serving import speculative, two_tier
from benchmarks.serving.shared import parser_with_threads
from benchmarks.serving.speculative import BATCH, FITS, FULL, HEADLINE, ONE_TIER, PLAIN, QUICK
from benchmarks.serving.two_tier_figures import Window, buys_rows
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.capacity import Geometry
from sglang_ess.testing.tiny_model import TinyModelConfig

SPEED = FULL.systems
IN_FULL = "_2_queries", "_hot01"  # ends of figures that a quick run lacks
SUMMARY = {
    *("two_tier_vs_one_tier", "two_tier_vs_one_tier_hot01", "two_tier_vs_one_tier_2_queries"),
    *("speculation_gain", "speculation_gain_2_queries"),
    *("speculation_gain_one_tier", "speculation_gain_one_tier_2_queries"),
    *("accept_length", "accept_length_2_queries"),
    *("requests_ratio", "slots_ratio", "retractions", "requests_ratio_v32", "requests_ratio_glm52"),
}


def passes(kept, batch=BATCH, step=0.1, mode="DECODE", misses=3):
    """A pass for each of `kept`, the tokens it adds; one layer that misses `misses` rows a pass."""
    return [
        {"mode": mode, "batch": batch, "start": 5 + i * step, "retracted": 0, "kept": tokens}
        | {"lookups": [10 * i], "misses": [misses * i]}
        for i, tokens in enumerate(kept)
    ]


class TestFigures:
    def test_tokens_are_those_that_were_kept(self):
        """The last pass only ends the step before it."""
        window = Window(passes([8, 4, 12, 16], step=0.5))
        assert window.kept == 24 and window.tokens_per_s == pytest.approx(16)
        assert speculative.accept_length(window) == pytest.approx(2)

    def test_only_whole_batches_count(self):
        run = [
            *passes([0], mode="EXTEND"), *passes([2], batch=BATCH - 1), *passes([8, 8, 8]),
            *passes([6], batch=BATCH - 1),
        ]  # fmt: skip
        window = speculative.whole_batches({"passes": run})
        assert window.batch == BATCH and window.kept == 16 and len(window.steps) == 2

    def test_ratios_are_paired_by_round(self):
        """A round that is half as fast for all changes no ratio."""
        windows = {
            key: [Window(passes([4 * key[1]] * 4, step=step)) for step in (0.1, 0.2)]
            for key in SPEED
        }
        rows = speculative.speed_rows(windows[FITS, 4], windows, FITS, 4, threads=2)
        found = {row["metric"]: row for row in rows}
        for metric, ratio in (("vs_one_tier", 1), ("gain", 4)):
            row = found[metric]
            assert (row["p10"], row["p90"]) == pytest.approx((ratio, ratio))
        assert found["decode"]["p10"] < 0.6 * found["decode"]["p90"]
        plain = speculative.speed_rows(windows[ONE_TIER, 1], windows, ONE_TIER, 1, threads=2)
        assert {row["metric"] for row in plain} == {"decode", "decode_step", "accept_length"}


class TestSystems:
    def test_what_is_compared_is_measured(self):
        for grid in QUICK, FULL:
            assert {(system, PLAIN) for system in (ONE_TIER, FITS)} <= {*grid.systems}
            assert {(ONE_TIER, queries) for _, queries in grid.systems} <= {*grid.systems}

    def test_systems_differ_in_tiers_and_drafts_alone(self, monkeypatch, tmp_path):
        bench = two_tier.Bench(FULL, seed=0, threads=2, directory=tmp_path)
        made = []
        monkeypatch.setattr(bench, "model", lambda *_, **__: "m")

        def running(engines):
            made.extend(engines)
            raise RuntimeError("enough")

        monkeypatch.setattr(bench, "running", running)
        bench.run((speculative.speed, speculative.batch))
        drafts = [key for key in speculative.drafting(2)]
        for engines in made[: len(SPEED)], made[len(SPEED) :]:
            arguments = [dict(engine._args[1]) for engine in engines]
            for args in arguments:
                for key in drafts:
                    args.pop(key, None)
            assert all(args == arguments[0] for args in arguments)
        widths = [e._args[1].get("speculative_num_draft_tokens", 1) for e in made[: len(SPEED)]]
        assert widths == [queries for _, queries in SPEED]
        ratios = [EssConfig.from_env(engine._env).hot_ratio for engine in made[: len(SPEED)]]
        assert ratios == [speculative.SYSTEMS[name].get("hot_ratio") for name, _ in SPEED]
        limits = {EssConfig.from_env(engine._env).device_gib for engine in made[len(SPEED) :]}
        assert len(made) == len(SPEED) + 2 and len(limits) == 1 and None not in limits

    @pytest.mark.parametrize("grid", [QUICK, FULL])
    def test_the_bytes_hold_what_the_figures_promise(self, grid):
        """One tier runs 4 requests; ESS at least 3.3 times as many, and fewer than are sent."""
        layers = speculative.BATCH_MODEL["layers"]
        total = (two_tier.one_tier_slots(grid) + two_tier.PAGE) * speculative.CELL_BYTES
        cell = two_tier.FP8_ROW_BYTES + two_tier.INDEX_KEY_BYTES
        geometry = Geometry(
            layers=layers, row_bytes=two_tier.FP8_ROW_BYTES, draft_bytes=cell,
            index_bytes=layers * two_tier.INDEX_KEY_BYTES, page_slots=two_tier.PAGE,
            topk=speculative.BATCH_MODEL["index_topk"], queries=speculative.BATCH_QUERIES,
            context_tokens=grid.request_tokens + two_tier.PAGE,
        )  # fmt: skip
        slots = capacity.max_slots(EssConfig(hot_ratio=0.1), geometry, total, 1 << 40)
        assert two_tier.one_tier_slots(grid) // grid.request_tokens == 4
        assert 3.3 * 4 < slots // grid.request_tokens < speculative.SUBMITTED

    def test_models_are_valid(self):
        for shape in speculative.SPEED_MODEL, speculative.BATCH_MODEL:
            assert TinyModelConfig(**shape).mtp_layers == 1
        assert TinyModelConfig(**speculative.BATCH_MODEL).layers == 61


def synthetic_report() -> Report:
    report = Report()
    windows = {
        (system, queries): [
            Window(passes([BATCH * min(queries, 3)] * 5, step=0.1 * queries**0.5)) for _ in "12"
        ]
        for system, queries in SPEED
    }
    for (system, queries), found in windows.items():
        report.add(*speculative.speed_rows(found, windows, system, queries, 2))
    sizes = {"device_bytes": 80, "host_bytes": 0, "slots": 100, "hot_rows": 0}
    one_tier, ess = ([Window(passes([n] * 3, batch=n))] for n in (4, 14))
    for system, found in ((ONE_TIER, one_tier), (HEADLINE, ess)):
        rows = buys_rows(found, one_tier, sizes, {"system": system}, 0)
        report.add(*[row | {"name": "batch"} for row in rows])
    for model in speculative.CAPACITY_MODELS:
        for system, requests in ((ONE_TIER, 10), (HEADLINE, 38)):
            config = {"model": model, "system": system}
            report.add(computed("real models", config, "requests", "requests", requests))
    return report


class TestReport:
    def test_summary(self):
        report = synthetic_report()
        speculative.summarise(report)
        assert report.summary.keys() == SUMMARY
        assert report.summary["two_tier_vs_one_tier"] == pytest.approx(1)
        assert report.summary["speculation_gain"] == pytest.approx(1.5)
        assert report.summary["speculation_gain_2_queries"] == pytest.approx(2**0.5)
        assert report.summary["accept_length"] == pytest.approx(3)
        assert report.summary["requests_ratio"] == pytest.approx(3.5)
        assert report.summary["requests_ratio_v32"] == pytest.approx(3.8)

    def test_what_was_not_measured_is_left_out(self):
        report = Report()
        report.add(failed("batch", {}, "all", "", "no answer in 600 s"))
        speculative.summarise(report)
        assert report.summary == {}

    def test_tables_and_plot(self, tmp_path, capsys):
        report = synthetic_report()
        speculative.print_tables(report)
        args = parser_with_threads("x").parse_args(["--plot", str(tmp_path / "plot.png")])
        finish(report, args, *speculative.panels(report))
        assert "at equal device bytes" in capsys.readouterr().out
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_driver_does_not_import_torch():
    code = "import sys, benchmarks.serving.speculative; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_quick_run(tmp_path):
    json_path = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.serving.speculative", "--quick"]
    command += ["--json", str(json_path), "--plot", str(tmp_path / "out.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(json_path.read_text())
    assert data["summary"].keys() == {key for key in SUMMARY if not key.endswith(IN_FULL)}
    assert data["summary"]["requests_ratio"] >= 3.3 and data["summary"]["retractions"] == 0
    assert data["summary"]["accept_length"] > 1.5
