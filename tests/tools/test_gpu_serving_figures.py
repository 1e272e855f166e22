"""tools/gpu_serving: what engines record, windows, figures."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import Report, failed, measured, plot, print_failed
from sglang_ess.attention.backend_cuda import EssDsaBackend
from sglang_ess.attention.overlap import Mode, OverlapPolicy
from tools.gpu_serving import engine as gpu_engine
from tools.gpu_serving.engine import Fill, memory_of
from tools.gpu_serving.figures import (
    METRICS,
    panels,
    point_rows,
    print_tables,
    summarise,
    windows_of,
)  # fmt: skip
from tools.gpu_serving.grid import HISPARSE, ONE_TIER, RESIDENT

SGLANG = Path(importlib.util.find_spec("sglang").origin).parent / "srt"


class TestEngine:
    def test_an_id_says_what_to_do(self):
        fill = Fill(7, 3, ("off", "da"), 4)
        assert Fill.of(fill.rid(2)) == fill
        assert [fill.label(i) for i in range(0, 20, 2)] == ["off", "off", "da", "da"] * 2 + [
            "off", "off",
        ]  # fmt: skip

    def test_fake_transfer_is_sglangs(self):
        text = (SGLANG / "disaggregation" / "utils.py").read_text()
        assert re.search(r'^FAKE_BOOTSTRAP_HOST = "(.+)"', text, re.M)[1] == (gpu_engine.FAKE_HOST)

    def test_a_fill_joins_in_one_step(self):
        processed = []
        hold = gpu_engine.together(lambda scheduler: processed.append(1))
        queue = []
        scheduler = SimpleNamespace(disagg_decode_prealloc_queue=SimpleNamespace(queue=queue))
        hold(scheduler)
        assert processed == [1]  # nothing waits: transfers go on
        for number in range(2):
            processed.clear()
            queue[:] = [SimpleNamespace(req=SimpleNamespace(rid=f"{number}.2.off.4.0"))]
            hold(scheduler)
            assert not processed
            queue.append(SimpleNamespace(req=SimpleNamespace(rid=f"{number}.2.off.4.1")))
            hold(scheduler)
            queue.pop()  # one did not fit: it must not stop the others' transfers
            hold(scheduler)
            assert processed == [1, 1]

    def test_decode_passes_are_recorded_with_their_label(self, tmp_path):
        forced, ran = [], []
        record = tmp_path / "passes"
        totals = iter([(5, 0, 0), None, (9, 0, 0)])
        allocator = SimpleNamespace(
            get_kvcache=lambda: SimpleNamespace(totals=lambda: next(totals))
        )
        scheduler = SimpleNamespace(token_to_kv_pool_allocator=allocator)
        run = gpu_engine.recorded(
            lambda self, batch: ran.append(batch) or "result",
            str(record),
            lambda *asked: forced.append(asked),
        )

        def batch(rid, decodes=True):
            mode = SimpleNamespace(is_decode=lambda: decodes)
            return SimpleNamespace(forward_mode=mode, reqs=[SimpleNamespace(rid=rid)] * 3)

        assert run(scheduler, batch("anything", decodes=False)) == "result"
        for rid in ("0.3.off+da.1.0", "0.3.off+da.1.0", "1.3.dba.1.2"):
            run(scheduler, batch(rid))
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        labels = [one["label"] for one in lines]
        assert len(ran) == 4 and labels == ["off", "da", "dba"]
        assert forced == [(label, 3) for label in labels]
        assert [(one["fill"], one["index"]) for one in lines] == [(0, 0), (0, 1), (1, 0)]
        assert [one["misses"] for one in lines] == [5, None, 9]
        assert {one["batch"] for one in lines} == {3}

    def test_modes_are_switched_between_steps(self):
        splits = []
        tier = SimpleNamespace(set_split=splits.append)
        backend = SimpleNamespace(token_to_kv_pool=SimpleNamespace(tier=tier), chosen=None)
        backend.policy = OverlapPolicy(3, None, (Mode.OFF,))
        backend._choose = lambda batch: EssDsaBackend._choose(backend, batch)
        for mode in (Mode.OFF, Mode.DBA, Mode.DBA, Mode.OFF):
            EssDsaBackend.force_mode(backend, mode, 8)
            assert backend.chosen is mode is backend.policy.choose(8).mode
        assert len(splits) == 3 and all(split.all() for split in splits)
        EssDsaBackend.force_mode(backend, None, 8)
        assert backend.policy.forced is None and backend.chosen is Mode.OFF

    def test_bytes_are_counted_by_their_use(self):
        index = [torch.zeros(10, 132, dtype=torch.uint8)] * 2
        rows = [torch.zeros(10, 1, 656, dtype=torch.uint8)] * 2
        one_tier = SimpleNamespace(index_k_with_scale_buffer=index, kv_buffer=rows)
        facts = memory_of(one_tier)
        assert (facts["index_bytes"], facts["latent_bytes"]) == (2640, 13120)
        assert facts["host_bytes"] == facts["metadata_bytes"] == 0 and facts["hot_rows"] is None
        caches = [SimpleNamespace(num_rows=n, num_layers=1) for n in (2, 4)]
        host = SimpleNamespace(row_bytes=656, nbytes=13120)
        ess = SimpleNamespace(
            index_k_with_scale_buffer=index, hot_caches=caches, host_tier=host, device_bytes=10_000
        )
        facts = memory_of(ess)
        assert facts["hot_rows"] == 3 and facts["latent_bytes"] == 6 * 656
        assert facts["metadata_bytes"] == 10_000 - 2640 - 6 * 656 and facts["host_bytes"] == 13120
        on_device = torch.zeros(5, dtype=torch.int32, device="meta")
        tables = SimpleNamespace(
            a=on_device, b=torch.zeros(9), mem_pool_host=SimpleNamespace(size=7, size_per_token=3)
        )
        facts = memory_of(one_tier, tables)
        assert facts["metadata_bytes"] == 20 and facts["host_bytes"] == 21


# --- what is made of the passes -----------------------------------------------------------


def passes(count, labels=("off",), steps=8, batch=4, ms=2.0, misses=None, start=100.0):
    """count decode passes; misses(i): the total that is known at pass i."""
    fill = Fill(0, batch, tuple(labels), steps)
    return [
        {"fill": 0, "index": i, "label": fill.label(i), "batch": batch}
        | {"start": start + i * ms / 1e3, "misses": misses and misses(i)}
        for i in range(count)
    ]


class TestWindows:
    def test_whole_windows_of_the_whole_batch(self):
        found = windows_of(passes(40, ("off", "da")), dropped=16, steps=8)
        assert [window.label for window in found] == ["off", "da", "off"]
        assert found[0].passes[0]["index"] == 16 and found[0].running == 4
        assert found[0].steps == pytest.approx([0.002] * 5)
        assert found[0].tokens_per_s == pytest.approx(2000)
        assert found[0].mean_index == 20.5
        tail = [one | {"batch": 1} for one in passes(16)]  # stragglers after the batch
        for place, one in enumerate(tail):
            one["index"] = 40 + place
        assert len(windows_of([*passes(40), *tail], 16, 8)) == 3
        with pytest.raises(ValueError, match="windows of 8 steps behind 16: got 20 passes, 4"):
            windows_of(passes(20), 16, 8)

    def test_misses_between_two_reports(self):
        def every(count):  # what a device reports: every few steps, two steps late
            return lambda i: 40 * max(0, (i - 2) // count * count)

        for window in windows_of(passes(96, steps=32, misses=every(8)), 32, 32):
            assert window.misses(layers=2) == pytest.approx(40 / (2 * 4))
        (window,) = windows_of(passes(8, misses=lambda i: 40 * i), 0, 8)
        assert window.misses(layers=5) == pytest.approx(2)
        (window,) = windows_of(passes(8, misses=lambda i: 7), 0, 8)
        assert window.misses(layers=2) == 0
        (window,) = windows_of(passes(8), 0, 8)
        assert window.misses(layers=2) is None
        some = [one | {"misses": None} if one["index"] % 2 else one
                for one in passes(8, misses=lambda i: 40 * i)]  # fmt: skip
        assert windows_of(some, 0, 8)[0].misses(5) == pytest.approx(2)

    def test_rows_of_a_point(self):
        config = {"system": "ess off", "context": 512, "batch": 4}
        windows = windows_of(passes(48, misses=lambda i: 40 * i), 16, 8)
        rows = {r["metric"]: r for r in point_rows(windows, config, 2)}
        assert rows.keys() == METRICS.keys()
        assert rows["step"]["median"] == rows["itl_p50"]["median"] == pytest.approx(2)
        assert rows["step"]["n"] == 20 and rows["running"]["median"] == 4
        assert rows["decode_tokens_per_s"]["median"] == pytest.approx(2000)
        assert rows["misses"]["median"] == 5 and rows["tokens"]["median"] == 512 + 32.5
        rows = {r["metric"] for r in point_rows(windows_of(passes(48), 16, 8), config, 2)}
        assert "misses" not in rows


def decoded(system, context, running, speed, round=0):
    config = {"system": system, "context": context, "batch": running, "round": round}
    return [
        measured("decode", config, metric, METRICS[metric], [value])
        for metric, value in (("decode_tokens_per_s", speed), ("running", running), ("step", 1.0))
    ]


class TestSummary:
    def report(self):
        report = Report(machine={})
        for rows in (
            decoded(ONE_TIER, 32768, 1, 100),
            decoded(ONE_TIER, 32768, 52, 2000),
            decoded(ONE_TIER, 32768, 52, 2100, round=1),
            decoded(HISPARSE, 32768, 1, 92),
            decoded(HISPARSE, 32768, 190, 2800),
            decoded("ess off", 32768, 1, 99),
            decoded("ess da", 32768, 1, 98),
            decoded("ess off", 32768, 151, 3000),
            decoded("ess dba", 32768, 151, 3400),
            decoded("ess dba", 32768, 64, 3500),
            decoded(RESIDENT, 32768, 151, 3600),
            decoded(RESIDENT, 32768, 64, 3600),
            decoded("ess da", 131072, 49, 900),
        ):
            report.add(*rows)
        return report

    def test_ratios(self):
        report = self.report()
        summarise(report, 32768)
        assert report.summary == pytest.approx(
            {
                "batch1_vs_one_tier": 0.99,
                "hisparse_batch1_vs_one_tier": 0.92,
                "gain_32k": 70,
                "best_gain_32k": 75,
                "hisparse_gain_32k": 40,
                "vs_hisparse_32k": 3400 / 2800,
                "running_ess_32k": 151,
                "running_one_tier_32k": 52,
                "running_hisparse_32k": 190,
                "running_ess_128k": 49,
                "equal_batch_vs_resident": 3400 / 3600,
                "drift": 1.05,
            }
        )

    def test_nothing_is_left_where_a_side_lacks(self):
        report = Report(machine={})
        report.add(*decoded("ess da", 32768, 151, 3000))
        config = {"system": ONE_TIER, "context": 32768, "batch": 52, "round": 0}
        report.add(failed("decode", config, "decode_tokens_per_s", "tokens/s", "out of time"))
        summarise(report, 32768)
        assert report.summary == {"running_ess_32k": 151}

    def test_tables_and_plot(self, tmp_path, capsys):
        report = self.report()
        config = {"system": "ess dba", "context": 32768, "batch": 9, "round": 0}
        report.add(failed("decode", config, "decode_tokens_per_s", "tokens/s", "out of time"))
        summarise(report, 32768)
        print_tables(report)
        print_failed(report)
        said = capsys.readouterr().out
        assert "one-tier again" in said
        assert "decode_tokens_per_s of decode ess dba 32768 9 0: out of time" in said
        plot(tmp_path / "a.png", *panels(report))
        assert (tmp_path / "a.png").stat().st_size > 10_000
