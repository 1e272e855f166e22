"""The MTP layer of a tiny model: SGLang's draft for speculative decoding (NextN).

It reads the embedding of a token and the target's hidden state one position earlier, and predicts
the token after. Embeddings and head are the target's; a checkpoint of DeepSeek or GLM repeats
them under the layer's name, Hy4's does not.
"""

from collections.abc import Iterator

import numpy as np

from sglang_ess.testing.tiny_config import AFTER_THE_LAST, ARCHS, TinyModelConfig
from sglang_ess.testing.tiny_weights import Draws, attention, ends, moe

# Both inputs pass into the layer as they are, with the mean that its indexer's weights need.
PASSED = 0.5
MIXED = 0.5


def mtp_tensors(config: TinyModelConfig, vocab_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (hub name, float32 values) of every tensor of the MTP layer."""
    draws, hidden = Draws(config.seed, config.hidden), config.hidden
    name, prefix = "mtp.", mtp_prefix(config)
    repeats = ARCHS[config.arch].mtp == AFTER_THE_LAST
    for norm in ("enorm", "hnorm", "input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{norm}.weight", draws.norm(name + norm, hidden)
    last = "shared_head.norm" if repeats else "final_layernorm"
    yield f"{prefix}{last}.weight", draws.norm(name + "last norm", hidden)
    passed = np.float32(PASSED) * np.eye(hidden, dtype=np.float32)
    halves = [passed + draws.blind(f"{name}eh {half}", hidden, gain=MIXED) for half in range(2)]
    yield prefix + "eh_proj.weight", np.concatenate(halves, axis=1)
    yield from attention(config, draws, prefix + "self_attn.", "from mtp ", True)
    yield from moe(config, draws, prefix + "mlp.")
    if repeats:
        target = dict(ends(draws, vocab_size))
        yield prefix + "embed_tokens.weight", target["model.embed_tokens.weight"]
        yield prefix + "shared_head.head.weight", target["lm_head.weight"]


def mtp_prefix(config: TinyModelConfig) -> str:
    """Return what the names of the MTP layer's tensors begin with."""
    pattern = ARCHS[config.arch].mtp
    assert pattern is not None, "refused on creation"
    return pattern.format(layers=config.layers)
