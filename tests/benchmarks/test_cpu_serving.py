"""benchmarks/serving/cpu_serving: how passes are read, figures; one slow run of the real thing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.harness import ROOT, Report, failed, finish, measured
from benchmarks.serving import cpu_serving
from benchmarks.serving.cpu_figures import (
    HEADLINE,
    PARTS,
    RATIOS,
    SPLIT_BATCH,
    WARMUP_STEPS,
    Timing,
    panels,
    print_tables,
    read_run,
    summarise,
    timing_rows,
    windows,
)
from benchmarks.serving.shared import VOCABULARY, prompts_of

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


class TestReadRun:
    def test_windows_see_rare_long_steps(self):
        steps = [1.0] * 7 + [9.0] + [1.0] * 8 + [1.0] * 3
        assert windows(steps) == [2.0, 1.0]
        assert windows([1.0, 3.0]) == [2.0]

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
        arguments = ["--plot", str(tmp_path / "plot.png")]
        finish(report, cpu_serving.parser().parse_args(arguments), *panels(report))
        printed = capsys.readouterr().out
        assert "decode_vs_transformers" in printed and "4096" in printed
        assert "not measured: decode of serving transformers 2048 4: out of memory" in printed
        lines = printed.partition("milliseconds of a decode step")[2].splitlines()[3:6]
        assert [line.split()[:2] for line in lines] == [
            ["bf16", "1024"], ["bf16", "2048"], ["bf16", "4096"],
        ]  # fmt: skip
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

    def test_help(self):
        command = [sys.executable, "-m", "benchmarks.serving.cpu_serving", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "--quick" in done.stdout

    def test_the_driver_does_not_import_torch(self):
        code = "import sys, benchmarks.serving.cpu_serving; sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    @pytest.mark.parametrize("grid", [cpu_serving.QUICK, cpu_serving.FULL])
    def test_grids_measure_what_the_summary_needs(self, grid):
        assert HEADLINE in grid.ours_fp8
        assert HEADLINE not in grid.points  # measured in rounds
        growth = {(SPLIT_BATCH, context) for context in grid.growth}
        assert growth - {HEADLINE} <= grid.points
        points = (*grid.ours, *grid.ours_fp8, *growth)
        assert all(grid.slots > batch * (context + grid.steps + 64) for batch, context in points)

    def test_prompts_are_distinct_and_repeatable(self):
        one, two = (np.array(prompts_of(0, 4, 32, salt)) for salt in (0, 1))
        assert one.shape == (4, 32) and one.max() < VOCABULARY
        assert len(np.unique(np.concatenate([one, two]), axis=0)) == 8
        assert (one == prompts_of(0, 4, 32)).all()


@pytest.mark.slow
def test_quick_run(tmp_path):
    json_path, png_path = tmp_path / "out.json", tmp_path / "out.png"
    command = [sys.executable, "-m", "benchmarks.serving.cpu_serving", "--quick"]
    command += ["--json", str(json_path), "--plot", str(png_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(json_path.read_text())
    assert data["summary"].keys() == SUMMARY_KEYS
    assert all(value > 0 for value in data["summary"].values()), data["summary"]
    assert png_path.read_bytes().startswith(b"\x89PNG")
    assert "decode_vs_transformers" in done.stdout
