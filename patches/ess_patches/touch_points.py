"""What ESS uses of SGLang without changing it, on any platform (ESS) or on the CPU platform (CPU).

Each row is checked at each start, in every process, like the hooks. The check imports the rows'
modules, and a process imports nearly all of them anyway: measured next to other work on two cores,
it adds 0.7 s to the 22 s of the scheduler and of the detokenizer, nothing to the launcher.
"""

from ess_patches.contract import Hook

_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_REQ = "sglang.srt.managers.schedule_batch.Req"
_PAGED = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator"
_POOL = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool"
_PLATFORM = "sglang.srt.platforms.interface.SRTPlatform"
_BACKEND = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_CONTEXT = "sglang.srt.model_executor.forward_context"


def _touch(
    target: str, kind: str, signature: str, body: str, reason: str, test: str, when: str = "cpu"
) -> Hook:
    return Hook(target, kind, signature, body, reason, when=when, test=f"tests/{test}")


def _ess(target: str, kind: str, signature: str, body: str, reason: str, test: str) -> Hook:
    return _touch(target, kind, signature, body, reason, test, when="always")


ESS = (
    _ess(
        "sglang.srt.disaggregation.utils.all_reduce_flags",
        "call",
        "(flags, group, op)",
        "sglang_ess.mem_cache.agreement",
        "Lets the ranks that run one batch agree on which requests join it, and on hot rows.",
        "serving/test_rank_agreement.py",
    ),
    _ess(
        f"{_TREE}.checkpoint",
        "call",
        "(self, req, *, up_to, **kwargs)",
        "sglang_ess.mem_cache.retraction",
        "Gives a running request's whole pages to the radix tree and moves its lock onto them.",
        "mem_cache/test_retraction.py",
    ),
    _ess(
        f"{_TREE}.touch_prefix",
        "call",
        "(self, key)",
        "sglang_ess.mem_cache.retraction",
        "Splits the node in which the key ends, so that eviction takes pieces and not the prompt.",
        "mem_cache/test_retraction.py",
    ),
    _ess(
        "sglang.srt.mem_cache.radix_cache.RadixKey",
        "call",
        "(self, token_ids, extra_key=None, is_bigram=False, limit=None, cache_salt=None)",
        "sglang_ess.mem_cache.retraction",
        "Names the prefix at which the tree splits a node.",
        "mem_cache/test_retraction.py",
    ),
    _ess(
        f"{_REQ}.refresh_fill_ids",
        "call",
        "(self)",
        "sglang_ess.mem_cache.retraction",
        "Extends the ids that checkpoint reads up to the last output token.",
        "mem_cache/test_retraction.py",
    ),
    _ess(
        f"{_REQ}.owned_kv_len",
        "call",
        "(self)",
        "sglang_ess.mem_cache.retraction",
        "Says how many of its tokens the request may publish.",
        "mem_cache/test_retraction.py",
    ),
    _ess(
        "sglang.srt.managers.schedule_batch.ScheduleBatch._get_decode_retraction_order",
        "call",
        "(reqs)",
        "sglang_ess.scheduler_gate",
        "Says who leaves a batch first where the hot tier thrashes: SGLang's order for a lack of "
        "slots.",
        "test_scheduler_gate.py",
    ),
    _ess(
        "sglang.srt.managers.scheduler_components.pool_stats_observer."
        "SchedulerPoolStatsObserver.get_pool_stats",
        "call",
        "(self)",
        "sglang_ess.metrics",
        "Counts the slots in use, as SGLang's own log line does.",
        "test_metrics.py",
    ),
    _ess(
        "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.register_on_alloc_rows",
        "call",
        "(self, hook)",
        "sglang_ess.metrics",
        "Calls us when a row of the request table gets a new owner: the last owner's misses are "
        "final then.",
        "test_metrics.py",
    ),
    _ess(
        f"{_PAGED}.check_decode_capacity",
        "subclass",
        "(self, *, num_tokens, tree_cache, requests=None, spec_algorithm=None)",
        "sglang_ess.mem_cache.allocator",
        "SGLang asks it before each decode step and retracts requests until it says yes.",
        "test_scheduler_gate.py",
    ),
    _ess(
        f"{_PAGED}.max_new_tokens_for_memory",
        "subclass",
        "(self, input_tokens, max_new_tokens, *, token_capacity, sliding_window_size, chunk_size)",
        "sglang_ess.mem_cache.allocator",
        "SGLang asks it for each request at intake; None refuses one that can never fit.",
        "test_scheduler_gate.py",
    ),
    _ess(
        f"{_PAGED}.prealloc_fits",
        "subclass",
        "(self, tree_cache, full_tokens, swa_tokens, *, full_budget_tokens, "
        "swa_budget_tokens=None)",
        "sglang_ess.mem_cache.allocator",
        "SGLang asks it before it gives slots to a request whose rows will be transferred.",
        "test_scheduler_gate.py",
    ),
    _ess(
        f"{_PAGED}._release_page_ids",
        "subclass",
        "(self, *page_ids)",
        "sglang_ess.mem_cache.allocator",
        "Private, but every way of freeing slots ends here: their hot rows are dropped with them.",
        "test_scheduler_gate.py",
    ),
    _ess(
        f"{_PAGED}.clear",
        "subclass",
        "(self)",
        "sglang_ess.mem_cache.allocator",
        "A flush frees every slot at once.",
        "serving/test_soak.py",
    ),
    _ess(
        "sglang.srt.speculative.base_spec_worker.BaseSpecWorker.primary_draft_kv_pool",
        "call",
        "<property>",
        "sglang_ess.launch.startup",
        "The draft model's pool, for the bytes that it takes; None for n-grams.",
        "launch/test_startup.py",
    ),
)

CPU = (
    _touch(
        _POOL,
        "subclass",
        "(self, size, page_size, kv_lora_rank, dtype, qk_rope_head_dim, layer_num, device, "
        "index_head_dim, enable_memory_saver, kv_cache_dim, start_layer=None, end_layer=None, "
        "index_buf_size=None, index_kpool=1, index_kpool_compress=False, tail_extra_slots=0, "
        "max_running_requests=None, skip_topk_layers=None, dcp_replicated=False)",
        "sglang_ess.cpu.dsa_pool",
        "The configurator creates our pool with these arguments.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_POOL}._write_mla_kv_buffer",
        "subclass",
        "(self, dst_buffer, loc, cache_k_nope, cache_k_rope)",
        "sglang_ess.cpu.dsa_pool",
        "Private, but the one place where a latent row is written; SGLang's is a CUDA kernel.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_POOL}._create_index_key_cache",
        "subclass",
        "(self)",
        "sglang_ess.cpu.dsa_pool",
        "Private, but made to be overridden: it chooses the class of the index keys.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_POOL}.get_index_k_with_scale_buffer",
        "call",
        "(self, layer_id)",
        "sglang_ess.cpu.indexer and sglang_ess.cpu.dsa_pool",
        "Index-key pages of a layer, in the byte layout that the operations read and write.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_POOL}.index_k_with_scale_buffer",
        "call",
        "<property>",
        "sglang_ess.launch.startup",
        "The buffers of all layers, for the bytes a token costs; only these pools have it.",
        "launch/test_startup.py",
    ),
    _touch(
        f"{_POOL}.set_mla_kv_buffer",
        "call",
        "(self, layer, loc_info, cache_k_nope, cache_k_rope, layer_id_override=None)",
        "sglang_ess.cpu.attention_backend and sglang_ess.mem_cache.pool_cpu",
        "The attention backend writes a pass's latent rows through it; two tiers override it.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_POOL}._create_buffers",
        "subclass",
        "(self)",
        "sglang_ess.mem_cache.pool",
        "Private, but the one place that allocates the latent rows; ours creates the two tiers.",
        "mem_cache/test_capacity.py",
    ),
    _touch(
        f"{_POOL}.set_kv_buffer",
        "subclass",
        "(self, layer, loc_info, cache_k, cache_v, layer_id_override=None)",
        "sglang_ess.mem_cache.pool_cpu",
        "A write path: the written slots' hot rows are dropped after it.",
        "serving/test_two_tier.py",
    ),
    _touch(
        f"{_POOL}.move_kv_cache",
        "subclass",
        "(self, tgt_loc, src_loc)",
        "sglang_ess.mem_cache.pool_cpu",
        "A write path of all layers: the targets' hot rows are dropped after it.",
        "serving/test_two_tier.py",
    ),
    _touch(
        f"{_POOL}.load_cpu_copy",
        "subclass",
        "(self, kv_cache_cpu_dict, indices, mamba_indices=None, req_pool_index=None)",
        "sglang_ess.mem_cache.pool",
        "A write path of all layers: the loaded slots' hot rows are dropped after it.",
        "serving/test_two_tier.py",
    ),
    _touch(
        f"{_POOL}.get_kv_size_bytes",
        "call",
        "(self)",
        "sglang_ess.launch.startup",
        "Device bytes one-tier, for the summary.",
        "launch/test_startup.py",
    ),
    _touch(
        "sglang.srt.mem_cache.memory_pool.unwrap_write_loc",
        "call",
        "(loc_info)",
        "sglang_ess.mem_cache.pool_cpu",
        "Reads the slots of a write from any of the forms that SGLang passes.",
        "serving/test_two_tier.py",
    ),
    _touch(
        "sglang.srt.mem_cache.kv_cache_configurator.calculate_mla_kv_cache_dim",
        "call",
        "(*, model_config, kv_cache_dtype)",
        "sglang_ess.mem_cache.capacity",
        "The width of a latent row, before the pool exists.",
        "mem_cache/test_capacity.py",
    ),
    _touch(
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
        "call",
        "(kvc)",
        "sglang_ess.mem_cache.capacity",
        "The bytes of a token as SGLang counts them, a draft model's too: its result's _cell_size.",
        "mem_cache/test_capacity.py",
    ),
    _touch(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "call",
        "(self, kvc, num_layers)",
        "sglang_ess.mem_cache.capacity",
        "The same without the draft model's. Computes _cell_size, which only instances have.",
        "mem_cache/test_capacity.py",
    ),
    _touch(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.contains_last_prefill_chunk",
        "call",
        "<bool>",
        "sglang_ess.attention.backend_cpu",
        "Says whether a batch ends a prompt, whose last positions then warm the hot tier.",
        "serving/test_two_tier.py",
    ),
    _touch(
        "sglang.srt.mem_cache.index_key_cache.IndexKeyCache",
        "subclass",
        "(self, pool, index_buf_size)",
        "sglang_ess.cpu.dsa_pool",
        "Its buffers, copies and PD registration stay SGLang's.",
        "serving/test_parity.py",
    ),
    _touch(
        "sglang.srt.mem_cache.index_key_cache.IndexKeyCache._buffer_shape",
        "subclass",
        "(self, num_pages)",
        "sglang_ess.cpu.dsa_pool",
        "Private, but the only place that says how wide a page is; float32 keys need 512 B.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_PLATFORM}.get_kv_pool_cls",
        "subclass",
        "(self, *, kind)",
        "sglang_ess.platforms.cpu",
        "SGLang's seam for another pool class.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_PLATFORM}.apply_server_args_defaults",
        "subclass",
        "(self, server_args)",
        "sglang_ess.platforms.cpu",
        "SGLang's seam for a platform's defaults; ours sets the attention backend.",
        "launch/test_launch_errors.py",
    ),
    _touch(
        f"{_PLATFORM}.init_backend",
        "subclass",
        "(self)",
        "sglang_ess.platforms.cpu",
        "Runs once in a worker before its model is built; ours registers backend and indexer.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_PLATFORM}.get_dispatch_key_name",
        "subclass",
        "(self)",
        "sglang_ess.platforms.cpu",
        "The key under which SGLang's multi-platform operations find our forward functions.",
        "serving/test_parity.py",
    ),
    _touch(
        "sglang.srt.platforms.cpu.CpuDeviceMixin.get_device",
        "subclass",
        "(self, device_id=0)",
        "sglang_ess.platforms.cpu",
        "Argument resolution splits the result as a string, and SGLang's own is a torch.device.",
        "serving/test_users.py",
    ),
    _touch(
        "sglang.kernels.fused_op.BaseFusedOp.register_oot_forward",
        "registry",
        "(op_cls, fn, platform_key)",
        "sglang_ess.platforms.cpu",
        "Registers our forward for the indexer, which has no native one.",
        "serving/test_parity.py",
    ),
    _touch(
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer.forward_cuda",
        "call",
        "(self, x, q_lora, positions, forward_batch, layer_id, return_indices=True, "
        "use_cuda_graph=True)",
        "sglang_ess.cpu.indexer",
        "Our indexer_forward replaces it, so it has the same parameters.",
        "serving/test_parity.py",
    ),
    _touch(
        "sglang.srt.layers.attention.attention_registry.register_attention_backend",
        "registry",
        "(name)",
        "sglang_ess.platforms.cpu",
        'Puts our backend in the place of "dsa", whose name the model code tests.',
        "serving/test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.forward_extend",
        "subclass",
        "(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs)",
        "sglang_ess.cpu.attention_backend",
        "Attention of a prefill chunk; the model passes q_rope, k_rope and topk_indices.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.forward_decode",
        "subclass",
        "(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs)",
        "sglang_ess.cpu.attention_backend",
        "Attention of a decode step; the same function as forward_extend.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.init_forward_metadata",
        "subclass",
        "(self, forward_batch)",
        "sglang_ess.cpu.attention_backend",
        "Computes once per pass what every layer needs of its queries.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_BACKEND}.get_indexer_metadata",
        "subclass",
        "(self, layer_id, forward_batch)",
        "sglang_ess.cpu.attention_backend",
        "Gives that metadata to the indexer.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_CONTEXT}.get_attn_backend",
        "call",
        "()",
        "sglang_ess.cpu.indexer",
        "The indexer finds the pass's metadata through it.",
        "serving/test_parity.py",
    ),
    _touch(
        f"{_CONTEXT}.get_token_to_kv_pool",
        "call",
        "()",
        "sglang_ess.cpu.indexer",
        "The indexer finds the pool through it.",
        "serving/test_parity.py",
    ),
    _touch(
        "sglang.srt.state_capturer.indexer_topk.maybe_capture_indexer_topk",
        "call",
        "(layer_id, topk_indices)",
        "sglang_ess.cpu.indexer",
        "Every indexer of SGLang ends with it; --enable-return-indexer-topk needs it.",
        "serving/test_parity.py",
    ),
    _touch(
        "sglang.srt.layers.rotary_embedding.factory.get_rope",
        "call",
        "(head_size, rotary_dim, max_position, base, is_neox_style=True, rope_scaling=None, "
        "dtype=None, partial_rotary_factor=1.0, dual_chunk_attention_config=None)",
        "sglang_ess.platforms.cpu_hooks",
        "Builds the plain rope, which get_rope_cpu refuses to build.",
        "serving/test_parity.py",
    ),
    _touch(
        "sglang.srt.configs.model_config.is_deepseek_dsa",
        "call",
        "(config)",
        "sglang_ess.launch.preflight and sglang_ess.platforms.cpu",
        "SGLang says whether a model has sparse attention.",
        "launch/test_launch_rules.py",
    ),
    _touch(
        "sglang.srt.arg_groups.model_override_base.model_config_of",
        "call",
        "(server_args)",
        "sglang_ess.platforms.cpu",
        "The model's configuration while arguments are still being resolved.",
        "serving/test_users.py",
    ),
    _touch(
        "sglang.srt.entrypoints.http_server.get_global_state",
        "call",
        "()",
        "sglang_ess.launch.startup",
        "Tells the launcher that the scheduler is ready, and gives it the scheduler's facts.",
        "launch/test_startup.py",
    ),
    _touch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.is_ready",
        "call",
        "(self)",
        "sglang_ess.launch.startup",
        "The launcher prints the summary block once it is true.",
        "launch/test_startup.py",
    ),
    _touch(
        "sglang.srt.managers.io_struct.sock_send",
        "call",
        "(socket, obj, flags=0)",
        "sglang_ess.launch_server",
        "Sends the schedulers SGLang's ShutdownReq once no HTTP server is left.",
        "launch/test_shutdown_server.py",
    ),
    _touch(
        "sglang.srt.utils.cudacore_pyspy_dump_utils.collect_scheduler_processes",
        "call",
        "()",
        "sglang_ess.launch_server",
        "Finds the schedulers that still run.",
        "launch/test_shutdown_server.py",
    ),
    _touch(
        "uvicorn.config.Config.load",
        "subclass",
        "(self)",
        "sglang_ess.launch.http_end",
        "Wraps the application, in tokenizer workers too: what uvicorn cancels gets status 503.",
        "launch/test_http_end.py",
    ),
    _touch(
        "uvicorn.supervisors.multiprocess.Multiprocess.terminate_all",
        "call",
        "(self)",
        "sglang_ess.launch.http_end",
        "Ours ends the tokenizer workers and leaves the scheduler running under them.",
        "launch/test_http_end.py",
    ),
)

HOOKS = ESS + CPU
