"""The slots that just missed a query's top-k, and the scores of both, for a trace."""

import numpy as np
import torch
from numba import prange

from sglang_ess.cpu.ops._numba import parallel_jit
from sglang_ess.cpu.ops.topk_select import _kth_largest, _ordered


@parallel_jit
def _runner_ups_kernel(scores, score_bits, lengths, req_rows, req_to_token, topk, found, out):
    num_queries, k = topk.shape
    most = found.shape[1]
    for t in prange(num_queries):
        length, bits, tokens = lengths[t], score_bits[t], req_to_token[req_rows[t]]
        threshold, ties = np.uint32(0), length
        if length > k + most:
            histogram = np.empty(4096, np.int32)
            threshold, ties = _kth_largest(bits, length, k + most, histogram)
        selected = written = 0
        for j in range(length):
            value = _ordered(bits[j])
            if selected < k and tokens[j] == topk[t, selected]:
                out[t, selected] = scores[t, j]
                selected += 1
            elif value < threshold or (value == threshold and ties <= 0) or written == most:
                continue
            else:
                found[t, written] = tokens[j]
                out[t, k + written] = scores[t, j]
                written += 1
            if value == threshold:
                ties -= 1
        for j in range(selected, k):
            out[t, j] = np.nan
        for j in range(written, most):
            found[t, j] = -1
            out[t, k + j] = np.nan


def runner_ups(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    req_rows: torch.Tensor,
    req_to_token: torch.Tensor,
    topk: torch.Tensor,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of ranks K + 1 to K + count of each query, and the scores of all K + count.

    scores [T, >= longest length] float32, no NaN; lengths, req_rows, req_to_token: as topk_select
    topk [T, K] int32: what topk_select returned for them
    Returns (slots [T, count] int32 in context order, then -1; scores [T, K + count] float32 of the
    entries of topk and then of those slots, NaN for -1). Among equal scores the earliest position
    wins.
    """
    found = torch.empty(len(lengths), count, dtype=torch.int32)
    out = torch.empty(len(lengths), topk.shape[1] + count)
    _runner_ups_kernel(
        scores.numpy(),
        scores.view(torch.int32).numpy().view(np.uint32),
        lengths.numpy(),
        req_rows.numpy(),
        req_to_token.numpy(),
        topk.numpy(),
        found.numpy(),
        out.numpy(),
    )
    return found, out
