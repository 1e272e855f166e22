"""The operator's figures: the log line and SGLang's /metrics are right."""

import logging
import math
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.values import MultiProcessValue
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

from ess_kernels import hot_state
from sglang_ess import metrics
from sglang_ess.admission.policy import HOT_TIER, Admission, AdmissionLimits, Step
from sglang_ess.mem_cache.pool import EssTokenToKVPool
from sglang_ess.metrics import Exporter, Metrics, SpeculationCounts, Watch, log_line
from sglang_ess.tiers import HotCache, HotGroups
from sglang_ess.tiers.index_groups import IndexGroups

ROW_BYTES, SLOTS = 656, 40
LABELS = {"model_name": "tiny", "tp_rank": 0}
# SGLang's counters of a SchedulerMetricsReporter: since its last log line, and before that.
SPECULATION = (
    "spec_num_accept_tokens", "spec_num_forward_ct",
    "spec_total_num_accept_tokens", "spec_total_num_forward_ct",
)  # fmt: skip


class Pool:
    """What of EssTokenToKVPool the metrics read."""

    hot_caches, figures = EssTokenToKVPool.hot_caches, EssTokenToKVPool.figures
    start_layer, rebalancers = 3, ()
    host_tier = SimpleNamespace(row_bytes=ROW_BYTES, num_slots=SLOTS)

    def __init__(self, groups, num_rows, requests):
        layer = torch.zeros(SLOTS, 1, dtype=torch.int64)
        self.tier = HotGroups([HotCache([layer] * size, num_rows) for size in groups.sizes])
        self.groups = groups
        self.request_misses = np.zeros(requests, np.int64)


def make_pool(num_layers=2, num_rows=4, requests=5, groups=None):
    return Pool(groups or IndexGroups.single(num_layers), num_rows, requests)


def decode(pool, *slots_of_layers):
    """Plan one step of one request. slots_of_layers: the slots that each layer selects"""
    for cache, slots in zip(pool.hot_caches, slots_of_layers, strict=True):
        cache.plan(torch.tensor([slots], dtype=torch.int32))


def samples(text):
    """{(name, labels without model and rank): value} of an exposition."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            rest = {k: v for k, v in sample.labels.items() if k in ("layer", "le", "mode")}
            found[sample.name, *rest.values()] = sample.value
    return found


# --- snapshots and the line -------------------------------------------------------------


def test_a_snapshot_begins_where_the_last_one_ended():
    pool, taken = make_pool(), Metrics()
    decode(pool, [1, 2, 3, -1], [1, 2, 3, 4])
    decode(pool, [1, 2, 5, -1], [5, 6, 7, 8])
    first, second = taken.snapshot(pool, 20).groups
    assert (first.layer, second.layer) == (3, 4)
    assert (first.lookups, first.misses, first.steps) == (6, 4, 2)
    assert (second.lookups, second.misses, second.evictions) == (8, 8, 4)
    assert first.hit_ratio == pytest.approx(1 / 3) and second.hit_ratio == 0
    assert first.eviction_age is None and second.eviction_age == 1
    assert (first.fetched_bytes, first.hot_rows_used, first.hot_rows) == (4 * ROW_BYTES, 4, 4)

    decode(pool, [1, 2, 5, -1], [5, 6, 7, 8])
    again = taken.snapshot(pool, 20)
    assert [(layer.lookups, layer.misses) for layer in again.groups] == [(3, 0), (4, 0)]
    assert taken.snapshot(pool, 20).total("lookups") == 0
    assert Metrics().snapshot(pool, 20).total("lookups") == 21  # another one sees all of it


def test_a_group_counts_once_and_its_bytes_for_each_layer():
    """Layers 3; 4 to 6; 7 and 8: a figure has its group's first layer."""
    pool, taken = make_pool(groups=IndexGroups((1, 3, 2))), Metrics()
    decode(pool, [1, 2, -1, -1], [1, 2, 3, -1], [1, 2, 3, 4])
    found = taken.snapshot(pool, 20)
    assert [(group.layer, group.layers) for group in found.groups] == [(3, 1), (4, 3), (7, 2)]
    assert [group.misses for group in found.groups] == [2, 3, 4]
    fetched = [group.fetched_bytes for group in found.groups]
    assert fetched == [2 * ROW_BYTES, 9 * ROW_BYTES, 8 * ROW_BYTES]
    assert pool.tier.totals()[0] * ROW_BYTES == sum(fetched)
    assert log_line(found) == (
        "ESS: hot rows 75% (9/12, 6 layers in 3 index groups), hit rate 0.0% (layer 3 lowest, "
        "0.0%), 9.0 misses/step, fetched 12.2 KiB/step, no evictions, host slots 20/40"
    )
    registry = CollectorRegistry()
    Exporter(LABELS, [3, 4, 7], registry).update(found)
    values = samples(generate_latest(registry).decode())
    assert values["sglang:ess_fetched_bytes_total", "4"] == 9 * ROW_BYTES
    assert ("sglang:ess_misses_total", "5") not in values


def test_a_cleared_cache_counts_from_nought():
    pool, taken = make_pool(num_layers=1), Metrics()
    decode(pool, [1, 2, 3, 4])
    taken.snapshot(pool, 0)
    pool.hot_caches[0].clear()
    decode(pool, [1, 2])
    (layer,) = taken.snapshot(pool, 0).groups
    assert (layer.lookups, layer.misses) == (2, 2)


def test_installed_rows():
    pool, taken = make_pool(num_layers=1), Metrics()
    pool.hot_caches[0].install(torch.tensor([1, 2]), torch.zeros(2, 1, dtype=torch.int64), 0)
    pool.hot_caches[0].warm(torch.tensor([[2, 3]], dtype=torch.int32))
    (layer,) = taken.snapshot(pool, 0).groups
    assert (layer.installed_rows, layer.misses, layer.fetched_bytes) == (3, 0, 0)


def test_the_log_line():
    pool, taken = make_pool(), Metrics()
    decode(pool, [1, 2, 3, -1], [1, 2, 3, 4])
    decode(pool, [1, 2, 3, -1], [5, 6, 7, 8])
    assert log_line(taken.snapshot(pool, 20)) == (
        "ESS: hot rows 88% (7/8, 2 layers), hit rate 21.4% (layer 4 lowest, 0.0%), "
        "5.5 misses/step, fetched 3.5 KiB/step, eviction age 1 steps, host slots 20/40"
    )
    assert log_line(taken.snapshot(pool, 0)) == (
        "ESS: hot rows 88% (7/8, 2 layers), no lookups, no evictions, host slots 0/40"
    )


def test_the_log_line_of_speculative_steps():
    """Two verify steps of two requests gave 9 tokens: the misses are those of both steps."""
    pool, taken = make_pool(), Metrics()
    decode(pool, [1, 2, 3, -1], [1, 2, 3, 4])
    decode(pool, [1, 2, 3, -1], [5, 6, 7, 8])
    assert "5.5 misses/step, 1.2 misses/token (accept length 2.25), fetched" in log_line(
        taken.snapshot(pool, 20), tokens=9, request_steps=4
    )
    idle = log_line(taken.snapshot(pool, 20), tokens=9, request_steps=4)
    assert "accept length" not in idle, "no step was planned meanwhile"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.0 B"), (1023, "1023.0 B"), (1 << 20, "1.0 MiB"), (3 << 40, "3072.0 GiB")],
)
def test_sizes(num_bytes, text):
    assert metrics._size(num_bytes) == text


def test_rows_that_move_between_layers():
    """Moves count since the last snapshot; each layer's gauge shows its rows now."""
    pool, taken = make_pool(), Metrics()
    assert taken.snapshot(pool, 0).rebalances == 0
    pool.rebalancers = [SimpleNamespace(rebalances=2, rows_moved=30)]
    pool.hot_caches[1].resize(3)
    first = taken.snapshot(pool, 0)
    assert (first.rebalances, first.rows_moved) == (2, 30)
    assert [layer.hot_rows for layer in first.groups] == [4, 3]
    registry = CollectorRegistry()
    exporter = Exporter(LABELS, [3, 4], registry)
    exporter.update(first)
    pool.rebalancers[0].rows_moved = 35
    exporter.update(taken.snapshot(pool, 0))
    found = samples(generate_latest(registry).decode())
    assert (
        found["sglang:ess_rebalances_total",] == 2 and found["sglang:ess_rows_moved_total",] == 35
    )
    assert found["sglang:ess_hot_rows", "4"] == 3


# --- Prometheus -------------------------------------------------------------------------


def test_prometheus_in_several_processes(tmp_path, monkeypatch):
    """As in SGLang, the scheduler writes files and the HTTP process collects them."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr("prometheus_client.values.ValueClass", MultiProcessValue())
    pool, taken, exporter = make_pool(), Metrics(), Exporter(LABELS, [3, 4], CollectorRegistry())
    for slots in ([1, 2, 3, 4], [5, 6, 7, 8]):
        decode(pool, [1, 2, 3, -1], slots)
        exporter.update(taken.snapshot(pool, 20))
    exporter.observe_request(120)
    exporter.observe_request(5)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    text = generate_latest(registry).decode()
    assert 'model_name="tiny"' in text and 'tp_rank="0"' in text
    found = samples(text)
    for name, values in {
        "lookups_total": (6, 8),
        "misses_total": (3, 8),
        "fetched_bytes_total": (3 * ROW_BYTES, 8 * ROW_BYTES),
        "installed_rows_total": (0, 0),
        "evictions_total": (0, 4),
        "hot_rows": (4, 4),
        "hot_rows_used": (3, 4),
    }.items():
        assert (found[f"sglang:ess_{name}", "3"], found[f"sglang:ess_{name}", "4"]) == values, name
    assert math.isnan(found["sglang:ess_eviction_age_steps", "3"])
    assert found["sglang:ess_eviction_age_steps", "4"] == 1
    assert (found["sglang:ess_host_slots",], found["sglang:ess_host_slots_used",]) == (SLOTS, 20)
    assert found["sglang:ess_request_misses_count",] == 2
    assert found["sglang:ess_request_misses_sum",] == 125
    assert found["sglang:ess_request_misses_bucket", "100.0"] == 1


# --- in SGLang's scheduler --------------------------------------------------------------


class Requests:
    """The part of SGLang's ReqToTokenPool that the metrics use."""

    def __init__(self, free):
        self.free_slots, self.callback = free, None

    def register_on_alloc_rows(self, callback):
        self.callback = callback


@pytest.fixture
def reporter(monkeypatch):
    """SGLang's SchedulerMetricsReporter, whose pool is make_pool()."""
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    pool = make_pool()
    scheduler = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        pool_stats_observer=SimpleNamespace(
            get_pool_stats=lambda: SimpleNamespace(full_num_used=20)
        ),
        req_to_token_pool=Requests(free=[3, 4]),
    )
    return SimpleNamespace(
        pool=pool,
        registry=registry,
        scheduler=scheduler,
        is_stats_logging_rank=True,
        current_scheduler_metrics_enabled=True,
        metrics_collector=SimpleNamespace(labels=LABELS),
        forward_ct_decode=1,
        decode_log_interval=4,
        **dict.fromkeys(SPECULATION, 0),
    )


def lines(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("ESS: ")]


def exposed(reporter):
    return samples(generate_latest(reporter.registry).decode())


def test_one_line_an_interval(reporter, caplog):
    caplog.set_level(logging.INFO)
    for step in range(1, 13):
        decode(reporter.pool, [step], [step])
        reporter.forward_ct_decode = step
        assert metrics.decode_reported(None, reporter, True) is None
    assert len(lines(caplog)) == 3
    assert all("2.0 misses/step" in line for line in lines(caplog))


def test_accept_lengths_are_sglangs_own(reporter, caplog):
    """SGLang's reporter counts verify steps and moves its counts to the totals as it logs."""
    caplog.set_level(logging.INFO)
    real = types.MethodType(SchedulerMetricsReporter.update_spec_metrics, reporter)
    reporter.spec_num_correct_drafts = 0
    reporter.spec_num_block_accept_tokens = reporter.spec_num_cap_tokens = 0
    for step in range(1, 9):
        decode(reporter.pool, [step], [step])
        reporter.forward_ct_decode = step
        accepted = 3 if step > 4 else 2  # tokens of each of two requests
        real(2, 2 * (accepted - 1), num_accept_tokens=2 * accepted)
        if step % reporter.decode_log_interval == 0:
            for name in ("num_accept_tokens", "num_forward_ct"):
                total = getattr(reporter, f"spec_total_{name}") + getattr(reporter, f"spec_{name}")
                setattr(reporter, f"spec_total_{name}", total)
                setattr(reporter, f"spec_{name}", 0)
        metrics.decode_reported(None, reporter, True)
    first, second = lines(caplog)
    assert "2.0 misses/step, 0.5 misses/token (accept length 2.00)" in first
    assert "2.0 misses/step, 0.3 misses/token (accept length 3.00)" in second


def test_counts_that_sglang_resets_are_left_out():
    """flush_cache does that."""
    reporter = SimpleNamespace(**dict.fromkeys(SPECULATION, 0))
    counts = SpeculationCounts(reporter)
    assert counts.since_last() == (0, 0)
    reporter.spec_num_accept_tokens, reporter.spec_num_forward_ct = 7, 3
    assert counts.since_last() == (7, 3)
    assert counts.since_last() == (0, 0)
    SchedulerMetricsReporter.reset_metrics(reporter)
    reporter.spec_num_accept_tokens, reporter.spec_num_forward_ct = 2, 1
    assert counts.since_last() == (0, 0)
    reporter.spec_num_accept_tokens, reporter.spec_num_forward_ct = 6, 3
    assert counts.since_last() == (4, 2)


def test_only_the_logging_rank_logs(reporter, caplog):
    caplog.set_level(logging.INFO)
    reporter.is_stats_logging_rank, reporter.forward_ct_decode = False, 4
    metrics.decode_reported(None, reporter)
    assert lines(caplog) == []


def test_without_enable_metrics_there_is_the_line_only(reporter, caplog):
    caplog.set_level(logging.INFO)
    reporter.current_scheduler_metrics_enabled, reporter.metrics_collector = False, None
    reporter.forward_ct_decode = 4
    metrics.decode_reported(None, reporter)
    assert len(lines(caplog)) == 1 and exposed(reporter) == {}
    assert reporter.scheduler.req_to_token_pool.callback is None


def test_one_tier_is_left_alone(reporter, caplog):
    caplog.set_level(logging.INFO)
    reporter.scheduler.token_to_kv_pool_allocator.get_kvcache = SimpleNamespace
    reporter.forward_ct_decode = 4
    metrics.decode_reported(None, reporter)
    metrics.stats_published(None, reporter.metrics_collector, None)
    assert reporter.ess_watch is None and lines(caplog) == [] and exposed(reporter) == {}


def test_prometheus_follows_sglangs_own_publishing(reporter):
    collector, stats = reporter.metrics_collector, SimpleNamespace(kv_used_tokens=7)
    metrics.stats_published(None, collector, stats)  # a prefill before any decode step
    metrics.decode_reported(None, reporter)
    decode(reporter.pool, [1, 2], [1, 2])
    metrics.stats_published(None, collector, stats)
    metrics.stats_published(None, collector, stats)  # idle
    found = exposed(reporter)
    assert found["sglang:ess_misses_total", "3"] == found["sglang:ess_misses_total", "4"] == 2
    assert found["sglang:ess_host_slots_used",] == 7


def test_a_devices_figures_come_from_its_mirror(reporter):
    """A GPU copies its counters to the host now and then; the metrics do not wait for it."""
    layers = len(reporter.pool.hot_caches)
    one = dict.fromkeys(hot_state.COUNTERS, 0) | {"lookups": 8, "misses": 2, "steps": 4}
    figures = [{**one, "occupied": 3, "rows": 4, "layers": 1}] * layers
    reporter.pool.tier = SimpleNamespace(figures=lambda: figures, caches=reporter.pool.hot_caches)
    reporter.pool.request_misses = None  # not counted on a device
    metrics.decode_reported(None, reporter)
    reporter.scheduler.req_to_token_pool.callback([1])
    metrics.stats_published(None, reporter.metrics_collector, SimpleNamespace(kv_used_tokens=0))
    found = exposed(reporter)
    assert found["sglang:ess_misses_total", "3"] == 2
    assert found["sglang:ess_hot_rows_used", "4"] == 3
    assert found["sglang:ess_request_misses_count",] == 0


def test_the_wait_of_a_gpus_main_stream():
    """Nanoseconds become seconds, since the last snapshot; the line has them by layer and step."""
    pool, taken, registry = make_pool(groups=IndexGroups((1, 3))), Metrics(), CollectorRegistry()
    exporter = Exporter(LABELS, [3, 4], registry)
    one = dict.fromkeys(hot_state.COUNTERS, 0) | {"lookups": 8, "steps": 10, "scans": 32}
    groups = [{**one, "occupied": 3, "rows": 4, "layers": size} for size in (1, 3)]
    pool.tier = SimpleNamespace(figures=lambda: groups)
    exporter.update(found := taken.snapshot(pool, 20))
    assert "waited" not in log_line(found)
    for group, nanoseconds in zip(groups, (20_000, 100_000), strict=True):
        group["stall_ns"] += nanoseconds
        group.update(steps=20, lookups=16, scans=33, short=1)
    exporter.update(found := taken.snapshot(pool, 20))
    assert [group.exposed_fetch_seconds for group in found.groups] == [2e-5, 1e-4]
    assert "waited 3.0 us/layer/step for them" in log_line(found)  # 120 us, 10 steps, 4 layers
    values = samples(generate_latest(registry).decode())
    assert values["sglang:ess_exposed_fetch_seconds_total", "4"] == pytest.approx(1e-4)
    assert values["sglang:ess_scanned_rows_total", "3"] == 33
    assert values["sglang:ess_unplaced_slots_total", "3"] == 1


def test_the_cpu_has_no_series_of_a_gpus_counters():
    pool, registry = make_pool(), CollectorRegistry()
    decode(pool, [1, 2, 3, -1], [1, 2, 3, 4])
    found = Metrics().snapshot(pool, 20)
    Exporter(LABELS, [3, 4], registry).update(found)
    assert found.groups[0].exposed_fetch_seconds is None and "waited" not in log_line(found)
    values = samples(generate_latest(registry).decode())
    assert ("sglang:ess_misses_total", "3") in values
    for name in ("exposed_fetch_seconds", "scanned_rows", "unplaced_slots"):
        assert (f"sglang:ess_{name}_total", "3") not in values


def test_a_requests_misses_are_counted_once(reporter):
    metrics.decode_reported(None, reporter)
    requests, misses = reporter.scheduler.req_to_token_pool, reporter.pool.request_misses
    misses[:] = 0, 10, 20, 30, 0
    requests.callback([1])  # a new owner
    assert misses.tolist() == [0, 0, 20, 30, 0]
    stats = SimpleNamespace(kv_used_tokens=0)
    metrics.stats_published(None, reporter.metrics_collector, stats)  # 3 and 4 are free
    metrics.stats_published(None, reporter.metrics_collector, stats)
    assert misses.tolist() == [0, 0, 20, 0, 0]
    found = exposed(reporter)
    assert found["sglang:ess_request_misses_count",] == 2
    assert found["sglang:ess_request_misses_sum",] == 40


def test_an_error_ends_the_metrics_and_nothing_else(reporter, caplog):
    watch = Watch(reporter)
    reporter.pool.host_tier = None
    for _ in range(3):
        watch.log()
        watch.publish(0)
        watch.rows_given_out([1])
    (line,) = lines(caplog)
    assert line.startswith("ESS: metrics are off after AttributeError")


def test_metrics_that_cannot_be_set_up(reporter, caplog):
    Exporter(LABELS, [3, 4], reporter.registry)  # the names are taken
    reporter.forward_ct_decode = 4
    metrics.decode_reported(None, reporter)
    metrics.decode_reported(None, reporter)
    (line,) = lines(caplog)
    assert "metrics are off after Duplicate" in line


def test_admission_is_exported_as_it_stands():
    """Gauges show the value; counters grow by what came since the last update."""
    registry = CollectorRegistry()
    exporter = Exporter({"model_name": "m"}, range(1), registry)
    admission = Admission(AdmissionLimits(hot_rows=100, topk=10, layers=1, row_bytes=656), 5e9)

    def value(name, **more):
        return registry.get_sample_value(f"sglang:ess_{name}", {"model_name": "m"} | more)

    for refusals in (2, 3):
        admission.deferred[HOT_TIER], admission.retractions = refusals, refusals - 1
        exporter.update_admission(admission)
        assert value("held_rounds_total", reason=HOT_TIER) == refusals
        assert value("held_rounds_total", reason="link") == 0
        assert value("shed_requests_total") == refusals - 1
        assert value("link_bytes_per_second") == 5e9 and value("thrashing") == 0
        assert value("accept_length") == 1
        assert value("working_set_rows") == admission.working_set_rows > 0
    for _ in range(2):  # the first four steps of a request do not count
        admission.observe(Step(4, 1, 0.01, 40, 0, 0, tokens=2.5))
    exporter.update_admission(admission)
    assert value("accept_length") == 2.5
