"""sglang.srt.managers.scheduler: its handshake with the HTTP process, who joins a batch."""

from dataclasses import replace

from ess_patches.contract import Hook

_INIT_INFO = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.get_init_info",
    kind="after",
    signature="(self)",
    body="sglang_ess.launch.startup:scheduler_ready",
    reason="Its result is sent once the pool exists and before the first request: the "
    "kernels are prepared there, and what a token costs goes along to the HTTP process.",
    when="cpu",
    test="tests/launch/test_startup.py",
)
_INIT = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.__init__",
    kind="around",
    signature="(self, server_args, port_args)",
    body="sglang_ess.errors:make_scheduler",
    reason="What SGLang or ESS refuses there (memory, backends, features) would reach the operator "
    "as the traceback of a child and a SIGQUIT.",
    when="cpu",
    test="tests/launch/test_launch_errors.py",
)

_DISPATCHER = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
    kind="after",
    signature="(self)",
    body="sglang_ess.intake.guard:guard_dispatcher",
    reason="Upstream lets an exception in the intake of one request end the server; the "
    "dispatcher is the one place that every message passes. One-tier too: the platform is ours.",
    when="cpu",
    test="tests/intake/test_intake.py",
)

HOOKS = (
    _INIT,
    replace(_INIT, when="cuda"),
    _INIT_INFO,
    replace(
        _INIT_INFO,
        reason="The same facts on a GPU, where one tier has no need of the hook.",
        when="cuda",
    ),
    _DISPATCHER,
    replace(_DISPATCHER, reason="The same on a GPU, where ESS serves two tiers.", when="cuda"),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
        kind="around",
        signature="(self, running_batch)",
        body="sglang_ess.scheduler_gate:prefill_round",
        reason="Admission: the part of the waiting queue whose working sets and misses there is "
        "room for. The allocator's own seams (create_prefill_budget) see tokens, not requests, "
        "and a refusal there lasts until a request ends.",
        when="always",
        test="tests/test_scheduler_gate.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._get_new_prebuilt_batch",
        kind="around",
        signature="(self, running_batch)",
        body="sglang_ess.scheduler_gate:prebuilt_round",
        reason="The same in disaggregated decode, where requests whose rows have arrived join "
        "the batch; private, but the one place where they do. Warm-up ids are used up there.",
        when="always",
        test="tests/disagg/test_pd_serving.py",
    ),
)
