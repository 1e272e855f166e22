"""sglang.srt.disaggregation.utils: what travels with a request from prefill to decode."""

from ess_patches.contract import Hook

_UTILS = "sglang.srt.disaggregation.utils"

HOOKS = (
    Hook(
        target=f"{_UTILS}.MetadataBuffers",
        kind="replace",
        signature="(self, size, hidden_size, hidden_states_dtype, max_sampling_mask_tokens, "
        "max_top_logprobs_num=128, custom_mem_pool=None, output_dsa_topk_indices_dim=0, *, "
        "kv_checksum_enabled=False)",
        body="sglang_ess.disagg.metadata:EssMetadataBuffers",
        reason="Warm-up ids travel with the request's metadata, in a buffer of their own at the "
        "end of the list; upstream's one optional top-k buffer is for drafts and holds one row.",
        when="always",
        test="tests/disagg/test_pd_serving.py",
    ),
    Hook(
        target=f"{_UTILS}.setup_state_kv_args",
        kind="after",
        signature="(kv_args, token_to_kv_pool, draft_token_to_kv_pool=None, total_kv_layers=None, "
        "req_to_token_pool=None)",
        body="sglang_ess.disagg.transfer:name_memory",
        reason="NIXL registers memory by its kind, and upstream calls every pool's rows VRAM; it "
        "is called where those kinds are set, just before the manager reads them.",
        when="cuda",
        test="tests/disagg/test_transfer.py",
    ),
    Hook(
        target=f"{_UTILS}.all_reduce_flags",
        kind="call",
        signature="(flags, group, op)",
        body="sglang_ess.scheduler_gate",
        reason="Ranks that run one batch agree on who joins it.",
        test="tests/test_scheduler_gate.py",
    ),
)
