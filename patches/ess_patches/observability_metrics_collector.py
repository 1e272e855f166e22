"""sglang.srt.observability.metrics_collector: the scheduler's Prometheus metrics."""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        kind="after",
        signature="(self, stats)",
        body="sglang_ess.metrics:stats_published",
        reason="All reports end in it, the idle one too: after decode steps alone, the last "
        "requests before a quiet time would stay out of /metrics.",
        test="tests/test_metrics.py",
    ),
)
