"""Kimi delta attention (KDA): a state of [K, V] per head that decays, corrects itself and is read.

For each token, with its decay exp(g), gate beta, and l2-normalised q (times K^-0.5) and k:

    S = diag(exp(g)) S;  S = S + k (beta (v - S^T k))^T;  o = S^T q

A work item is one head of one sequence. It runs over the sequence's tokens, so a prompt costs what
as many decode steps do.
"""

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numba import prange

from sglang_ess.cpu.ops._numba import FASTMATH, jit

L2_EPS = np.float32(1e-6)  # added to the sum of squares, as flash-linear-attention does


@jit
def _normalised(x, factor, out):
    """out = x * factor / |x|; all [K] float32."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    scale = factor / np.sqrt(total + L2_EPS)
    for i in range(x.shape[0]):
        out[i] = x[i] * scale


@jit
def _step(state, q, k, v, decay, beta, delta, out):
    """One token of one head: state [K, V] is updated, out [V] written; delta [V] is scratch."""
    keys, values = state.shape
    for j in range(values):
        delta[j] = np.float32(0)
    for i in range(keys):
        for j in range(values):
            state[i, j] *= decay[i]
            delta[j] += state[i, j] * k[i]
    for j in range(values):
        delta[j] = (v[j] - delta[j]) * beta
        out[j] = np.float32(0)
    for i in range(keys):
        for j in range(values):
            state[i, j] += k[i] * delta[j]
            out[j] += state[i, j] * q[i]


_tokens, _gates = numba.float32[:, :, ::1], numba.float32[:, ::1]
_states, _longs = numba.float32[:, :, :, ::1], numba.int64[::1]
_signature = numba.void(*[_tokens] * 4, _gates, _states, *[_longs] * 4, _tokens)


@numba.njit([_signature], cache=True, fastmath=FASTMATH, nogil=True, parallel=True)
def _kda_kernel(q, k, v, decay, beta, states, starts, slots, marks, mark_slots, out):
    heads, width = q.shape[1], q.shape[2]
    for item in prange(slots.shape[0] * heads):
        s, h = item // heads, item % heads
        state = states[slots[s], h]
        query, key = np.empty(width, np.float32), np.empty(width, np.float32)
        delta = np.empty(v.shape[2], np.float32)
        factor = np.float32(1) / np.sqrt(np.float32(width))
        for t in range(starts[s], starts[s + 1]):
            _normalised(q[t, h], factor, query)
            _normalised(k[t, h], np.float32(1), key)
            _step(state, query, key, v[t, h], decay[t, h], beta[t, h], delta, out[t, h])
            if t + 1 - starts[s] == marks[s]:
                states[mark_slots[s], h] = state


def kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    states: torch.Tensor,
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Run KDA over a batch of sequences that lie one after another.

    q, k, v, log_decay [T, H, D]; beta [T, H]; any float dtype, the arithmetic is float32
    states [slots, H, D, D] float32, [.., i, j] between key i and value j; read and updated
    sequences: (starts, slots, marks, mark_slots), all int64. starts [S + 1]: sequence s has the
        tokens starts[s] .. starts[s + 1] - 1. slots [S]: each sequence's own state. marks [S]:
        after this many tokens the state is copied to mark_slots[s] as well; 0: never
    Returns [T, H, D] float32.
    Source: flash-linear-attention's naive_recurrent_kda.
    """
    out = torch.empty(v.shape)
    _kda_kernel(
        *(x.float().contiguous().numpy() for x in (q, k, v, log_decay.float().exp(), beta)),
        states.numpy(),
        *(x.numpy() for x in sequences),
        out.numpy(),
    )
    return out


def log_decay(
    gate: torch.Tensor, bias: torch.Tensor, a_log: torch.Tensor, lower_bound: float | None
) -> torch.Tensor:
    """Log of the decay of each state row: gate [T, H, D], bias [H * D], a_log [H] -> float32.

    With a lower bound: bound * sigmoid(exp(a_log) * x), else -exp(a_log) * softplus(x), where
    x = gate + bias.
    """
    x = gate.float() + bias.float().view(gate.shape[1:])
    rate = a_log.float().view(-1, 1).exp()
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * x)
    return -rate * F.softplus(x)


def causal_conv(window: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu of a depthwise convolution over time, in float32.

    window [..., n + width - 1, C]: width - 1 earlier inputs, then n; weight [C, width]
    Returns [..., n, C] float32.
    """
    width = weight.shape[1]
    tokens = window.shape[-2] - width + 1
    window, taps = window.float(), weight.float()
    total = window[..., :tokens, :] * taps[:, 0]
    for tap in range(1, width):
        total = total + window[..., tap : tap + tokens, :] * taps[:, tap]
    return F.silu(total)
