"""Bodies of the hooks in ess_patches.topk_stream: they overwrite decode's top-k.

Both are AFTER hooks. They change the result in place and return it.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_ess.testing.topk_stream.playback import playback


def play_on_cuda(
    topk: torch.Tensor, indexer: Any, forward_batch: Any, layer_id: int, q_fp8: Any, weights: Any,
    metadata: Any,
) -> torch.Tensor:  # fmt: skip
    """AFTER Indexer._get_topk_paged: replace a decode batch's top-k [queries, K] int32.

    metadata: DSAIndexerMetadata of these queries, which may be half of a batch. Its fused top-k
    gives slots; the unfused one (HiSparse) gives positions.
    Raises: RuntimeError for offsets into a flattened prefix, which decode never has.
    """
    if not forward_batch.forward_mode.is_decode():
        return topk
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod

    if metadata.topk_transform_method != TopkTransformMethod.PAGED:
        raise RuntimeError(
            "a top-k stream must replace slots or positions: got "
            f"{metadata.topk_transform_method.name}. Drop --ess-topk-stream."
        )
    lengths, pages = metadata.get_seqlens_int32(), metadata.get_page_table_64()
    return _play(topk, lengths, pages, layer_id, as_slots=not metadata.force_unfused_topk)


def play_on_cpu(
    slots: torch.Tensor, layer_id: int, metadata: Any, query: Any, weights: Any, topk: int
) -> torch.Tensor:
    """AFTER sglang_ess.cpu.indexer.decode_slots: replace its slots [requests, K] int32."""
    return _play(slots, metadata.lengths, metadata.page_table, layer_id, as_slots=True)


def _play(
    topk: torch.Tensor, lengths: torch.Tensor, pages: torch.Tensor, layer_id: int, as_slots: bool
) -> torch.Tensor:
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    stream = playback(topk.shape[1], get_token_to_kv_pool().layer_num, topk.device)
    stream.replace(topk, lengths, pages, layer_id, as_slots)
    return topk
