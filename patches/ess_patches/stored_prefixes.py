"""What ESS uses of SGLang, without changing it, to load a stored prefix while its request waits."""

from ess_patches.contract import Hook

_TREE = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"


def _touch(target: str, signature: str, reason: str) -> Hook:
    body, test = "sglang_ess.mem_cache.waiting_loads", "tests/serving/test_third_tier_loads.py"
    return Hook(target, "call", signature, body, reason, when="always", test=test)


TOUCHED = (
    _touch(
        "sglang.srt.managers.schedule_batch.Req.init_next_round_input",
        "(self, tree_cache=None, cow_mamba=None)",
        "Looks a waiting request's prefix up, in the radix tree and then in the store.",
    ),
    _touch(
        "sglang.srt.mem_cache.unified_cache.unified_cache_linker.UnifiedCacheLinkerWrapper.match",
        "(self, key, req, result)",
        "Leaves in hit_markers what the store has of the request's prefix.",
    ),
    _touch(
        f"{_TREE}.insert",
        "(self, params)",
        "Takes in loaded rows once all of them have passed their checksums.",
    ),
    _touch(
        f"{_TREE}.evict",
        "(self, params)",
        "Makes room for a load.",
    ),
    _touch(
        f"{_TREE}.inc_lock_ref",
        "(self, node_id, skip_lock_components=())",
        "Keeps the part of a prefix that is in the tree while the rest is loaded.",
    ),
    _touch(
        f"{_TREE}.dec_lock_ref",
        "(self, node_id, params, skip_swa=False)",
        "Gives that part back.",
    ),
)
