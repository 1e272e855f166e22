"""Every hook that ESS registers with SGLang, sorted by the upstream name that it changes.

The bodies are strings, resolved when the hooks are registered. touch_points.py and
touch_points_cuda.py list what ESS uses of SGLang without changing it; topk_stream.py has the hooks
of a test-only switch.
"""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="sglang.srt.arg_groups.overrides._dsa_kv_cache_dtype_default",
        kind="around",
        signature="(view)",
        body="sglang_ess.platforms.cpu_hooks:dsa_kv_cache_dtype",
        reason="SGLang forces bfloat16 KV rows before Blackwell. On the CPU the rows follow the "
        "model's dtype, so that a float32 model can be compared exactly.",
        when="cpu",
        test="tests/serving/test_parity.py",
    ),
    Hook(
        target="sglang.srt.disaggregation.utils.MetadataBuffers",
        kind="replace",
        signature="(self, size, hidden_size, hidden_states_dtype, max_sampling_mask_tokens, "
        "max_top_logprobs_num=128, custom_mem_pool=None, output_dsa_topk_indices_dim=0, *, "
        "kv_checksum_enabled=False)",
        body="sglang_ess.disagg.metadata:EssMetadataBuffers",
        reason="Warm-up ids travel with the request's metadata, in an additional buffer at the end "
        "of the list. SGLang's own optional top-k buffer is for drafts and holds one row.",
        test="tests/disagg/test_pd_serving.py",
    ),
    Hook(
        target="sglang.srt.disaggregation.utils.get_kv_class",
        kind="after",
        signature="(transfer_backend, class_type)",
        body="sglang_ess.disagg.transfer:manager_class",
        reason="SGLang chooses the class that sends and receives rows here. Its own would send all "
        "latent rows to each of the ranks that share one host tier.",
        when="both",
        test="tests/disagg/test_transfer.py",
    ),
    Hook(
        target="sglang.srt.disaggregation.utils.setup_state_kv_args",
        kind="after",
        signature="(kv_args, token_to_kv_pool, draft_token_to_kv_pool=None, total_kv_layers=None, "
        "req_to_token_pool=None)",
        body="sglang_ess.disagg.transfer:describe_pool",
        reason="NIXL registers memory by its kind, and SGLang calls every pool's rows VRAM. The "
        "ranks of a shared host tier are known to the pool alone. This function fills the "
        "arguments that a transfer manager reads next.",
        when="both",
        test="tests/disagg/test_transfer.py",
    ),
    Hook(
        target="sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        kind="before",
        signature="(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, "
        "subprocess_watchdog, execute_warmup_func=<function _execute_server_warmup>, "
        "launch_callback=None)",
        body="sglang_ess.intake.streams:before_server",
        reason="Adds a middleware that answers an error raised before a response's first byte. An "
        "app takes no middleware once it has started. Tokenizer workers get it from "
        "intake/http_app.py.",
        when="both",
        test="tests/intake/test_intake.py",
    ),
    Hook(
        target="sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_paged",
        kind="around",
        signature="(self, forward_batch, layer_id, q_fp8, weights, metadata)",
        body="sglang_ess.platforms.cuda:topk_selected",
        reason="The fetch of missed rows starts here, as soon as the top-k is known. The attention "
        "backend gets the top-k only after the work that the fetch can hide behind, and SGLang "
        "has no public function between the two.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
    Hook(
        target="sglang.srt.layers.attention.graph_variants.create_attention_graph_variants",
        kind="after",
        signature="(hf_config)",
        body="sglang_ess.platforms.cuda:graph_variants",
        reason="A captured decode graph fixes the order of transfer and attention, so each overlap "
        "mode needs a graph. SGLang captures such variants for other models and picks one per "
        "step, but creates none for DSA on CUDA.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
    Hook(
        target="sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        kind="around",
        signature="(layer, x, topk_output, moe_runner_config)",
        body="sglang_ess.platforms.cpu_hooks:moe_of_rank",
        reason="SGLang's torch-native experts leave out the limit on SwiGLU's inputs "
        "(swiglu_limit), which Hy4 has, and fail at the id -1, which expert parallelism gives "
        "another rank's expert.",
        when="cpu",
        test="tests/serving/test_architectures.py",
    ),
    Hook(
        target="sglang.srt.layers.rotary_embedding.factory.get_rope_cpu",
        kind="around",
        signature="(head_size, rotary_dim, max_position, base, is_neox_style=True, "
        "rope_scaling=None, dtype=None, partial_rotary_factor=1.0, device=None)",
        body="sglang_ess.platforms.cpu_hooks:rope_without_scaling",
        reason="SGLang asserts a deepseek_yarn scaling on the CPU, and GLM-5 has none.",
        when="cpu",
        test="tests/serving/test_parity.py",
    ),
    Hook(
        target="sglang.srt.managers.communicator.FanOutCommunicator.__call__",
        kind="around",
        signature="(self, obj)",
        body="sglang_ess.intake.control:ask",
        reason="A control request and its answer pass here. The hook refuses what cannot be served "
        "and turns a failure in the scheduler into status 400.",
        when="both",
        test="tests/intake/test_intake.py",
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.release_req",
        kind="around",
        signature="(*, req, remaing_req_count, req_to_token_pool, token_to_kv_pool_allocator, "
        "tree_cache, hisparse_coordinator, offload_kv=True)",
        body="sglang_ess.mem_cache.retraction:release_req",
        reason="SGLang frees a retracted request's KV; its TODO says that the radix tree might "
        "keep it. With the KV kept in the tree, the request resumes as a prefix hit.",
        test="tests/mem_cache/test_retraction.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="around",
        signature="(self, server_args, port_args)",
        body="sglang_ess.errors:make_scheduler",
        reason="SGLang and ESS make checks here that only a scheduler process can make (memory, "
        "backends, features). Without the hook a refusal would reach the operator as the "
        "traceback of a child process and a SIGQUIT.",
        when="both",
        test="tests/launch/test_launch_errors.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._get_new_prebuilt_batch",
        kind="around",
        signature="(self, running_batch)",
        body="sglang_ess.scheduler_gate:prebuilt_round",
        reason="Admission in disaggregated decode: requests whose rows have arrived join the batch "
        "here and nowhere else. Their warm-up ids are used here too.",
        test="tests/disagg/test_pd_serving.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_init_info",
        kind="after",
        signature="(self)",
        body="sglang_ess.launch.startup:scheduler_ready",
        reason="SGLang sends the result once the pool exists and before the first request. The "
        "hook compiles the CPU's kernels and adds what a token costs, for the HTTP process.",
        when="both",
        test="tests/launch/test_startup.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
        kind="around",
        signature="(self, running_batch)",
        body="sglang_ess.scheduler_gate:prefill_round",
        reason="Admission: the round sees only those waiting requests whose working sets and "
        "misses fit. The allocator's own seam (create_prefill_budget) counts tokens, not "
        "requests, and its refusal lasts until a request ends.",
        test="tests/test_scheduler_gate.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
        kind="after",
        signature="(self)",
        body="sglang_ess.intake.guard:guard_dispatcher",
        reason="In SGLang an exception in the intake of one request ends the server. Every message "
        "passes this dispatcher, so the hook catches it here.",
        when="both",
        test="tests/intake/test_intake.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.dp_attn._local_prefill_cuda_graph_vote",
        kind="around",
        signature="(*, local_batch, num_tokens, prefill_graph_runner, coordinated_prefill, "
        "breakable_prefill, spec_algorithm, model_config)",
        body="sglang_ess.platforms.cuda:decode_stays_decode",
        reason="With data-parallel attention, SGLang runs a decode batch as prompts of one token "
        "while another rank replays a prefill graph. Over two tiers that stages every request's "
        "whole context in every layer. SGLang asks the attention backend for a vote only in "
        "prefill, and spares HiSparse by its own flag.",
        when="cuda",
        test="tests/platforms/test_ranks.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.metrics_reporter."
        "SchedulerMetricsReporter.report_decode_stats",
        kind="after",
        signature="(self, can_run_cuda_graph, running_batch=None, num_generated_tokens=0)",
        body="sglang_ess.metrics:decode_reported",
        reason="Writes the hot tier's log line after SGLang's decode line, at the same interval. "
        "SGLang has no seam for the text of its line.",
        test="tests/test_metrics.py",
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.request_receiver."
        "SchedulerRequestReceiver._broadcast_reqs_across_ranks",
        kind="around",
        signature="(self, recv_reqs, local_reqs=None)",
        body="sglang_ess.platforms.cuda:requests_with_mode",
        reason="Ranks must replay the graph of the same overlap mode. Rank 0's choice travels in "
        "SGLang's own broadcast of requests, once an iteration and before its batch; what else "
        "the scheduler broadcasts is for one data-parallel group.",
        when="cuda",
        test="tests/platforms/test_ranks.py",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        kind="around",
        signature="(self, obj, input_text, input_ids, input_embeds=None, mm_inputs=None, "
        "token_type_ids=None)",
        body="sglang_ess.intake.request_checks:create_tokenized",
        reason="Each prompt passes here last before it is sent, in the form that the scheduler "
        "will read. _validate_one_request sees neither sampling parameters nor types.",
        when="both",
        test="tests/intake/test_intake.py",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        kind="before",
        signature="(self, obj, request=None)",
        body="sglang_ess.intake.request_checks:before_generate",
        reason="Checks a body before it is expanded: n, the lists of a batch, reserved request "
        "ids. All HTTP routes, tokenizer workers and an offline Engine pass here.",
        when="both",
        test="tests/intake/test_intake.py",
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."
        "_resolve_kv_pool_class",
        kind="after",
        signature="(self, *, kind, default)",
        body="sglang_ess.platforms.cuda:kv_pool_class",
        reason="SGLang asks the platform for a pool class, but nobody can make CUDA's own platform "
        "name another one.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget",
        kind="around",
        signature="(self, budget_bytes, *, cap_tokens=None)",
        body="sglang_ess.mem_cache.capacity:config_from_budget",
        reason="SGLang divides device bytes by the cost of a token that keeps its latent rows on "
        "the device. Under ESS those bytes buy index keys and hot rows, and host memory is a "
        "second limit. One tier on the CPU platform takes --ess-device-gib as its device memory.",
        when="both",
        test="tests/mem_cache/test_capacity.py",
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator._should_elide_dsa_index_k",
        kind="around",
        signature="(*, is_draft_worker)",
        body="sglang_ess.mem_cache.capacity:elides_index_keys",
        reason="SGLang gives layers that read another's top-k index keys as soon as a linker is "
        "there, because its own linkers take a buffer of no rows for an error. Ours leaves such "
        "layers out, on the device and in the store.",
        when="both",
        test="tests/serving/test_third_tier.py",
    ),
    Hook(
        target="sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        kind="after",
        signature="(self, stats)",
        body="sglang_ess.metrics:stats_published",
        reason="Every report ends here, the idle one too. If the hot tier published after decode "
        "steps alone, /metrics would miss the last requests before a quiet time.",
        test="tests/test_metrics.py",
    ),
    Hook(
        target="sglang.srt.platforms.interface.SRTPlatform.get_paged_allocator_cls",
        kind="after",
        signature="(self)",
        body="sglang_ess.platforms.cuda:paged_allocator_class",
        reason="SGLang asks the allocator whether a decode step fits, and hands it the slots that "
        "are freed; ours drops the hot rows with them. Nobody can make CUDA's own platform name "
        "another allocator.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
    Hook(
        target="torch.cuda.get_device_capability",
        kind="around",
        signature="(device=None)",
        body="sglang_ess.platforms.cpu_hooks:device_capability",
        reason="SGLang's argument resolution calls it for every DSA model that is not on NPU or "
        "XPU, and it raises where there is no CUDA device.",
        when="cpu",
        test="tests/serving/test_parity.py",
    ),
)
