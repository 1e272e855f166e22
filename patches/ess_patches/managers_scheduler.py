"""sglang.srt.managers.scheduler: the scheduler's handshake with the HTTP process."""

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
)
