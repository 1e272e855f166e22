"""What the CPU platform changes for models with linear attention layers (GLM-5.3-Flash).

`all_hooks` leaves these rows out: their modules cost a second to import. A scheduler checks and
registers them when its pool turns out to be of such a model (sglang_ess.cpu.hybrid_backend).
"""

from ess_patches.contract import Hook

_TEST = "tests/serving/test_glm5_next.py"
_MAMBA = "sglang.srt.layers.attention.hybrid_linear_attn_backend.MambaAttnBackendBase"
_POOL = "sglang.srt.mem_cache.memory_pool.HybridLinearKVPool"

HOOKS = (
    Hook(
        target="sglang.kernels.ops.activation.silu_and_mul_clamp._jit_silu_and_mul_clamp_module",
        kind="around",
        signature="(dtype)",
        body="sglang_ess.platforms.cpu_hooks:clamped_silu",
        reason="The clamped SwiGLU of dense layers is a CUDA kernel that SGLang compiles at the "
        "first call.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.kernels.ops.attention.fla.fused_norm_gate.FusedRMSNormGated.forward",
        kind="around",
        signature="(self, x, g, residual=None, prenorm=False, residual_in_fp32=False)",
        body="sglang_ess.platforms.cpu_hooks:gated_norm",
        reason="The norm after linear attention. SGLang's is a Triton kernel; its CPU kernel takes "
        "silu alone, where GLM-5.3-Flash gates with a sigmoid.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.layers.attention.linear.kda_backend.KDAAttnBackend",
        kind="replace",
        signature="(self, model_runner)",
        body="sglang_ess.cpu.kda_backend:CpuKdaBackend",
        reason="SGLang pairs the sparse backend with this one, by name. It runs Triton kernels.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode",
        kind="around",
        signature="(self)",
        body="sglang_ess.platforms.cpu_hooks:without_pinning",
        reason="SGLang pins the mask of the requests whose states it keeps, on every platform. "
        "Pinning raises where there is no driver.",
        when="cpu",
        test=_TEST,
    ),
)

TOUCHED = (
    Hook(
        target=f"{_MAMBA}.init_forward_metadata",
        kind="call",
        signature="(self, forward_batch)",
        body="sglang_ess.cpu.kda_backend",
        reason="Says which state each request has, and which snapshots the radix cache wants.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.model_executor.forward_batch_info.ForwardBatch.mamba_track_aligned_lens",
        kind="call",
        signature="(self)",
        body="sglang_ess.cpu.kda_backend",
        reason="After how many tokens of a prefill pass a snapshot is due.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target=f"{_POOL}._transfer_id_context",
        kind="call",
        signature="(self, layer)",
        body="sglang_ess.cpu.hybrid_backend",
        reason="Gives a layer the number that it has in the pool of the sparse layers.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.layers.attention.dsa.dsa_indexer_kpool.IndexerKPool.forward_cuda",
        kind="call",
        signature="(self, x, q_lora, positions, forward_batch, layer_id, return_indices=True, "
        "use_cuda_graph=True)",
        body="sglang_ess.cpu.kpool_indexer",
        reason="Our kpool_indexer_forward replaces it, so it has the same parameters.",
        when="cpu",
        test=_TEST,
    ),
)
