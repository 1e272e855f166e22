"""FlashInfer's attention of a decode step without overlap: --ess-attention flashinfer.

FlashInfer must know on the host how long each query's list is. In a step without overlap it is
min(seq_len, top-k): SGLang's fused top-k puts the slots first and -1 behind them
(dsa_topk_backend.topk_transform), and a plan keeps their places. seq_lens_cpu is exact for decode
with one query a request, with the overlap scheduler too: ScheduleBatch.prepare_for_decode adds one
to it on the host, and the runners pad it as they pad seq_lens.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sglang_ess.attention.mla_kernels import FlashInferMemory, FlashInferMla, Need
from sglang_ess.attention.overlap import Mode
from sglang_ess.layout import ROW_DIM


class PlannedLists:
    """FlashInfer's wrappers: one for each captured batch size, one for all eager steps.

    All layers of a step have lists of the same lengths, so they share the step's plan.
    On the device it takes 128 MiB and 12 bytes a list entry of the largest batch, and FlashInfer
    8 MiB for each wrapper.

    need: whole, packed lists; topk: their columns
    Raises: RuntimeError, one line, for what FlashInfer cannot read.
    """

    def __init__(self, need: Need, sm_scale: float, device: torch.device, topk: int):
        if reasons := FlashInferMla.refusals(need):
            raise RuntimeError(
                "--ess-attention flashinfer must have what FlashInfer can do: it "
                f"{' and '.join(reasons)}. Add --ess-attention sglang."
            )
        self._made_with = need, sm_scale, device, FlashInferMemory(device)
        self._topk, self._scale = topk, sm_scale
        self._captured: dict[int, FlashInferMla] = {}
        self._eager = FlashInferMla(*self._made_with)
        self._planned: FlashInferMla | None = None

    def plan(self, seq_lens: torch.Tensor | None, batch: int, captured: bool) -> None:
        """Plan a step of `batch` queries: outside the CUDA graph, on the stream that runs it.

        seq_lens: [batch] on the host, the new tokens included; padding is 1
        captured: the step is captured or replayed
        Raises: RuntimeError, one line, if the host does not have each query's length.
        """
        self._planned = None
        if seq_lens is None or len(seq_lens) != batch:
            got = "none" if seq_lens is None else len(seq_lens)
            raise RuntimeError(
                f"--ess-attention flashinfer must have {batch} lengths on the host: got {got}. "
                "Add --ess-attention sglang."
            )
        if not batch:
            return
        kernel = self._eager
        if captured:
            if batch not in self._captured:
                self._captured[batch] = FlashInferMla(*self._made_with)
            kernel = self._captured[batch]
        kernel.plan(seq_lens.clamp(1, self._topk), self._topk)
        self._planned = kernel

    def attend(self, q_all, rows, indices, scale: float) -> torch.Tensor:
        """out [T, H, 512] of q_all [T, H, 576] over hot rows [N, 576] and lists [T, K] int32.

        scale: the layer's; FlashInfer has that of the model, which must be the same
        """
        if self._planned is None:
            raise RuntimeError("a decode step must be planned before its attention: got no plan.")
        if not math.isclose(scale, self._scale, rel_tol=1e-6):
            raise RuntimeError(
                f"--ess-attention flashinfer must have the model's softmax scale {self._scale:g} "
                f"in every layer: got {scale:g}. Add --ess-attention sglang."
            )
        return self._planned.attend(q_all, rows, indices, None)[0]


def planned_lists_for(backend: Any, sm_scale: float) -> PlannedLists:
    """Those of an EssDsaBackend. Raises: RuntimeError, one line, where FlashInfer cannot serve."""
    if backend.policy.modes != (Mode.OFF,):
        raise RuntimeError(
            "--ess-attention flashinfer must come with --ess-overlap off: got modes "
            f"{', '.join(mode.value for mode in backend.policy.modes)}. Add --ess-overlap off."
        )
    if backend.speculative_num_draft_tokens:
        raise RuntimeError(
            "--ess-attention flashinfer must know each query's length on the host, which nobody "
            "does while drafts are verified: got --speculative-num-draft-tokens "
            f"{backend.speculative_num_draft_tokens}. Add --ess-attention sglang."
        )
    rows = backend.token_to_kv_pool.tier.rows[0].flatten(1)
    if rows.dtype != torch.uint8 and rows.shape[1] != ROW_DIM:
        raise RuntimeError(
            f"--ess-attention flashinfer must have rows of {ROW_DIM} values: got "
            f"{rows.shape[1]}. Add --ess-attention sglang."
        )
    need = Need(rows.dtype, backend.device_capability, backend.num_q_heads)
    return PlannedLists(need, sm_scale, torch.device(backend.device), backend.dsa_index_topk)
