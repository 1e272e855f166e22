"""Hook bodies that make SGLang's CUDA platform build and use the two tiers."""

from __future__ import annotations

from typing import Any

from sglang_ess.attention.overlap import Mode
from sglang_ess.config import EssConfig


def kv_pool_class(pool_class: type, configurator: Any, *, kind: str, default: type) -> type:
    """AFTER KVCacheConfigurator._resolve_kv_pool_class: ours for a sparse model's main pool."""
    from sglang_ess.mem_cache.capacity import serves_two_tiers

    is_main = kind == "dsa" and not configurator.is_draft_worker and configurator.device != "cpu"
    if not is_main or not serves_two_tiers(EssConfig.from_env()):
        return pool_class
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_ess.mem_cache.pool_cuda import CudaEssTokenToKVPool
    from sglang_ess.platforms.draft_chains import use_chains

    use_chains()
    # The pool is built before the backend. The names stay, so that every "dsa" rule applies.
    for name in ("dsa", "nsa"):
        register_attention_backend(name)(sparse_backend)
    return CudaEssTokenToKVPool


def sparse_backend(model_runner: Any) -> Any:
    """The attention backend of a sparse model: ours, and SGLang's for a draft model's one tier."""
    if model_runner.is_draft_worker:
        from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend

        return DeepseekSparseAttnBackend(model_runner)
    from sglang_ess.attention.backend_cuda import EssDsaBackend

    return EssDsaBackend(model_runner)


def paged_allocator_class(allocator_class: type | None, platform: Any) -> type | None:
    """AFTER SRTPlatform.get_paged_allocator_cls: our allocator where the pool is ours."""
    from sglang_ess.mem_cache.capacity import serves_two_tiers

    if allocator_class is not None or not serves_two_tiers(EssConfig.from_env()):
        return allocator_class
    from sglang_ess.mem_cache.allocator import EssPagedAllocator

    return EssPagedAllocator


class OverlapVariants:
    """A decode graph for each overlap mode. A step replays the graph of its mode."""

    def __init__(self, modes: tuple[Mode, ...]):
        self.capture_labels: tuple[str, ...] = tuple(mode.value for mode in modes)

    def select(self, forward_batch: Any) -> str:
        """The label of this batch's graph. Does not ask the device."""
        from sglang_ess.attention import backend_cuda

        backend = backend_cuda.active
        assert backend is not None, "graph_variants has seen it"
        label = backend.chosen.value
        return label if label in self.capture_labels else self.capture_labels[0]


def graph_variants(variants: Any, hf_config: Any) -> Any:
    """AFTER create_attention_graph_variants, which returns None on CUDA with sparse attention."""
    from sglang_ess.attention import backend_cuda

    backend = backend_cuda.active
    if variants is not None or backend is None:
        return variants
    return OverlapVariants(backend.policy.modes)


def topk_selected(
    get_topk: Any, indexer: Any, forward_batch: Any, layer_id: int, q_fp8: Any, weights: Any,
    metadata: Any,
) -> Any:  # fmt: skip
    """AROUND Indexer._get_topk_paged: start decode's plan and fetch as soon as top-k is known.

    A draft model's indexer passes here too, in the same modes and with layer ids of its own, but
    with the metadata of another backend.
    """
    from sglang_ess.attention import backend_cuda

    def upstream(q_fp8, weights, metadata):
        return get_topk(indexer, forward_batch, layer_id, q_fp8, weights, metadata)

    backend = backend_cuda.active
    if backend is None or metadata is not backend.indexer_metadata:
        return upstream(q_fp8, weights, metadata)
    if not backend_cuda.is_decode_step(forward_batch.forward_mode):
        return upstream(q_fp8, weights, metadata)
    return backend.select(upstream, forward_batch, layer_id, q_fp8, weights, metadata)


def requests_with_mode(
    broadcast: Any, receiver: Any, requests: list | None, local_requests: list | None = None
) -> list:
    """AROUND SchedulerRequestReceiver._broadcast_reqs_across_ranks: rank 0's overlap mode too.

    Every rank takes the mode in the same iteration of its scheduler, before that iteration's batch.
    """
    from sglang.srt.runtime_context import get_parallel

    from sglang_ess.attention import backend_cuda

    backend = backend_cuda.active
    if backend is None or get_parallel().tp_size == 1:
        return broadcast(receiver, requests, local_requests)
    mode = backend.policy.announcement()
    if mode is not None and get_parallel().tp_rank == 0:
        requests = [*(requests or ()), mode]
    received = broadcast(receiver, requests, local_requests)
    for mode in (item for item in received if isinstance(item, Mode)):
        backend.agree(mode)
    return [item for item in received if not isinstance(item, Mode)]


def decode_stays_decode(vote: Any, *, local_batch: Any, **others: Any) -> bool:
    """AROUND _local_prefill_cuda_graph_vote: a decode batch over two tiers is no short prefill.

    SGLang's prefill graph runs another rank's decode batch as prompts of one token with the whole
    context as their prefix, and a prompt's prefix is staged from the host tier in every layer.
    """
    from sglang_ess.attention import backend_cuda

    if backend_cuda.active is not None and local_batch is not None:
        if local_batch.forward_mode.is_decode():
            return False
    return vote(local_batch=local_batch, **others)
