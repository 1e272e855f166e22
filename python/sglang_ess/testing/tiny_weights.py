"""Random weights with which the context matters, under the names of a hub checkpoint.

Weights of std 0.02 would leave the logits near zero, so that no parity test could fail. Here
hidden states are O(1), attention is peaked and the next-token distribution is far from uniform.

The indexer agrees with the attention for which it selects, as training makes it agree in a real
model: both score a key with nearly the same bilinear form. With independent weights the row at
the border of the top-k may carry a third of a head, and a rounding error that moves the border
looks like a wrong answer. Measured with transformers, bf16 against fp32 over 1,280 random bytes:
the logprob that changes most changes by 3.0 nats with independent weights and by 0.15 with these
(median over positions).
"""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from sglang_ess.testing.tiny_config import (
    ARCHS,
    HC_STREAMS,
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    QK_ROPE_HEAD_DIM,
    TinyModelConfig,
)
from sglang_ess.testing.tiny_tokenizer import NUM_BYTES

# Found by a scan with transformers: 1,280 random bytes, both archs, seeds 0 and 1. Replacing one
# byte 1,000 tokens back changes the logprobs by 0.1 nats, as much as bf16 rounding does; top-k 128
# of 1,280 changes them by 1.0 against dense attention. Greedy output does not fall into a loop.
ATTENTION_LOGIT_STD = 3.0  # largest weight of a head near 0.3
HEAD_ALIKENESS = 0.9  # share of a query that all heads of a layer have in common
INDEXER_ALIKENESS = 0.95  # share of an attention head that comes from its indexer head
EMBEDDING_MEAN = 1.0  # common to all tokens, so that successive top-k sets overlap as real ones do
ATTENTION_GAIN = 1.0
MLP_GAIN = 0.6
EXPERT_GAIN = 0.3  # small: a near-tie in the router must not swamp the rest
LOGIT_STD = 2.5
SINK_MEAN = 6.0  # a sink takes 3 to 15 % of a head
CONTROL_LOGIT_GAIN = -0.6  # times the mean's share of a hidden state: logits near -5


class Draws:
    """Normal draws that depend on (seed, name) only, so that one more layer changes no other."""

    def __init__(self, seed: int, hidden: int):
        self.seed = seed
        self.mean = self.normal("embedding mean", hidden)

    def normal(self, name: str, *shape: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        return rng.standard_normal(shape, dtype=np.float32)

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> np.ndarray:
        """Draw [..., out, in], which maps inputs of std 1 to outputs of std `gain`."""
        return self.normal(name, *shape) * np.float32(gain / math.sqrt(shape[-1]))

    def blind(self, name: str, out: int, gain: float = 1.0) -> np.ndarray:
        """Draw [out, hidden] like `matrix`, with output 0 for the embeddings' mean.

        All weights that write hidden states or logits are such. Otherwise the mean would grow
        from layer to layer until every position predicts the same token.
        """
        matrix = self.matrix(name, out, len(self.mean), gain=gain)
        return matrix - np.outer(matrix @ self.mean, self.mean) / (self.mean @ self.mean)

    def norm(self, name: str, size: int) -> np.ndarray:
        return 1 + np.float32(0.1) * self.normal(name, size)


def blend(alikeness: float, common: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Mix common and own values so that the variance does not change."""
    return np.float32(alikeness) * common + np.float32(math.sqrt(1 - alikeness**2)) * own


def checkpoint_tensors(
    config: TinyModelConfig, vocab_size: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (hub name, float32 values) of every tensor. Linear weights are [out, in]."""
    draws, parts = Draws(config.seed, config.hidden), ARCHS[config.arch].parts
    yield from ends(draws, vocab_size)
    for layer in range(0, config.layers, 2) if "pairs" in parts else ():
        yield from _pair(config, draws, layer)
    for layer in range(config.layers) if "pairs" not in parts else ():
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", draws.norm(prefix + norm, config.hidden)
        yield from _attention(config, draws, layer)
        if "streams" in parts:
            for stage in ("attn", "mlp"):
                yield from _hyper(draws, f"{prefix}hc_{stage}_layer.hc_pre.hc_", 2)
        if layer < config.dense_layers:
            yield from mlp(config, draws, prefix + "mlp.", config.intermediate, MLP_GAIN)
        else:
            yield from moe(config, draws, prefix + "mlp.")
    if "streams" in parts:
        yield from _hyper(draws, "model.hc_head.hc_head_", 1)


def ends(draws: Draws, vocab_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what is not a layer's: the embeddings, the last norm and the head."""
    hidden = len(draws.mean)
    embedding = draws.normal("embedding", vocab_size, hidden)
    yield "model.embed_tokens.weight", embedding + np.float32(EMBEDDING_MEAN) * draws.mean
    yield "model.norm.weight", draws.norm("final norm", hidden)
    head = draws.blind("head", vocab_size, gain=LOGIT_STD)
    # Control and reserved tokens read only the mean, negatively, so that none is ever likely.
    head[NUM_BYTES:] *= 0.1 / LOGIT_STD
    head[NUM_BYTES:] += draws.mean * np.float32(CONTROL_LOGIT_GAIN / np.linalg.norm(draws.mean))
    yield "lm_head.weight", head


def _pair(config, draws, first):
    """Yield LongCat's layer of the attention layers first and first + 1, and experts."""
    prefix = f"model.layers.{first // 2}."
    for half in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"{prefix}{norm}.{half}"
            yield name + ".weight", draws.norm(name, config.hidden)
        yield from _attention(config, draws, first + half)
        yield from mlp(config, draws, f"{prefix}mlps.{half}.", config.intermediate, MLP_GAIN)
    yield from _router(config, draws, prefix + "mlp.", "router.classifier", "router")
    yield from _experts(config, draws, prefix + "mlp.")


def _attention_name(config, layer) -> str:
    if "pairs" in ARCHS[config.arch].parts:
        return f"model.layers.{layer // 2}.self_attn.{layer % 2}."
    return f"model.layers.{layer}.self_attn."


def _attention(config, draws, layer):
    # A shared layer has no indexer, so it must agree with the one whose choice it reuses.
    source = max(i for i in range(layer + 1) if config.indexer_types[i] == "full")
    name = _attention_name(config, layer)
    yield from attention(config, draws, name, f"from layer {source} ", source == layer)


def attention(config, draws, name, shared, indexed):
    """Yield one layer's attention, whose tensors begin with `name`.

    shared: begins the names of the draws that it has in common with the indexer that selects for it
    indexed: whether that indexer is its own
    """
    q_rank, rope = config.q_lora_rank, QK_ROPE_HEAD_DIM
    kv_a = draws.blind(shared + "kv_a", KV_LORA_RANK + rope)
    index_k = draws.matrix(shared + "index k", INDEX_HEAD_DIM - rope, KV_LORA_RANK)
    index_q = index_queries(config, draws, shared)
    q_b = _attention_queries(config, draws, name, index_q)
    k_b = draws.matrix(name + "k", config.heads, config.nope_dim, KV_LORA_RANK)
    alike = _indexed(config)
    k_b[:, :alike] = blend(INDEXER_ALIKENESS, index_k[:alike], k_b[:, :alike])
    v_b = draws.matrix(name + "v", config.heads, config.v_dim, KV_LORA_RANK)
    yield name + "q_a_proj.weight", draws.matrix(shared + "q_a", q_rank, config.hidden)
    yield name + "q_a_layernorm.weight", draws.norm(name + "q_a norm", q_rank)
    yield name + "q_b_proj.weight", q_b.reshape(-1, q_rank)
    yield name + "kv_a_proj_with_mqa.weight", kv_a
    yield name + "kv_a_layernorm.weight", draws.norm(name + "kv_a norm", KV_LORA_RANK)
    yield name + "kv_b_proj.weight", np.concatenate([k_b, v_b], axis=1).reshape(-1, KV_LORA_RANK)
    value_width, gain = config.heads * config.v_dim, ATTENTION_GAIN
    if "gate" in ARCHS[config.arch].parts:
        gain *= 2  # the gate's sigmoid takes about half
        yield name + "linear_gate.weight", draws.blind(name + "gate", value_width)
    if "sinks" in ARCHS[config.arch].parts:
        yield name + "learnable_sink_param", SINK_MEAN + draws.normal(name + "sinks", config.heads)
    yield name + "o_proj.weight", draws.matrix(name + "o", config.hidden, value_width, gain=gain)
    if indexed:
        yield from _indexer(
            config,
            draws,
            name + "indexer.",
            index_q,
            index_k @ kv_a[:KV_LORA_RANK],
            kv_a[KV_LORA_RANK:],
        )


def _indexed(config) -> int:
    """Return how many of a head's dimensions without rope the indexer also has."""
    return min(config.nope_dim, INDEX_HEAD_DIM - QK_ROPE_HEAD_DIM)


def _rope_rows(config) -> np.ndarray:
    """Return [rope]: for row i of attention's rope part, the row of the indexer's.

    Attention and GLM's indexer pair rows (2i, 2i+1). V3.2's indexer pairs (i, i + rope/2).
    """
    rows = np.arange(QK_ROPE_HEAD_DIM)
    return rows.reshape(2, -1).T.reshape(-1) if ARCHS[config.arch].indexer_halves else rows


def index_queries(config, draws, shared):
    """Return [index_heads, INDEX_HEAD_DIM, q_lora_rank]. The odd heads point the opposite way.

    Their weights in _indexer are opposite too, so they keep the score sloped where relu cuts the
    even heads off. Otherwise half the keys would tie at 0, and each implementation of top-k
    breaks ties differently.
    """
    common = draws.matrix(shared + "index q", INDEX_HEAD_DIM, config.q_lora_rank)
    own = draws.matrix(
        shared + "index q heads", config.index_heads, INDEX_HEAD_DIM, config.q_lora_rank
    )
    return blend(HEAD_ALIKENESS, head_signs(config)[:, None, None] * common, own)


def head_signs(config) -> np.ndarray:
    return np.where(np.arange(config.index_heads) % 2, -1, 1).astype(np.float32)


def _attention_queries(config, draws, name, index_q):
    """Return [heads, nope + rope, q_lora_rank], built on the even indexer heads."""
    rope, nope, alike = QK_ROPE_HEAD_DIM, config.nope_dim, _indexed(config)
    even = index_q[::2]
    like = even[np.arange(config.heads) % len(even)]
    q_b = draws.matrix(name + "q", config.heads, nope + rope, config.q_lora_rank)
    for rows, ours in (
        (slice(alike), like[:, rope : rope + alike]),
        (slice(nope, None), like[:, :rope][:, _rope_rows(config)]),
    ):
        q_b[:, rows] = blend(INDEXER_ALIKENESS, ours, q_b[:, rows])
    return q_b * np.float32(ATTENTION_LOGIT_STD / config.attention_mscale)


def _hyper(draws, prefix, outputs):
    """Yield one mixer of residual streams: what it reads of each, and what it adds to each.

    outputs: 2, or 1 at the end, where nothing is added
    """
    width = outputs * HC_STREAMS
    yield prefix + "fn", draws.matrix(prefix + "fn", width, HC_STREAMS * len(draws.mean))
    yield prefix + "scale", np.full(outputs, 0.3, np.float32)
    base = np.float32(0.3) * draws.normal(prefix + "base", width)
    base[:HC_STREAMS] -= np.float32(math.log(HC_STREAMS - 1))  # sigmoid gives 1 / HC_STREAMS
    yield prefix + "base", base


def _indexer(config, draws, name, index_q, k_nope, k_rope):
    own = draws.matrix(name + "weights", config.index_heads, config.hidden, gain=0.1)
    # The shift that puts the rope dimensions where the architecture has them.
    by = -QK_ROPE_HEAD_DIM if ARCHS[config.arch].indexer_rope_last else 0
    k = np.concatenate([k_rope[np.argsort(_rope_rows(config))], k_nope])
    k_norm = draws.norm(name + "k_norm", INDEX_HEAD_DIM)
    k_bias = np.float32(0.1) * draws.normal(name + "k_norm bias", INDEX_HEAD_DIM)
    yield name + "wq_b.weight", np.roll(index_q, by, axis=1).reshape(-1, config.q_lora_rank)
    yield name + "wk.weight", np.roll(k, by, axis=0)
    yield name + "k_norm.weight", np.roll(k_norm, by)
    yield name + "k_norm.bias", np.roll(k_bias, by)
    # Every hidden state contains the mean of the embeddings, so a head's weight keeps its sign.
    yield (
        name + "weights_proj.weight",
        head_signs(config)[:, None] * draws.mean / config.hidden + own,
    )


def mlp(config, draws, name, width, gain):
    yield name + "gate_proj.weight", draws.blind(name + "gate", width)
    yield name + "up_proj.weight", draws.blind(name + "up", width)
    yield name + "down_proj.weight", draws.matrix(name + "down", config.hidden, width, gain=gain)


def moe(config, draws, name):
    yield from _router(config, draws, name, "gate", "gate")
    yield from mlp(config, draws, name + "shared_experts.", config.moe_intermediate, MLP_GAIN)
    yield from _experts(config, draws, name)


def _router(config, draws, name, weight, bias):
    matrix = draws.matrix(name + "router", config.experts, config.hidden)
    yield f"{name}{weight}.weight", matrix
    # Not negative, so that a kernel which masks other groups with 0, not -inf, also agrees.
    values = np.abs(draws.normal(name + "router bias", config.experts))
    yield f"{name}{bias}.e_score_correction_bias", np.float32(0.1) * values


def _experts(config, draws, name):
    prefixes = [f"{name}experts.{expert}." for expert in range(config.experts)]
    experts = [[*mlp(config, draws, p, config.moe_intermediate, EXPERT_GAIN)] for p in prefixes]
    if "stacked" not in ARCHS[config.arch].parts:
        yield from (tensor for expert in experts for tensor in expert)
        return
    gate, up, down = (
        np.stack([values for _, values in each]) for each in zip(*experts, strict=True)
    )
    yield name + "experts.gate_up_proj", np.concatenate([gate, up], axis=1)
    yield name + "experts.down_proj", down


# In both libraries.
_FLOAT32 = re.compile(
    r"e_score_correction_bias$|router\.classifier|\.hc_|\.learnable_sink_param"
    r"|\.dt_bias$|\.A_log$|_conv1d\.|compress_ape$"
)


def _to_dtype(name: str, values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if _FLOAT32.search(name):
        return tensor
    if re.search(r"indexer\.(weights_proj|index_kpool_compress_gate)", name):
        # SGLang has it in bfloat16, transformers in float32. Store what both can represent.
        tensor = tensor.bfloat16()
    return tensor.to(dtype)


def write_weights(path: Path, named: Iterable[tuple[str, np.ndarray]], dtype: str) -> None:
    """Write one safetensors file of (hub name, float32 values). A reader of an earlier file keeps
    that one.

    dtype: "bfloat16" or "float32", of all tensors that have no dtype of their own
    """
    tensors = {n: _to_dtype(n, v, getattr(torch, dtype)) for n, v in named}
    partial = path.with_suffix(".partial")
    partial.write_bytes(save(tensors, metadata={"format": "pt"}))
    os.replace(partial, path)
