"""The third tier's metrics in SGLang's /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COUNTERS = {
    "lookup_pages": "Pages of prompts that were looked up in the store of --ess-store.",
    "hit_pages": "Pages that the store had, from the first one looked up on.",
    "loaded_pages": "Pages that were loaded from the store instead of computed.",
    "loaded_bytes": "Bytes of these pages.",
    "saved_pages": "Pages that were handed to the store; it skips those that it has.",
    "skipped_pages": "Pages that were not saved because too many were waiting.",
    "read_bytes": "Bytes that this server has read from the store.",
    "written_bytes": "Bytes that this server has written to the store.",
    "write_errors": "Pages that the disk did not take.",
    "evicted_pages": "Pages of any server that this server has removed to keep the store's limit.",
}
_GAUGES = {
    "used_bytes": "Bytes of the store, of all servers over it.",
    "limit_bytes": "The store's largest size.",
}
_LOAD_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class StoreMetrics:
    """Metrics of one EssLinker. linker: with figures and store_stats(); labels: SGLang's."""

    def __init__(self, linker: Any, labels: Mapping[str, Any], registry: Any = None):
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        registry = registry or REGISTRY
        self._linker, self._labels = linker, labels
        self._counted: dict[str, int] = {}
        self._counters = {
            name: Counter(
                f"sglang:ess_store_{name}_total", text, list(labels), registry=registry
            ).labels(**labels)
            for name, text in _COUNTERS.items()
        }
        self._gauges = {
            name: Gauge(
                f"sglang:ess_store_{name}", text, list(labels), registry=registry,
                multiprocess_mode="mostrecent",
            ).labels(**labels)
            for name, text in _GAUGES.items()
        }  # fmt: skip
        self._failures = Counter(
            "sglang:ess_store_failures_total",
            "Loads, lookups and saves that failed, by reason; the prompts were computed.",
            [*labels, "reason"],
            registry=registry,
        )
        self._seconds = Histogram(
            "sglang:ess_store_load_seconds",
            "Time of a load of a prompt's stored pages.",
            list(labels),
            registry=registry,
            buckets=_LOAD_BUCKETS,
        ).labels(**labels)

    @classmethod
    def of(cls, scheduler: Any, labels: Mapping[str, Any]) -> StoreMetrics | None:
        """Those of a scheduler's linker, if it is ours and its rank asks the store."""
        tree = getattr(scheduler, "tree_cache", None)
        linker = getattr(getattr(tree, "linker", None), "cache_linker", None)
        return cls(linker, labels) if getattr(linker, "is_leader", False) else None

    def update(self) -> None:
        """Add what has happened since the last call."""
        figures, stats = self._linker.figures, self._linker.store_stats()
        now = {name: getattr(figures, name) for name in _COUNTERS if hasattr(figures, name)}
        now |= {"written_bytes": stats.bytes_written, "evicted_pages": stats.evicted}
        now |= {"read_bytes": stats.bytes_read, "write_errors": stats.write_errors}
        for name, count in now.items():
            self._counters[name].inc(count - self._counted.get(name, 0))
        for reason, count in figures.failures.items():
            since = count - self._counted.get(f"failed {reason}", 0)
            self._failures.labels(**self._labels, reason=reason).inc(since)
            now[f"failed {reason}"] = count
        self._counted = now
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))
        while figures.load_seconds:
            self._seconds.observe(figures.load_seconds.popleft())
