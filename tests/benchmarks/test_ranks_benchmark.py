"""benchmarks/serving/ranks: its figures, systems and page counts; a slow run of the real thing."""

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.harness import ROOT, Report, failed, finish, measured, ratios
from benchmarks.serving import ranks, two_tier
from benchmarks.serving.engines import page_frames
from benchmarks.serving.ranks import FITS, FULL, HEADLINE, ONE_TIER, QUICK
from benchmarks.serving.shared import parser_with_threads

SUMMARY = {
    *("host_bytes_tp1", "host_bytes_tp2", "host_bytes_tp4"),
    *("decode_tp2_vs_one_tier", "decode_tp2_vs_one_tier_hot01"),
}
IN_FULL = "_tp4", "_hot01"  # ends of figures that a quick run lacks
SPEEDS = {ONE_TIER: [10, 20], FITS: [10, 19], HEADLINE: [8, 16]}


def synthetic_report() -> Report:
    report = Report()
    for count, resident in ((1, 1000), (2, 1010), (4, 1020)):
        config = {"ranks": count}
        report.add(measured("memory", config, "resident", "B", [resident]))
        report.add(measured("memory", config, "allocated", "B", [1000]))
    for system, speeds in SPEEDS.items():
        report.add(measured("speed", {"system": system}, "decode", "tokens/s", speeds))
        paired = ratios(speeds, SPEEDS[ONE_TIER])
        report.add(measured("speed", {"system": system}, "vs_one_tier", "x", paired))
    return report


def test_summary():
    report = synthetic_report()
    ranks.summarise(report)
    assert report.summary.keys() == SUMMARY
    assert report.summary["host_bytes_tp4"] == pytest.approx(1.02)
    assert report.summary["decode_tp2_vs_one_tier"] == pytest.approx(0.975)
    assert report.summary["decode_tp2_vs_one_tier_hot01"] == pytest.approx(0.8)


def test_what_was_not_measured_is_left_out():
    report = Report()
    report.add(failed("memory", {}, "all", "", "no answer in 600 s"))
    ranks.summarise(report)
    assert report.summary == {}


def test_tables_and_plot(tmp_path, capsys):
    report = synthetic_report()
    ranks.print_tables(report)
    args = parser_with_threads("x").parse_args(["--plot", str(tmp_path / "plot.png")])
    finish(report, args, *ranks.panels(report))
    assert "host bytes of a node" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_systems_differ_in_tiers_alone(monkeypatch, tmp_path):
    monkeypatch.setenv(ranks.BIND_VAR, "")
    bench, made = two_tier.Bench(FULL, seed=0, threads=1, directory=tmp_path), []
    monkeypatch.setattr(bench, "model", lambda *_, **__: "m")

    def running(engines):
        made.extend(engines)
        raise RuntimeError("enough")

    monkeypatch.setattr(bench, "running", running)
    bench.run([ranks.speed])
    arguments = [engine._args[1] for engine in made]
    assert len(made) == len(FULL.systems) and all(one == arguments[0] for one in arguments)
    assert arguments[0]["tp_size"] == ranks.SPEED_RANKS


def test_each_rank_has_cores_of_its_own(monkeypatch):
    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda _: {0, 1, 4, 5})
    assert ranks.bound(2, 2) == "0,1|4,5"
    assert ranks.bound(4, 1) == "0|1|4|5"
    assert ranks.bound(4, 2) == "0,1|4,5|0,1|4,5"  # fewer cores than ranks want


def test_pages_are_counted_that_were_touched_and_once():
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 8 * page)  # shared and anonymous
    start = np.frombuffer(memory, np.uint8).ctypes.data
    memory[2 * page] = memory[5 * page] = 1
    with open("/proc/self/pagemap", "rb") as pagemap:
        try:
            found = page_frames(pagemap, start, 8 * page)
        except PermissionError:
            pytest.skip("page numbers need root")
        assert len(found) == len(set(found)) == 2
        assert page_frames(pagemap, start + 1, 3 * page - 1) == found[:1]  # whole pages alone


@pytest.mark.slow
def test_quick_run(tmp_path):
    json_path = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.serving.ranks", "--quick"]
    command += ["--json", str(json_path), "--plot", str(tmp_path / "out.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(json_path.read_text())["summary"]
    assert summary.keys() == {key for key in SUMMARY if not key.endswith(IN_FULL)}
    assert summary["host_bytes_tp2"] <= 1.02
    assert QUICK.ranks == (1, 2)
