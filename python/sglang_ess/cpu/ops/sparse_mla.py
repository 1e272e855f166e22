"""Sparse MLA over index lists: o[t] = softmax(scale * q[t] . K[slots[t]]) . V[slots[t]].

K is the whole 576-wide latent row, V its first 512 columns (absorbed MLA). Each query
reads its own rows once: rows x 656 B (fp8) or x 1152 B (bf16), whatever the context.
"""

import numba
import numpy as np
import torch
from numba import prange

from sglang_ess.cpu.ops._numba import (
    FASTMATH,
    as_array,
    bf16_to_float,
    e4m3_to_float,
    from_float,
    jit,
    to_float,
)
from sglang_ess.cpu.ops.rows import FORMAT_BF16, FORMAT_FP8, row_format, unpack_rows
from sglang_ess.layout import LATENT_DIM, ROPE_DIM, ROW_DIM, SCALE_GROUP, fp8_row_bytes

# Rows that are decoded at a time. 16 x 576 floats (36 KiB) leave room for the query in a 48 KiB
# L1 cache. The dot products run four rows abreast.
BLOCK = 16


@jit
def _load_row(row, fmt, out, bits):
    """out [576] float32 = latent row [row_bytes] uint8 in the given format.

    A row without rope writes its 512 latents alone.
    """
    if fmt == FORMAT_FP8:
        scales = row[LATENT_DIM : LATENT_DIM + 16].view(np.float32)
        for group in range(LATENT_DIM // SCALE_GROUP):
            start = group * SCALE_GROUP
            e4m3_to_float(row[start : start + SCALE_GROUP], scales[group], bits, out, start)
        bf16_to_float(row[LATENT_DIM + 16 :].view(np.uint16), bits, LATENT_DIM)
    elif fmt == FORMAT_BF16:
        bf16_to_float(row.view(np.uint16), bits, 0)
    else:
        values = row.view(np.float32)
        for i in range(values.shape[0]):
            out[i] = values[i]


@jit
def _scores(q, keys, count, scale, scores):
    """scores[:count] = scale * keys[:count] . q, four keys abreast. q [576]."""
    j = 0
    while j + 4 <= count:
        s0 = s1 = s2 = s3 = np.float32(0)
        k0, k1, k2, k3 = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        for d in range(ROW_DIM):
            s0 += q[d] * k0[d]
            s1 += q[d] * k1[d]
            s2 += q[d] * k2[d]
            s3 += q[d] * k3[d]
        scores[j], scores[j + 1] = s0 * scale, s1 * scale
        scores[j + 2], scores[j + 3] = s2 * scale, s3 * scale
        j += 4
    while j < count:
        s0 = np.float32(0)
        k0 = keys[j]
        for d in range(ROW_DIM):
            s0 += q[d] * k0[d]
        scores[j] = s0 * scale
        j += 1


@jit
def _accumulate(acc, keys, weights, count):
    """acc [512] += weights[:count] . keys[:count, :512], four rows abreast."""
    j = 0
    while j + 4 <= count:
        p0, p1, p2, p3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        k0, k1, k2, k3 = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        for d in range(LATENT_DIM):
            acc[d] += p0 * k0[d] + p1 * k1[d] + p2 * k2[d] + p3 * k3[d]
        j += 4
    while j < count:
        p0 = weights[j]
        k0 = keys[j]
        for d in range(LATENT_DIM):
            acc[d] += p0 * k0[d]
        j += 1


@jit
def _fold_block(q, keys, count, scale, peak, total, acc, scores):
    """Online softmax: fold count decoded rows into one head's running state.

    q [576]; peak, total: running maximum and sum; acc [512] running numerator, written
    """
    _scores(q, keys, count, scale, scores)
    block_peak = peak
    for j in range(count):
        block_peak = max(block_peak, scores[j])
    correction = np.exp(peak - block_peak) if total > 0 else np.float32(0)
    total *= correction
    for j in range(count):
        scores[j] = np.exp(scores[j] - block_peak)
        total += scores[j]
    if correction != np.float32(1):
        for d in range(LATENT_DIM):
            acc[d] *= correction
    _accumulate(acc, keys, scores, count)
    return block_peak, total


def _signature(value):
    """The kernel's signature. It is declared, so that no batch layout compiles while serving."""
    rows, slots, lse = numba.uint8[:, ::1], numba.int32[:, ::1], numba.float32[:, ::1]
    queries, out = value[:, :, :], value[:, :, ::1]
    return numba.void(queries, queries, rows, numba.int64, slots, numba.float32, out, lse)


@numba.njit(
    [_signature(numba.int16), _signature(numba.float32)],
    cache=True,
    fastmath=FASTMATH,
    nogil=True,
    parallel=True,
)
def _sparse_mla_kernel(q_nope, q_rope, rows, fmt, slots, scale, out, lse):
    num_queries, num_heads = q_nope.shape[0], q_nope.shape[1]
    for t in prange(num_queries):
        q = np.zeros((num_heads, ROW_DIM), np.float32)  # 0 where there is no rope
        q_bits = q.view(np.uint32)
        for h in range(num_heads):
            to_float(q_nope[t, h], q[h], q_bits[h], 0)
            to_float(q_rope[t, h], q[h], q_bits[h], LATENT_DIM)
        keys = np.zeros((BLOCK, ROW_DIM), np.float32)
        bits = keys.view(np.uint32)
        scores = np.empty(BLOCK, np.float32)
        peak = np.full(num_heads, -np.inf, np.float32)
        total = np.zeros(num_heads, np.float32)
        acc = np.zeros((num_heads, LATENT_DIM), np.float32)
        acc_bits = acc.view(np.uint32)
        position, last = 0, slots.shape[1]
        while position < last:
            count = 0
            while position < last and count < BLOCK:
                slot = slots[t, position]
                position += 1
                if slot >= 0:
                    _load_row(rows[slot], fmt, keys[count], bits[count])
                    count += 1
            for h in range(num_heads):
                if count > 0:
                    peak[h], total[h] = _fold_block(
                        q[h], keys, count, scale, peak[h], total[h], acc[h], scores
                    )
        for h in range(num_heads):
            some = total[h] > 0
            lse[t, h] = peak[h] + np.log(total[h]) if some else -np.inf
            inverse = np.float32(1) / total[h] if some else np.float32(0)
            from_float(acc[h], acc_bits[h], inverse, out[t, h])


def sparse_mla_reference(q_nope, q_rope, rows, slots, scale):
    """sparse_mla in float64, with the same arguments and results."""
    q = torch.cat([q_nope, q_rope], dim=-1)
    valid = slots >= 0
    keys = unpack_rows(rows[slots.clamp_min(0).long().flatten()].contiguous())
    keys = keys.double().view(*slots.shape, -1)
    scores = torch.einsum("thd,tkd->thk", q.double(), keys) * scale
    scores = scores.masked_fill(~valid.unsqueeze(1), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    return torch.einsum("thk,tkd->thd", weights, keys[..., :LATENT_DIM]), lse


def sparse_mla(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query over its own list of latent rows.

    q_nope [T, heads, 512], q_rope [T, heads, 64]: both bfloat16 or both float32, any strides
    rows [num_slots, 656] uint8 (fp8), or [num_slots, 576] bfloat16 or float32; contiguous
    without rope: q_rope [T, heads, 0], rows 528 or 512 wide
    slots [T, K] int32, -1 pads anywhere
    Returns (out [T, heads, 512] in q's dtype, lse [T, heads] float32, natural log); the
    arithmetic is float32. A query without a row gets zeros and -inf, so that partial results
    merge by log-sum-exp.
    Raises: TypeError for a dtype, ValueError for shapes that do not fit.
    Source: DeepSeek-V3.2 sparse attention; FlashMLA's sparse decode interface.
    """
    fmt = row_format(rows)
    heads, rope = q_nope.shape[:2], q_rope.shape[-1]
    width = fp8_row_bytes(rope) if fmt == FORMAT_FP8 else LATENT_DIM + rope
    if (
        q_nope.shape != (*heads, LATENT_DIM)
        or q_rope.shape != (*heads, rope)
        or rope not in (0, ROPE_DIM)
        or rows.shape[-1] != width
        or not rows.is_contiguous()
    ):
        raise ValueError(
            "sparse_mla needs q_nope [T, heads, 512], q_rope [T, heads, 64] and contiguous rows "
            f"[slots, {width}]: got {tuple(q_nope.shape)}, {tuple(q_rope.shape)}, "
            f"{tuple(rows.shape)} of {rows.dtype}."
        )
    if slots.shape[0] != heads[0] or slots.dtype != torch.int32:
        raise ValueError(
            f"sparse_mla needs slots [{heads[0]}, K] int32: got {tuple(slots.shape)} {slots.dtype}."
        )
    out = torch.empty(*heads, LATENT_DIM, dtype=q_nope.dtype)
    lse = torch.empty(*heads)
    _sparse_mla_kernel(
        as_array(q_nope),
        as_array(q_rope),
        rows.view(torch.uint8).view(rows.shape[0], -1).numpy(),
        fmt,
        slots.contiguous().numpy(),
        np.float32(scale),
        as_array(out),
        lse.numpy(),
    )
    return out, lse


def apply_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Attention with one logit more in each softmax, whose value is zero.

    out [T, heads, dim], lse [T, heads] natural log, as sparse_mla gives them, of all rows of a
    query; sink [heads]. Returns out in its dtype. A query without a row stays zero.
    """
    share = torch.sigmoid(lse - sink.float())
    return (out.float() * share.unsqueeze(-1)).to(out.dtype)
