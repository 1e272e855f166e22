"""Weights with which most drafts of the MTP layer are right, and some are not: --drafts right.

With random weights no draft is accepted: what four layers make of a context, one cannot know.
Here each token has two successors, which the head favours above all others and equally, and the
context decides between them. Layer 0's attention has the larger part in that decision, and the
MTP layer's attention is the same: it reads the same tokens, and positions shift by one for
queries and keys alike. So a draft is wrong where later layers or an MLP tip the decision, or where
the MTP layer read wrong rows. Of the target's hidden state it takes the embeddings' mean, which
it has from nowhere else: without it, its indexer and its queries are off.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from sglang_ess.testing.tiny_config import INDEX_HEAD_DIM, QK_ROPE_HEAD_DIM, TinyModelConfig
from sglang_ess.testing.tiny_mtp import mtp_prefix
from sglang_ess.testing.tiny_tokenizer import NUM_BYTES
from sglang_ess.testing.tiny_weights import EMBEDDING_MEAN, Draws

SUCCESSORS = 2
# Found by a scan with transformers in float32: six prompts of 400 random bytes, 100 tokens each,
# V3.2 and GLM. A first draft is right for 73 and 72 % of tokens, for 41 and 40 % when the MTP layer
# reads the 8 oldest rows, for 56 and 54 % when hidden states are 0. With three successors
# and LEADING 3: 60 and 65 %. A layer's top-k against dense attention is worth 0.3 to 1.1 nats,
# and 0.3 to 1.0 with random drafts.
FAVOUR = 1.5  # logits of a token's successors, in units of sqrt(hidden) x its embedding's share
LEADING = 2.5  # gain of layer 0's attention
FOLLOWING = 0.8  # gain of all else that the target writes
DRAFT_MLP = 0.5  # gain of the MTP layer's experts, which the target has not
# A query of token t finds the same tokens in any long context. Where they stand differs from one
# context to the next, so scores are more by rope: else each token had one and the same successor.
ROPE, NOPE = 1.8, 0.3
MEAN_PASSED = 2.0  # a hidden state is normed, about half of what it was


def changed_tensors(
    config: TinyModelConfig, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return what takes the place of tensors (hub name -> float32 values) of the same names."""
    draws, prefix = Draws(config.seed, config.hidden), mtp_prefix(config)
    head = _head(draws, tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])
    result = {"lm_head.weight": head, prefix + "shared_head.head.weight": head.copy()}
    for name, values in tensors.items():
        if (gain := _gain(name, prefix)) is not None:
            result[name] = values * np.float32(gain)
    for layer in _led_by_layer_0(config):
        name = f"model.layers.{layer}.self_attn.q_b_proj.weight"
        result[name] = _more_by_rope(tensors[name], config.nope_dim + QK_ROPE_HEAD_DIM, -1)
    name = "model.layers.0.self_attn.indexer.wq_b.weight"
    result[name] = _more_by_rope(tensors[name], INDEX_HEAD_DIM, 1)
    first = re.compile(r"model\.layers\.0\.(self_attn|input_layernorm)\.")
    for name in filter(first.match, tensors):
        copied = name.replace("model.layers.0.", prefix)
        result[copied] = result.get(name, tensors[name]).copy()
    result[prefix + "shared_head.norm.weight"] = tensors["model.norm.weight"].copy()
    norms = (tensors[f"{prefix}{norm}.weight"] for norm in ("enorm", "hnorm"))
    result[prefix + "eh_proj.weight"] = _projection(draws, *norms)
    return result


def _head(draws: Draws, embedding: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Return the head, changed so that each byte's embedding gives its successors one logit."""
    mean, hidden = draws.mean, len(draws.mean)
    own = embedding[:NUM_BYTES] - np.float32(EMBEDDING_MEAN) * mean
    own = own - np.outer(own @ mean, mean) / (mean @ mean)  # the head stays blind to the mean
    # before[v]: the tokens that v may follow. A permutation each, so all have SUCCESSORS.
    orders = [draws.normal(f"successors {i}", NUM_BYTES) for i in range(SUCCESSORS)]
    before = own[np.stack([np.argsort(one, kind="stable") for one in orders], axis=1)]
    before = before.astype(np.float64)
    result = head.copy()
    lacking = FAVOUR * math.sqrt(hidden) - np.einsum("vsh,vh->vs", before, result[:NUM_BYTES])
    result[:NUM_BYTES] += np.einsum("vhs,vs->vh", np.linalg.pinv(before), lacking)
    return result


def _gain(name: str, prefix: str) -> float | None:
    """Return by what a tensor is multiplied; None: it stays."""
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    if not writes:
        return None
    if name.startswith(prefix):
        return DRAFT_MLP
    return LEADING if name == "model.layers.0.self_attn.o_proj.weight" else FOLLOWING


def _led_by_layer_0(config: TinyModelConfig) -> range:
    """Return the layers that read the top-k of layer 0, whose attention must agree with it."""
    types = [*config.indexer_types, "full"]
    return range(types.index("full", 1))


def _more_by_rope(weight: np.ndarray, width: int, end: int) -> np.ndarray:
    """Return queries [heads x width, rank]; end: 1: rope is first in a head, -1: last."""
    result = weight.reshape(-1, width, weight.shape[-1]) * np.float32(NOPE)
    rope = slice(QK_ROPE_HEAD_DIM) if end > 0 else slice(-QK_ROPE_HEAD_DIM, None)
    result[:, rope] *= np.float32(ROPE / NOPE)
    return result.reshape(weight.shape)


def _projection(draws: Draws, enorm: np.ndarray, hnorm: np.ndarray) -> np.ndarray:
    """Return eh_proj: the embedding without its mean, and the hidden state's share of the mean."""
    mean = draws.mean
    onto_mean = np.outer(mean, mean) / (mean @ mean)
    # An embedding, which is normed to 1, was this before.
    embedding = np.float32(math.sqrt(1 + EMBEDDING_MEAN**2)) * (np.eye(len(mean)) - onto_mean)
    halves = [embedding / enorm, MEAN_PASSED * onto_mean / hnorm]
    return np.concatenate(halves, axis=1).astype(np.float32)
