"""sglang.srt.platforms.interface: the classes that a platform supplies."""

from ess_patches.contract import Hook

_PAGED = "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator"
_BODY = "sglang_ess.mem_cache.allocator"

HOOKS = (
    Hook(
        target="sglang.srt.platforms.interface.SRTPlatform.get_paged_allocator_cls",
        kind="after",
        signature="(self)",
        body="sglang_ess.platforms.cuda:paged_allocator_class",
        reason="The allocator is asked whether a decode step fits and told which slots are free; "
        "CUDA's own platform cannot be told to name another. Ours drops hot rows with their "
        "slots, which took a hook on Scheduler.flush_cache before.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
    Hook(
        target=f"{_PAGED}.check_decode_capacity",
        kind="subclass",
        signature="(self, *, num_tokens, tree_cache, requests=None, spec_algorithm=None)",
        body=_BODY,
        reason="Asked before each decode step; a no retracts requests until it is a yes.",
        test="tests/test_scheduler_gate.py",
    ),
    Hook(
        target=f"{_PAGED}.max_new_tokens_for_memory",
        kind="subclass",
        signature="(self, input_tokens, max_new_tokens, *, token_capacity, sliding_window_size, "
        "chunk_size)",
        body=_BODY,
        reason="Asked for each request at intake; None refuses one that can never fit.",
        test="tests/test_scheduler_gate.py",
    ),
    Hook(
        target=f"{_PAGED}.prealloc_fits",
        kind="subclass",
        signature="(self, tree_cache, full_tokens, swa_tokens, *, full_budget_tokens, "
        "swa_budget_tokens=None)",
        body=_BODY,
        reason="Asked before slots are given to a request that is to be transferred.",
        test="tests/test_scheduler_gate.py",
    ),
    Hook(
        target=f"{_PAGED}._release_page_ids",
        kind="subclass",
        signature="(self, *page_ids)",
        body=_BODY,
        reason="Private, but where every way of freeing slots ends: their hot rows go with them.",
        test="tests/test_scheduler_gate.py",
    ),
    Hook(
        target=f"{_PAGED}.clear",
        kind="subclass",
        signature="(self)",
        body=_BODY,
        reason="A flush frees every slot at once.",
        test="tests/serving/test_soak.py",
    ),
)
