"""Figures of the hot tier for the operator: a log line, and metrics at SGLang's /metrics.

Both read counters that the hot tier keeps in any case. The log line follows SGLang's own decode
line. The metrics are updated when SGLang publishes its own: with each prefill and decode line, and
when the scheduler becomes idle. A decode step itself costs nothing.

Names follow SGLang's: the prefix "sglang:", the labels of its scheduler (model_name, tp_rank, ...),
and the label "layer" for a figure of one index group: its first layer. Hits are lookups - misses.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_ess.admission.policy import REASONS
from sglang_ess.mem_cache.linker_metrics import StoreMetrics

logger = logging.getLogger(__name__)

# Counters that both hot tiers keep, on the CPU and on a GPU.
COUNTERS = ("lookups", "misses", "evictions", "evicted_age", "installs")
# Those that a GPU's hot tier keeps in addition: ess_kernels/hot_state.py.
GPU_COUNTERS = ("stall_ns", "scans", "short")
CPU_COUNTERS = ("early", "early_used")  # and one on the CPU: tiers/early_rows.py


# --- snapshots --------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSnapshot:
    """The hot tier of one index group: its size now, and its counts since the last snapshot.

    layer: layer_id of the group's first layer, as the pool numbers it (where SGLang wraps the pool
        for linear attention layers, from 0); layers: how many read its top-k
    steps: decode steps; a speculative one with its D lists a request is one
    lookups: top-k entries resolved; misses: those of them that were fetched from the host tier
    fetched_bytes: of the misses, in all layers of the group; installed_rows: rows made hot by a
        write or by warm-up
    evicted_age: steps since the last use of each evicted row, summed
    early_rows: fetched between verify steps (--ess-early-fetch); early_rows_used: of them, before
        they were evicted. 0 on a GPU
    exposed_fetch_seconds: that the main stream waited for missed rows, in all layers of the group,
        by the device's clock; scanned_rows: rows whose age was read to find victims;
        unplaced_slots: lookups and new slots that found no row, which must stay 0. All three are
        of a GPU, and None on the CPU
    """

    layer: int
    hot_rows: int
    hot_rows_used: int
    steps: int
    lookups: int
    misses: int
    fetched_bytes: int
    installed_rows: int
    evictions: int
    evicted_age: int
    layers: int = 1
    early_rows: int = 0
    early_rows_used: int = 0
    exposed_fetch_seconds: float | None = None
    scanned_rows: int | None = None
    unplaced_slots: int | None = None

    @property
    def hit_ratio(self) -> float | None:
        """Share of lookups that hit, in [0, 1]; None if there was no lookup."""
        return 1 - self.misses / self.lookups if self.lookups else None

    @property
    def eviction_age(self) -> float | None:
        """Mean age of an evicted row, in steps; None if there was no eviction."""
        return self.evicted_age / self.evictions if self.evictions else None


@dataclass(frozen=True)
class Snapshot:
    """All index groups of one pool.

    host_slots: rows of the host tier in one layer; host_slots_used: those that SGLang counts as
    used, without the evictable ones of the radix cache
    rebalances, rows_moved: how often hot rows moved between layers since the last snapshot, and
    how many rows did
    """

    groups: tuple[LayerSnapshot, ...]
    host_slots: int
    host_slots_used: int
    rebalances: int = 0
    rows_moved: int = 0

    def total(self, name: str) -> int:
        """The sum of a field of LayerSnapshot over the groups."""
        return sum(getattr(group, name) for group in self.groups)


class Metrics:
    """Takes snapshots. Each covers the time since the last snapshot of the same object."""

    def __init__(self) -> None:
        self._before: dict[int, dict[str, int]] = {}
        self._moved_before = (0, 0)

    def snapshot(self, pool: Any, used_slots: int) -> Snapshot:
        """pool: an EssTokenToKVPool"""
        found, groups, layer = pool.figures(), [], pool.start_layer
        for figures in found.groups:
            on_gpu = all(name in figures for name in GPU_COUNTERS)
            extra = GPU_COUNTERS if on_gpu else (n for n in CPU_COUNTERS if n in figures)
            names = (*COUNTERS, "steps", *extra)
            now = {name: figures[name] for name in names}
            before = self._before.get(layer, {})
            if any(now[name] < value for name, value in before.items()):
                before = {}  # HotCache.clear() has reset the counters
            self._before[layer] = now
            since = {name: value - before.get(name, 0) for name, value in now.items()}
            groups.append(
                LayerSnapshot(
                    layer=layer,
                    hot_rows=figures["rows"],
                    hot_rows_used=figures["occupied"],
                    steps=since["steps"],
                    lookups=since["lookups"],
                    misses=since["misses"],
                    fetched_bytes=since["misses"] * figures["layers"] * pool.host_tier.row_bytes,
                    installed_rows=since["installs"],
                    evictions=since["evictions"],
                    evicted_age=since["evicted_age"],
                    layers=figures["layers"],
                    early_rows=since.get("early", 0),
                    early_rows_used=since.get("early_used", 0),
                    exposed_fetch_seconds=since["stall_ns"] / 1e9 if on_gpu else None,
                    scanned_rows=since.get("scans"),
                    unplaced_slots=since.get("short"),
                )
            )
            layer += figures["layers"]
        rebalances, rows_moved = self._moved_before
        self._moved_before = found.rebalances, found.rows_moved
        return Snapshot(
            groups=tuple(groups),
            host_slots=pool.host_tier.num_slots,
            host_slots_used=used_slots,
            rebalances=found.rebalances - rebalances,
            rows_moved=found.rows_moved - rows_moved,
        )


class SpeculationCounts:
    """What speculative decoding has brought one scheduler, by SGLang's own counters.

    reporter: SGLang's SchedulerMetricsReporter. It counts each decode step whose result is there,
        and moves the counts to its totals when it logs.
    """

    def __init__(self, reporter: Any):
        self._reporter, self._before = reporter, (0, 0)

    def since_last(self) -> tuple[int, int]:
        """(tokens, decode steps counted once for each request in them) since the last call.

        The tokens of a step are its accepted drafts and one more for each request. (0, 0) without
        speculation, and after SGLang has reset its counters.
        """
        reporter, before = self._reporter, self._before
        self._before = now = (
            reporter.spec_total_num_accept_tokens + reporter.spec_num_accept_tokens,
            reporter.spec_total_num_forward_ct + reporter.spec_num_forward_ct,
        )
        tokens, request_steps = now[0] - before[0], now[1] - before[1]
        return (0, 0) if min(tokens, request_steps) < 0 else (tokens, request_steps)


def log_line(snapshot: Snapshot, tokens: int = 0, request_steps: int = 0) -> str:
    """The log line. Misses are those of all index groups in a decode step, bytes of all layers.

    tokens, request_steps: of SpeculationCounts; 0 without speculation
    """
    used, rows = snapshot.total("hot_rows_used"), snapshot.total("hot_rows")
    layers, groups = snapshot.total("layers"), len(snapshot.groups)
    of = f"{layers} layers" + (f" in {groups} index groups" if groups < layers else "")
    parts = [f"hot rows {used / rows:.0%} ({used}/{rows}, {of})"]
    lookups, misses = snapshot.total("lookups"), snapshot.total("misses")
    if lookups:
        steps = max(group.steps for group in snapshot.groups)
        used_groups = [group for group in snapshot.groups if group.lookups]
        worst = min(used_groups, key=lambda group: group.hit_ratio or 0.0)
        parts += [
            f"hit rate {1 - misses / lookups:.1%} "
            f"(layer {worst.layer} lowest, {worst.hit_ratio:.1%})",
            f"{misses / steps:.1f} misses/step",
        ]
        if request_steps:
            length = tokens / request_steps
            parts.append(f"{misses / tokens:.1f} misses/token (accept length {length:.2f})")
        parts.append(f"fetched {_size(snapshot.total('fetched_bytes') / steps)}/step")
        exposed = sum(group.exposed_fetch_seconds or 0.0 for group in snapshot.groups)
        if exposed > 0:
            parts.append(f"waited {exposed / (steps * layers) * 1e6:.1f} us/layer/step for them")
    else:
        parts.append("no lookups")
    if evictions := snapshot.total("evictions"):
        parts.append(f"eviction age {snapshot.total('evicted_age') / evictions:.0f} steps")
    else:
        parts.append("no evictions")
    parts.append(f"host slots {snapshot.host_slots_used}/{snapshot.host_slots}")
    return "ESS: " + ", ".join(parts)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


# --- Prometheus -------------------------------------------------------------------------

_LAYER_COUNTERS = {
    "lookups": "Top-k entries resolved in decode.",
    "misses": "Top-k entries that were not in the hot tier and were fetched from the host tier.",
    "fetched_bytes": "Bytes of latent rows fetched from the host tier for misses, in all layers "
    "that read the top-k.",
    "installed_rows": "Rows made hot by a write of their slot or by warm-up.",
    "evictions": "Rows evicted from the hot tier.",
    "early_rows": "Rows that --ess-early-fetch made hot before a top-k list had them. 0 on a GPU.",
    "early_rows_used": "Of these, rows that a top-k list had before they were evicted.",
}
_GPU_COUNTERS = {
    "exposed_fetch_seconds": "Seconds that a GPU's main stream waited in decode for rows fetched "
    "from the host tier, in all layers that read the top-k, by the GPU's clock. None on the CPU "
    "platform.",
    "scanned_rows": "Hot rows whose age a GPU read to find rows to evict. None on the CPU "
    "platform.",
    "unplaced_slots": "Lookups and new slots for which a GPU found no hot row; more than 0 is a "
    "bug. None on the CPU platform.",
}
_LAYER_GAUGES = {
    "hot_rows": "Rows of the hot tier.",
    "hot_rows_used": "Rows of the hot tier that hold a slot's latent row.",
    "eviction_age_steps": "Mean steps since last use of the rows evicted since the last update; "
    "NaN if none was.",
}
_GAUGES = {
    "host_slots": "Rows of the host tier in one layer.",
    "host_slots_used": "Slots in use, without the radix cache's evictable ones.",
}
_COUNTERS = {
    "rebalances": "Times that hot rows moved between layers (--ess-layer-budgets auto).",
    "rows_moved": "Hot rows that moved to another layer.",
}
_ADMISSION_GAUGES = {
    "working_set_rows": "Distinct rows a layer that a running request selected in the last 12 "
    "decode steps, mean of the sampled ones.",
    "hot_tier_demand_rows": "Rows a layer that the running requests want hot: their working sets, "
    "what they share counted once.",
    "predicted_step_seconds": "Decode step that admission predicts for the running requests.",
    "accept_length": "Tokens that a request gets in a decode step, mean of the last steps: what "
    "admission divides a step's time by. 1 without speculation.",
    "link_bytes_per_second": "Host-to-device bandwidth at row size, as last measured.",
    "thrashing": "1 while rows are evicted about as soon as they were used.",
}
# From what a short chat fetches to a long context that never fits, all layers together.
_MISS_BUCKETS = tuple(base * 10**power for power in range(2, 9) for base in (1, 3))


class Exporter:
    """ESS's metrics in a registry of prometheus_client, which SGLang's /metrics collects.

    Make at most one for a process and registry, after SGLang has set PROMETHEUS_MULTIPROC_DIR:
    prometheus_client reads that variable when it is imported.
    labels: label names and values of SGLang's scheduler metrics; layers: SGLang's layer ids
    """

    def __init__(self, labels: Mapping[str, Any], layers: Sequence[int], registry: Any = None):
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        names = [*labels, "layer"]

        def by_layer(metric: Any) -> dict[int, Any]:
            return {layer: metric.labels(**labels, layer=str(layer)) for layer in layers}

        def counter(name: str, text: str, label_names: Sequence[str]) -> Any:
            return Counter(f"sglang:ess_{name}_total", text, label_names, registry=registry)

        self._counters = {
            name: by_layer(counter(name, text, names)) for name, text in _LAYER_COUNTERS.items()
        }
        # Their series begin with the first figure: a tier on the CPU has none.
        self._gpu_counters = {n: counter(n, text, names) for n, text in _GPU_COUNTERS.items()}
        self._labels = labels

        def gauge(name: str, text: str, label_names: Sequence[str]) -> Any:
            full_name = f"sglang:ess_{name}"
            # Like SGLang's gauges: one process writes a series, and its successor replaces it.
            return Gauge(
                full_name, text, label_names, registry=registry, multiprocess_mode="mostrecent"
            )

        self._layer_gauges = {
            name: by_layer(gauge(name, text, names)) for name, text in _LAYER_GAUGES.items()
        }
        self._gauges = {
            name: gauge(name, text, list(labels)).labels(**labels) for name, text in _GAUGES.items()
        }
        self._pool_counters = {
            name: counter(name, text, list(labels)).labels(**labels)
            for name, text in _COUNTERS.items()
        }
        self._admission_gauges = {
            name: gauge(name, text, list(labels)).labels(**labels)
            for name, text in _ADMISSION_GAUGES.items()
        }
        self._preempted = counter(
            "shed_requests",
            "Running requests that went back to the queue because the hot tier thrashed.",
            list(labels),
        ).labels(**labels)
        deferred = counter(
            "held_rounds",
            "Scheduling rounds in which a waiting request could not join, by what ran out.",
            [*labels, "reason"],
        )
        self._deferred = {reason: deferred.labels(**labels, reason=reason) for reason in REASONS}
        self._counted: dict[str, int] = {}
        self._request_misses = Histogram(
            "sglang:ess_request_misses",
            "Rows fetched for a request, all layers together, from its first decode step until "
            "it finished or was retracted. Requests without a miss are not counted.",
            list(labels),
            registry=registry,
            buckets=_MISS_BUCKETS,
        ).labels(**labels)

    def update(self, snapshot: Snapshot) -> None:
        """Add a snapshot's counts and set the sizes."""
        for layer in snapshot.groups:
            for name, series in self._counters.items():
                series[layer.layer].inc(getattr(layer, name))
            for name, counter in self._gpu_counters.items():
                if (count := getattr(layer, name)) is not None:
                    counter.labels(**self._labels, layer=str(layer.layer)).inc(count)
            age = layer.eviction_age
            gauges = self._layer_gauges
            gauges["hot_rows"][layer.layer].set(layer.hot_rows)
            gauges["hot_rows_used"][layer.layer].set(layer.hot_rows_used)
            gauges["eviction_age_steps"][layer.layer].set(float("nan") if age is None else age)
        self._gauges["host_slots"].set(snapshot.host_slots)
        self._gauges["host_slots_used"].set(snapshot.host_slots_used)
        for name, pool_counter in self._pool_counters.items():
            pool_counter.inc(getattr(snapshot, name))

    def update_admission(self, admission: Any) -> None:
        """Set the admission metrics from the Admission of this scheduler."""
        values = {
            "working_set_rows": admission.working_set_rows,
            "hot_tier_demand_rows": admission.hot_tier_demand,
            "predicted_step_seconds": admission.step_seconds,
            "accept_length": admission.accept_length,
            "link_bytes_per_second": admission.link_bytes_per_second,
            "thrashing": float(admission.is_thrashing),
        }
        for name, value in values.items():
            self._admission_gauges[name].set(value)
        counts = {**admission.deferred, "preempted": admission.retractions}
        for name, count in counts.items():
            series = self._preempted if name == "preempted" else self._deferred[name]
            series.inc(count - self._counted.get(name, 0))
        self._counted = counts

    def observe_request(self, misses: int) -> None:
        """Count a request that has finished or was retracted after `misses` misses."""
        self._request_misses.observe(misses)


# --- SGLang's scheduler -----------------------------------------------------------------


class Watch:
    """The metrics of one scheduler. The first error in them is logged and switches them off.

    reporter: SGLang's SchedulerMetricsReporter, whose pool has a hot tier

    A request's misses are read when its row of the request table goes to another request, or at an
    update that finds the row free. SGLang calls back for the former, so no hook on freeing is
    needed. The misses of a decode step that still runs when the request ends count too.
    """

    def __init__(self, reporter: Any):
        from sglang_ess.mem_cache.allocator import sparse_pool

        self._scheduler = scheduler = reporter.scheduler
        self._pool = sparse_pool(scheduler.token_to_kv_pool_allocator)
        self._observer = scheduler.pool_stats_observer
        self._requests = scheduler.req_to_token_pool
        self._logs = reporter.is_stats_logging_rank
        self._logged, self._exported = Metrics(), Metrics()
        self._speculation = SpeculationCounts(reporter)
        self._exporter: Exporter | None = None
        self._store: StoreMetrics | None = None
        self._broken = False
        if reporter.current_scheduler_metrics_enabled:
            collector = reporter.metrics_collector
            layers = [self._pool.start_layer + first for first in self._pool.groups.firsts]
            self._exporter = Exporter(collector.labels, layers)
            self._store = StoreMetrics.of(scheduler, collector.labels)
            self._requests.register_on_alloc_rows(self.rows_given_out)
            collector.ess_watch = self

    def log(self) -> None:
        """Write the log line."""
        if self._logs:
            self._safely(self._log)

    def publish(self, used_slots: int) -> None:
        """Update the Prometheus metrics. used_slots: slots that SGLang counts as used"""
        self._safely(self._publish, used_slots)

    def rows_given_out(self, rows: Sequence[int]) -> None:
        """Read the misses of the last owners of these rows of the request table."""
        self._safely(self._take_misses, rows)

    def _log(self) -> None:
        used_slots = self._observer.get_pool_stats().full_num_used
        snapshot = self._logged.snapshot(self._pool, used_slots)
        logger.info(log_line(snapshot, *self._speculation.since_last()))

    def _publish(self, used_slots: int) -> None:
        assert self._exporter is not None  # only a collector with an exporter calls this
        self._exporter.update(self._exported.snapshot(self._pool, used_slots))
        gate = getattr(self._scheduler, "ess_gate", None)
        if gate is not None and gate.admission is not None:
            self._exporter.update_admission(gate.admission)
        if self._store is not None:
            self._store.update()
        self._take_misses(self._requests.free_slots)

    def _take_misses(self, rows: Sequence[int]) -> None:
        misses, indices = self._pool.request_misses, np.asarray(rows, np.int64)
        if misses is None:
            return
        assert self._exporter is not None
        for count in misses[indices][misses[indices] > 0].tolist():
            self._exporter.observe_request(count)
        misses[indices] = 0

    def _safely(self, action: Any, *args: Any) -> None:
        if self._broken:
            return
        try:
            action(*args)
        except Exception as error:
            self._broken = True
            logger.warning("ESS: metrics are off after %s: %s", type(error).__name__, error)


def decode_reported(result: None, reporter: Any, *args: Any, **kwargs: Any) -> None:
    """Body of the AFTER hook on SchedulerMetricsReporter.report_decode_stats.

    Its target runs at each decode step. Between two log lines this costs a dictionary lookup and
    a modulo.
    """
    if "ess_watch" not in reporter.__dict__:
        reporter.ess_watch = _watch(reporter)
    watch = reporter.ess_watch
    if watch is not None and reporter.forward_ct_decode % reporter.decode_log_interval == 0:
        watch.log()


def stats_published(result: None, collector: Any, stats: Any) -> None:
    """Body of the AFTER hook on SchedulerMetricsCollector.log_stats."""
    watch = getattr(collector, "ess_watch", None)
    if watch is not None:
        watch.publish(stats.kv_used_tokens)


def _watch(reporter: Any) -> Watch | None:
    """A scheduler's Watch; None for a pool without a hot tier, or if the set-up fails."""
    from sglang_ess.mem_cache.allocator import sparse_pool

    pool = sparse_pool(reporter.scheduler.token_to_kv_pool_allocator)
    if not hasattr(pool, "figures"):
        return None
    try:
        return Watch(reporter)
    except Exception as error:
        logger.warning("ESS: metrics are off after %s: %s", type(error).__name__, error)
        return None
