"""Top-k of each row of scores, returned as slots in context order.

The selection is exact: three histograms over the scores' ordered bits find the k-th largest
value, and one more pass emits the slots. That is linear in the context, unlike a sort. Among equal
scores the earliest position wins, so the result depends on the scores alone.
"""

import numpy as np
import torch
from numba import prange

from sglang_ess.cpu.ops._numba import jit, parallel_jit

SIGN = np.uint32(0x80000000)
ALL = np.uint32(0xFFFFFFFF)
RADIX_BITS = (12, 12, 8)


@jit
def _ordered(bits):
    """float32 bits -> uint32 that sorts like the float."""
    return bits ^ (ALL if bits & SIGN else SIGN)


@jit
def _kth_largest(bits, length, k, histogram):
    """(ordered bits of the k-th largest of bits[:length], how many equal it to keep)."""
    prefix, shift, wanted = np.uint32(0), 32, k
    for width in RADIX_BITS:
        above = shift
        shift -= width
        buckets = 1 << width
        for b in range(buckets):
            histogram[b] = 0
        mask = np.uint32(buckets - 1)
        for j in range(length):
            value = _ordered(bits[j])
            if above == 32 or (value >> np.uint32(above)) == prefix:
                histogram[(value >> np.uint32(shift)) & mask] += 1
        bucket = buckets - 1
        while histogram[bucket] < wanted:
            wanted -= histogram[bucket]
            bucket -= 1
        prefix = (prefix << np.uint32(width)) | np.uint32(bucket)
    return prefix, wanted


@parallel_jit
def _topk_select_kernel(score_bits, lengths, req_rows, req_to_token, out):
    num_queries, k = out.shape
    for t in prange(num_queries):
        length = lengths[t]
        tokens = req_to_token[req_rows[t]]
        written = 0
        if length <= k:
            for j in range(length):
                out[t, j] = tokens[j]
            written = length
        else:
            bits = score_bits[t]
            histogram = np.empty(4096, np.int32)
            threshold, ties = _kth_largest(bits, length, k, histogram)
            for j in range(length):
                value = _ordered(bits[j])
                if value > threshold:
                    out[t, written] = tokens[j]
                    written += 1
                elif value == threshold and ties > 0:
                    out[t, written] = tokens[j]
                    written += 1
                    ties -= 1
        for j in range(written, k):
            out[t, j] = -1


def topk_select_reference(scores, lengths, req_rows, req_to_token, k) -> torch.Tensor:
    """topk_select by a stable sort in torch, with the same arguments and result."""
    out = torch.full((scores.shape[0], k), -1, dtype=torch.int32)
    for t, length in enumerate(lengths.tolist()):
        order = torch.sort(scores[t, :length], descending=True, stable=True).indices
        positions = order[:k].sort().values
        out[t, : len(positions)] = req_to_token[req_rows[t], positions]
    return out


def topk_select(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    req_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    k: int,
) -> torch.Tensor:
    """Slots of each query's k best-scored positions.

    scores [T, >= longest length that exceeds k] float32, no NaN; may have no columns when
        no length exceeds k
    lengths [T] int32, the positions each query sees
    req_rows [T] int64, the query's row of req_to_token
    req_to_token [requests, max context] int32, position -> slot (SGLang's table)
    Returns [T, k] int32: slots in context order, then -1.
    """
    out = torch.empty(lengths.shape[0], k, dtype=torch.int32)
    _topk_select_kernel(
        scores.view(torch.int32).numpy().view(np.uint32),
        lengths.numpy(),
        req_rows.numpy(),
        req_to_token.numpy(),
        out.numpy(),
    )
    return out
