"""What the CPU platform uses of SGLang in place: subclassed, called or registered, not patched.

These rows are checked at each start like the hooks, in every process. That imports their
modules, nearly all of which a process imports anyway: measured beside other work on two
cores, it adds 0.7 s to the 22 s of the scheduler and of the detokenizer (0.6 s of it for
http_server) and nothing to the launcher.
"""

from ess_patches.contract import Hook

_POOL = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool"
_PLATFORM = "sglang.srt.platforms.interface.SRTPlatform"
_BACKEND = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_CONTEXT = "sglang.srt.model_executor.forward_context"


def _touch(target: str, kind: str, signature: str, body: str, reason: str, test: str) -> Hook:
    return Hook(target, kind, signature, body, reason, when="cpu", test=f"tests/{test}")


HOOKS = (
    _touch(
        _POOL,
        "subclass",
        "(self, size, page_size, kv_lora_rank, dtype, qk_rope_head_dim, layer_num, device, "
        "index_head_dim, enable_memory_saver, kv_cache_dim, start_layer=None, end_layer=None, "
        "index_buf_size=None, index_kpool=1, index_kpool_compress=False, tail_extra_slots=0, "
        "max_running_requests=None, skip_topk_layers=None, dcp_replicated=False)",
        "sglang_ess.cpu.pool",
        "The configurator builds our pool with these arguments.",
        "test_parity.py",
    ),
    _touch(
        f"{_POOL}._write_mla_kv_buffer",
        "subclass",
        "(self, dst_buffer, loc, cache_k_nope, cache_k_rope)",
        "sglang_ess.cpu.pool",
        "Private, but the one place where a latent row is written; upstream's is a CUDA kernel.",
        "test_parity.py",
    ),
    _touch(
        f"{_POOL}._create_index_key_cache",
        "subclass",
        "(self)",
        "sglang_ess.cpu.pool",
        "Private, but made to be overridden: it chooses the class that holds the index keys.",
        "test_parity.py",
    ),
    _touch(
        f"{_POOL}.get_index_k_with_scale_buffer",
        "call",
        "(self, layer_id)",
        "sglang_ess.cpu.indexer and cpu.pool",
        "Index-key pages of a layer, in the byte layout that the operations read and write.",
        "test_parity.py",
    ),
    _touch(
        f"{_POOL}.index_k_with_scale_buffer",
        "call",
        "<property>",
        "sglang_ess.startup",
        "The buffers of all layers, for the bytes a token costs; only these pools have it.",
        "test_startup.py",
    ),
    _touch(
        f"{_POOL}.set_mla_kv_buffer",
        "call",
        "(self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None)",
        "sglang_ess.cpu.attention_backend",
        "The attention backend writes a pass's latent rows through it.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.mem_cache.index_key_cache.IndexKeyCache",
        "subclass",
        "(self, pool, index_buf_size)",
        "sglang_ess.cpu.pool",
        "Its buffers, copies and PD registration stay upstream's.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.mem_cache.index_key_cache.IndexKeyCache._buffer_shape",
        "subclass",
        "(self, num_pages)",
        "sglang_ess.cpu.pool",
        "Private, but the only place that says how wide a page is; float32 keys need 512 B.",
        "test_parity.py",
    ),
    _touch(
        f"{_PLATFORM}.get_kv_pool_cls",
        "subclass",
        "(self, *, kind)",
        "sglang_ess.cpu.platform",
        "Upstream's seam for another pool class.",
        "test_parity.py",
    ),
    _touch(
        f"{_PLATFORM}.apply_server_args_defaults",
        "subclass",
        "(self, server_args)",
        "sglang_ess.cpu.platform",
        "Upstream's seam for a platform's own defaults: the attention backend.",
        "test_launch_errors.py",
    ),
    _touch(
        f"{_PLATFORM}.init_backend",
        "subclass",
        "(self)",
        "sglang_ess.cpu.platform",
        "Runs once in a worker before its model is built: our registrations happen there.",
        "test_parity.py",
    ),
    _touch(
        f"{_PLATFORM}.get_dispatch_key_name",
        "subclass",
        "(self)",
        "sglang_ess.cpu.platform",
        "The key under which SGLang's multi-platform operations find our forward functions.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.platforms.cpu.CpuDeviceMixin.get_device",
        "subclass",
        "(self, device_id=0)",
        "sglang_ess.cpu.platform",
        "Argument resolution splits the result as a string; upstream's is a torch.device.",
        "test_users.py",
    ),
    _touch(
        "sglang.kernels.fused_op.BaseFusedOp.register_oot_forward",
        "registry",
        "(op_cls, fn, platform_key)",
        "sglang_ess.cpu.platform",
        "Registers our forward for the indexer, which has no native one.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.forward_cuda",
        "call",
        "(self, x, q_lora, positions, forward_batch, layer_id, return_indices=True, "
        "use_cuda_graph=True)",
        "sglang_ess.cpu.indexer",
        "indexer_forward takes the call in its stead, so it mirrors these parameters.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.layers.attention.attention_registry.register_attention_backend",
        "registry",
        "(name)",
        "sglang_ess.cpu.platform",
        'Puts our backend in the place of "dsa", whose name the model code tests.',
        "test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.forward_extend",
        "subclass",
        "(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs)",
        "sglang_ess.cpu.attention_backend",
        "Sparse MLA of a prefill chunk; the model passes q_rope, k_rope and topk_indices.",
        "test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.forward_decode",
        "subclass",
        "(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs)",
        "sglang_ess.cpu.attention_backend",
        "Sparse MLA of a decode step; the same function as forward_extend.",
        "test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.init_forward_metadata",
        "subclass",
        "(self, forward_batch)",
        "sglang_ess.cpu.attention_backend",
        "Computes once a pass what every layer needs to know of its queries.",
        "test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.get_indexer_metadata",
        "subclass",
        "(self, layer_id, forward_batch)",
        "sglang_ess.cpu.attention_backend",
        "Hands that metadata to the indexer.",
        "test_parity.py",
    ),
    _touch(
        f"{_CONTEXT}.get_attn_backend",
        "call",
        "()",
        "sglang_ess.cpu.indexer",
        "The indexer finds the pass's metadata through it.",
        "test_parity.py",
    ),
    _touch(
        f"{_CONTEXT}.get_token_to_kv_pool",
        "call",
        "()",
        "sglang_ess.cpu.indexer",
        "The indexer finds the pool through it.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.state_capturer.indexer_topk.maybe_capture_indexer_topk",
        "call",
        "(layer_id, topk_indices)",
        "sglang_ess.cpu.indexer",
        "Keeps --enable-return-indexer-topk working: every upstream indexer ends with it.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.layers.rotary_embedding.factory.get_rope",
        "call",
        "(head_size, rotary_dim, max_position, base, is_neox_style=True, rope_scaling=None, "
        "dtype=None, partial_rotary_factor=1.0, dual_chunk_attention_config=None)",
        "sglang_ess.cpu.adapt",
        "Gives the plain rope that get_rope_cpu refuses to.",
        "test_parity.py",
    ),
    _touch(
        "sglang.srt.configs.model_config.is_deepseek_dsa",
        "call",
        "(config)",
        "sglang_ess.preflight and cpu.platform",
        "Whether a model has sparse attention is upstream's to say.",
        "test_launch_errors.py",
    ),
    _touch(
        "sglang.srt.arg_groups.model_override_base.model_config_of",
        "call",
        "(server_args)",
        "sglang_ess.cpu.platform",
        "The model's configuration while arguments are still being resolved.",
        "test_users.py",
    ),
    _touch(
        "sglang.srt.entrypoints.http_server.get_global_state",
        "call",
        "()",
        "sglang_ess.startup",
        "The launcher learns from it that the scheduler is ready, and gets its facts.",
        "test_startup.py",
    ),
    _touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.is_ready",
        "call",
        "(self)",
        "sglang_ess.startup",
        "The launcher prints the summary block once it is true.",
        "test_startup.py",
    ),
)
