"""A retracted request keeps its slots in the radix tree and resumes as a prefix hit.

Upstream frees the KV of a retracted request at once and computes all of it again at the resume.
Here the slots go into the radix tree first, which gives them up on demand. They are cut into
pieces that eviction takes from the end, so a resume computes only what was really evicted.
"""

from __future__ import annotations

from typing import Any


def release_req(original, *, req, tree_cache, offload_kv: bool = True, **context: Any) -> bool:
    """Body of the AROUND hook on schedule_batch.release_req: keep the KV, then release.

    Effect: as upstream's, but the request's whole pages stay in `tree_cache`, unlocked. Upstream's
    own evictions (in this call and in check_decode_mem) take as many of them as they need.
    Returns and raises as upstream's.
    """
    if resumes_from_tree(req, tree_cache, offload_kv):
        keep_in_tree(req, tree_cache)
    # It frees what the tree does not own: the tokens beyond cache_protected_len.
    return original(req=req, tree_cache=tree_cache, offload_kv=offload_kv, **context)


def resumes_from_tree(req, tree_cache, offload_kv: bool) -> bool:
    """Whether the request will resume from this KV, and the tree can hand it back."""
    # Upstream passes False for KV that no request resumes from: of beam groups, of requests that
    # are being aborted, and in pause_generation(mode="retract"), which asks to recompute it.
    if not offload_kv or not req.kv.holds_kv or req.skip_radix_cache_insert:
        return False
    # An abort may have replaced the prompt by a stub, whose tokens are wrong keys for this KV.
    if req.finished() or req.to_finish is not None:
        return False
    # A beam leader shares its row, a diffusion block is no prefix, and a streaming session keeps
    # its row through upstream's claim_kv_row.
    if req.beam_group is not None or req.is_dllm() or (req.session and req.session.streaming):
        return False
    # strip_thinking_cache gives up rows that an earlier resume may have put into the tree.
    if req.owned_kv_len() < req.kv.cache_protected_len:
        return False
    return frees_on_demand(tree_cache)


def frees_on_demand(tree_cache) -> bool:
    """Whether the tree can evict a node as soon as it is unlocked.

    It cannot where an insert starts a copy (HiCache, external linkers): the node stays locked
    until the copy ends, and retract_decode would retract one more request. It does not hold
    unfinished state of mamba or sliding windows. Disaggregated decode has its own backup of
    retracted requests.
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

    Effect: req.kv.cache_protected_len and req.lock cover these pages. The request keeps its
    partial last page.
    """
    req.refresh_fill_ids()  # until the next prefill they lag behind output_ids
    tree_cache.checkpoint(req, up_to=req.owned_kv_len())
    split_tail_first(req, tree_cache)


def split_tail_first(req, tree_cache) -> None:
    """Cut the request's path in the tree at each of cut_points().

    The tree evicts whole leaves. Without cuts it would evict a whole prompt for one missing page.
    Cuts inside a prefix that other requests share cost nothing: its pages stay while they are used.
    """
    from sglang.srt.mem_cache.radix_cache import RadixKey

    # With a draft model, each key of the tree is of two tokens.
    more = int(tree_cache.tree_core.is_eagle)
    for end in cut_points(req.kv.cache_protected_len, tree_cache.page_size):
        # A walk that ends inside a node splits the node. The longest prefix comes first, so that
        # the head is touched last and is never older than the tail.
        tree_cache.touch_prefix(
            RadixKey(
                req.full_untruncated_fill_ids,
                req.extra_key,
                limit=end + more,
                cache_salt=req.cache_salt,
            )
        )


def cut_points(num_tokens: int, page_size: int) -> list[int]:
    """Prefix lengths that leave pieces of 1, 1, 2, 4, 8... pages, counted from the end.

    To free n pages, eviction then takes fewer than 2n. The cuts add log2(num_tokens / page_size)
    nodes. num_tokens: a multiple of page_size
    """
    pages = num_tokens // page_size
    return [(pages - (1 << i)) * page_size for i in range(pages.bit_length()) if 1 << i < pages]
