"""KDA's recurrence, decay and convolution against transformers' glm5_next."""

import pytest
import torch
from transformers.models.glm5_next import modeling_glm5_next as theirs

from sglang_ess.cpu.ops.kda import causal_conv, kda, log_decay

HEADS, DIM = 3, 32


def inputs(tokens, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, HEADS, DIM, generator=g) for _ in range(3))
    decay = -torch.rand(tokens, HEADS, DIM, generator=g)
    return q, k, v, decay, torch.rand(tokens, HEADS, generator=g)


def reference(q, k, v, decay, beta, state):
    """recurrent_kimi_delta_attention in float64 where it lets us: (out, last state)."""
    out, state = theirs.recurrent_kimi_delta_attention(
        *(x[None] for x in (q, k, v)),
        g=decay[None],
        beta=beta[None],
        initial_state=state[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out[0], state[0]


def longs(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_sequences_equal_transformers():
    """Sequences of several lengths, each with a state of its own, some of them marked."""
    tokens, states = [1, 70, 0, 9], torch.randn(8, HEADS, DIM, DIM)
    starts = longs(0, *torch.tensor(tokens).cumsum(0).tolist())
    slots, marks, kept = longs(3, 1, 2, 6), longs(0, 64, 0, 9), longs(0, 4, 0, 7)
    whole, before = inputs(sum(tokens)), states.clone()
    out = kda(*whole, states, (starts, slots, marks, kept))
    for i, slot in enumerate(slots.tolist()):
        own = [x[starts[i] : starts[i + 1]] for x in whole]
        expected, last = reference(*own, before[slot])
        torch.testing.assert_close(out[starts[i] : starts[i + 1]], expected)
        torch.testing.assert_close(states[slot], last)
        if marks[i]:
            _, marked = reference(*(x[: marks[i]] for x in own), before[slot])
            torch.testing.assert_close(states[kept[i]], marked)
    untouched = [0, 5]
    assert torch.equal(states[untouched], before[untouched])


def test_a_prompt_in_parts_is_the_prompt():
    whole, states = inputs(50), torch.zeros(2, HEADS, DIM, DIM)
    never = longs(0)
    once = kda(*whole, states, (longs(0, 50), longs(0), never, never))
    parts = [
        kda(
            *(x[first:last] for x in whole),
            states,
            (longs(0, last - first), longs(1), never, never),
        )
        for first, last in ((0, 17), (17, 18), (18, 50))
    ]
    assert torch.equal(torch.cat(parts), once) and torch.equal(states[0], states[1])


@pytest.mark.parametrize("bound", [-5.0, None])
def test_decay_equals_transformers(bound):
    gate, bias, a_log = torch.randn(7, HEADS, DIM), torch.randn(HEADS * DIM), torch.randn(HEADS)

    class Config:
        linear_head_dim, linear_num_heads, hidden_size = DIM, HEADS, HEADS * DIM
        linear_lower_bound = bound

    module = theirs.Glm5NextTextForgetGate(Config)
    module.f_a_proj, module.f_b_proj = torch.nn.Identity(), torch.nn.Identity()
    module.dt_bias.data, module.A_log.data = bias, a_log
    expected = module(gate.flatten(1)[None])[0]
    torch.testing.assert_close(log_decay(gate, bias, a_log, bound), expected)


def test_convolution_equals_transformers():
    x, weight = torch.randn(1, 20, 11), torch.randn(20, 4)
    expected = theirs.causal_conv1d_fn(x, weight, activation="silu")
    window = torch.cat([torch.zeros(3, 20), x[0].T])
    torch.testing.assert_close(causal_conv(window, weight), expected[0].T)
    batch = window.unfold(0, 4, 1).transpose(1, 2)  # one token each, as decode has it
    torch.testing.assert_close(causal_conv(batch, weight)[:, 0], expected[0].T)
