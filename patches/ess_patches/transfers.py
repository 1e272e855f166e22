"""What ESS uses of SGLang's transfers between prefill and decode without changing it.

`all_hooks` leaves these rows out: their module imports prometheus_client, which nobody may import
before SGLang has named a directory for the metrics of all processes. A scheduler checks them when
it builds its transfer manager (sglang_ess.disagg.transfer).
"""

from ess_patches.contract import Hook

_CONN = "sglang.srt.disaggregation.mooncake.conn"


def _touch(target: str, kind: str, signature: str, reason: str) -> Hook:
    body, test = "sglang_ess.disagg.mooncake", "tests/disagg/test_transfer.py"
    return Hook(target, kind, signature, body, reason, when="both", test=test)


TOUCHED = (
    _touch(
        f"{_CONN}.MooncakeKVManager._send_kvcache_generic",
        "subclass",
        "(self, mooncake_session_id, src_data_ptrs, dst_data_ptrs, item_lens, "
        "prefill_data_indices, dst_data_indices, executor, state_type=None, force_flat=False, "
        "src_layer_ids=None, dst_layer_ids=None, dst_device_data_indices=None, "
        "dst_device_data_ptrs=None, dst_item_lens=None, bootstrap_room=None)",
        "Private, but the one place that knows buffers and rank: ours sends a rank its share.",
    ),
    _touch(
        f"{_CONN}.MooncakeKVManager.build_receiver_registration_message",
        "subclass",
        "(self)",
        "What a decode rank tells a prefill rank of itself; ours adds its share.",
    ),
    _touch(
        f"{_CONN}.KVArgsRegisterInfo",
        "call",
        "(self, room, endpoint, dst_port, mooncake_session_id, dst_kv_ptrs, dst_aux_ptrs, "
        "dst_state_data_ptrs, dst_tp_rank, dst_attn_tp_size, dst_kv_item_len, "
        "dst_state_item_lens, dst_state_dim_per_tensor, dst_kv_layer_ids, dst_state_layer_ids, "
        "dst_dcp_size=1, dst_dcp_rank=0, requires_dcp_relayout=False, dcp_token_item_lens=None, "
        "dst_kv_item_lens=<factory>, staging_base_ptr=0, staging_total_size=0, staging=None)",
        "The same as a prefill rank has it: the share is behind the items' lengths.",
    ),
    _touch(
        "sglang.srt.disaggregation.common.conn.CommonKVManager.get_mla_kv_ptrs_with_pp",
        "call",
        "(self, src_kv_ptrs, dst_kv_ptrs, state_type=None)",
        "Pairs the buffers of a prefill rank with a decode rank's, pipeline stages included.",
    ),
)
