"""What the CUDA backend refuses, each in one line."""

from __future__ import annotations

from typing import Any

from sglang.srt.environ import envs

from sglang_ess.attention.two_tier_decode import LayerStep
from sglang_ess.mem_cache.pool_cuda import CudaEssTokenToKVPool


def check_server(backend: Any, pool: Any, index_kpool: int = 1) -> None:
    """Raises: RuntimeError, one line, for what an EssDsaBackend cannot serve."""
    if not isinstance(pool, CudaEssTokenToKVPool):
        raise RuntimeError(
            f"ESS must have its own KV pool: got {type(pool).__name__}. Report the server's "
            "options; --disable-ess serves them."
        )
    if envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get():
        raise RuntimeError(
            "ESS must see every decode step on the host: got SGLANG_ENABLE_METADATA_GLUE_GRAPH "
            "on. Unset it or add --disable-ess."
        )
    if backend.speculative_num_draft_tokens and envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get():
        raise RuntimeError(
            "ESS must prepare a verification of drafts on the stream that runs it: got "
            "SGLANG_ENABLE_OVERLAP_PLAN_STREAM on. Unset it or add --disable-ess."
        )
    if index_kpool > 1:
        raise RuntimeError(
            "ESS must have an index key for each token: got index_kpool "
            f"{index_kpool}. Add --disable-ess."
        )
    if not backend.use_fused_topk:
        raise RuntimeError(
            "ESS must have fused top-k: got SGLANG_DSA_FUSE_TOPK off. Unset it or add "
            "--disable-ess."
        )
    impls = (backend.dsa_prefill_impl, backend.dsa_decode_impl)
    for impl in ("trtllm", "flashmla_sparse_q8"):  # one reads pages, one flattens the prefix
        if impl in impls:
            raise RuntimeError(
                f"ESS must read rows by index: got the DSA backend {impl}. Add "
                "--dsa-decode-backend and --dsa-prefill-backend flashmla_kv (fp8 rows) or "
                "flashmla_sparse (bf16 rows)."
            )


def check_no_sink(sink, step: LayerStep, way: str = "--ess-overlap off") -> None:
    """Raises: RuntimeError for a sink, which neither attention in parts nor FlashInfer can have."""
    if sink is None:
        return
    if step.buffers is None:  # several passes, whatever overlaps
        way = "a larger hot tier (--ess-hot-ratio or --ess-hot-gib)"
    raise RuntimeError(
        f"attention in parts or by FlashInfer must have no sink: got one. Add {way}, or "
        "--disable-ess."
    )


def check_mode(mode: Any) -> None:
    """Raises: RuntimeError for a pass of the draft model, which keeps SGLang's own backend."""
    if mode.is_draft_extend_v2():
        raise RuntimeError(
            f"ESS must serve the target model only: got a pass {mode.name}. Drop "
            "--speculative-algorithm or add --disable-ess."
        )
