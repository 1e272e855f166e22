"""A retracted request keeps its slots in the radix tree and resumes as a prefix hit.

Upstream frees a retracted request's KV at once, because the memory is wanted now, and computes
all of it again at the resume. The tree gives slots up on demand just as well: so the slots go
into the tree first, cut into pieces that eviction takes from the end, and a resume computes
only what was really evicted.
"""

from __future__ import annotations

from typing import Any


def release_req(original, *, req, tree_cache, offload_kv: bool = True, **context: Any) -> bool:
    """Body of the AROUND hook on schedule_batch.release_req: keep the KV, then release.

    Effect: as upstream's, but the request's whole pages stay in `tree_cache`, unlocked, and are
    evicted as far as upstream's own evictions (in the call, and in check_decode_mem) need it.
    Returns and raises: as upstream's.
    """
    if resumes_from_tree(req, tree_cache, offload_kv):
        keep_in_tree(req, tree_cache)
    # Frees what the tree does not own (cache_protected_len), moved by the checkpoint.
    return original(req=req, tree_cache=tree_cache, offload_kv=offload_kv, **context)


def resumes_from_tree(req, tree_cache, offload_kv: bool) -> bool:
    """Whether this KV will be wanted again, and by a tree that can hand it back."""
    # False is upstream's word for KV nobody resumes from: beam groups and last requests that
    # are being aborted, and pause_generation(mode="retract"), which asks for a recomputation.
    if not offload_kv or not req.kv.holds_kv or req.skip_radix_cache_insert:
        return False
    # An abort may already have put a stub in the place of the prompt: wrong keys for this KV.
    if req.finished() or req.to_finish is not None:
        return False
    # A beam leader's row is not its own, a diffusion block is no prefix, and a streaming
    # session keeps the row through upstream's claim_kv_row.
    if req.beam_group is not None or req.is_dllm() or (req.session and req.session.streaming):
        return False
    # strip_thinking_cache disowns rows that a former resume has already put into the tree.
    if req.owned_kv_len() < req.kv.cache_protected_len:
        return False
    return frees_on_demand(tree_cache)


def frees_on_demand(tree_cache) -> bool:
    """Whether the tree can evict a node as soon as it is unlocked.

    Not so where an insert starts a copy (HiCache, external linkers: the node stays locked until
    it ends, and retract_decode would retract one request more), where the tree does not hold
    unfinished state (mamba, sliding windows), or where retraction has a backup of its own
    (disaggregated decode).
    """
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.runtime_context import get_disagg

    return (
        type(tree_cache) is UnifiedRadixCache
        and tree_cache.supports_prefix_sharing()
        and tree_cache.tree_components == (ComponentType.FULL,)
        and tree_cache.cache_controller is None
        and tree_cache.linker is None
        and get_disagg().disaggregation_mode != "decode"
    )


def keep_in_tree(req, tree_cache) -> None:
    """Give the tree the request's whole pages, cut so that the tail is evicted first.

    Effect: req.kv.cache_protected_len and req.lock cover the kept pages; the request's partial
    last page stays its own.
    """
    req.refresh_fill_ids()  # they lag output_ids until the next prefill
    tree_cache.checkpoint(req, up_to=req.owned_kv_len())
    split_tail_first(req, tree_cache)


def split_tail_first(req, tree_cache) -> None:
    """Cut the request's path in the tree at each of cut_points().

    A tree evicts whole leaves, so without cuts one page too few costs the whole prompt. Cuts
    within a prefix that others share cost nothing: its pages stay while those need them.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    for end in cut_points(req.kv.cache_protected_len, tree_cache.page_size):
        # A walk that ends inside a node splits it there. The longest prefix is first, so the
        # head is touched last: it is never older than the tail.
        tree_cache.touch_prefix(
            RadixKey(
                req.full_untruncated_fill_ids, req.extra_key, limit=end, cache_salt=req.cache_salt
            )
        )


def cut_points(num_tokens: int, page_size: int) -> list[int]:
    """Prefix lengths that leave pieces of 1, 1, 2, 4, 8... pages, counted from the end.

    To free n pages, eviction then takes fewer than 2n of them, at the cost of
    log2(num_tokens / page_size) nodes. num_tokens is a multiple of page_size.
    """
    pages = num_tokens // page_size
    return [(pages - (1 << i)) * page_size for i in range(pages.bit_length()) if 1 << i < pages]
