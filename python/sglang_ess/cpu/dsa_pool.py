"""The KV pool of the CPU platform: SGLang's DSA pool with its write paths in torch.

Addressing, allocation, copies and PD registration stay SGLang's. Only the writes that upstream
does by CUDA or Triton kernels are overridden: of a latent row and of an index key.
"""

import torch
from sglang.srt.mem_cache.index_key_cache import IndexKeyCache
from sglang.srt.mem_cache.memory_pool import (
    DSATokenToKVPool,
    HybridLinearKVPool,
    KVCache,
    MLATokenToKVPool,
)

from sglang_ess.config import EssConfig
from sglang_ess.cpu.ops.rows import pack_fp8_rows, store_index_keys
from sglang_ess.layout import index_page_bytes


class _CpuIndexKeyCache(IndexKeyCache):
    """IndexKeyCache whose copies for retracted requests need no CUDA stream."""

    def cpu_copy(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Copy the pages of the slots indices [n], layer by layer."""
        pages = indices[:: self.pool.page_size] // self.pool.page_size
        return [buffer[pages if len(buffer) else pages[:0]] for buffer in self.buffer]

    def load_cpu_copy(self, index_k_cpu: list[torch.Tensor], indices: torch.Tensor) -> None:
        pages = indices[:: self.pool.page_size] // self.pool.page_size
        for buffer, copy in zip(self.buffer, index_k_cpu, strict=True):
            if len(buffer):
                buffer[pages] = copy


class _Float32IndexKeyCache(_CpuIndexKeyCache):
    """Index keys in float32, 512 B each: the reference for fp8 keys."""

    def _buffer_shape(self, num_pages: int) -> tuple[int, int]:
        return num_pages, index_page_bytes(fp32=True)


class CpuDsaTokenToKVPool(DSATokenToKVPool):
    """DSATokenToKVPool whose rows are written by torch.

    Latent rows per layer: [slots, 1, 656] uint8, or [slots, 1, 576] bfloat16 or float32.
    Index keys per layer: [pages, 8448] uint8, or [pages, 32768] with --ess-index-dtype
    float32; none for layers that share another layer's top-k.
    """

    def _create_index_key_cache(self) -> IndexKeyCache:
        config = EssConfig.from_env()
        exact = config is not None and config.index_dtype == "float32"
        return (_Float32IndexKeyCache if exact else _CpuIndexKeyCache)(self, self.index_buf_size)

    def get_cpu_copy(self, indices, mamba_indices=None, req_pool_index=None) -> dict:
        """Copy a retracted request's rows and index keys. Upstream's waits for CUDA at its end."""
        rows = MLATokenToKVPool.get_cpu_copy(self, indices)
        return {"kv": rows, "index_k": self.index_key_cache.cpu_copy(indices)}

    def load_cpu_copy(self, kv_cache_cpu, indices, mamba_indices=None, req_pool_index=None) -> None:
        self._load_rows(kv_cache_cpu["kv"], indices)
        self.index_key_cache.load_cpu_copy(kv_cache_cpu["index_k"], indices)

    def _load_rows(self, copies, indices: torch.Tensor) -> None:
        MLATokenToKVPool.load_cpu_copy(self, copies, indices)

    def latent_rows(self, layer_id: int) -> torch.Tensor:
        """Latent rows of one layer, [slots, row width], as the kernels take them."""
        return self.kv_buffer[layer_id - self.start_layer].squeeze(1)

    def _write_mla_kv_buffer(self, dst_buffer, loc, cache_k_nope, cache_k_rope) -> None:
        """dst_buffer[loc] = latent rows of cache_k_nope [T, 1, 512], cache_k_rope [T, 1, 64].

        Row 0 stays as it is: SGLang's kernels reserve it for padding and never write it.
        """
        target = dst_buffer.squeeze(1)
        reserved = target[0].clone()
        # Indexing would wake threads for a few rows.
        target.index_copy_(0, loc, self._packed(cache_k_nope, cache_k_rope))
        target[0].copy_(reserved)

    def _packed(self, cache_k_nope: torch.Tensor, cache_k_rope: torch.Tensor) -> torch.Tensor:
        """Latent rows [T, row width] of latents [T, 1, 512] and rope keys [T, 1, 64]."""
        latent, rope = cache_k_nope.flatten(1), cache_k_rope.flatten(1)
        if self.dsa_kv_cache_store_fp8:
            return pack_fp8_rows(latent, rope)
        return torch.cat([latent, rope], dim=-1).to(self.dtype)

    def store_index_k(self, layer_id: int, loc: torch.Tensor, keys: torch.Tensor) -> None:
        """Write the index keys [T, 128] of the slots loc [T]; fp8 pages quantise them.

        A pooled key stands for index_kpool slots; loc names any of them.
        """
        pooled = self.index_kpool > 1
        pages = self.get_index_k_with_scale_buffer(layer_id)
        store_index_keys(pages, loc // self.index_kpool if pooled else loc, keys, pooled)


def leaf_of(pool: KVCache, layer_id: int) -> tuple[KVCache, int]:
    """The DSA pool that holds a layer's rows, and the layer's number there.

    In a model with linear attention layers SGLang wraps the DSA pool, which numbers its own layers
    from 0.
    """
    if isinstance(pool, HybridLinearKVPool):
        return pool.full_kv_pool, pool.full_attention_layer_id_mapping[layer_id]
    return pool, layer_id
