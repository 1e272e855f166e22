"""What ESS changes for speculative decoding (EAGLE, NEXTN, NGRAM).

`all_hooks` leaves these rows out: a server without drafts does not need them. A scheduler checks
and registers them (sglang_ess.platforms.draft_chains), on the CPU platform before it makes
SGLang's draft worker, on a GPU before the pool.
"""

from ess_patches.contract import Hook

_TEST = "tests/serving/test_speculation.py"
_OPS = "sglang.kernels.ops.speculative"
_FACTORY = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
_OURS = "sglang_ess.cpu.speculation"


def _kernel(target: str, signature: str, body: str, reason: str) -> Hook:
    return Hook(target, "replace", signature, f"{_OURS}:{body}", reason, "cpu", _TEST)


# For drafts of NGRAM, on every platform.
NGRAM_HOOKS = (
    Hook(
        target="sglang.srt.speculative.cpp_ngram.ngram_corpus.NgramCorpus.batch_get",
        kind="after",
        signature="(self, req_ids, batch_tokens, total_lens)",
        body="sglang_ess.platforms.draft_chains:padded_as_chain",
        reason="Where NGRAM finds fewer drafts than a step verifies, SGLang appends tokens of id 0 "
        "as branches of the root. Attention of a sparse model sees the slots before a query, and "
        "an accepted branch would be read with the wrong context.",
        when="both",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.speculative.spec_utils.move_accept_tokens_to_target_kvcache",
        kind="replace",
        signature="(batch, accept_index, num_correct_drafts, token_to_kv_pool_allocator)",
        body="sglang_ess.platforms.draft_chains:keep_accepted_rows",
        reason="NGRAM copies the accepted rows to the front of the step's slots. Those of a chain "
        "are there already, and each copy would drop their hot rows.",
        when="both",
        test=_TEST,
    ),
)
# For every kind of drafts, on the CPU.
HOOKS = (
    _kernel(
        f"{_OPS}.cache_locs.assign_draft_cache_locs_contiguous_func",
        "(req_pool_indices, req_to_token, seq_lens, out_cache_loc, topk, num_cols, "
        "positions=None, mrope=None)",
        "draft_slots",
        "The slots of the draft model's steps come from a Triton kernel. SGLang has a seam for "
        "those of a verify step alone.",
    ),
    _kernel(
        f"{_OPS}.eagle.fill_bonus_tokens_func",
        "(accept_tokens, accept_lens, bonus_tokens, accept_stride, batch_size)",
        "fill_bonus_tokens",
        "The token after the accepted drafts comes from a Triton kernel.",
    ),
    _kernel(
        f"{_OPS}.spec_tree.build_tree_kernel_efficient_func",
        "(parent_list, top_scores_index, seq_lens, tree_mask, positions, retrieve_index, "
        "retrieve_next_token, retrieve_next_sibling, topk, spec_steps, num_verify_tokens, "
        "tree_mask_mode)",
        "build_chain",
        "SGLang refuses platforms that are not its own here.",
    ),
    _kernel(
        f"{_OPS}.spec_tree.verify_tree_greedy_func",
        "(predicts, accept_index, accept_token_num, candidates, retrieve_index, "
        "retrieve_next_token, retrieve_next_sibling, target_predict, topk=-1)",
        "verify_chain",
        "SGLang refuses platforms that are not its own here.",
    ),
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."
        "_resolve_kv_pool_class",
        kind="after",
        signature="(self, *, kind, default)",
        body=f"{_OURS}:draft_pool_class",
        reason="The draft model's pool has one tier. SGLang asks the platform without saying whose "
        "pool it is.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.layers.attention.dsa.utils.should_remap_pd_dsa_seed_to_local_slots",
        kind="after",
        signature="()",
        body=f"{_OURS}:seeds_are_positions",
        reason="A prefill server sends the top-k of a request's first drafts as positions. SGLang "
        "makes slots of them where it has kernels that read slots, on CUDA and HIP; our indexer "
        "gives slots, too.",
        when="cpu",
        test="tests/disagg/test_pd_speculation.py",
    ),
    _kernel(
        "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func",
        "(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size)",
        "note_slots",
        "A verify step's new slots get into the request table by a Triton kernel.",
    ),
    _kernel(
        "sglang.srt.mem_cache.allocation.get_last_loc",
        "(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)",
        "last_slots",
        "SGLang has a torch form of this and chooses it by the attention backend's name, which is "
        "dsa here.",
    ),
    Hook(
        target=f"{_FACTORY}._create_dsa_decode_backend",
        kind="around",
        signature="(self)",
        body=f"{_OURS}:create_decode_backend",
        reason="SGLang makes the draft model's attention backends by name, of classes that import "
        "CUDA kernels.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target=f"{_FACTORY}._create_dsa_prefill_backend",
        kind="around",
        signature="(self)",
        body=f"{_OURS}:create_extend_backend",
        reason="As for its decode steps.",
        when="cpu",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.speculative.eagle_utils.eagle_sample",
        kind="after",
        signature="(verify_input, batch, logits_output, grammar_mask=None, "
        "uno_target_max_top_k=None, *, watermark_state=None, watermark_full_mask=True)",
        body=f"{_OURS}:drafts_accepted",
        reason="How many drafts of each request a step has accepted is known here, for EAGLE and "
        "NGRAM alike. A trace holds it.",
        when="cpu",
        test=_TEST,
    ),
    _kernel(
        "torch.cuda.synchronize",
        "(device=None)",
        "nothing_to_wait_for",
        "SGLang's draft models call it once they have the target's embedding, and it raises where "
        "there is no CUDA device.",
    ),
)

TOUCHED = (
    Hook(
        target="sglang.srt.mem_cache.allocation.get_last_loc_torch",
        kind="call",
        signature="(req_to_token, req_pool_indices_tensor, prefix_lens_tensor)",
        body=_OURS,
        reason="SGLang's torch form of get_last_loc.",
        when="cpu",
        test=_TEST,
    ),
    *(
        Hook(
            target=f"sglang.srt.speculative.eagle_utils.{name}",
            kind="registry",
            signature="<NoneType>",
            body=_OURS,
            reason=f"SGLang's name for {what}, None where a platform has no kernel. Ours goes "
            "there.",
            when="cpu",
            test=_TEST,
        )
        for name, what in (
            ("tree_speculative_sampling_target_only", "the sampler of a verify step"),
            ("top_k_renorm_prob", "the top-k of its probabilities"),
            ("top_p_renorm_prob", "the top-p of its probabilities"),
        )
    ),
)
