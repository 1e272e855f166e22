"""sglang.srt.managers.schedule_batch: what becomes of a retracted request's KV."""

from ess_patches.contract import Hook

_BODY = "sglang_ess.mem_cache.retraction"
_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
_REQ = "sglang.srt.managers.schedule_batch.Req"
_TEST = "tests/mem_cache/test_retraction.py"

HOOKS = (
    Hook(
        target="sglang.srt.managers.schedule_batch.release_req",
        kind="around",
        signature="(*, req, remaing_req_count, req_to_token_pool, token_to_kv_pool_allocator, "
        "tree_cache, hisparse_coordinator, offload_kv=True)",
        body=f"{_BODY}:release_req",
        reason="Upstream frees a retracted request's KV (its TODO says that the tree might keep "
        "it); kept in the tree, the request resumes as a prefix hit.",
        test=_TEST,
    ),
    Hook(
        target=f"{_TREE}.checkpoint",
        kind="call",
        signature="(self, req, *, up_to, **kwargs)",
        body=_BODY,
        reason="Gives the tree a running request's whole pages and moves its lock onto them.",
        test=_TEST,
    ),
    Hook(
        target=f"{_TREE}.touch_prefix",
        kind="call",
        signature="(self, key)",
        body=_BODY,
        reason="Its walk splits the node it ends in: eviction then takes pieces, not the prompt.",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.mem_cache.radix_cache.RadixKey",
        kind="call",
        signature="(self, token_ids, extra_key=None, is_bigram=False, limit=None, cache_salt=None)",
        body=_BODY,
        reason="Names the prefix at which to split.",
        test=_TEST,
    ),
    Hook(
        target=f"{_REQ}.refresh_fill_ids",
        kind="call",
        signature="(self)",
        body=_BODY,
        reason="Brings the ids that checkpoint reads up to the last output token.",
        test=_TEST,
    ),
    Hook(
        target=f"{_REQ}.owned_kv_len",
        kind="call",
        signature="(self)",
        body=_BODY,
        reason="How many of the row's tokens the request may publish.",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.managers.schedule_batch.ScheduleBatch._get_decode_retraction_order",
        kind="call",
        signature="(reqs)",
        body="sglang_ess.scheduler_gate",
        reason="Who leaves a batch first where the hot tier thrashes: as where slots run out.",
        test="tests/test_scheduler_gate.py",
    ),
)
