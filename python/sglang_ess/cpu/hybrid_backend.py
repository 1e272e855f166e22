"""Sparse attention next to linear attention layers: the backend sees its own layers alone.

SGLang wraps the DSA pool of such a model; the pool inside numbers its layers from 0.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool


def over_own_layers(runner: Any, build: Callable[[Any], AttentionBackend]) -> AttentionBackend:
    """build(runner), or, for a model with linear attention layers, one over the pool inside.

    Effect: with linear attention, ess_patches.linear_attention's hooks are registered.
    build: makes the backend of a runner of which it reads token_to_kv_pool, req_to_token_pool and
        kv_cache_dtype
    """
    pool = runner.token_to_kv_pool
    if not isinstance(pool, HybridLinearKVPool):
        return build(runner)
    _use_linear_attention()
    inner = SimpleNamespace(
        token_to_kv_pool=pool.full_kv_pool,
        req_to_token_pool=runner.req_to_token_pool,
        kv_cache_dtype=runner.kv_cache_dtype,
    )
    return _OwnLayers(build(inner), runner)


def _use_linear_attention() -> None:
    """Register what the linear attention layers need, before SGLang builds their backend.

    Raises: Refusal where SGLang is not as the contract has it.
    """
    from ess_patches import contract, linear_attention

    contract.register_late(linear_attention.HOOKS + linear_attention.TOUCHED, "cpu")


class _OwnLayers(AttentionBackend):
    """A backend whose layers have the pool's numbers while it runs."""

    def __init__(self, inner: AttentionBackend, runner: Any):
        super().__init__()
        self._inner, self.token_to_kv_pool = inner, runner.token_to_kv_pool
        self.req_to_token_pool, self.kv_cache_dtype = (
            runner.req_to_token_pool,
            runner.kv_cache_dtype,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def init_forward_metadata(self, forward_batch) -> None:
        self._inner.init_forward_metadata(forward_batch)

    def get_indexer_metadata(self, layer_id, forward_batch):
        return self._inner.get_indexer_metadata(layer_id, forward_batch)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        with self.token_to_kv_pool._transfer_id_context(layer):
            return self._inner.forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache, **kwargs
            )

    forward_decode = forward_extend
