"""sglang.srt.managers.scheduler: its handshake with the HTTP process, its cache flush."""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_init_info",
        kind="after",
        signature="(self)",
        body="sglang_ess.startup:scheduler_ready",
        reason="Its result is sent once the pool exists and before the first request: the "
        "kernels are prepared there, and what a token costs goes along to the HTTP process.",
        when="cpu",
        test="tests/test_startup.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.flush_cache",
        kind="after",
        signature="(self, empty_cache=True)",
        body="sglang_ess.pool:cache_flushed",
        reason="A flush frees every slot through the allocator and tells the pool nothing: its "
        "hot rows would stay, owned by nobody, until writes or misses take them.",
        when="always",
        test="tests/test_soak.py",
    ),
)
