"""Bodies of the hooks that make SGLang's CUDA platform build and use the two tiers."""

from __future__ import annotations

from typing import Any

import torch

from sglang_ess.attention.overlap import Mode
from sglang_ess.config import EssConfig
from sglang_ess.testing.topk_stream.announce import requested


def kv_pool_class(pool_class: type, configurator: Any, *, kind: str, default: type) -> type:
    """AFTER KVCacheConfigurator._resolve_kv_pool_class: ours for a sparse model's main pool."""
    from sglang_ess.mem_cache.capacity import serves_two_tiers

    is_main = kind == "dsa" and not configurator.is_draft_worker and configurator.device != "cpu"
    if not is_main or not serves_two_tiers(EssConfig.from_env()):
        return pool_class
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_ess.attention.backend_cuda import EssDsaBackend
    from sglang_ess.mem_cache.pool_cuda import CudaEssTokenToKVPool

    # The pool is built before the backend. Same names, so that every "dsa" rule holds.
    for name in ("dsa", "nsa"):
        register_attention_backend(name)(EssDsaBackend)
    return CudaEssTokenToKVPool


def paged_allocator_class(allocator_class: type | None, platform: Any) -> type | None:
    """AFTER SRTPlatform.get_paged_allocator_cls: ours over our pool."""
    from sglang_ess.mem_cache.capacity import serves_two_tiers

    if allocator_class is not None or not serves_two_tiers(EssConfig.from_env()):
        return allocator_class
    from sglang_ess.mem_cache.allocator import EssPagedAllocator

    return EssPagedAllocator


class OverlapVariants:
    """A decode graph for each mode of overlap; a step takes the one that is chosen for it."""

    def __init__(self, modes: tuple[Mode, ...]):
        self.capture_labels: tuple[str, ...] = tuple(mode.value for mode in modes)

    def select(self, forward_batch: Any) -> str:
        """The label for this batch; no device is asked."""
        from sglang_ess.attention import backend_cuda

        label = backend_cuda.active.chosen.value
        return label if label in self.capture_labels else self.capture_labels[0]


def graph_variants(variants: Any, hf_config: Any) -> Any:
    """AFTER create_attention_graph_variants: None upstream on CUDA with sparse attention."""
    from sglang_ess.attention import backend_cuda

    backend = backend_cuda.active
    if variants is not None or backend is None:
        return variants
    return OverlapVariants(backend.policy.modes)


def topk_selected(
    get_topk: Any, indexer: Any, forward_batch: Any, layer_id: int, q_fp8: Any, weights: Any,
    metadata: Any,
) -> Any:  # fmt: skip
    """AROUND Indexer._get_topk_paged: decode's plan and fetch set off as soon as top-k is known.

    Under --ess-topk-stream, with ESS or without, it is the stream's as soon as it is known.
    """
    from sglang_ess.attention import backend_cuda

    backend, is_decode = backend_cuda.active, forward_batch.forward_mode.is_decode()

    def upstream(q_fp8, weights, metadata):
        topk = get_topk(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
        if is_decode and requested():
            _play(topk, layer_id, metadata)
        return topk

    if backend is None or not is_decode:
        return upstream(q_fp8, weights, metadata)
    return backend.select(upstream, forward_batch, layer_id, q_fp8, weights, metadata)


def _play(topk: torch.Tensor, layer_id: int, metadata: Any) -> None:
    """Overwrite topk [queries, K] int32: slots of fused top-k, positions of unfused (HiSparse).

    metadata: DSAIndexerMetadata of the queries, a half's too
    Raises: RuntimeError for offsets into a flattened prefix, which decode has none of.
    """
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    from sglang_ess.testing.topk_stream.playback import playback

    if metadata.topk_transform_method != TopkTransformMethod.PAGED:
        raise RuntimeError(
            "a top-k stream must replace slots or positions: got "
            f"{metadata.topk_transform_method.name}. Drop --ess-topk-stream."
        )
    stream = playback(topk.shape[1], get_token_to_kv_pool().layer_num, topk.device)
    stream.replace(
        topk,
        metadata.get_seqlens_int32(),
        metadata.get_page_table_64(),
        layer_id,
        as_slots=not metadata.force_unfused_topk,
    )
