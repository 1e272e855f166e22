"""What the CPU platform changes for data-parallel attention (--enable-dp-attention).

`all_hooks` leaves these rows out: other servers do not need them. A scheduler checks and registers
them when it builds its attention backend (sglang_ess.platforms.cpu).
"""

from ess_patches.contract import Hook

_TEST = "tests/serving/test_ranks.py"
_PD_TEST = "tests/disagg/test_pd_ranks.py"

_GROUP = "sglang.srt.distributed.parallel_state.GroupCoordinator"

HOOKS = (
    Hook(
        target=f"{_GROUP}.all_gather_into_tensor",
        kind="replace",
        signature="(self, output, input)",
        body="sglang_ess.platforms.cpu_hooks:gather_tokens",
        reason="The ranks' tokens are gathered by a custom operator without a CPU form, on every "
        "platform but SGLang's own CPU engine.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target=f"{_GROUP}._all_gather_into_tensor",
        kind="call",
        signature="(self, output, input)",
        body="sglang_ess.platforms.cpu_hooks",
        reason="What that operator calls: torch's collective, over gloo here.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target=f"{_GROUP}.all_to_all_single",
        kind="replace",
        signature="(self, output, input)",
        body="sglang_ess.platforms.cpu_hooks:exchange_logits",
        reason="Ranks of a decode server exchange their parts of the logits by a custom operator "
        "without a CPU form.",
        when="cpu",
        test=_PD_TEST,
    ),
    Hook(
        target=f"{_GROUP}._all_to_all_single",
        kind="call",
        signature="(self, output, input)",
        body="sglang_ess.platforms.cpu_hooks",
        reason="What that operator calls: torch's collective, over gloo here.",
        when="cpu",
        test=_PD_TEST,
    ),
    Hook(
        target="sglang.srt.layers.dp_attention.memcpy",
        kind="replace",
        signature="(dst, src, dim, offset, sz, offset_src)",
        body="sglang_ess.platforms.cpu_hooks:copy_tokens",
        reason="A rank puts its tokens among those of all by a Triton kernel, on every platform "
        "but SGLang's own CPU engine.",
        when="cpu",
        test="tests/serving/test_rank_servers.py",
    ),
    Hook(
        target="sglang.srt.layers.dp_attention.memcpy_cpu",
        kind="call",
        signature="(dst, src, dim, offset, sz, offset_src)",
        body="sglang_ess.platforms.cpu_hooks",
        reason="What SGLang's own CPU engine calls there.",
        when="cpu",
        test="tests/serving/test_rank_servers.py",
    ),
    Hook(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch",
        kind="around",
        signature="(self, model_runner)",
        body="sglang_ess.platforms.cpu_hooks:sizes_without_pinning",
        reason="SGLang pins the ranks' numbers of tokens, on every platform but its own CPU "
        "engine. Pinning raises where there is no driver.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper.maybe_sleep",
        kind="replace",
        signature="(self)",
        body="sglang_ess.platforms.cpu_hooks:sleep_briefly",
        reason="An idle rank sleeps until a request of its own comes, a second at most. But every "
        "rank takes part in the steps of the others, which would wait for it.",
        when="cpu",
        test=_TEST,
    ),
)
