"""The harness of the benchmarks: rows, files, tables, plots, workers; and all of hot_cache."""

import json
import os
import time

import numpy as np
import pytest
import torch

from benchmarks import hot_cache
from benchmarks.harness import (
    OtherLoad,
    Panel,
    Report,
    argument_parser,
    failed,
    field_of,
    find,
    finish,
    measured,
    pivot,
    plot,
    print_table,
    ratios,
    simulated,
    spread,
    table,
)
from tests.support.calculator import Calculator
from tools.worker import Worker, WorkerError

ROW_KEYS = {"name", "kind", "config", "metric", "unit", "median", "p10", "p90", "n", "load1"}
MACHINE_KEYS = {"cpu", "cores", "memory_gib", "loadavg_start", "loadavg_end"}
VERSION_KEYS = {"python", "sglang", "torch", "numba", "transformers", "commit", "dirty"}


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

    def test_a_config_may_have_a_kind_and_rows_of_its_own(self):
        report = Report(machine={})
        for kind, rate in (("fetch", 4), ("memcpy", 18)):
            report.add(measured("copy", {"kind": kind, "rows": 8}, "rate", "GB/s", [rate]))
        assert report.median("copy", "rate", kind="fetch", rows=8) == 4
        assert report.figure("copy", rows=8) == 18 and report.select("copy", rows=9) == []


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


def grid() -> Report:
    """Two systems at three batches, each with a published figure, and a point that failed."""
    report = Report(machine={})
    for system, factor in (("one", 1.0), ("two", 2.0)):
        for batch in (1, 2, 4):
            config = {"system": system, "batch": batch}
            published = 9.0 * batch if batch > 1 else None
            report.add(
                simulated("grid", config, "speed", "1/s", [10 * factor * batch], paper=published),
                measured("grid", config, "busy", "ratio", [0.1, 0.2, 0.3]),
            )
    report.add(failed("grid", {"system": "one", "batch": 8}, "speed", "1/s", "out of memory"))
    report.summarise("best", 80)
    return report


class TestOutput:
    def test_a_field_is_of_the_config_or_of_the_row(self):
        row = grid().rows[0]
        assert field_of(row, "batch") == 1 and field_of(row, "median") == 10
        assert field_of(row, "absent") is None
        assert field_of(row, lambda row: row["n"]) == 1

    def test_selecting(self):
        report = grid()
        assert len(report.select("grid")) == 13 and len(report.select(kind="failed")) == 1
        assert report.figure("grid", "speed", system="two", batch=4) == 80
        assert report.figure("grid", "busy", key="p10", system="two", batch=4) > 0.1
        assert report.figure("grid", "speed", system="three") is None
        assert report.median("grid", "speed", system="two", batch=4) is None  # not measured

    def test_a_pivot_has_a_column_for_each_metric(self):
        lines = pivot(grid().select("grid"), ("system", "batch"))
        assert lines[0] == {"system": "one", "batch": 1, "speed": 10, "busy": 0.2}
        assert len(lines) == 7 and lines[-1]["speed"] is None
        by_system = pivot(grid().select(metric="speed"), ("batch",), "system")
        assert by_system[2] == {"batch": 4, "one": 40, "two": 80}
        assert pivot(grid().rows, ("absent",)) == []

    def test_a_table_of_rows(self, capsys):
        columns = {"batch": "batch", "share": "median:.0%", "all": spread,
                   "twice": lambda row: 2 * row["n"]}  # fmt: skip
        print_table(grid().select(metric="busy", system="one"), columns, "Busy")
        lines = capsys.readouterr().out.strip().splitlines()
        assert lines[0] == "Busy" and len(lines) == 6
        assert lines[3].split() == ["1", "20%", "0.2", "[0.12,", "0.28]", "6"]
        print_table([], columns)
        assert capsys.readouterr().out == ""

    def test_lines_of_a_panel_are_its_series(self):
        rows = grid().select(metric="speed")
        names = [name for name, _ in Panel(rows, "batch", series="system").lines()]
        assert names == ["one", "two"]
        both = Panel(rows, "batch", series=("system", "metric"))
        found = {name: len(line) for name, line in both.lines()}
        assert found == {"one, speed": 3, "two, speed": 3}  # the failed point has no median

    def test_the_end_of_a_run(self, tmp_path, capsys):
        files = ["--quick", "--json", f"{tmp_path}/a.json", "--plot", f"{tmp_path}/a.png"]
        rows = grid().select(metric="speed")
        panels = [
            Panel(rows, "batch", series="system", points="paper", levels={"limit": 50}),
            Panel(rows, "batch", series="system", kind="bar", axes={"ylabel": "1/s"}),
            Panel(rows, "batch", series="system", kind="stack"),
        ]
        finish(grid(), argument_parser("A run.\n\nMore.").parse_args(files), *panels, extra=3)
        printed = capsys.readouterr().out
        assert "not measured: speed of grid one 8: out of memory" in printed and "best" in printed
        data = json.loads((tmp_path / "a.json").read_text())
        assert data["quick"] is True and data["config"] == {"quick": True, "extra": 3}
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        plot(tmp_path / "one.png", panels[0])
        assert (tmp_path / "one.png").stat().st_size > 5000


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
            "fetch_gb_per_s", "memcpy_gb_per_s",
            "sustained_lookups_per_s"} <= data["summary"].keys()  # fmt: skip
    assert all(value > 0 for value in data["summary"].values()), data["summary"]
    assert 0.05 < data["summary"]["miss_ratio"] < 0.15
    assert all(row.keys() >= ROW_KEYS for row in data["rows"])
    assert png_path.read_bytes().startswith(b"\x89PNG")
    assert "share_of_roof" in capsys.readouterr().out
