"""Options of SGLang that a server with ESS, or one on the CPU platform, cannot have.

Each table lists the values that are allowed; the launcher refuses any other.
"""

from __future__ import annotations

from typing import Any

# (ServerArgs field, flag, allowed values)
Rules = tuple[tuple[str, str, tuple[Any, ...]], ...]

# What the CPU platform serves with any model.
CPU_RULES: Rules = (
    ("device", "--device", (None, "cpu")),
    # A context split over ranks: our attention reads all rows of a request.
    ("attn_cp_size", "--attn-cp-size", (1,)),
    ("dcp_size", "--dcp-size", (1,)),
    # Experts in groups that meet by one of the transports below, or that move while serving.
    ("moe_dp_size", "--moe-dp-size", (1,)),
    ("moe_a2a_backend", "--moe-a2a-backend", ("none",)),
    ("boundary_reduction", "--boundary-reduction", ("auto", "ar")),
    ("elastic_ep_backend", "--elastic-ep-backend", (None, "none")),
    ("enable_eplb", "--enable-eplb", (False,)),
    ("ep_num_redundant_experts", "--ep-num-redundant-experts", (0,)),
    # A rank's number on its node chooses its cores (platforms/cpu_threads.py).
    ("base_gpu_id", "--base-gpu-id", (0,)),
    ("gpu_id_step", "--gpu-id-step", (1,)),
    ("quantization", "--quantization", (None, "unquant")),
    ("enable_hierarchical_cache", "--enable-hierarchical-cache", (False,)),
    ("enable_lmcache", "--enable-lmcache", (False,)),
    ("enable_flexkv", "--enable-flexkv", (False,)),
    ("enable_lora", "--enable-lora", (None, False)),
    ("lora_paths", "--lora-paths", (None, [])),
    ("enable_two_batch_overlap", "--enable-two-batch-overlap", (False,)),
    ("enable_single_batch_overlap", "--enable-single-batch-overlap", (False,)),
    ("cpu_offload_gb", "--cpu-offload-gb", (0,)),
    ("weight_cache_mode", "--weight-cache-mode", ("off",)),
)
# What it serves with a sparse-attention model. Other models run on SGLang's own CPU backend.
CPU_SPARSE_RULES: Rules = (
    ("kv_cache_dtype", "--kv-cache-dtype", ("auto", "bf16", "bfloat16", "fp8_e4m3")),
    ("page_size", "--page-size", (None, 64)),
    ("attention_backend", "--attention-backend", (None, "dsa", "nsa")),
    ("prefill_attention_backend", "--prefill-attention-backend", (None, "dsa", "nsa")),
    ("decode_attention_backend", "--decode-attention-backend", (None, "dsa", "nsa")),
    ("dtype", "--dtype", ("auto", "bfloat16", "float32", "float")),
    ("is_embedding", "--is-embedding", (False,)),
)
# What a two-tier pool serves, on every platform.
ESS_RULES: Rules = (
    # These write slots without the pool's setters, so that a stale hot row could survive.
    ("enable_memory_saver", "--enable-memory-saver", (False,)),
    ("enable_unified_memory", "--enable-unified-memory", (False,)),
    ("enable_hisparse", "--enable-hisparse", (False,)),
    ("enable_hierarchical_cache", "--enable-hierarchical-cache", (False,)),
    ("enable_lmcache", "--enable-lmcache", (False,)),
    ("enable_flexkv", "--enable-flexkv", (False,)),
    # These transports can write into host memory; the others need device pointers.
    (
        "disaggregation_transfer_backend",
        "--disaggregation-transfer-backend",
        ("mooncake", "nixl", "fake"),
    ),
    # These copy KV to the host, where the host tier already holds it.
    (
        "disaggregation_decode_enable_offload_kvcache",
        "--disaggregation-decode-enable-offload-kvcache",
        (False,),
    ),
    (
        "disaggregation_decode_host_receive_threshold",
        "--disaggregation-decode-host-receive-threshold",
        (1, 1.0),
    ),
    (
        "disaggregation_decode_retraction_backup",
        "--disaggregation-decode-retraction-backup",
        (None, "cpu_tensor", "none"),
    ),
    # A pool with two tiers stays so until the server ends, and a prefill server has one tier.
    ("enable_pd_role_switch", "--enable-pd-role-switch", (False,)),
    ("dcp_size", "--dcp-size", (1,)),
    ("attn_cp_size", "--attn-cp-size", (1,)),
)
# What it serves on a GPU, in addition.
CUDA_RULES: Rules = (
    # The CPU platform serves stages. On GPUs they have not been tried.
    ("pp_size", "--pp-size", (1,)),
    # Both split a batch inside a layer; the plan of one part would disturb the other's.
    ("enable_two_batch_overlap", "--enable-two-batch-overlap", (False,)),
    ("enable_single_batch_overlap", "--enable-single-batch-overlap", (False,)),
    ("enable_pdmux", "--enable-pdmux", (False,)),
    # A mixed batch stages the whole context of each request in decode, in every layer.
    ("enable_mixed_chunk", "--enable-mixed-chunk", (False,)),
    # All of SGLang's but pplx. It pads every rank to one length, for which SGLang runs a decode
    # batch beside another rank's prefill as prompts of one token: as a mixed batch.
    ("moe_a2a_backend", "--moe-a2a-backend", (
        "none", "deepep", "deepep_v2", "mooncake", "nixl", "mori", "flashinfer", "megamoe",
        "flashinfer_megamoe",
    )),
    ("attention_backend", "--attention-backend", (None, "dsa", "nsa")),
    ("prefill_attention_backend", "--prefill-attention-backend", (None, "dsa", "nsa")),
    ("decode_attention_backend", "--decode-attention-backend", (None, "dsa", "nsa")),
)  # fmt: skip
# Options that change the queries per request in decode, or the page table: a stream knows neither.
STREAM_RULES: Rules = (
    ("speculative_algorithm", "--speculative-algorithm", (None,)),
    *(rule for rule in ESS_RULES if rule[0] in ("dcp_size", "attn_cp_size")),
)


def rule_reasons(
    server_args: Any,
    rules: Rules,
    where: str = "on the CPU platform",
    remedy: str = "Drop or change it",
) -> list[str]:
    """One line for each option whose value the rules do not allow."""
    return [
        f"{flag} must be {_shown(allowed)} {where}: got {_shown((value,))}. {remedy}."
        for name, flag, allowed in rules
        if (value := getattr(server_args, name)) not in allowed
    ]


def _shown(values: tuple[Any, ...]) -> str:
    words = {None: "unset", True: "on", False: "off"}
    return " or ".join(
        words[value] if value is None or isinstance(value, bool) else str(value)
        for value in values
        if value != []
    )
