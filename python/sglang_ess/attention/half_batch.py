"""Cuts a decode batch's indexer metadata along the batch, for the halves of DBA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

# The fields of DSAMetadata with a row for each query of a decode step. The others belong to
# prefill or to the whole batch.
PER_QUERY = (
    "cache_seqlens_int32",
    "page_table_1",
    "real_page_table",
    "dsa_cache_seqlens_int32",
    "dsa_seqlens_expanded",
    "indexer_logical_page_table",
    "indexer_seq_lens",
)


def slice_metadata(metadata: Any, queries: slice) -> Any:
    """DSAIndexerMetadata of the queries [start, stop) alone.

    It has no DeepGEMM schedule: the whole batch's does not fit, and the indexer makes one itself.
    Returns None where the last queries have no metadata: data-parallel padding, which the indexer
    only knows at the end of a whole batch.
    """
    whole = metadata.attn_metadata
    if queries.stop > len(whole.cache_seqlens_int32):
        return None
    cut: dict[str, Any] = {
        name: getattr(whole, name)[queries]
        for name in PER_QUERY
        if isinstance(getattr(whole, name), torch.Tensor)
    }
    count = queries.stop - queries.start
    cut |= {
        "dsa_extend_seq_lens_list": whole.dsa_extend_seq_lens_list[queries],
        "cu_seqlens_q": whole.cu_seqlens_q[: count + 1],
        "paged_mqa_schedule_metadata": None,
        "paged_mqa_ctx_lens_2d": None,
    }
    if whole.topk_v2_plan is not None:
        from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2

        cut["topk_v2_plan"] = plan_topk_v2(cut["dsa_seqlens_expanded"])
    lens = metadata.paged_mqa_ctx_lens_2d
    return replace(
        metadata,
        attn_metadata=replace(whole, **cut),
        paged_mqa_schedule_metadata=None,
        paged_mqa_ctx_lens_2d=None if lens is None else lens[queries],
    )
