"""sglang.srt.managers.scheduler_components.metrics_reporter: the scheduler's log lines."""

from ess_patches.contract import Hook

_COMPONENTS = "sglang.srt.managers.scheduler_components"
_BODY = "sglang_ess.metrics"
_TEST = "tests/test_metrics.py"

HOOKS = (
    Hook(
        target=f"{_COMPONENTS}.metrics_reporter.SchedulerMetricsReporter.report_decode_stats",
        kind="after",
        signature="(self, can_run_cuda_graph, running_batch=None, num_generated_tokens=0)",
        body=f"{_BODY}:decode_reported",
        reason="The hot tier's log line follows SGLang's decode line, at its interval; upstream "
        "has no seam in a line's text, and this is where it is written.",
        test=_TEST,
    ),
    Hook(
        target=f"{_COMPONENTS}.pool_stats_observer.SchedulerPoolStatsObserver.get_pool_stats",
        kind="call",
        signature="(self)",
        body=_BODY,
        reason="How many slots are in use, as SGLang's own line counts them.",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.mem_cache.memory_pool.ReqToTokenPool.register_on_alloc_rows",
        kind="call",
        signature="(self, hook)",
        body=_BODY,
        reason="Upstream's callback for a row of the request table that gets a new owner: the "
        "last owner's misses are final then.",
        test=_TEST,
    ),
)
