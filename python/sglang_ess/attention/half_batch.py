"""Cuts a decode batch's indexer metadata along the batch, for the halves of DBA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

# The fields of DSAMetadata with a row for each query of a decode step, and those with one for each
# request. The others belong to prefill or to the whole batch.
PER_QUERY = (
    "page_table_1",
    "real_page_table",
    "dsa_cache_seqlens_int32",
    "dsa_seqlens_expanded",
    "indexer_logical_page_table",
)
PER_REQUEST = ("cache_seqlens_int32", "indexer_seq_lens")


def slice_metadata(metadata: Any, queries: slice, lists: int = 1) -> Any:
    """DSAIndexerMetadata of the queries [start, stop) alone.

    lists: queries of each request; start and stop are multiples of it
    It has no DeepGEMM schedule: the whole batch's does not fit, and the indexer makes one itself.
    Returns None where the last queries have no metadata: data-parallel padding, which the indexer
    only knows at the end of a whole batch.
    """
    whole = metadata.attn_metadata
    if queries.stop > len(whole.dsa_seqlens_expanded):
        return None
    requests = slice(queries.start // lists, queries.stop // lists)
    num_requests = len(whole.cache_seqlens_int32)

    def part(values: Any) -> Any:
        """Of what has a row for each request or for each query, as SGLang's caller likes."""
        return values[requests if len(values) == num_requests else queries]

    cut: dict[str, Any] = {
        name: getattr(whole, name)[rows]
        for names, rows in ((PER_QUERY, queries), (PER_REQUEST, requests))
        for name in names
        if isinstance(getattr(whole, name), torch.Tensor)
    }
    cut |= {
        "dsa_extend_seq_lens_list": part(whole.dsa_extend_seq_lens_list),
        "cu_seqlens_q": whole.cu_seqlens_q[: queries.stop - queries.start + 1],
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
        paged_mqa_ctx_lens_2d=None if lens is None else part(lens),
    )
