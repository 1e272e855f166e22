"""What ESS uses of SGLang in place on a GPU: subclassed, called or registered, not patched."""

from ess_patches.contract import Hook

_POOL = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool"
_DSA = "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend"
_INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer_metadata.DSAIndexerMetadata"
_FORWARD = (
    "(self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None, "
    "topk_indices=None, cos_sin_cache=None, is_neox=False, llama_4_scaling=None, attn_sink=None)"
)


def _touch(target: str, kind: str, signature: str, body: str, reason: str, test: str) -> Hook:
    return Hook(target, kind, signature, body, reason, when="cuda", test=f"tests/{test}")


HOOKS = (
    _touch(
        f"{_POOL}._write_mla_kv_buffer",
        "call",
        "(self, dst_buffer, loc, cache_k_nope, cache_k_rope)",
        "sglang_ess.mem_cache.pool_cuda",
        "Private: the kernels that pack latent rows, here into rows of their own on the device.",
        "mem_cache/test_pool_cuda.py",
    ),
    _touch(
        f"{_POOL}.get_key_buffer",
        "subclass",
        "(self, layer_id)",
        "sglang_ess.mem_cache.pool_cuda",
        "Where upstream's attention takes the rows from: hot or staged ones during a pass.",
        "mem_cache/test_pool_cuda.py",
    ),
    _touch(
        f"{_DSA}.forward_decode",
        "subclass",
        _FORWARD,
        "sglang_ess.attention.backend_cuda",
        "Plans, then lets upstream read the hot rows, or attends in two parts.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.forward_extend",
        "subclass",
        _FORWARD,
        "sglang_ess.attention.backend_cuda",
        "Upstream runs once for each group of staged requests.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.init_forward_metadata",
        "subclass",
        "(self, forward_batch)",
        "sglang_ess.attention.backend_cuda",
        "Where a pass begins: prefill's staging sets off, decode's mode is chosen.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.init_forward_metadata_out_graph",
        "subclass",
        "(self, forward_batch, in_capture=False)",
        "sglang_ess.attention.backend_cuda",
        "The same for a captured decode step, and the mode of a graph that is being captured.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.get_indexer_metadata",
        "subclass",
        "(self, layer_id, forward_batch)",
        "sglang_ess.attention.backend_cuda",
        "Keeps top-k fused, so that its indices are slots.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.get_topk_transform_method",
        "subclass",
        "(self, forward_mode=None)",
        "sglang_ess.attention.backend_cuda",
        "Slots in prefill too, not offsets into a flattened prefix.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.set_dsa_prefill_impl",
        "subclass",
        "(self, forward_batch=None)",
        "sglang_ess.attention.backend_cuda",
        "Dense MHA only where no prefix has to be read.",
        "platforms/test_cuda.py",
    ),
    _touch(
        f"{_DSA}.init_cuda_graph_state",
        "subclass",
        "(self, max_bs, max_num_tokens)",
        "sglang_ess.attention.backend_cuda",
        "Without the coordinator, which would have it keep a page table of the whole context.",
        "platforms/test_cuda.py",
    ),
    _touch(
        f"{_DSA}._pad_topk_indices",
        "call",
        "(self, topk_indices, num_tokens)",
        "sglang_ess.attention.backend_cuda",
        "Private: rows for the padding of a data-parallel batch.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        _INDEXER,
        "call",
        "(self, attn_metadata, topk_transform_method, "
        "topk_backend=<DSATopKBackend.SGL_KERNEL: 'sgl-kernel'>, "
        "paged_mqa_schedule_metadata=None, paged_mqa_ctx_lens_2d=None, force_unfused_topk=False)",
        "sglang_ess.attention.half_batch",
        "Cut along the batch for DBA.",
        "attention/test_half_batch.py",
    ),
    _touch(
        "sglang.kernels.ops.attention.dsv4.topk.plan_topk_v2",
        "call",
        "(seq_lens, static_threshold=-1, *, out=None)",
        "sglang_ess.attention.half_batch",
        "The top-k kernel's plan for half a batch.",
        "attention/test_half_batch.py",
    ),
    _touch(
        "sglang.srt.layers.attention.merge_state.merge_state",
        "call",
        "(prefix_output, prefix_lse, suffix_output, suffix_lse, output=None, output_lse=None)",
        "sglang_ess.attention.backend_cuda",
        "Merges the attention to hits and to misses.",
        "attention/test_two_tier_decode.py",
    ),
    _touch(
        "sglang.srt.model_executor.runner_utils.capture_mode.get_capture_attention_variant",
        "call",
        "()",
        "sglang_ess.attention.backend_cuda",
        "Which variant the graph runner is capturing.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        "sglang.srt.layers.attention.attention_registry.register_attention_backend",
        "registry",
        "(name)",
        "sglang_ess.platforms.cuda",
        "Our backend under the names dsa and nsa; the last one wins.",
        "platforms/test_cuda.py",
    ),
)
