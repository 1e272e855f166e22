"""Decode kernels behind one signature: attend(q_all, rows, indices, lengths) -> (out, lse).

    q_all    [T, H, 576] bfloat16: 512 absorbed latents, 64 rope
    rows     [N, 656] uint8 (fp8) or [N, 576] bfloat16: one layer's hot rows
    indices  [T, K] int32 hot rows, -1 pads; columns from lengths[t] on are not attended
    lengths  [T] int32 on the device
    out      [T, H, 512] bfloat16, lse [T, H] float32, natural logarithm; contiguous, as SGLang's
             merge_state_triton requires. A query without rows gets 0 and -inf.

attend() can be captured in a CUDA graph: shapes are static and the host reads nothing.
FlashInferMla must have a plan() before each step, outside the graph.
`refusals` says in words what a kernel cannot do, without importing it; `choose` takes the first
kernel that fits. A kernel that stops_early spends little on columns from lengths[t] on; the others
compute them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ess_kernels.checks import interpreted
from ess_kernels.sparse_mla import sparse_mla
from sglang_ess.layout import LATENT_DIM, PAGE_SLOTS, ROPE_DIM

# The workspace as SGLang's dsa_dcp.trtllm_rows_per_call sizes it: 256 float2 of softmax state for
# each query and head, and 128 MiB for the kernel itself.
TRTLLM_STATE_BYTES, TRTLLM_SCRATCH_BYTES = 256 * 8, 128 << 20
FLASHINFER_WORKSPACE_BYTES = 128 << 20  # as the docstring of FlashInfer's wrapper recommends


@dataclass(frozen=True)
class Need:
    """The rows, device and lists that a decode kernel must handle.

    rows_dtype: uint8 for fp8 rows, bfloat16 for plain ones (or float32, interpreted)
    capability: the device's compute capability; None under Triton's interpreter
    split_lists: lists come in parts (hits, misses) that are merged by log-sum-exp. A part may be
        empty, and only the device knows its length.
    pads_anywhere: -1 may come before a row, not only after the last one
    """

    rows_dtype: torch.dtype
    capability: tuple[int, int] | None
    num_heads: int
    split_lists: bool = False
    pads_anywhere: bool = False


def _flash_mla_refusals(need: Need, dtype: torch.dtype, name: str) -> list[str]:
    reasons = []
    if need.rows_dtype != dtype:
        reasons.append(f"reads {name} rows only: got {need.rows_dtype}")
    if need.capability is None or need.capability[0] not in (9, 10):
        reasons.append(f"needs sm_90 or sm_100: got {need.capability}")
    if need.num_heads > 128:
        reasons.append(f"takes at most 128 heads: got {need.num_heads}")
    return reasons


def _pad_heads(q_all: torch.Tensor, num_heads: int) -> torch.Tensor:
    """q_all with zero heads up to num_heads. Their results are thrown away."""
    have = q_all.shape[1]
    if have == num_heads:
        return q_all
    padded = q_all.new_zeros(len(q_all), num_heads, q_all.shape[2])
    padded[:, :have] = q_all
    return padded


def _masked(indices: torch.Tensor, lengths: torch.Tensor, multiple: int) -> torch.Tensor:
    """indices with -1 from lengths[t] on, padded by columns of -1 to a multiple of `multiple`."""
    columns = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
    masked = indices.masked_fill(columns >= lengths[:, None], -1)
    missing = -indices.shape[1] % multiple
    return torch.nn.functional.pad(masked, (0, missing), value=-1) if missing else masked


def _without_heads(out, lse, num_heads, log_unit=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashMLA's results for the real heads. Its lse of no rows, +inf, becomes -inf."""
    lse = lse[:, :num_heads] * log_unit
    return out[:, :num_heads].contiguous(), lse.masked_fill(lse == math.inf, -math.inf).contiguous()


def _pages(rows: torch.Tensor) -> torch.Tensor:
    if len(rows) % PAGE_SLOTS:
        raise ValueError(
            f"the hot rows must be whole pages of {PAGE_SLOTS}: got {len(rows)}. "
            "Round the hot tier up."
        )
    return rows.view(-1, PAGE_SLOTS, rows.shape[1])


class FlashMlaFp8:
    """FlashMLA's sparse decode over fp8 rows, called as SGLang's `_forward_flashmla_kv` does.

    Source: flash_mla_interface.flash_mla_with_kvcache (q [batch, 1, 64 or 128 heads, 576], rows
    [pages, 64, 1, 656], indices [batch, 1, K], lse [batch, heads, 1] natural logarithm), and
    sgl-project/FlashMLA csrc/kernels/sm90/decode/sparse/splitkv_mla.cuh: the V3.2 format refuses
    topk_length, K must be a multiple of 64, no rows give +inf. So lengths become -1 pads, and the
    blocks of pads are computed too. The schedule depends on shapes only. Each call makes its own
    (one small launch), because a kept schedule would belong to the graph that made it.
    """

    name = "flashmla_fp8"
    stops_early = False

    def __init__(self, need: Need, sm_scale: float, device: torch.device):
        from sglang.kernels.ops.attention import flash_mla_interface

        self._flash_mla = flash_mla_interface
        self._sm_scale = sm_scale
        self._num_heads = 64 if need.num_heads <= 64 else 128

    @staticmethod
    def refusals(need: Need) -> list[str]:
        return _flash_mla_refusals(need, torch.uint8, "fp8")

    def attend(self, q_all, rows, indices, lengths):
        out, lse = self._flash_mla.flash_mla_with_kvcache(
            q=_pad_heads(q_all, self._num_heads).unsqueeze(1),
            k_cache=_pages(rows).unsqueeze(2),
            block_table=None,
            cache_seqlens=None,
            head_dim_v=LATENT_DIM,
            tile_scheduler_metadata=self._flash_mla.get_mla_metadata()[0],
            softmax_scale=self._sm_scale,
            is_fp8_kvcache=True,
            indices=_masked(indices, lengths, 64).unsqueeze(1),
            kv_format="V32",
        )
        return _without_heads(out.squeeze(1), lse.squeeze(2), q_all.shape[1])


class FlashMlaBf16:
    """FlashMLA's sparse prefill kernel on bfloat16 rows, as SGLang's `_forward_flashmla_sparse`.

    Source: flash_mla_interface.flash_mla_sparse_fwd. The legacy kernels, which SGLang calls, give
    statistics in base 2. A row after topk_length that holds NaN may reach the output, so those
    indices are -1 too. csrc/kernels/sm90/prefill/sparse: K is a multiple of 128, no rows give
    +inf. Heads are padded to 64, on Blackwell to 128, as SGLang does.
    """

    name = "flashmla_bf16"
    stops_early = True

    def __init__(self, need: Need, sm_scale: float, device: torch.device):
        from sglang.kernels.ops.attention import flash_mla_interface

        self._flash_mla = flash_mla_interface
        self._sm_scale = sm_scale
        blackwell = need.capability is not None and need.capability[0] >= 10
        self._num_heads = 64 if need.num_heads <= 64 and not blackwell else 128

    @staticmethod
    def refusals(need: Need) -> list[str]:
        return _flash_mla_refusals(need, torch.bfloat16, "bfloat16")

    def attend(self, q_all, rows, indices, lengths):
        out, _, lse = self._flash_mla.flash_mla_sparse_fwd(
            q=_pad_heads(q_all, self._num_heads),
            kv=rows.unsqueeze(1),
            indices=_masked(indices, lengths, 128).unsqueeze(1),
            sm_scale=self._sm_scale,
            d_v=LATENT_DIM,
            topk_length=lengths.clamp_min(1),  # its one column is a pad where the list is empty
        )
        return _without_heads(out, lse, q_all.shape[1], math.log(2))


class TrtllmSparseMla:
    """TRTLLM-GEN's sparse decode on Blackwell over bfloat16 rows, as SGLang's `_forward_trtllm`.

    Source: flashinfer.decode.trtllm_batch_decode_with_kv_cache_mla with sparse_mla_top_k: K is a
    multiple of 4, token indices are in block_tables [T, 1, K], packed before any -1. It returns
    the lse in the requested base. Queries of length 0 are corrected afterwards, as SGLang's
    dsa_dcp does.
    """

    name = "trtllm"
    stops_early = True

    def __init__(self, need: Need, sm_scale: float, device: torch.device, max_queries: int = 512):
        import flashinfer.decode

        self._decode = flashinfer.decode
        self._sm_scale = sm_scale
        self._max_queries = max_queries
        num_bytes = TRTLLM_SCRATCH_BYTES + max_queries * need.num_heads * TRTLLM_STATE_BYTES
        self._workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    @staticmethod
    def refusals(need: Need) -> list[str]:
        reasons = []
        if need.rows_dtype != torch.bfloat16:
            reasons.append(f"reads bfloat16 rows only: got {need.rows_dtype}")
        if need.capability is None or need.capability[0] != 10:
            reasons.append(f"needs sm_100: got {need.capability}")
        if need.num_heads > 128:
            reasons.append(f"takes at most 128 heads: got {need.num_heads}")
        if need.pads_anywhere:
            reasons.append("wants rows before pads: got pads anywhere")
        return reasons

    def attend(self, q_all, rows, indices, lengths):
        num_queries, num_heads = q_all.shape[:2]
        if num_queries > self._max_queries:
            raise ValueError(
                f"queries of a decode step must fit the workspace: got {num_queries}, limit "
                f"{self._max_queries}. Raise max_queries."
            )
        topk = _masked(indices, lengths, 4)
        out, lse = self._decode.trtllm_batch_decode_with_kv_cache_mla(
            query=q_all.unsqueeze(1),
            kv_cache=_pages(rows).unsqueeze(1),
            workspace_buffer=self._workspace,
            qk_nope_head_dim=128,  # before absorption; DeepSeek-V3.2's
            kv_lora_rank=LATENT_DIM,
            qk_rope_head_dim=ROPE_DIM,
            block_tables=topk.unsqueeze(1),
            seq_lens=lengths,
            max_seq_len=topk.shape[1],
            sparse_mla_top_k=topk.shape[1],
            bmm1_scale=self._sm_scale,
            backend="trtllm-gen",
            lse=q_all.new_empty(num_queries, num_heads, dtype=torch.float32),
            return_lse=True,
            return_lse_base="basee",
        )
        empty = (lengths == 0)[:, None]
        out = out.view(num_queries, num_heads, LATENT_DIM)
        return out.masked_fill(empty[:, :, None], 0), lse.masked_fill(empty, -math.inf)


class FlashInferMemory:
    """Device memory that FlashInfer's wrappers share, because only one plan is in use at a time.

    Everything in it is written by a plan() or inside a step, and read in that step, on one stream.
    Captured graphs keep the tensors that they were captured with.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._lists = (torch.empty(0), torch.empty(0))

    def lists(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(kv_indices [size] int32, places [size] int64), zeros the first time."""
        if len(self._lists[0]) < size:
            self._lists = (
                torch.zeros(size, dtype=torch.int32, device=self._device),
                torch.zeros(size, dtype=torch.int64, device=self._device),
            )
        return self._lists[0][:size], self._lists[1][:size]


class FlashInferMla:
    """FlashInfer's BatchMLAPagedAttentionWrapper at page size 1, with index lists as kv_indices.

    Its plan() needs each request's length on the host. So it serves whole, packed lists whose
    length the scheduler knows, not dual attention, whose parts have lengths that only the device
    knows. Call plan() once a step, outside the CUDA graph. attend() can then be captured, because
    the wrapper keeps its buffers, and FlashInfer's launch depends on the number of queries and
    heads alone (MLAPlan in its scheduler.cuh). attend() ignores `lengths`, which must equal the
    planned ones.
    Source: flashinfer.mla._batch_mla._wrapper (plan, run; lse_mode "basee" is the natural
    logarithm), _planning (the page counts in kv_indptr must equal the lengths) and
    _backends._fa_common (a plan of other shapes must have a new wrapper).

    memory: to share with other wrappers; None: its own
    """

    name = "flashinfer"
    stops_early = True

    def __init__(
        self,
        need: Need,
        sm_scale: float,
        device: torch.device,
        memory: FlashInferMemory | None = None,
    ):
        import flashinfer.mla

        self._mla = flashinfer.mla
        self._device = device
        self._backend = "fa3" if need.capability == (9, 0) else "fa2"
        self._num_heads, self._dtype = need.num_heads, need.rows_dtype
        self._sm_scale = sm_scale
        self._memory = FlashInferMemory(device) if memory is None else memory
        self._wrapper: Any = None
        self._shape: tuple[int, int] | None = None

    @staticmethod
    def refusals(need: Need) -> list[str]:
        reasons = []
        if need.rows_dtype != torch.bfloat16:
            reasons.append(f"reads bfloat16 rows only: got {need.rows_dtype}")
        if need.capability is None or need.capability[0] < 8:
            reasons.append(f"needs sm_80 or newer: got {need.capability}")
        if need.split_lists:
            reasons.append("wants lengths on the host: got parts of lists")
        if need.pads_anywhere:
            reasons.append("wants rows before pads: got pads anywhere")
        return reasons

    def plan(self, lengths: Sequence[int] | torch.Tensor, num_columns: int) -> None:
        """Prepare attend() for len(lengths) queries with these list lengths of num_columns.

        lengths: on the host. Waits for nothing on the device.
        Raises: ValueError if a length is not 1..num_columns.
        """
        lengths = torch.as_tensor(lengths, dtype=torch.int32)
        wrong = lengths[(lengths < 1) | (lengths > num_columns)]
        if len(wrong):
            raise ValueError(
                f"a list's length must be 1 to {num_columns}: got {int(wrong[0])}. Parts of "
                "lists, as dual attention has them, go to another decode kernel."
            )
        if self._shape != (len(lengths), num_columns):
            self._allocate(len(lengths), num_columns)
        kv_indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=kv_indptr[1:])
        total = int(kv_indptr[-1])
        self._set_places(lengths, kv_indptr, num_columns, total)
        self._wrapper.plan(
            metadata=self._mla.MLAPlanMetadata.csr(
                qo_indptr=torch.arange(len(lengths) + 1, dtype=torch.int32),
                kv_indptr=kv_indptr,
                kv_indices=self._kv_indices[:total],
                kv_len_arr=lengths,
            ),
            num_heads=self._num_heads,
            head_dim_ckv=LATENT_DIM,
            head_dim_kpe=ROPE_DIM,
            page_size=1,
            causal=False,
            sm_scale=self._sm_scale,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
            lse_mode="basee",
        )

    def _set_places(self, lengths, kv_indptr, num_columns: int, total: int) -> None:
        """Write where in the flat lists [T * K] each of kv_indices comes from.

        The host sends two numbers for each query; the device makes the rest of them. Places from
        `total` on must be valid too: attend() reads them, and nobody reads the result.
        """
        gaps = torch.arange(len(lengths)) * num_columns - kv_indptr[:-1]
        sent = torch.stack([lengths.long(), gaps])
        if self._device.type == "cuda":
            sent = sent.pin_memory()  # PyTorch reuses pinned memory only after its copies are done
        counts, gaps = sent.to(self._device, non_blocking=True)
        places = torch.repeat_interleave(gaps, counts, output_size=total)
        torch.add(places, torch.arange(total, device=self._device), out=self._places[:total])
        self._places[total:].zero_()  # a plan for a larger batch may have left others there

    def _allocate(self, num_queries: int, num_columns: int) -> None:
        device = self._device
        self._shape = num_queries, num_columns
        self._kv_indices, self._places = self._memory.lists(num_queries * num_columns)
        self._wrapper = self._mla.BatchMLAPagedAttentionWrapper(
            self._memory.workspace,
            use_cuda_graph=True,
            qo_indptr=torch.zeros(num_queries + 1, dtype=torch.int32, device=device),
            kv_indptr=torch.zeros(num_queries + 1, dtype=torch.int32, device=device),
            kv_indices=self._kv_indices,
            kv_len_arr=torch.zeros(num_queries, dtype=torch.int32, device=device),
            backend=self._backend,
        )

    def attend(self, q_all, rows, indices, lengths):
        if self._shape != tuple(indices.shape):
            raise ValueError(
                f"indices must have the planned shape: got {tuple(indices.shape)}, planned "
                f"{self._shape}. Call plan() once a step."
            )
        torch.index_select(indices.view(-1), 0, self._places, out=self._kv_indices)
        # A query that pads a batch may have no row, and FlashInfer reads what it is given.
        self._kv_indices.clamp_(min=0)
        out, lse = self._wrapper.run(
            query=q_all,
            kv_cache=rows.unsqueeze(1),
            return_lse=True,
            return_lse_base_on_e=True,
        )
        return out, lse


class TritonMla:
    """The kernel of ess_kernels: any list, any row format, any number of heads."""

    name = "triton"
    stops_early = True

    def __init__(self, need: Need, sm_scale: float, device: torch.device):
        self._sm_scale = sm_scale

    @staticmethod
    def refusals(need: Need) -> list[str]:
        if need.capability is None:
            return [] if interpreted() else ["needs a GPU, or TRITON_INTERPRET=1 from the start"]
        least = (8, 9) if need.rows_dtype == torch.uint8 else (8, 0)
        if need.capability < least:
            kind = "e4m3" if least == (8, 9) else "bfloat16"
            return [f"needs sm_{least[0]}{least[1]} for {kind}: got {need.capability}"]
        return []

    def attend(self, q_all, rows, indices, lengths):
        return sparse_mla(q_all, rows, indices, self._sm_scale, lengths)


# In order of preference. FlashInferMla needs a call of plan(), so it is taken on request only.
PREFERRED = (FlashMlaFp8, TrtllmSparseMla, FlashMlaBf16, TritonMla)
KERNELS = {kernel.name: kernel for kernel in (*PREFERRED, FlashInferMla)}


def choose(
    need: Need,
    sm_scale: float,
    device: torch.device,
    requested: str | None = None,
    short_lists: bool = False,
):
    """Make the requested decode kernel, or the first of PREFERRED that fits the need.

    short_lists: take one that stops early, for lists that fill few of their columns
    Raises: ValueError for an unknown name, or with each candidate's reasons if none fits.
    """
    if requested is not None and requested not in KERNELS:
        raise ValueError(
            f"the decode kernel must be one of {', '.join(KERNELS)}: got {requested!r}."
        )
    candidates = PREFERRED if requested is None else (KERNELS[requested],)
    refusals = {}
    for kernel in candidates:
        refusals[kernel.name] = kernel.refusals(need)
        if short_lists and not kernel.stops_early:
            refusals[kernel.name] = [*refusals[kernel.name], "computes every column"]
        if not refusals[kernel.name]:
            return kernel(need, sm_scale, device)
    reasons = "; ".join(f"{name} {', '.join(why)}" for name, why in refusals.items())
    raise ValueError(f"a decode kernel must fit {need}: {reasons}.")
