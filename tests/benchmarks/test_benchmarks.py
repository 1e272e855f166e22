"""The benchmarks' own arithmetic, files and processes; one slow run of the real thing."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks import cpu_serving, hot_cache
from benchmarks.common import (
    ROOT,
    OtherLoad,
    Report,
    Worker,
    WorkerError,
    failed,
    find,
    measured,
    ratios,
    save_figure,
    table,
)
from benchmarks.serving_report import (
    HEADLINE,
    RATIOS,
    SPLIT_BATCH,
    draw,
    print_tables,
    split_lines,
    summarise,
    timing_rows,
    windows,
)
from benchmarks.serving_systems import PARTS, WARMUP_STEPS, Timing, read_run
from tests.support.calculator import Calculator

ROW_KEYS = {"name", "kind", "config", "metric", "unit", "median", "p10", "p90", "n", "load1"}
MACHINE_KEYS = {"cpu", "cores", "memory_gib", "loadavg_start", "loadavg_end"}
VERSION_KEYS = {"python", "sglang", "torch", "numba", "transformers", "commit", "dirty"}
SUMMARY_KEYS = {
    *RATIOS.values(),
    "attention_growth",
    "indexer_growth",
    "context_growth",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "fp8_prefill_tokens_per_s",
    "fp8_decode_tokens_per_s",
    "transformers_prefill_tokens_per_s",
    "transformers_decode_tokens_per_s",
}


def passes_of(batch, context, steps, step=0.04, cached=0, ops=(0.01, 0.002, 0.005)):
    """A synthetic OurEngine.generate(): two extend passes from 1.0 to 3.0 s, then decode."""
    ops = dict(zip(("indexer", "topk", "attention"), ops, strict=True))
    half = (batch * context - cached) // 2
    found = [
        {"mode": "EXTEND", "batch": batch, "tokens": half, "start": at, "end": at + 0.9, **ops}
        for at in (1.0, 2.1)
    ]
    for i in range(steps + WARMUP_STEPS + 1):
        start = 4.0 + step * i + (0.5 if i > WARMUP_STEPS + 2 else 0)  # one slow step
        decode = {"mode": "DECODE", "batch": batch, "tokens": 0}
        found.append(decode | {"start": start, "end": start + 0.9 * step, **ops})
    return {"submitted": 0.5, "passes": found, "cached": cached}


class TestRows:
    def test_percentiles(self):
        row = measured("op", {"a": 1}, "time", "ms", range(1, 12))
        assert (row["p10"], row["median"], row["p90"], row["n"]) == (2, 6, 10, 11)
        assert row["mean"] == 6 and row["kind"] == "measured"
        single = measured("op", {}, "time", "ms", [3.5])
        assert single["p10"] == single["median"] == single["p90"] == 3.5

    def test_no_samples_is_a_failed_row(self):
        row = measured("op", {}, "time", "ms", [])
        assert row["kind"] == "failed" and row["median"] is None and row["error"] == "no samples"

    def test_ratios_are_paired(self):
        assert ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
        assert ratios([2.0, 30.0], [1.0]) == [2.0]

    def test_find_skips_failures(self):
        rows = [
            measured("op", {"b": 1, "c": 2}, "t", "ms", [1]),
            failed("op", {"b": 1}, "t", "ms", ""),
        ]
        assert find(rows, "op", "t", b=1) is rows[0]
        assert find(rows, "op", "t", b=2) is None

    def test_windows_see_rare_long_steps(self):
        steps = [1.0] * 7 + [9.0] + [1.0] * 8 + [1.0] * 3
        assert windows(steps) == [2.0, 1.0]
        assert windows([1.0, 3.0]) == [2.0]


class TestReport:
    def test_required_keys(self, tmp_path):
        report = Report()
        report.add(measured("op", {"a": 1}, "t", "ms", [1, 2]), failed("op", {}, "t", "ms", "OOM"))
        report.summarise("speed", 2)
        report.summarise("absent", None)
        path = tmp_path / "deep" / "out.json"
        report.write(path, seed=3, arch="v32")
        data = json.loads(path.read_text())
        assert {"machine", "versions", "command", "seed", "config", "rows", "summary"} <= set(data)
        assert data["machine"].keys() >= MACHINE_KEYS
        assert data["versions"].keys() >= VERSION_KEYS
        assert data["versions"]["sglang"] == "0.5.23"
        assert all(row.keys() >= ROW_KEYS for row in data["rows"])
        assert data["rows"][1]["error"] == "OOM" and data["rows"][1]["median"] is None
        assert data["summary"] == {"speed": 2.0} and data["seed"] == 3

    def test_table(self):
        assert table(["name", "x"], [["a", 1.23456], ["b", None], ["c", 12345.6]]).splitlines() == [
            "name      x",
            "----  -----",
            "   a   1.23",
            "   b      -",
            "   c  12346",
        ]

    def test_other_load_is_a_ratio(self):
        load = OtherLoad()
        time.sleep(0.05)
        assert 0 <= load.ratio() <= 1


class TestReadRun:
    def test_times_and_split(self):
        timing = read_run(passes_of(16, 64, steps=6), 16, 64)
        assert timing.prefill == [pytest.approx(3.0 - 0.5)]
        assert timing.steps == pytest.approx([0.04, 0.04, 0.54, 0.04, 0.04, 0.04])
        assert timing.split["indexer"] == pytest.approx([0.01] * 6)
        assert timing.split["rest"] == pytest.approx([0.023, 0.023, 0.523, 0.023, 0.023, 0.023])
        assert timing.prefill_split["attention"] == pytest.approx([0.01])
        assert timing.prefill_split["rest"] == pytest.approx([2.5 - 0.034])

    def test_a_cached_prefix_is_no_prefill(self):
        run = passes_of(4, 64, steps=2, cached=64)
        with pytest.raises(ValueError, match="64 cached"):
            read_run(run, 4, 64)
        assert read_run(run, 4, 64, fresh=False).prefill == []

    def test_a_retraction_is_refused(self):
        run = passes_of(4, 64, steps=2)
        run["passes"][1]["tokens"] += 64
        with pytest.raises(ValueError, match="must prefill 4 x 64 tokens: got 320"):
            read_run(run, 4, 64)
        run = passes_of(4, 64, steps=2)
        run["passes"][-1]["batch"] = 3
        with pytest.raises(ValueError, match=r"batch 4: got \[3, 4\]"):
            read_run(run, 4, 64)

    def test_rows(self):
        timing = read_run(passes_of(SPLIT_BATCH, 64, steps=6), SPLIT_BATCH, 64)
        timing += timing
        rows = timing_rows(timing, {"batch": SPLIT_BATCH, "context": 64}, note=1)
        by_metric = {(row["name"], row["metric"]): row for row in rows}
        assert by_metric["serving", "prefill"]["median"] == pytest.approx(16 * 64 / 2.5)
        assert by_metric["serving", "decode_step"]["n"] == 12
        assert by_metric["serving", "decode_step"]["median"] == pytest.approx(40)
        assert by_metric["serving", "decode"]["n"] == 1  # one window of 8 steps, one is slow
        assert {metric for name, metric in by_metric if name == "step_split"} == set(PARTS)
        shares = [by_metric["prefill_split", part]["median"] for part in PARTS]
        assert sum(shares) == pytest.approx(1)
        assert all(row["note"] == 1 for row in rows)
        alone = timing_rows(timing, {"batch": 1, "context": 64})
        assert {row["name"] for row in alone} == {"serving"}


def synthetic_report() -> Report:
    """Rows of a run in which attention is flat and the indexer doubles with the context."""
    report, (batch, context) = Report(), HEADLINE
    ours = {"system": "sglang-ess", "waits": "ours", "batch": batch}
    for scale, tokens in ((1, 1024), (2, context), (4, 4096)):
        for kv in ("bf16", "fp8_e4m3"):
            run = passes_of(batch, tokens, steps=8, ops=(0.001 * scale, 0.001, 0.005))
            config = ours | {"context": tokens, "kv": kv}
            report.add(*timing_rows(read_run(run, batch, tokens), config))
    theirs = {"system": "transformers", "context": context}
    report.add(*timing_rows(Timing(steps=[0.4] * 8), theirs | {"batch": batch}))
    report.add(*timing_rows(Timing(prefill=[1.0]), theirs | {"batch": 1}))
    report.add(failed("serving", theirs | {"batch": 4}, "decode", "tokens/s", "out of memory"))
    for name in RATIOS.values():
        report.add(measured(name, {"batch": batch}, "speedup", "x", [8.0, 10.0, 12.0]))
    return report


class TestSummary:
    def test_numbers(self):
        report = synthetic_report()
        summarise(report, (1024, 4096))
        assert report.summary.keys() == SUMMARY_KEYS
        assert report.summary["attention_growth"] == pytest.approx(1)
        assert report.summary["indexer_growth"] == pytest.approx(4)
        assert report.summary["context_growth"] == 4
        assert report.summary["decode_vs_transformers"] == 10
        assert report.summary["transformers_decode_tokens_per_s"] == pytest.approx(40)

    def test_what_was_not_measured_is_left_out(self):
        report = synthetic_report()
        summarise(report, (1024, 8192))
        assert SUMMARY_KEYS - report.summary.keys() == {"attention_growth", "indexer_growth"}

    def test_tables_and_plot(self, tmp_path, capsys):
        report = synthetic_report()
        summarise(report, (1024, 4096))
        print_tables(report)
        printed = capsys.readouterr().out
        assert "decode_vs_transformers" in printed and "4096" in printed
        assert "not measured: decode of transformers 2048 4: out of memory" in printed
        lines = split_lines(report, system="sglang-ess", kv="bf16")
        assert [context for context, _ in lines] == [1024, 2048, 4096]
        save_figure(tmp_path / "plot.png", lambda axes: draw(report, axes))
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

    def test_one_round(self):
        ours = Timing(prefill=[4.0], steps=[0.04, 0.04, 0.1])
        libgomp = Timing(steps=[0.02, 0.02, 0.5])
        found = cpu_serving.compare(
            ours, libgomp, decode=Timing(steps=[0.6, 0.6]), prefill=Timing(prefill=[0.5])
        )
        assert found.keys() == RATIOS.keys()
        assert found["decode"] == pytest.approx(10)
        assert found["prefill"] == pytest.approx(0.5 * HEADLINE[0] / 4.0)
        assert found["spin"] == pytest.approx(3)
        assert found["spin_median"] == pytest.approx(0.5)


class TestCommandLine:
    def test_options(self):
        options = cpu_serving.parser().parse_args(
            ["--quick", "--json", "a.json", "--plot", "a.png", "--seed", "7", "--arch", "glm"]
        )
        assert options.quick and options.seed == 7 and options.arch == "glm"
        assert options.json.name == "a.json" and options.plot.name == "a.png"
        assert options.threads == len(os.sched_getaffinity(0))
        defaults = cpu_serving.parser().parse_args([])
        assert not defaults.quick and defaults.json is None and defaults.arch == "v32"

    def test_an_unknown_arch_is_refused(self, capsys):
        with pytest.raises(SystemExit):
            cpu_serving.parser().parse_args(["--arch", "llama"])
        assert "v32" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "start", [["-m", "benchmarks.cpu_serving"], ["benchmarks/cpu_serving.py"]]
    )
    def test_help_by_both_ways(self, start):
        command = [sys.executable, *start, "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "--quick" in done.stdout

    def test_the_driver_does_not_import_torch(self):
        code = "import sys, benchmarks.cpu_serving; sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    @pytest.mark.parametrize("plan", [cpu_serving.QUICK, cpu_serving.FULL])
    def test_plans_measure_what_the_summary_needs(self, plan):
        assert HEADLINE in plan.ours_fp8
        assert HEADLINE not in plan.ours and HEADLINE not in plan.theirs  # measured in rounds
        points = (*plan.ours, *plan.ours_fp8, *((SPLIT_BATCH, c) for c in plan.growth))
        assert all(plan.slots > batch * (context + plan.steps + 64) for batch, context in points)

    def test_prompts_are_distinct_and_repeatable(self):
        one, two = (np.array(cpu_serving.prompts_of(0, 4, 32, salt)) for salt in (0, 1))
        assert one.shape == (4, 32) and one.max() < cpu_serving.VOCABULARY
        assert len(np.unique(np.concatenate([one, two]), axis=0)) == 8
        assert (one == cpu_serving.prompts_of(0, 4, 32)).all()


class TestWorker:
    def test_environment_and_errors(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BENCH_GONE", "1")
        env = {"BENCH_HERE": "yes", "BENCH_GONE": None}
        with Worker(Calculator, env=env, log=tmp_path / "log") as worker:
            assert worker.call("environment", "BENCH_HERE") == "yes"
            assert worker.call("environment", "BENCH_GONE") is None
            assert os.environ["BENCH_GONE"] == "1" and "BENCH_HERE" not in os.environ
            with pytest.raises(WorkerError, match="ZeroDivisionError: division by zero"):
                worker.call("divide", 1, 0)
            assert worker.call("divide", 6, 3) == 2

    def test_a_dead_process_is_replaced(self, tmp_path):
        with Worker(Calculator, log=tmp_path / "log") as worker:
            with pytest.raises(WorkerError, match="died.*last words"):
                worker.call("die")
            assert worker.call("divide", 6, 3) == 2
            with pytest.raises(WorkerError, match="no answer in 0 s"):
                worker.call("sleep", 60, timeout=0.2)
            assert worker.call("divide", 8, 2) == 4

    def test_too_much_memory_is_an_error(self, tmp_path):
        with Worker(Calculator, log=tmp_path / "log", memory_gib=1) as worker:
            with pytest.raises(WorkerError, match="MemoryError"):
                worker.call("allocate", 2)
            assert worker.call("divide", 6, 3) == 2


@pytest.mark.slow
def test_quick_run(tmp_path):
    json_path, png_path = tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, "-m", "benchmarks.cpu_serving", "--quick"]
    command += ["--json", str(json_path), "--plot", str(png_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(json_path.read_text())
    assert data["summary"].keys() == SUMMARY_KEYS
    assert all(value > 0 for value in data["summary"].values()), data["summary"]
    assert all(row.keys() >= ROW_KEYS for row in data["rows"])
    assert png_path.read_bytes().startswith(b"\x89PNG")
    assert "decode_vs_transformers" in done.stdout


def test_hot_cache(tmp_path, monkeypatch, capsys):
    """The whole of benchmarks.hot_cache on a context small enough for a test."""
    for name, value in {"CONTEXT": 8192, "TOPK": 256, "CORE": 512, "NUM_LAYERS": 2}.items():
        monkeypatch.setattr(hot_cache, name, value)
    trace = hot_cache.Trace(2, cold_ratio=0.1, seed=1)
    before, after = trace.step(), trace.step()
    for request in range(2):
        assert len(np.unique(after[request])) == 256
        assert np.isin(after[request], trace.slots[request]).all()
        assert 0.5 < np.isin(after[request], before[request]).mean() < 0.8
    json_path, png_path = tmp_path / "out.json", tmp_path / "out.png"
    threads = torch.get_num_threads()
    hot_cache.main(["--quick", "--json", str(json_path), "--plot", str(png_path)])
    torch.set_num_threads(threads)
    data = json.loads(json_path.read_text())
    assert {"lookups_per_s", "roof_lookups_per_s", "share_of_roof", "hit_lookups_per_s",
            "fetch_gb_per_s", "memcpy_gb_per_s", "sustained_lookups_per_s",
            "ordered_dict_lookups_per_s"} <= data["summary"].keys()  # fmt: skip
    assert all(value > 0 for value in data["summary"].values()), data["summary"]
    assert 0.05 < data["summary"]["miss_ratio"] < 0.15
    assert all(row.keys() >= ROW_KEYS for row in data["rows"])
    assert png_path.read_bytes().startswith(b"\x89PNG")
    assert "share_of_roof" in capsys.readouterr().out
