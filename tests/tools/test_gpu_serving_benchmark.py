"""tools/gpu_serving: its grid, bytes, time and losses; one slow run on the CPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.harness import ROOT, Report
from sglang_ess.attention.overlap import CostTable, Mode, OverlapPolicy
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache import capacity
from tests.tools.test_gpu_serving_figures import decoded, passes
from tools.gpu_serving import __main__ as gpu_serving
from tools.gpu_serving.__main__ import Clock, EngineWorker, Maker, Pace, Run
from tools.gpu_serving.engine import AUTO
from tools.gpu_serving.grid import (
    CPU,
    CUDA,
    ESS_SYSTEMS,
    HISPARSE,
    ONE_TIER,
    RESIDENT,
    SYSTEMS,
    Engine,
    Model,
    Point,
    Selection,
    budget_bytes,
    ess_options,
    ess_size,
    geometry,
    hisparse_bytes,
    hisparse_size,
    server_args,
)
from tools.worker import WorkerError

SLICE = Model("slice", layers=4, topk=2048, vocabulary=129_280)
TINY = Model("tiny", layers=2, topk=128, vocabulary=4096)
CASES = [(CUDA, SLICE), (CPU, TINY)]
SGLANG = Path(importlib.util.find_spec("sglang").origin).parent / "srt"


class TestGrid:
    def test_the_batches_are_those_of_the_papers_baseline(self):
        engines = {engine.name: engine for engine in Selection(CUDA, SLICE).engines()}
        largest = {
            context: max(p.batch for p in engines[ONE_TIER].points if p.context == context)
            for context in (32768, 131072)
        }
        assert largest == {32768: 52, 131072: 13}
        for context, ess in ((32768, 160), (131072, 54)):  # ESS's own, with other bytes a slot
            batch, slots, rows = ess_size(CUDA, SLICE, context)
            assert 0.85 * ess < batch <= ess
            assert slots == batch * CUDA.request_tokens(context)
            assert rows >= batch * CUDA.hot_rows(context)

    @pytest.mark.parametrize("grid, model", CASES)
    def test_every_system_but_resident_takes_the_same_bytes(self, grid, model):
        limit, page = budget_bytes(grid, model), 64 * model.layers * (656 + 132)
        engines = Selection(grid, model).engines()
        for engine in engines:
            took = engine.device_bytes(grid, model)
            if engine.system == RESIDENT:
                assert took > limit
            else:
                assert 0.999 * limit - 2 * page < took <= limit, engine.name

    def test_a_batch_more_would_not_fit(self):
        limit = budget_bytes(CUDA, SLICE)
        batch, _, _ = ess_size(CUDA, SLICE, 32768)
        request = CUDA.request_tokens(32768)
        shape = geometry(CUDA, SLICE, request + 64)
        more = (batch + 1) * request, (batch + 1) * CUDA.hot_rows(32768)
        assert shape.device_bytes(*more) > limit
        batch, rows, ratio = hisparse_size(CUDA, SLICE, 32768)
        assert rows >= batch * (CUDA.buffer + 64) and rows * ratio >= batch * request
        for other in range(2, 40):
            need = max((batch + 1) * (CUDA.buffer + 64), -(-(batch + 1) * request // other))
            assert hisparse_bytes(need, other) > limit // SLICE.layers

    @pytest.mark.parametrize("grid, model", CASES)
    def test_the_servers_decide_as_planned(self, grid, model):
        """capacity.py, asked with the options of each engine, gives its hot rows."""
        for engine in Selection(grid, model).engines():
            config = EssConfig(**ess_options(engine, grid, model))
            assert config.enabled == engine.is_ess
            if engine.is_ess:
                assert config.layer_budgets == "uniform"
                shape = geometry(grid, model, engine.context_tokens(grid))
                found = capacity.choose_capacity(config, shape, engine.slots, 1 << 50, 1 << 50)
                assert found.hot_rows == engine.hot_rows
                assert found.device_bytes == engine.device_bytes(grid, model)

    def test_server_args_are_sglangs(self):
        known = (SGLANG / "arg_groups" / "field_order.py").read_text()
        for engine in Selection(CUDA, SLICE).engines():
            args = server_args(engine, CUDA, SLICE)
            assert all(f'"{name}"' in known for name in args)
            assert set(args["cuda_graph_bs_decode"]) == {point.batch for point in engine.points}
            longest = max(point.context for point in engine.points)
            assert args["context_length"] > longest + CUDA.new_tokens
            assert args.get("enable_hisparse", False) == (engine.system == HISPARSE)
        assert "load_format" not in server_args(engine, CPU, TINY)

    def test_every_system_has_one_request_and_its_largest_batches(self):
        engines = Selection(CUDA, SLICE).engines()
        found = {
            (system, point.context, point.batch == 1)
            for engine in engines
            for system in engine.systems.values()
            for point in engine.points
            if point.batch not in CUDA.batches
        }
        everybody = {ONE_TIER, HISPARSE, RESIDENT, *CUDA.labels.values()}
        assert found == {
            (system, context, single)
            for system in everybody
            for context, single in ((32768, True), (32768, False), (131072, False))
        }
        assert [engine.system for engine in engines[:3]] == [ONE_TIER, HISPARSE, "ess off"]
        assert engines[-1].round == 1 and engines[-1].points == engines[0].points

    def test_equal_batches_have_their_upper_bound(self):
        engines = {engine.name: engine for engine in Selection(CUDA, SLICE).engines()}
        bound = set(engines[RESIDENT].points)
        for name in ("ess 32768", "ess 131072"):
            assert set(engines[name].points) <= bound
        assert len({*engines[ONE_TIER].points} | bound) >= 8  # what predict_gpu can fit

    def test_systems_and_contexts_can_be_chosen(self):
        engines = Selection(CUDA, SLICE, ("ess da", ONE_TIER)).engines()
        assert {s for engine in engines for s in engine.systems.values()} == {"ess da", ONE_TIER}
        options = gpu_serving.parser().parse_args(["--contexts", "8192", "--systems", "hisparse"])
        engines = Selection(gpu_serving.grid_of(options), SLICE, options.systems).engines()
        assert [engine.name for engine in engines] == ["hisparse 8192"]
        options = gpu_serving.parser().parse_args(["--batches", "4,400"])
        engines = Selection(gpu_serving.grid_of(options), SLICE, (ONE_TIER,)).engines()
        assert [point.batch for point in engines[0].points] == [1, 4, 52, 4, 13]
        with pytest.raises(SystemExit):
            gpu_serving.parser().parse_args(["--systems", "hispares"])

    def test_options_change_the_plan(self):
        parse = gpu_serving.parser().parse_args
        quick = gpu_serving.grid_of(parse(["--quick"]))
        assert quick.contexts == CUDA.contexts and quick.new_tokens < CUDA.new_tokens
        assert quick.windows >= 2 * len(quick.labels) and quick.new_tokens % 64 == 0
        more = gpu_serving.grid_of(parse(["--overlap-costs", "k.json", "--kv-gib-per-layer", "2"]))
        assert more.labels[AUTO] == "ess auto" and more.kv_gib_per_layer == 2
        assert more.windows >= 3 * len(more.labels)
        assert gpu_serving.grid_of(parse(["--platform", "cpu"])) == CPU

    def test_every_mode_is_captured(self, tmp_path):
        """The cost table of an engine whose modes take turns lets the server capture all."""
        make = Maker(CUDA, SLICE, tmp_path, "stream", "")
        for engine in Selection(CUDA, SLICE).engines():
            config = EssConfig.from_env(make.environment(engine))
            assert bool(config.overlap_costs) == (len(engine.systems) > 1)
            assert not engine.is_ess or config.overlap_costs or config.overlap in engine.systems
            if config.overlap_costs:
                policy = OverlapPolicy(4, CostTable.read(config.overlap_costs), tuple(Mode))
                assert policy.modes == tuple(Mode) and config.overlap == "auto"


# --- time, and what goes wrong ------------------------------------------------------------

PACE = Pace(engine=30, point=5, start=100)
ROOMY = {"latent_bytes": 1, "index_bytes": 1, "metadata_bytes": 1, "slots": 9, "hot_rows": None}


class FakeWorker:
    """Takes fake time; `fate` of each method: seconds, or an error."""

    def __init__(self, name, now, fates, log):
        self.name, self.now, self.fates, self.log = name, now, fates, log
        self.alive, self.sizes = False, dict(ROOMY)

    def start(self):
        self.alive = True
        self.log.append(f"start {self.name}")

    def wait(self, timeout):
        self._meet("wait")

    def _meet(self, what):
        fate = self.fates.get((self.name, what), 1)
        if isinstance(fate, list):
            fate = fate.pop(0)
        if isinstance(fate, Exception):
            self.alive = self.alive and "died" not in str(fate)
            raise fate
        self.now[0] += fate

    def call(self, method, *args, timeout=None):
        if method == "sizes":
            return self.sizes
        batch, _, new_tokens, labels, steps = args[:5]
        self.log.append(f"decode {self.name} {batch}")
        self._meet("decode")
        return passes(new_tokens, labels, steps, batch, misses=lambda i: i)

    def reason(self):
        return "CUDA error: it broke"

    def hang_up(self):
        self.log.append(f"end {self.name}")

    def close(self, grace=0):
        self.alive = False


def a_run(tmp_path, seconds, fates=None, change=None):
    """(Run with fake workers and a fake clock, its log, times saved)."""
    now, log, saved = [0.0], [], []

    def make(engine):
        worker = FakeWorker(engine.name, now, fates or {}, log)
        if change:
            change(worker)
        return worker

    clock = Clock(seconds, lambda: now[0])
    report = Report(machine={})
    run = Run(CPU, TINY, "stream", report, clock, PACE, make,
              lambda: saved.append(len(report.rows)), log.append)  # fmt: skip
    return run, log, saved


def engine(name, *points, system="ess off", **more):
    points = tuple(Point(512, batch) for batch in points)
    return Engine(name, {"off": system}, 64, points, 1, **more)


def outcomes(run):
    """{(engine, batch): error or None} of decode."""
    rows = [row for row in run.report.rows if row["metric"] == "decode_tokens_per_s"]
    return {(r["config"]["engine"], r["config"]["batch"]): r.get("error") for r in rows}


class TestRun:
    ENGINES = (
        engine("a", 1, 2, 3),
        engine("b", 1),
        engine("c", 4),
    )

    def test_one_engine_after_another_and_saved_one_by_one(self, tmp_path):
        run, log, saved = a_run(tmp_path, 1000)
        run.all(self.ENGINES)
        kept = [line for line in log if line.startswith(("start ", "decode "))]
        assert kept == [
            "start a", "decode a 1", "decode a 2", "decode a 3", "start b", "decode b 1",
            "start c", "decode c 4",
        ]  # fmt: skip
        assert set(outcomes(run).values()) == {None} and len(outcomes(run)) == 5
        assert len(saved) == 3 + 5 and saved == sorted(set(saved))  # engines and points

    def test_nothing_starts_that_would_not_end(self, tmp_path):
        run, log, _ = a_run(tmp_path, 35)
        run.all(self.ENGINES)
        found = outcomes(run)
        assert found["c", 4].startswith("out of time: 29 s left for a start")
        assert "start c" not in log and found["b", 1] is None
        run, log, _ = a_run(tmp_path, 40, {("a", "decode"): 33})
        run.all(self.ENGINES)
        assert outcomes(run)["a", 1] is None and outcomes(run)["b", 1].startswith("out of time")

    def test_an_engine_that_does_not_start_leaves_the_others(self, tmp_path):
        died = WorkerError("the process died")
        run, _, _ = a_run(tmp_path, 1000, {("b", "wait"): died})
        run.all(self.ENGINES)
        found = outcomes(run)
        assert found.pop(("b", 1)) == "start: the process died | CUDA error: it broke"
        assert set(found.values()) == {None} and len(found) == 4

    def test_a_death_ends_one_engine_only(self, tmp_path):
        died = WorkerError("the process died")
        run, log, _ = a_run(tmp_path, 1000, {("a", "decode"): [1, died]})
        run.all(self.ENGINES)
        found = outcomes(run)
        assert [found["a", n] for n in (2, 3)] == ["the process died | CUDA error: it broke"] * 2
        assert found["a", 1] is found["b", 1] is found["c", 4] is None
        assert log.count("decode a 3") == 0

    def test_what_hangs_is_given_up(self, tmp_path):
        hangs = WorkerError("TimeoutError: 2 requests must decode 64 tokens within 60 s: none did")
        run, log, _ = a_run(tmp_path, 1000, {("a", "decode"): [1, hangs]})
        run.all(self.ENGINES)
        assert "TimeoutError" in outcomes(run)["a", 3] and "decode a 3" not in log

    def test_other_errors_cost_their_point(self, tmp_path):
        refused = WorkerError("ValueError: too long")
        run, _, _ = a_run(tmp_path, 1000, {("a", "decode"): [refused, 1, 1]})
        run.all(self.ENGINES)
        found = outcomes(run)
        assert found["a", 1] == "ValueError: too long" and found["a", 2] is found["a", 3] is None

    def test_an_engine_above_the_bytes_is_no_comparison(self, tmp_path):
        def grow(worker):
            worker.sizes["index_bytes"] = budget_bytes(CPU, TINY)

        run, log, _ = a_run(tmp_path, 1000, change=grow)
        wave = [engine("a", 1), engine("r", 1, system=RESIDENT)]
        wave.append(Engine("h", {"off": HISPARSE}, 64, (Point(512, 1),), ratio=2))
        run.all(wave)
        found = outcomes(run)
        assert "must take the compared device bytes: got" in found["a", 1]
        assert found["r", 1] is None and "decode a 1" not in log
        assert "compared device bytes" in found["h", 1]

    def test_hisparses_tables_are_on_top(self, tmp_path):
        def fill(worker):
            worker.sizes["metadata_bytes"] = budget_bytes(CPU, TINY)

        run, _, _ = a_run(tmp_path, 1000, change=fill)
        hisparse = Engine("h", {"off": HISPARSE}, 64, (Point(512, 1),), ratio=2)
        run.all([hisparse, engine("a", 1)])
        assert outcomes(run)["h", 1] is None and outcomes(run)["a", 1]

    def test_one_tier_is_measured_again(self, tmp_path):
        first = engine("one", 1, system=ONE_TIER)
        again = engine("again", 1, system=ONE_TIER, round=1)
        run, log, _ = a_run(tmp_path, 1000)
        run.all([first, engine("a", 1), again])
        rounds = [r["config"]["round"] for r in run.report.rows if r["metric"] == "running"]
        assert rounds == [0, 0, 1] and "start again" in log

    def test_a_kill_leaves_the_last_report(self, tmp_path, monkeypatch):
        options = SimpleNamespace(json=tmp_path / "out.json", seed=0, quick=False)
        report = Report(machine={})
        save = gpu_serving.saver(report, options, {"batch1_context": 32768})
        report.add(*decoded("ess da", 32768, 151, 3000))
        save()
        before = options.json.read_text()
        assert json.loads(before)["summary"] == {"running_ess_32k": 151}

        def killed(path, *_, **__):
            path.write_text("{")
            raise SystemExit(143)  # in the middle of writing

        monkeypatch.setattr(report, "write", killed)
        with pytest.raises(SystemExit):
            save()
        assert options.json.read_text() == before

    def test_the_log_says_why(self, tmp_path):
        log = tmp_path / "log"
        worker = EngineWorker(object, log=log)
        assert not worker.alive and worker.reason() == ""
        log.write_text("  File x\ntorch.OutOfMemoryError: CUDA out of memory\nKilled\n")
        assert worker.reason() == "torch.OutOfMemoryError: CUDA out of memory"


# --- the whole of it ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_miniature_measures_every_system(tmp_path):
    """Minutes: five engines, one after another."""
    path = tmp_path / "cpu.json"
    done = subprocess.run(
        [sys.executable, "-m", "tools.gpu_serving", "--platform", "cpu",
         "--json", path, "--plot", tmp_path / "cpu.png"],
        cwd=ROOT, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    rows = [row for row in found["rows"] if row["name"] == "decode"]
    assert not [row["error"] for row in rows if row["kind"] == "failed"]
    systems = {ONE_TIER, "ess off", RESIDENT}
    assert systems < set(SYSTEMS) and {row["config"]["system"] for row in rows} == systems
    running = {
        (r["config"]["system"], r["config"]["context"], r["config"]["batch"]): r["median"]
        for r in rows
        if r["metric"] == "running"
    }
    assert all(batch == ran for (_, _, batch), ran in running.items())
    assert running[ONE_TIER, 512, 4] == 4 and running["ess off", 512, 7] == 7
    misses = {r["config"]["system"] for r in rows if r["metric"] == "misses" and r["median"] > 0}
    assert misses == {"ess off"} and misses < set(ESS_SYSTEMS)
    summary = found["summary"]
    assert {"gain_512", "batch1_vs_one_tier", "equal_batch_vs_resident", "drift"} <= summary.keys()
    for row in found["rows"]:
        if row["metric"] == "device_bytes" and row["config"]["engine"] != RESIDENT:
            assert row["median"] <= found["config"]["kv_budget_bytes"]
