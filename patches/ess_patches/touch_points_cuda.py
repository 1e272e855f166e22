"""What ESS uses of SGLang on a GPU without changing it: subclassed, called or registered."""

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
        f"{_POOL}.get_key_buffer",
        "subclass",
        "(self, layer_id)",
        "sglang_ess.mem_cache.pool_cuda",
        "SGLang's attention reads the rows that it returns: hot or staged ones during a pass.",
        "mem_cache/test_pool_cuda.py",
    ),
    _touch(
        f"{_DSA}.forward_decode",
        "subclass",
        _FORWARD,
        "sglang_ess.attention.backend_cuda",
        "Ours plans, then lets SGLang read the hot rows, or attends in two parts.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.forward_extend",
        "subclass",
        _FORWARD,
        "sglang_ess.attention.backend_cuda",
        "Ours lets SGLang's run once for each group of staged requests; in a verification of "
        "drafts over hot rows.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.init_forward_metadata",
        "subclass",
        "(self, forward_batch)",
        "sglang_ess.attention.backend_cuda",
        "A pass begins here: ours starts the staging of a prefill, or chooses a decode's mode.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.init_forward_metadata_out_graph",
        "subclass",
        "(self, forward_batch, in_capture=False)",
        "sglang_ess.attention.backend_cuda",
        "The same for a captured decode step; it also sets the mode of a graph under capture.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.get_indexer_metadata",
        "subclass",
        "(self, layer_id, forward_batch)",
        "sglang_ess.attention.backend_cuda",
        "Ours keeps top-k fused, so that its indices are slots.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.get_topk_transform_method",
        "subclass",
        "(self, forward_mode=None)",
        "sglang_ess.attention.backend_cuda",
        "Ours asks for slots in prefill too, not for offsets into a flattened prefix.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        f"{_DSA}.set_dsa_prefill_impl",
        "subclass",
        "(self, forward_batch=None)",
        "sglang_ess.attention.backend_cuda",
        "Ours allows dense attention only where no prefix has to be read.",
        "platforms/test_cuda.py",
    ),
    _touch(
        f"{_DSA}.init_cuda_graph_state",
        "subclass",
        "(self, max_bs, max_num_tokens)",
        "sglang_ess.attention.backend_cuda",
        "Ours hides the coordinator, for which SGLang would keep a page table of all tokens.",
        "platforms/test_cuda.py",
    ),
    _touch(
        f"{_DSA}._pad_topk_indices",
        "call",
        "(self, topk_indices, num_tokens)",
        "sglang_ess.attention.backend_cuda",
        "Private: adds rows for the padding of a data-parallel batch.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        _INDEXER,
        "call",
        "(self, attn_metadata, topk_transform_method, "
        "topk_backend=<DSATopKBackend.SGL_KERNEL: 'sgl-kernel'>, "
        "paged_mqa_schedule_metadata=None, paged_mqa_ctx_lens_2d=None, force_unfused_topk=False)",
        "sglang_ess.attention.half_batch",
        "Ours cuts it along the batch for mode DBA, which plans a batch in halves.",
        "attention/test_half_batch.py",
    ),
    _touch(
        "sglang.kernels.ops.attention.dsv4.topk.plan_topk_v2",
        "call",
        "(seq_lens, static_threshold=-1, *, out=None)",
        "sglang_ess.attention.half_batch",
        "Makes the top-k kernel's own schedule for half a batch.",
        "attention/test_half_batch.py",
    ),
    _touch(
        "sglang.srt.layers.attention.merge_state.merge_state",
        "call",
        "(prefix_output, prefix_lse, suffix_output, suffix_lse, output=None, output_lse=None)",
        "sglang_ess.attention.backend_cuda",
        "Merges the attention to the hits with that to the misses.",
        "attention/test_two_tier_decode.py",
    ),
    _touch(
        "sglang.srt.model_executor.runner_utils.capture_mode.get_capture_attention_variant",
        "call",
        "()",
        "sglang_ess.attention.backend_cuda",
        "Says which variant the graph runner is capturing.",
        "attention/test_backend_cuda.py",
    ),
    _touch(
        "sglang.srt.layers.attention.attention_registry.register_attention_backend",
        "registry",
        "(name)",
        "sglang_ess.platforms.cuda",
        "Puts our backend under the names dsa and nsa, for the target model; the last "
        "registration wins.",
        "platforms/test_cuda.py",
    ),
)
