"""benchmarks/serving/pd_serving: its load, figures and report, on fakes."""

import asyncio
import contextlib
import json
import os
import threading

import numpy as np
import pytest
from aiohttp import web

from benchmarks.harness import Report, finish, measured
from benchmarks.serving import pd_serving
from benchmarks.serving.pd_figures import (
    ESS,
    OFF,
    ON,
    ONE_TIER,
    curve,
    panels,
    point_rows,
    print_tables,
    rate_name,
    summarise,
)
from benchmarks.serving.pd_load import (
    SATURATED,
    Answer,
    Request,
    Result,
    arrivals,
    requests_of,
    run_load,
)
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.capacity import Geometry
from sglang_ess.testing.tiny_model import TinyModelConfig
from tools.pd_cluster import Cores, Node, logged_batches, summed_counters

SCENARIOS = [pd_serving.OUTPUT, pd_serving.THRASH]
GRIDS = [pd_serving.QUICK, pd_serving.FULL]


def answer(sent, *chunks, error=""):
    return Answer(sent, list(chunks), error)


def rng():
    return np.random.default_rng(0)


class TestArrivals:
    def test_poisson(self):
        moments = arrivals(4.0, 4000, rng())
        gaps = np.diff(moments)
        assert moments[0] == 0 and (gaps >= 0).all()
        # An exponential's mean and deviation are both 1 / rate.
        assert gaps.mean() == pytest.approx(0.25, rel=0.1)
        assert gaps.std() == pytest.approx(0.25, rel=0.1)

    def test_saturated_is_at_once(self):
        assert arrivals(SATURATED, 3, rng()) == [0, 0, 0]

    def test_requests_are_the_same_at_every_rate(self):
        documents = [[1], [2], [3]]
        slow, fast = (requests_of(documents, (5, 9), rate, 7, seed=1) for rate in (1.0, SATURATED))
        assert [r.prompt for r in slow] == [[1], [2], [3], [1], [2], [3], [1]]
        assert [(r.prompt, r.new_tokens) for r in slow] == [(r.prompt, r.new_tokens) for r in fast]
        assert {r.new_tokens for r in requests_of(documents, (5, 9), 1.0, 99, 1)} == set(
            range(5, 10)
        )
        assert slow[-1].at > 0 == fast[-1].at


class TestFigures:
    def test_gaps_are_shared_by_the_tokens_of_a_chunk(self):
        one = answer(10.0, (10.5, 1), (11.0, 2), (13.0, 6))
        assert one.first_token_s == 0.5 and one.tokens == 6
        assert one.gaps_s == [0.5, 0.5, 0.5, 0.5, 0.5]

    def test_output_is_of_completed_requests_until_the_last_token(self):
        done, later = answer(0.0, (1.0, 1), (2.0, 11)), answer(1.0, (3.0, 1), (5.0, 9))
        lost = answer(0.0, (1.0, 1), (30.0, 400), error="reset")
        result = Result([done, lost, later], started=0.0)
        assert result.seconds == 5 and result.tokens_per_s == 20 / 5
        assert result.errors == ["reset"] and result.first_tokens_s == [1, 2]
        assert len(result.gaps_s) == 10 + 8


@contextlib.contextmanager
def served(handler):
    """The URL of a server in a thread of its own whose POST /generate is handler."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    found = {}

    async def start():
        app = web.Application()
        app.router.add_post("/generate", handler)
        found["runner"] = web.AppRunner(app)
        await found["runner"].setup()
        site = web.TCPSite(found["runner"], "127.0.0.1", 0)
        await site.start()
        found["port"] = site._server.sockets[0].getsockname()[1]

    def serve():
        loop.run_until_complete(start())
        loop.call_soon(ready.set)  # not before: a stop() that comes earlier is lost
        loop.run_forever()
        loop.run_until_complete(found["runner"].cleanup())

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{found['port']}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def stream(request):
    """As the prompt's first token says: 0 all tokens, 1 too few, 2 an error, 3 a refusal,
    4 an abort."""
    body = await request.json()
    kind, new_tokens = body["input_ids"][0], body["sampling_params"]["max_new_tokens"]
    assert body["stream"] and body["sampling_params"]["ignore_eos"]
    if kind == 3:
        return web.Response(status=503, text="full")
    response = web.StreamResponse()
    await response.prepare(request)
    for count in range(1, new_tokens + 1 - (kind == 1)):
        event = {"output_ids": [7], "meta_info": {"completion_tokens": count}}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    if kind == 2:
        await response.write(b'data: {"error": {"message": "transfer failed"}}\n\n')
    if kind == 4:
        reason = {"type": "abort", "message": "bootstrap timed out"}
        event = {"meta_info": {"completion_tokens": 0, "finish_reason": reason}}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


class TestRunLoad:
    def test_streams_are_read_and_failures_counted(self):
        requests = [Request([kind], new_tokens=4, at=0.0) for kind in range(5)]
        with served(stream) as url:
            result = run_load(url, requests, timeout_s=10)
        whole, short, broken, refused, aborted = result.answers
        assert whole.error == "" and whole.tokens == 4
        assert [count for _, count in whole.chunks][-1] == 4
        assert short.error == "3 of 4 tokens"
        assert "transfer failed" in broken.error
        assert refused.error == "status 503: full"
        assert aborted.error == "aborted: bootstrap timed out"

    def test_requests_wait_for_their_moment(self):
        with served(stream) as url:
            result = run_load(url, [Request([0], 2, 0.0), Request([0], 2, 0.2)], timeout_s=10)
        first, second = result.answers
        # A loop's timer may fire a tick of its clock early.
        assert first.sent - result.started < 0.19 < second.sent - result.started

    def test_a_dead_server_is_an_error_of_the_request(self):
        with served(stream) as url:
            pass
        (one,) = run_load(url, [Request([0], 2, 0.0)], timeout_s=10).answers
        assert "Connect" in one.error


class TestCluster:
    def test_decode_has_the_last_core_alone(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 1, 3})
        assert Cores.of_machine() == Cores(front=(1, 3), decode=(5,))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2})
        assert Cores.of_machine() == Cores(front=(2,), decode=(2,))

    def test_a_node_runs_on_its_cores(self, tmp_path, monkeypatch):
        (tmp_path / "fake_node.py").write_text(
            "import json, os, sys\n"
            "from http.server import BaseHTTPRequestHandler, HTTPServer\n"
            "FACTS = [sorted(os.sched_getaffinity(0)), os.nice(0), os.environ['OMP_NUM_THREADS']]\n"
            "class Handler(BaseHTTPRequestHandler):\n"
            "    def do_GET(self):\n"
            "        self.send_response(200); self.end_headers()\n"
            "        self.wfile.write(json.dumps(FACTS).encode())\n"
            "HTTPServer(('127.0.0.1', int(sys.argv[-1])), Handler).serve_forever()\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        core, log = max(os.sched_getaffinity(0)), tmp_path / "log"
        with Node("fake_node", log=log, cores=[core], nice=3) as node:
            node.wait_ready(10)
            assert node.get("/ready") == [[core], os.nice(0) + 3, "1"]
            node.check_cores()
            assert 0 < node.cpu_seconds() < 10
            node.cores = (core, core + 1)
            with pytest.raises(RuntimeError, match="must run on cores"):
                node.check_cores()

    def test_batches_are_read_from_the_log(self):
        text = (
            "[2026-01-01] Decode batch, #running-req: 3, #token: 4, gen throughput\n"
            "[2026-01-01] Prefill batch, #new-seq: 1, #running-req: 9,\n"
            "[2026-01-01] Decode batch [17], #running-req: 12, #token: 4\n"
        )
        assert logged_batches(text) == [3, 12]

    def test_counters_are_summed_over_the_layers(self):
        text = (
            "# HELP sglang:ess_misses_total x\n"
            'sglang:ess_misses_total{layer="0",tp_rank="0"} 10.0\n'
            'sglang:ess_misses_total{layer="1",tp_rank="0"} 2.5e1\n'
            'sglang:ess_lookups_total{layer="0",tp_rank="0"} 7.0\n'
            'sglang:num_running_reqs{tp_rank="0"} 3.0\n'
        )
        assert summed_counters(text) == {"misses": 35.0, "lookups": 7.0}


class TestScenarios:
    @pytest.mark.parametrize("scenario", SCENARIOS)
    def test_sizes(self, scenario):
        model = TinyModelConfig(**scenario.model)
        assert scenario.request_tokens + pd_serving.PAGE <= model.context
        # One-tier a token takes what (A)'s device bytes are counted in.
        assert model.layers == scenario.model["layers"]
        assert (pd_serving.FP8_ROW_BYTES, pd_serving.INDEX_KEY_BYTES) == (656, 132)

    def test_equal_bytes_hold_more_requests_with_ess(self):
        """As SGLang's decode server admits: a request needs its prompt and what it may write."""
        scenario, limit = pd_serving.OUTPUT, int(pd_serving.device_gib() * 2**30)
        geometry = Geometry(
            layers=scenario.model["layers"],
            row_bytes=pd_serving.FP8_ROW_BYTES,
            index_bytes=scenario.model["layers"] * pd_serving.INDEX_KEY_BYTES,
            topk=TinyModelConfig(**scenario.model).index_topk,
            context_tokens=scenario.request_tokens + pd_serving.PAGE,
            page_slots=pd_serving.PAGE,
        )
        config = EssConfig(hot_ratio=pd_serving.HOT_RATIO)
        slots = {
            ESS: capacity.max_slots(config, geometry, limit, 1 << 40),
            ONE_TIER: limit // (scenario.model["layers"] * 788) - pd_serving.PAGE,
        }
        each = scenario.request_tokens + scenario.outputs[1]
        held = {name: count // each for name, count in slots.items()}
        assert held[ONE_TIER] == 4 and held[ESS] >= 3.5 * 4
        assert scenario.documents > held[ESS]  # no two that decode together share one

    def test_the_hot_tier_of_the_thrash_holds_few(self):
        flags = dict(zip(*[iter(pd_serving.thrash_flags())] * 2, strict=True))
        slots, scenario = int(flags["--max-total-tokens"]), pd_serving.THRASH
        rows = slots * float(flags["--ess-hot-ratio"])
        whole = scenario.prompt + scenario.mean_output
        assert rows / whole == pytest.approx(pd_serving.THRASH_FITTING, rel=0.01)
        # The servers' own flags leave room for many times more.
        admitted = slots // (scenario.request_tokens + scenario.outputs[1])
        assert admitted >= 4 * pd_serving.THRASH_FITTING
        assert scenario.documents > admitted

    @pytest.mark.parametrize("grid", GRIDS)
    def test_grids_go_past_saturation(self, grid):
        assert max(grid.thrash_shares) == 3 and 4 <= len(grid.thrash_shares) <= 6
        assert list(grid.shares) == sorted(grid.shares) and grid.burst >= 2 * 15


def results(speed=10.0, count=4, gap=0.1):
    """count completed requests, `speed` tokens/s in all, a token every `gap` s."""
    tokens = round(speed * 20 / count)
    chunks = [(20 - gap * (tokens - 1 - i), i + 1) for i in range(tokens)]
    return Result([answer(0.0, *chunks) for _ in range(count)], started=0.0)


class TestReport:
    def test_point_rows(self):
        counted = {"lookups": 100.0, "misses": 25.0, "shed_requests": 3.0}
        rows = point_rows(
            "output", {"rate": 1}, results(30, gap=0.1), [2, 4], counted, cpu_seconds=15
        )
        found = {row["metric"]: (row["median"], row["unit"]) for row in rows}
        assert found["output"] == (pytest.approx(30), "tokens/s")
        assert found["batch_mean"] == (3, "requests") and found["batch_max"] == (4, "requests")
        assert found["itl_p50"] == (pytest.approx(100), "ms")
        assert found["itl_p99"] == (pytest.approx(100), "ms")
        assert found["ttft_p50"] == (pytest.approx(20 - 0.1 * 149), "s")
        assert found["hit_rate"][0] == 0.75 and found["shed"] == (3, "requests")
        assert found["decode_cpu"] == (pytest.approx(15 / 20), "ratio")
        assert found["errors"][0] == 0 and found["completed"][0] == 4

    def test_a_load_without_answers_is_a_failed_row(self):
        lost = Result([answer(0.0, error="gone")], 0.0)
        errors, output = point_rows("output", {}, lost, [1], {}, 0)
        assert errors["median"] == 1
        assert output["kind"] == "failed" and "gone" in output["error"]

    def test_one_tier_has_no_hit_rate(self):
        metrics = {row["metric"] for row in point_rows("output", {}, results(), [1], {}, 0)}
        assert "hit_rate" not in metrics

    def planted(self):
        report = Report()

        def point(name, metric, value, **config):
            report.add(measured(name, config, metric, "", [value]))

        for system, speed in ((ONE_TIER, 50.0), (ESS, 125.0)):
            point("output", "output", speed, system=system, rate=rate_name(SATURATED))
            point("output", "output", 40.0, system=system, rate=1.0)
            point("output", "itl_p99", 2 * speed, system=system, rate="inf")
            point("output", "errors", 1, system=system, rate="inf")
        for admission, speeds in ((ON, (80, 100, 95)), (OFF, (80, 90, 30))):
            point("thrash", "output", 500, admission=admission, linked=True, rate="inf")
            for rate, speed in zip((9.0, 2.0, 30.0), speeds, strict=True):
                config = {"admission": admission, "linked": True, "rate": rate}
                point("thrash", "output", speed, **config)
        point("thrash", "output", 200, admission=OFF, linked=False, rate=99.0)
        for warm, misses, latency in ((ON, (4, 8), 90), (OFF, (10, 30), 100)):
            report.add(measured("warmup", {"pd_warmup": warm}, "handover_misses", "", misses))
            point("warmup", "itl_p99", latency, pd_warmup=warm, rate=2.0)
        return report

    def test_summary(self):
        report = self.planted()
        summarise(report, itl_target_ms=300)
        summary = report.summary
        assert summary["output_ratio"] == 2.5
        assert summary["p99_itl_ms"] == 250 and summary["itl_target_ms"] == 300
        assert summary["output_tokens_per_s_one_tier"] == 50 and summary["errors"] == 2
        assert summary["admission_retained"] == pytest.approx(0.95)
        assert summary["admission_off_retained"] == pytest.approx(1 / 3)
        assert summary["thrash_gain"] == pytest.approx(95 / 30)
        assert summary["warmup_first8_ratio"] == pytest.approx(6 / 20)
        assert summary["warmup_itl_p99_ratio"] == pytest.approx(0.9)

    def test_what_was_not_measured_is_left_out(self):
        report = self.planted()
        report.rows = [row for row in report.rows if row["config"].get("system") != ESS]
        report.rows = [row for row in report.rows if row["config"].get("admission") != OFF]
        summarise(report, 300)
        assert not {"output_ratio", "itl_target_ms", "thrash_gain"} & report.summary.keys()
        assert "admission_retained" in report.summary

    def test_a_gain_is_of_one_rate(self):
        report = self.planted()
        report.rows = [
            row
            for row in report.rows
            if not (row["config"].get("admission") == OFF and row["config"]["rate"] == 30.0)
        ]
        summarise(report, 300)
        assert "thrash_gain" not in report.summary

    def test_curves_are_sorted_and_without_saturation(self):
        points = curve(self.planted(), "thrash", "output", admission=ON, linked=True)
        assert points == [(2.0, 100), (9.0, 80), (30.0, 95)]

    @pytest.mark.parametrize("full", [True, False])
    def test_tables_and_plot(self, full, tmp_path, capsys):
        report = self.planted() if full else Report()
        summarise(report, 300)
        print_tables(report, "link 1 GiB/s")
        path = tmp_path / "plot.png"
        options = pd_serving.parser().parse_args(["--plot", str(path)])
        finish(report, options, *panels(report, "link 1 GiB/s"))
        assert ("output_ratio" in capsys.readouterr().out) == full
        assert path.read_bytes().startswith(b"\x89PNG")


class FakeDecode:
    """One-tier it decodes 4 requests at once, with ESS 12; 8 misses a layer and request."""

    def __init__(self, flags):
        self.flags, self.misses = flags, 0.0
        self.ess = "--disable-ess" not in flags

    def facts(self):
        hot = {"hot_rows": 3} if self.ess else {}
        used = pd_serving.device_gib() * 2**30 * 0.99
        return {"slots": 9, "device_bytes": used, "host_bytes": 7} | hot

    def log_offset(self):
        return 0

    def batches(self, since):
        return [12 if self.ess else 4]

    def cpu_seconds(self):
        return 0.0

    def counters(self):
        return {"misses": self.misses, "lookups": 10 * self.misses} if self.ess else {}


class TestParts:
    """The parts on servers that are not there."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """(flags of the decode server, requests) of every load."""
        asked, running = [], []

        @contextlib.contextmanager
        def decoding(prefill, model, flags, directory, cores):
            running.append(FakeDecode(flags))
            router = type("Router", (), {"url": "http://nowhere"})
            yield running[-1], router

        @contextlib.contextmanager
        def prefill(*args, **kwargs):
            yield None

        def load(url, requests, timeout_s):
            decode = running[-1]
            asked.append((decode.flags, requests))
            if decode.ess:
                decode.misses += 6 * 8 * len(requests)
            return results(120.0 if decode.ess else 48.0, count=len(requests))

        monkeypatch.setattr(pd_serving, "decoding", decoding)
        monkeypatch.setattr(pd_serving, "Prefill", prefill)
        monkeypatch.setattr(pd_serving, "run_load", load)
        monkeypatch.setattr(pd_serving.Bench, "model", lambda *_, **__: "model")
        monkeypatch.setattr(pd_serving, "SETTLE_SECONDS", 0)
        return asked

    def test_a_run_of_everything(self, asked, tmp_path, capsys):
        path, plot = tmp_path / "out.json", tmp_path / "out.png"
        cores = os.sched_getaffinity(0)
        try:
            assert (
                pd_serving.main(
                    ["--quick", "--link-gib", "0.5", "--json", str(path), "--plot", str(plot)]
                )
                == 0
            )
        finally:
            os.sched_setaffinity(0, cores)
        found = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert found["summary"]["output_ratio"] == pytest.approx(2.5)
        assert found["summary"]["admission_retained"] == pytest.approx(1, rel=0.01)
        assert found["summary"]["batch_mean_ess"] == 12
        assert not [row for row in found["rows"] if row["kind"] == "failed"]
        (misses,) = {row["mean"] for row in found["rows"] if row["metric"] == "handover_misses"}
        assert misses == 8
        assert plot.exists() and found["config"]["link_gib_per_s"] == 0.5

    def test_both_systems_get_the_same_bytes_and_requests(self, asked, tmp_path):
        bench = pd_serving.Bench(pd_serving.QUICK, 0, tmp_path, 0.2)
        pd_serving.output(bench)
        systems = {True: [], False: []}
        for flags, requests in asked:
            if "--ess-link-gib" not in flags and len(requests) >= 6:
                at = flags.index("--ess-device-gib")
                shape = [(tuple(r.prompt[:4]), r.new_tokens, r.at) for r in requests]
                systems["--disable-ess" in flags].append((flags[at + 1], shape))
        first, *points = systems[False]  # the first load fills the prefill server
        assert {new_tokens for _, new_tokens, _ in first[1]} == {2}
        assert points == systems[True] and len(points) == 1 + len(bench.grid.shares)

    def test_admission_gets_the_same_rates_off_and_on(self, asked, tmp_path):
        bench = pd_serving.Bench(pd_serving.FULL, 0, tmp_path, 0.2)
        pd_serving.thrash(bench)
        rates = {
            admission: [rate for rate, _ in curve(bench.report, "thrash", "output", **config)]
            for admission, config in (
                (name, {"admission": name, "linked": True}) for name in (ON, OFF)
            )
        }
        saturated = 120 / pd_serving.THRASH.mean_output
        expected = [share * saturated for share in bench.grid.thrash_shares]
        assert rates[ON] == rates[OFF] == pytest.approx(expected, rel=1e-3)
        links = {"--ess-link-gib" in flags and "0.2" in flags for flags, _ in asked}
        assert links == {True, False}

    @pytest.mark.parametrize("used", [0.5, 1.01])
    def test_a_pool_must_fill_its_bytes(self, asked, tmp_path, monkeypatch, used):
        size = used * pd_serving.device_gib() * 2**30
        facts = {"slots": 9, "device_bytes": size, "host_bytes": 7}
        monkeypatch.setattr(FakeDecode, "facts", lambda _: facts)
        bench = pd_serving.Bench(pd_serving.QUICK, 0, tmp_path, 0.2)
        bench.run([pd_serving.output])
        (row,) = bench.report.rows
        assert row["kind"] == "failed" and "device bytes" in row["error"]

    def test_memory_bandwidth_is_of_this_machine(self, monkeypatch):
        monkeypatch.setattr(pd_serving, "COPIES", 3)
        assert 0.1 < pd_serving.memory_gib_per_s() < 1000

    def test_counters_must_settle(self):
        decode = FakeDecode(())
        decode.counters = iter([{"misses": 1}, {"misses": 2}, {"misses": 2}]).__next__
        assert pd_serving.settled_counters(decode) == {"misses": 2}
        with pytest.raises(RuntimeError, match="must settle"):
            pd_serving.settled_counters(FakeDecode(()), seconds=0)
