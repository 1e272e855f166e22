"""benchmarks/serving/two_tier: its windows, sizes and figures; one slow run of the real thing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.harness import ROOT, Report, failed, finish, measured
from benchmarks.serving import two_tier
from benchmarks.serving.engines import SETTLED_PASSES, is_settled, pool_bytes
from benchmarks.serving.shared import parser_with_threads
from benchmarks.serving.two_tier_figures import (
    HEADLINE,
    ONE_TIER,
    STEP_FIGURES,
    WORKLOADS,
    Window,
    buys_rows,
    panels,
    prefill_tokens_per_s,
    print_tables,
    summarise,
)
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.capacity import Geometry
from sglang_ess.testing.tiny_model import TinyModelConfig

GRIDS = [two_tier.QUICK, two_tier.FULL]
QUICK_SUMMARY = {
    *("requests_ratio", "decode_ratio", "shared_requests_ratio", "shared_decode_ratio"),
    *("hit_rate_unshared", "hit_rate_shared", "slots_ratio", "retractions"),
    *(
        f"{metric}_{name}"
        for name in ("one_tier", "ess")
        for metric in ("device_bytes", "host_bytes", "slots", "requests", "decode_tokens_per_s")
    ),
    *("step_resident", "step_ratio02", "step_resident_median_step", "step_ratio02_median_step"),
    "prefill_ratio",
}


def decode_passes(batch, steps, step=0.1, misses=0, layers=2, **more):
    """steps + 1 decode passes; each layer looks up 10 rows a pass and misses `misses`."""
    counted = layers if misses is not None else 0
    return [
        {"mode": "DECODE", "batch": batch, "start": 5 + i * step, "retracted": 0, "kept": batch}
        | {"lookups": [10 * i] * counted, "misses": [(misses or 0) * i] * counted}
        | more
        for i in range(steps + 1)
    ]


class TestWindow:
    def test_figures(self):
        window = Window(decode_passes(4, steps=8, step=0.5, misses=3))
        assert window.steps == pytest.approx([0.5] * 8)
        assert window.batch == 4 and window.tokens_per_s == pytest.approx(8)
        assert window.hit_rates == pytest.approx([0.7, 0.7])
        assert window.hit_rate == pytest.approx(0.7)
        assert window.misses_per_step == pytest.approx(6)

    def test_only_full_decode_steps_count(self):
        passes = decode_passes(4, steps=3)
        for change in ({"mode": "EXTEND"}, {"batch": 3}, {"retracted": 1}):
            with pytest.raises(ValueError, match="decode passes of one batch, none retracted"):
                Window([*passes[:-1], passes[-1] | change])

    def test_settled_is_decode_passes_in_a_row(self):
        decode = decode_passes(4, steps=SETTLED_PASSES)
        assert is_settled(decode[:SETTLED_PASSES])
        assert not is_settled(decode[: SETTLED_PASSES - 1])
        assert not is_settled([*decode, {"mode": "EXTEND"}, *decode[: SETTLED_PASSES - 1]])

    def test_prefill_speed(self):
        extends = [
            {"mode": "EXTEND", "tokens": 100, "start": at, "end": at + 1.0} for at in (1.0, 3.0)
        ]
        run = {"passes": [*extends, *decode_passes(1, 2)]}
        assert prefill_tokens_per_s(run, 200) == pytest.approx(200 / 3)
        with pytest.raises(ValueError, match="prefill 300 tokens: got 200"):
            prefill_tokens_per_s(run, 300)


@pytest.mark.parametrize("grid", GRIDS)
class TestGrids:
    """The sizes of both parts, with the arithmetic that the servers do."""

    def test_what_the_headline_needs_is_measured(self, grid):
        assert two_tier.ess_name(grid.ratios[0]) == HEADLINE
        names = [two_tier.ess_name(ratio) for ratio in grid.cost_ratios]
        assert names[:2] == list(STEP_FIGURES)[:2] and set(names) <= set(STEP_FIGURES)

    def test_the_bytes_hold_what_the_figures_promise(self, grid):
        """One-tier runs 4 requests; ESS, from the same bytes, at least 3.5 times as many."""
        total, need = two_tier.device_bytes(grid), grid.request_tokens
        geometry = Geometry(
            layers=two_tier.LAYERS,
            row_bytes=two_tier.FP8_ROW_BYTES,
            index_bytes=two_tier.LAYERS * two_tier.INDEX_KEY_BYTES,
            topk=TinyModelConfig().index_topk,
            context_tokens=need + two_tier.PAGE,
            page_slots=two_tier.PAGE,
        )
        one_tier = two_tier.one_tier_slots(grid)
        ess = capacity.max_slots(EssConfig(hot_ratio=grid.ratios[0]), geometry, total, 1 << 40)
        assert one_tier // need == 4 and ess // need >= 14
        assert ess // need < two_tier.SUBMITTED
        rows = capacity.hot_rows_at(grid.ratios[0], geometry, ess)
        assert geometry.device_bytes(ess, rows) <= total

    def test_requests_outlast_the_windows(self, grid):
        steps = grid.rounds * (grid.steps + two_tier.DROPPED_PASSES + 1) + SETTLED_PASSES
        assert grid.new_tokens > steps
        assert grid.prompt + grid.new_tokens < grid.request_tokens
        steps = grid.cost_rounds * (grid.cost_steps + two_tier.DROPPED_PASSES + 1) + SETTLED_PASSES
        assert grid.cost_new_tokens > steps

    def test_part_b_has_slots_for_all(self, grid):
        request = two_tier.COST_CONTEXT + grid.cost_new_tokens
        assert grid.cost_slots >= two_tier.COST_BATCH * (request + two_tier.PAGE)
        assert grid.cost_slots > two_tier.PREFILL_CONTEXT + two_tier.PAGE


class TestSystems:
    def test_constants_are_capacitys(self):
        assert two_tier.MINIMUM_HOT_ROWS == capacity.MIN_HOT_ROWS
        assert two_tier.LAYERS == TinyModelConfig(**two_tier.BUYS_MODEL).layers

    def test_shared_prompts(self):
        prompts = two_tier.shared_prompts(seed=3, prompt=200)
        assert len(prompts) == two_tier.SUBMITTED * two_tier.QUESTIONS
        assert {len(prompt) for prompt in prompts} == {200}
        document = 200 - two_tier.QUESTION_TOKENS
        starts = {tuple(prompt[:document]) for prompt in prompts}
        assert len(starts) == two_tier.SUBMITTED
        assert prompts[0][:document] == prompts[two_tier.QUESTIONS - 1][:document]
        assert len({tuple(prompt) for prompt in prompts}) == len(prompts)

    def test_both_sides_get_the_same_arguments(self, tmp_path):
        bench = two_tier.Bench(two_tier.FULL, seed=0, threads=2, directory=tmp_path)
        for engines in two_tier.buys_engines(bench, "m"), two_tier.cost_engines(bench, "m"):
            arguments = [engine._args[1] for engine in engines.values()]
            assert all(args == arguments[0] for args in arguments)
            configs = {
                name: EssConfig.from_env(engine._env).enabled for name, engine in engines.items()
            }
            assert configs == {name: name != ONE_TIER for name in engines}

    def test_systems_start_and_end_together(self, tmp_path):
        done = []

        class Engine:
            def __init__(self, name):
                self.name = name

            def __enter__(self):
                return self

            def __exit__(self, *_):
                done.append(("close", self.name))

            def __getattr__(self, method):
                return lambda *_: done.append((method, self.name))

        bench = two_tier.Bench(two_tier.QUICK, seed=0, threads=2, directory=tmp_path)
        with bench.running([Engine("a"), Engine("b")]):
            done.append("run")
        assert done == [
            *(("start", name) for name in "ab"), *(("wait", name) for name in "ab"), "run",
            *(("hang_up", name) for name in "ab"), *(("close", name) for name in "ba"),
        ]  # fmt: skip

    def test_turns_rotate(self):
        asked = []

        class Engine:
            def __init__(self, name):
                self.name = name

            def call(self, method, steps):
                asked.append(self.name)
                return decode_passes(2, steps)

        windows = two_tier.take_turns({name: Engine(name) for name in "abc"}, rounds=3, steps=4)
        assert "".join(asked) == "abcbcacab"
        assert [len(found) for found in windows.values()] == [3, 3, 3]

    def test_a_part_that_fails_leaves_the_other(self, tmp_path):
        def broken(bench):
            raise RuntimeError("greedy tokens must be one-tier's")

        def works(bench):
            bench.report.add(measured("costs", {"system": "ess 1"}, "step_ratio", "x", [1.0]))

        bench = two_tier.Bench(two_tier.QUICK, seed=0, threads=2, directory=tmp_path)
        bench.run((broken, works))
        assert bench.report.rows[0]["error"].startswith("greedy tokens")
        assert bench.report.median("costs", "step_ratio", system="ess 1") == 1

    def test_pool_bytes(self):
        class Pool:
            kv_buffer = [np.zeros((64, 1, 656), np.uint8)] * 3
            index_k_with_scale_buffer = [np.zeros((1, 64 * 132), np.uint8)] * 3

        sizes = pool_bytes(Pool)
        assert sizes["device_bytes"] == 3 * 64 * (656 + 132)
        assert (sizes["host_bytes"], sizes["hot_rows"], sizes["row_bytes"]) == (0, 0, 656)


def synthetic_report() -> Report:
    """ESS runs four times the requests at twice the step, missing 1 row in 5."""
    report = Report()
    sizes = {"device_bytes": 80, "host_bytes": 0, "slots": 100, "hot_rows": 0}
    for workload in WORKLOADS:
        one_tier = [Window(decode_passes(4, 8, 0.1, misses=None)) for _ in "12"]
        ess = [Window(decode_passes(16, 8, 0.2, misses=2)) for _ in "12"]
        config = {"workload": workload}
        rows = buys_rows(one_tier, one_tier, sizes, config | {"system": ONE_TIER}, 0)
        assert "hit_rate" not in {row["metric"] for row in rows}
        report.add(*rows)
        ours = sizes | {"slots": 390, "hot_rows": 39, "host_bytes": 300}
        report.add(*buys_rows(ess, one_tier, ours, config | {"system": HEADLINE}, 0))
    for i, system in enumerate((ONE_TIER, *STEP_FIGURES)):
        config = {"system": system, "batch": 16}
        for metric in ("step_ratio", "step_ratio_median"):
            report.add(measured("costs", config, metric, "x", [1 + i / 10]))
    report.add(measured("costs", {"system": "ess 0.2"}, "prefill_ratio", "x", [0.9]))
    report.add(failed("buys", {}, "all", "", "no answer in 600 s"))
    return report


class TestReport:
    def test_summary(self):
        report = synthetic_report()
        summarise(report)
        found = report.summary
        assert found.keys() >= QUICK_SUMMARY
        assert found["requests_ratio"] == 4 and found["decode_ratio"] == pytest.approx(2)
        assert found["shared_decode_ratio"] == pytest.approx(2)
        assert found["hit_rate_unshared"] == pytest.approx(0.8)
        assert found["slots_ratio"] == pytest.approx(3.9) and found["retractions"] == 0
        assert (found["step_resident"], found["step_ratio02"]) == (1.1, 1.2)
        assert (found["step_ratio01"], found["step_minimum"]) == (1.3, 1.4)

    def test_what_was_not_measured_is_left_out(self):
        report = Report()
        report.add(measured("costs", {"system": "ess 0.2"}, "step_ratio", "x", [1.1]))
        summarise(report)
        assert report.summary == {"step_ratio02": 1.1}

    def test_tables_and_plot(self, tmp_path, capsys):
        report = synthetic_report()
        summarise(report)
        print_tables(report)
        arguments = ["--plot", str(tmp_path / "plot.png")]
        finish(report, parser_with_threads("x").parse_args(arguments), *panels(report))
        printed = capsys.readouterr().out
        assert "requests_ratio" in printed
        assert "not measured: all of buys : no answer" in printed
        assert "unshared  one-tier" in printed
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class TestCommandLine:
    def test_options(self):
        options = parser_with_threads(two_tier.__doc__).parse_args(
            ["--quick", "--json", "a.json", "--plot", "a.png", "--seed", "7"]
        )
        assert options.quick and options.seed == 7 and options.json.name == "a.json"
        assert options.threads == len(os.sched_getaffinity(0))

    def test_help(self):
        command = [sys.executable, "-m", "benchmarks.serving.two_tier", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "--quick" in done.stdout

    def test_the_driver_does_not_import_torch(self):
        code = "import sys, benchmarks.serving.two_tier; sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_quick_run(tmp_path):
    json_path, png_path = tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, "-m", "benchmarks.serving.two_tier", "--quick"]
    command += ["--json", str(json_path), "--plot", str(png_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(json_path.read_text())
    assert data["summary"].keys() == QUICK_SUMMARY
    assert data["summary"]["device_bytes_ess"] <= data["summary"]["device_bytes_one_tier"]
    assert data["summary"]["requests_ratio"] >= 3.5 and data["summary"]["retractions"] == 0
    assert not [row for row in data["rows"] if row["kind"] == "failed"]
    assert png_path.read_bytes().startswith(b"\x89PNG")
