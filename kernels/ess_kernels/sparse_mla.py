"""sparse_mla: attention of each query over its own list of hot rows, with log-sum-exp.

    out[t, h] = softmax_j(sm_scale * q[t, h] . K[j]) . V[j],  j over indices[t] without its -1s
    lse[t, h] = log(sum_j exp(sm_scale * q[t, h] . K[j]))

K is the whole 576-wide latent row, V its first 512 columns (absorbed MLA). Rows are fp8 (656
bytes; sglang_ess/layout.py has the format) or plain bfloat16 or float32.

Bytes moved: rows x row bytes for every block of heads; q and out once; with more than one split
also 2 x splits x heads x 2052 for the partial results. Every query reads its own rows. So the
bytes of the rows limit the speed up to about 16 heads, and the tensor cores beyond.

Numerics: the matrix products take operands of q's dtype and sum in float32. An fp8 latent enters
unscaled (e4m3 is exact in bfloat16); its scale multiplies the float32 scores and, for V, the
weights. No dequantised latent is ever rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ess_kernels.checks import check_on_device, check_tensor, interpreted
from sglang_ess.layout import FP8_ROW_BYTES, LATENT_DIM, ROW_DIM, SCALE_GROUP

FP8_SCALES = tl.constexpr(LATENT_DIM // 4)  # first scale of a row, in float32
FP8_ROPE = tl.constexpr((LATENT_DIM + 16) // 2)  # first rope key of a row, in bfloat16

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)

# Heads of one program: one wgmma takes 64, and mma.sync takes 16 at least. The accumulator of 64
# heads (128 KiB) leaves room in an SM's registers for one program, that of 16 heads for two.
MIN_BLOCK_H, MAX_BLOCK_H = 16, 64
WARPS = {16: 4, 32: 8, 64: 8}
PROGRAMS_PER_SM = {16: 2, 32: 1, 64: 1}
# Rows of one step. Compiled for sm_90 (Triton 3.8) with 64 heads, 32 rows take 129 KiB of shared
# memory for fp8 and 144 KiB for bfloat16, and spill 152 and 0 bytes; 64 rows take 185 and 216 KiB
# and spill 904 and 140. With 16 and 32 heads fp8 spills 76 and 32 bytes, bfloat16 none.
BLOCK_K = 32
NUM_STAGES = 2
# The fixed cost of a program, in blocks of rows: it loads q (72 KiB at 64 heads, two blocks of
# bfloat16 rows) and, with splits, writes float32 partials (128 KiB, nearly four blocks, for which
# no program waits). Estimated from bytes, not measured.
PROGRAM_OVERHEAD_BLOCKS = 4
MAX_SPLITS = 32


@triton.jit
def _load_latents(base_ptr, offsets, valid, group: tl.constexpr, FP8: tl.constexpr, DOT):
    """Load latents [group * 128, group * 128 + 128) of rows at offsets [K]: [K, 128], unscaled."""
    columns = group * 128 + tl.arange(0, 128)
    at = base_ptr + offsets[:, None] + columns[None, :]
    values = tl.load(at, mask=valid[:, None], other=0)
    if FP8:
        values = values.to(tl.float8e4nv, bitcast=True)
    return values.to(DOT)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, EMULATE: tl.constexpr):
    """Round float32 x to DTYPE. EMULATE: the interpreter would truncate to bfloat16 instead."""
    if EMULATE:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _dot(a, b, acc, IEEE: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a @ b in float32. EMULATE: the interpreter would multiply bfloat16 as raw integers."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee" if IEEE else "tf32")


@triton.jit
def _sparse_mla_kernel(
    q_ptr,  # [T, H, 576] bfloat16 or float32, last stride 1
    latent_ptr,  # the rows as [N, ROW_STRIDE]: uint8 where FP8, else their own dtype
    scale_ptr,  # the same bytes as float32 [N, 164]; read where FP8
    rope_ptr,  # the same bytes as bfloat16 [N, 328] where FP8, else as latent_ptr
    indices_ptr,  # [T, K] int32 rows, -1 pads
    lengths_ptr,  # [T] int32; read where HAS_LENGTHS
    out_ptr,  # [T, SPLITS, H, 512] float32 partials, or [T, H, 512] of q's dtype if one split
    lse_ptr,  # [T, SPLITS, H] float32
    scale_log2,  # sm_scale * log2(e)
    q_stride_t,
    q_stride_h,
    num_heads,
    num_columns,
    HAS_LENGTHS: tl.constexpr,
    FP8: tl.constexpr,
    IEEE: tl.constexpr,
    EMULATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = heads < num_heads
    state = (t * SPLITS + split) * num_heads + heads
    DOT: tl.constexpr = q_ptr.dtype.element_ty
    LATENT_STRIDE: tl.constexpr = 656 if FP8 else 576
    ROPE_STRIDE: tl.constexpr = 328 if FP8 else 576
    ROPE_START: tl.constexpr = FP8_ROPE if FP8 else 512

    length = num_columns
    if HAS_LENGTHS:
        length = tl.minimum(tl.load(lengths_ptr + t), num_columns)
    # The splits divide the list's true length, so that the first does not get all of a short list.
    blocks = (length + BLOCK_K - 1) // BLOCK_K
    share = (blocks + SPLITS - 1) // SPLITS * BLOCK_K
    first = split * share
    last = tl.minimum(first + share, length)
    if first >= last:
        tl.store(lse_ptr + state, tl.full([BLOCK_H], float("-inf"), tl.float32), mask=head_mask)
        if SPLITS == 1:  # else _combine_kernel skips this split by its lse
            piece = tl.arange(0, 512)
            tl.store(
                out_ptr + state[:, None] * 512 + piece[None, :],
                tl.zeros([BLOCK_H, 512], out_ptr.dtype.element_ty),
                mask=head_mask[:, None],
            )
        return

    d128 = tl.arange(0, 128)
    d64 = tl.arange(0, 64)
    q_at = q_ptr + t * q_stride_t + heads[:, None] * q_stride_h
    q0 = tl.load(q_at + d128[None, :], mask=head_mask[:, None], other=0.0)
    q1 = tl.load(q_at + 128 + d128[None, :], mask=head_mask[:, None], other=0.0)
    q2 = tl.load(q_at + 256 + d128[None, :], mask=head_mask[:, None], other=0.0)
    q3 = tl.load(q_at + 384 + d128[None, :], mask=head_mask[:, None], other=0.0)
    q_rope = tl.load(q_at + 512 + d64[None, :], mask=head_mask[:, None], other=0.0)

    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc0 = tl.zeros([BLOCK_H, 128], tl.float32)
    acc1 = tl.zeros([BLOCK_H, 128], tl.float32)
    acc2 = tl.zeros([BLOCK_H, 128], tl.float32)
    acc3 = tl.zeros([BLOCK_H, 128], tl.float32)
    for start in range(first, last, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        rows = tl.load(indices_ptr + t * num_columns + columns, mask=columns < last, other=-1)
        valid = rows >= 0
        rows = tl.where(valid, rows, 0).to(tl.int64)  # a row's byte offset exceeds 2^31
        at = rows * LATENT_STRIDE
        k_rope = tl.load(
            rope_ptr + (rows * ROPE_STRIDE)[:, None] + ROPE_START + d64[None, :],
            mask=valid[:, None],
            other=0.0,
        ).to(DOT)
        nothing = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
        scores = _dot(q_rope, tl.trans(k_rope), nothing, IEEE, EMULATE)
        k0 = _load_latents(latent_ptr, at, valid, 0, FP8, DOT)
        if FP8:
            scale_at = scale_ptr + rows * 164 + FP8_SCALES
            f0 = tl.load(scale_at, mask=valid, other=0.0)
            f1 = tl.load(scale_at + 1, mask=valid, other=0.0)
            f2 = tl.load(scale_at + 2, mask=valid, other=0.0)
            f3 = tl.load(scale_at + 3, mask=valid, other=0.0)
            scores += _dot(q0, tl.trans(k0), nothing, IEEE, EMULATE) * f0[None, :]
            k1 = _load_latents(latent_ptr, at, valid, 1, FP8, DOT)
            scores += _dot(q1, tl.trans(k1), nothing, IEEE, EMULATE) * f1[None, :]
            k2 = _load_latents(latent_ptr, at, valid, 2, FP8, DOT)
            scores += _dot(q2, tl.trans(k2), nothing, IEEE, EMULATE) * f2[None, :]
            k3 = _load_latents(latent_ptr, at, valid, 3, FP8, DOT)
            scores += _dot(q3, tl.trans(k3), nothing, IEEE, EMULATE) * f3[None, :]
        else:
            scores = _dot(q0, tl.trans(k0), scores, IEEE, EMULATE)
            k1 = _load_latents(latent_ptr, at, valid, 1, FP8, DOT)
            scores = _dot(q1, tl.trans(k1), scores, IEEE, EMULATE)
            k2 = _load_latents(latent_ptr, at, valid, 2, FP8, DOT)
            scores = _dot(q2, tl.trans(k2), scores, IEEE, EMULATE)
            k3 = _load_latents(latent_ptr, at, valid, 3, FP8, DOT)
            scores = _dot(q3, tl.trans(k3), scores, IEEE, EMULATE)
        scores = tl.where(valid[None, :], scores * scale_log2, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # Only pads so far: any finite anchor avoids -inf - -inf in exp2.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        fade = tl.exp2(peak - anchor)
        p = tl.exp2(scores - anchor[:, None])
        total = total * fade + tl.sum(p, 1)
        peak = new_peak
        acc0 *= fade[:, None]
        acc1 *= fade[:, None]
        acc2 *= fade[:, None]
        acc3 *= fade[:, None]
        if FP8:
            acc0 = _dot(_rounded(p * f0[None, :], DOT, EMULATE), k0, acc0, IEEE, EMULATE)
            acc1 = _dot(_rounded(p * f1[None, :], DOT, EMULATE), k1, acc1, IEEE, EMULATE)
            acc2 = _dot(_rounded(p * f2[None, :], DOT, EMULATE), k2, acc2, IEEE, EMULATE)
            acc3 = _dot(_rounded(p * f3[None, :], DOT, EMULATE), k3, acc3, IEEE, EMULATE)
        else:
            weights = _rounded(p, DOT, EMULATE)
            acc0 = _dot(weights, k0, acc0, IEEE, EMULATE)
            acc1 = _dot(weights, k1, acc1, IEEE, EMULATE)
            acc2 = _dot(weights, k2, acc2, IEEE, EMULATE)
            acc3 = _dot(weights, k3, acc3, IEEE, EMULATE)

    some = total > 0
    inverse = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    lse = tl.where(some, peak * LN_2 + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + state, lse, mask=head_mask)
    out_at = out_ptr + state[:, None] * 512 + d128[None, :]
    out_mask = head_mask[:, None]
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    ROUND: tl.constexpr = EMULATE and SPLITS == 1  # partials stay float32
    tl.store(out_at, _rounded(acc0 * inverse[:, None], OUT, ROUND), mask=out_mask)
    tl.store(out_at + 128, _rounded(acc1 * inverse[:, None], OUT, ROUND), mask=out_mask)
    tl.store(out_at + 256, _rounded(acc2 * inverse[:, None], OUT, ROUND), mask=out_mask)
    tl.store(out_at + 384, _rounded(acc3 * inverse[:, None], OUT, ROUND), mask=out_mask)


@triton.jit
def _combine_kernel(
    part_ptr,  # [T, SPLITS, H, 512] float32
    part_lse_ptr,  # [T, SPLITS, H] float32
    out_ptr,  # [T, H, 512]
    lse_ptr,  # [T, H] float32
    num_heads,
    SPLITS: tl.constexpr,
    SPLITS_POW2: tl.constexpr,
    EMULATE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    splits = tl.arange(0, SPLITS_POW2)
    state = t * SPLITS * num_heads + head
    lse = tl.load(
        part_lse_ptr + state + splits * num_heads, mask=splits < SPLITS, other=float("-inf")
    )
    peak = tl.max(lse, 0)
    anchor = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(lse - anchor), 0)
    some = total > 0
    safe = tl.where(some, total, 1.0)
    d = tl.arange(0, 512)
    acc = tl.zeros([512], tl.float32)
    for split in range(SPLITS):
        at = state + split * num_heads
        part_lse = tl.load(part_lse_ptr + at)
        # A split without rows wrote its lse alone, so its partial result is not read.
        some_rows = tl.full([512], float("-inf"), tl.float32) < part_lse
        part = tl.load(part_ptr + at * 512 + d, mask=some_rows, other=0.0)
        acc += part * tl.exp(part_lse - anchor)
    at = t * num_heads + head
    tl.store(out_ptr + at * 512 + d, _rounded(acc / safe, out_ptr.dtype.element_ty, EMULATE))
    tl.store(lse_ptr + at, tl.where(some, anchor + tl.log(safe), float("-inf")))


def block_heads(num_heads: int) -> int:
    """Heads of one program: the smallest power of two >= num_heads, but from 16 to 64."""
    return min(max(int(triton.next_power_of_2(num_heads)), MIN_BLOCK_H), MAX_BLOCK_H)


def choose_splits(num_queries: int, num_heads: int, num_columns: int, num_sms: int) -> int:
    """Splits of each list: the smallest number with the shortest estimated time.

    It depends on shapes alone, so that a CUDA graph stays valid. Programs run in waves, as many at
    a time as the SMs hold. A wave takes a program's blocks of rows plus PROGRAM_OVERHEAD_BLOCKS.
    """
    block_h = block_heads(num_heads)
    programs = num_queries * triton.cdiv(num_heads, block_h)
    at_once = num_sms * PROGRAMS_PER_SM[block_h]
    blocks = triton.cdiv(num_columns, BLOCK_K)

    def duration(splits: int) -> int:
        waves = triton.cdiv(programs * splits, at_once)
        return int(waves * (triton.cdiv(blocks, splits) + PROGRAM_OVERHEAD_BLOCKS))

    return min(range(1, max(1, min(blocks, MAX_SPLITS)) + 1), key=lambda s: (duration(s), s))


def unpack_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows [n, 656] uint8, or [n, 576] bfloat16 or float32, as [n, 576] float64, exactly."""
    if rows.dtype != torch.uint8:
        return rows.double()
    scales_at, rope_at = LATENT_DIM, LATENT_DIM + 16
    latents = rows[:, :scales_at].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[:, scales_at:rope_at].contiguous().view(torch.float32).double()
    rope = rows[:, rope_at:].contiguous().view(torch.bfloat16).double()
    return torch.cat([latents * scales.repeat_interleave(SCALE_GROUP, dim=1), rope], dim=1)


def sparse_mla_reference(
    q: torch.Tensor,
    rows: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch, with the same arguments. Returns (out, lse) in float64."""
    valid = indices >= 0
    if lengths is not None:
        columns = torch.arange(indices.shape[1], device=indices.device)
        valid = valid & (columns < lengths[:, None])
    used = torch.where(valid, indices, 0).long()
    keys = torch.zeros(*indices.shape, ROW_DIM, dtype=torch.float64, device=q.device)
    keys[valid] = unpack_rows(rows[used[valid]])
    scores = torch.einsum("thd,tkd->thk", q.double(), keys) * sm_scale
    scores = scores.masked_fill(~valid[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse)[..., None])
    return torch.einsum("thk,tkd->thd", weights, keys[..., :LATENT_DIM]), lse


def _check(
    q: torch.Tensor,
    rows: torch.Tensor,
    indices: torch.Tensor,
    lengths: torch.Tensor | None,
    num_splits: int | None,
) -> None:
    check_tensor("q", q, (torch.bfloat16, torch.float32), (None, None, ROW_DIM))
    check_on_device("q", q)
    if q.stride(2) != 1:
        raise ValueError(f"q must have a last stride of 1: got strides {q.stride()}.")
    # bfloat16 products would lose the precision that float32 rows are kept for.
    dtypes = {torch.bfloat16: (torch.uint8, torch.bfloat16)}.get(
        q.dtype, (torch.uint8, torch.bfloat16, torch.float32)
    )
    width = FP8_ROW_BYTES if rows.dtype == torch.uint8 else ROW_DIM
    check_tensor("rows", rows, dtypes, (None, width), q.device)
    check_tensor("indices", indices, torch.int32, (len(q), None), q.device)
    if lengths is not None:
        check_tensor("lengths", lengths, torch.int32, (len(q),), q.device)
    for name, tensor in (("rows", rows), ("indices", indices), ("lengths", lengths)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous: got strides {tensor.stride()}.")
    if rows.data_ptr() % 16:
        raise ValueError(
            f"rows must start at a multiple of 16 bytes: got address {rows.data_ptr():#x}."
        )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be at least 1: got {num_splits}.")


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def sparse_mla(
    q: torch.Tensor,
    rows: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    lengths: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query over the rows in its list. Returns (out, lse).

    q        [T, H, 576] bfloat16 or float32: 512 absorbed latents, 64 rope; last stride 1
    rows     [N, 656] uint8 (fp8) or [N, 576] bfloat16, or float32 if q is float32; contiguous
    indices  [T, K] int32 rows, with -1 pads anywhere; other values are not checked
    lengths  [T] int32: query t reads only columns below lengths[t]; None: all columns. A list of
             length 0 costs one store per head and split
    num_splits  parts of each list that run in parallel; None: choose_splits
    out      [T, H, 512] of q's dtype; lse [T, H] float32, natural logarithm. A query without
             rows gets 0 and -inf
    Effect: asynchronous on the current stream; one launch, or two with splits.
    Raises: ValueError for a wrong dtype, shape, stride or device.
    Source: the split of the keys is flash-decoding's; DeepSeek-V3.2 defines the attention.
    """
    _check(q, rows, indices, lengths, num_splits)
    num_queries, num_heads = q.shape[:2]
    num_columns = indices.shape[1]
    if num_splits is None:
        num_splits = choose_splits(num_queries, num_heads, num_columns, _num_sms(q.device))
    out = q.new_empty(num_queries, num_heads, LATENT_DIM)
    lse = q.new_empty(num_queries, num_heads, dtype=torch.float32)
    if not lse.numel():
        return out, lse
    part, part_lse = out, lse
    if num_splits > 1:
        shape = (num_queries, num_splits, num_heads)
        part = q.new_empty(*shape, LATENT_DIM, dtype=torch.float32)
        part_lse = q.new_empty(shape, dtype=torch.float32)
    fp8 = rows.dtype == torch.uint8
    block_h = block_heads(num_heads)
    emulate = interpreted() and q.dtype == torch.bfloat16
    scales, ropes = (rows.view(torch.float32), rows.view(torch.bfloat16)) if fp8 else (rows, rows)
    _sparse_mla_kernel[(num_queries, triton.cdiv(num_heads, block_h), num_splits)](
        q, rows, scales, ropes, indices, lengths, part, part_lse, sm_scale * LOG2_E,
        q.stride(0), q.stride(1), num_heads, num_columns,
        HAS_LENGTHS=lengths is not None, FP8=fp8, IEEE=q.dtype == torch.float32, EMULATE=emulate,
        SPLITS=num_splits, BLOCK_H=block_h, BLOCK_K=BLOCK_K,
        num_warps=WARPS[block_h], num_stages=NUM_STAGES,
    )  # fmt: skip
    if num_splits > 1:
        _combine_kernel[(num_queries, num_heads)](
            part, part_lse, out, lse, num_heads,
            SPLITS=num_splits, SPLITS_POW2=triton.next_power_of_2(num_splits), EMULATE=emulate,
        )  # fmt: skip
    return out, lse
