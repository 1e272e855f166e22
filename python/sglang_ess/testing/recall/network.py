"""The recall model in a form that can be trained: its parameters have a checkpoint's names.

Computes what transformers' deepseek_v32 model computes (a test compares them), with gradients for
the indexer, which transformers does not give: as DeepSeek trains it (DeepSeek-V3.2-Exp report,
section 2.1), by the divergence of its scores from the attention that it selects for.

What is not drawn at random: the heads of the first layer begin as heads that look 1 to 8 bytes
back, and one of the second layer 8. Matching the last bytes, which retrieval needs, is then
learned in minutes. Nothing holds the heads there.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_ess.testing.tiny_config import (
    INDEX_HEAD_DIM,
    KV_LORA_RANK,
    QK_ROPE_HEAD_DIM,
    RMS_NORM_EPS,
    ROUTED_SCALING_FACTOR,
    TinyModelConfig,
)
from sglang_ess.testing.tiny_model import rope_parameters

ROPE = QK_ROPE_HEAD_DIM
LOOK_BACK = ((1, 2, 3, 4, 5, 6, 7, 8), (8, *[None] * 7))  # bytes, by layer and head
CONSTANT = 4.0  # of every embedding in its first dimension: what heads that look back match
MATCH = 30.0  # the logit of the byte they look at
FAST = 3  # frequencies beyond this one count less and less in the match
RESIDUAL_GAIN = 0.5  # of matrices that write hidden states
_ROWS = 512  # queries whose selections are computed at once


@dataclass(frozen=True)
class Selection:
    """Which keys a query attends to: the indexer's `k` best, or, with `last`, the last k."""

    k: int
    last: bool = False


@dataclass
class ForwardPass:
    """What all layers of a forward pass share.

    cos, sin: [batch, length, rope / 2]; selection: None: all keys up to the query's own
    sampled: [batch, n], queries for which the indexers' losses are computed; None: no losses
    losses: one a layer, in nats
    """

    cos: Tensor
    sin: Tensor
    selection: Selection | None = None
    sampled: Tensor | None = None
    losses: list[Tensor] | None = None


def rotary_frequencies(config: TinyModelConfig) -> Tensor:
    """[rope / 2] float32, radians a position, as transformers computes them."""
    from transformers import DeepseekV32Config
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32RotaryEmbedding

    one = DeepseekV32Config(
        qk_rope_head_dim=ROPE,
        max_position_embeddings=config.context,
        rope_parameters=rope_parameters(config),
    )
    return DeepseekV32RotaryEmbedding(one).inv_freq.float()


def _matrix(inputs: int, outputs: int, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    return layer


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, RMS_NORM_EPS).to(x.dtype)


def _rotate(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention's way: dimensions (2i, 2i + 1)."""
    return _rotate(x[..., 0::2], x[..., 1::2], cos, sin)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The indexer's way: the first 64 dimensions of a head, (i, i + 32)."""
    half = ROPE // 2
    rotated = _rotate(x[..., :half], x[..., half:ROPE], cos, sin)
    return torch.cat([rotated, x[..., ROPE:].to(rotated.dtype)], -1)


def _rows_at(x: Tensor, rows: Tensor) -> Tensor:
    """[batch, n, width] of x [batch, length, width] at rows [batch, n]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[-1]))


class Indexer(nn.Module):
    def __init__(self, config: TinyModelConfig):
        super().__init__()
        self.heads = config.index_heads
        self.wq_b = _matrix(config.q_lora_rank, config.index_heads * INDEX_HEAD_DIM)
        self.wk = _matrix(config.hidden, INDEX_HEAD_DIM)
        self.k_norm = nn.LayerNorm(INDEX_HEAD_DIM, eps=1e-6)
        self.weights_proj = _matrix(config.hidden, config.index_heads)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, length, 128]"""
        return _rotate_halves(self.k_norm(self.wk(x).float()), cos, sin)

    def scores(self, x, latent, cos, sin, keys) -> Tensor:
        """float32 [batch, queries, keys]. x, latent, cos, sin: of the queries."""
        query = self.wq_b(latent).unflatten(-1, (self.heads, INDEX_HEAD_DIM))
        query = _rotate_halves(query, cos[:, :, None], sin[:, :, None])
        kind = latent.dtype
        matches = F.relu(torch.einsum("bqhd,bsd->bqhs", query.to(kind), keys.to(kind)))
        weights = self.weights_proj(x).float() * (self.heads * INDEX_HEAD_DIM) ** -0.5
        with torch.autocast("cpu", enabled=False):  # bfloat16 would make ties
            return torch.einsum("bqhs,bqh->bqs", matches.float(), weights)


class Attention(nn.Module):
    def __init__(self, config: TinyModelConfig):
        super().__init__()
        self.heads, self.nope, self.value = config.heads, config.nope_dim, config.v_dim
        self.q_a_proj = _matrix(config.hidden, config.q_lora_rank)
        self.q_a_layernorm = Norm(config.q_lora_rank)
        self.q_b_proj = _matrix(config.q_lora_rank, self.heads * (self.nope + ROPE))
        self.kv_a_proj_with_mqa = _matrix(config.hidden, KV_LORA_RANK + ROPE)
        self.kv_a_layernorm = Norm(KV_LORA_RANK)
        self.kv_b_proj = _matrix(KV_LORA_RANK, self.heads * (self.nope + self.value))
        self.o_proj = _matrix(self.heads * self.value, config.hidden, RESIDUAL_GAIN)
        self.indexer = Indexer(config)
        self.scale = (self.nope + ROPE) ** -0.5 * config.attention_mscale

    def forward(self, x: Tensor, step: ForwardPass) -> Tensor:
        latent = self.q_a_layernorm(self.q_a_proj(x))
        query = self.q_b_proj(latent).unflatten(-1, (self.heads, self.nope + ROPE))
        turned = _rotate_pairs(query[..., self.nope :], step.cos[:, :, None], step.sin[:, :, None])
        query = torch.cat([query[..., : self.nope], turned.to(query.dtype)], -1).transpose(1, 2)
        row = self.kv_a_proj_with_mqa(x)
        turned = _rotate_pairs(row[..., KV_LORA_RANK:], step.cos, step.sin).to(row.dtype)
        row = self.kv_b_proj(self.kv_a_layernorm(row[..., :KV_LORA_RANK]))
        row = row.unflatten(-1, (self.heads, self.nope + self.value)).transpose(1, 2)
        shared = turned[:, None].expand(-1, self.heads, -1, -1)
        key = torch.cat([row[..., : self.nope], shared], -1)
        # The CPU's fused kernel takes values that are as wide as keys.
        value = F.pad(row[..., self.nope :], (0, key.shape[-1] - self.value))
        mask = self._learn_and_select(x.detach(), latent.detach(), query, key, step)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return self.o_proj(out[..., : self.value].transpose(1, 2).flatten(2))

    def _learn_and_select(self, x, latent, query, key, step) -> Tensor | None:
        """Add the indexer's loss to the step's; return [batch, 1, length, length] bool or None."""
        if step.sampled is None and step.selection is None:
            return None
        keys = self.indexer.keys(x, step.cos, step.sin)
        if step.sampled is not None and step.losses is not None:
            step.losses.append(self._loss(x, latent, query, key, keys, step))
        if step.selection is None:
            return None
        with torch.no_grad():
            return self._selected(x, latent, keys, step)

    def _loss(self, x, latent, query, key, keys, step) -> Tensor:
        """Mean divergence of the indexer's softmax from the heads' mean attention, in nats."""
        rows = step.sampled
        later = torch.arange(x.shape[1]) > rows[:, :, None]
        with torch.no_grad():
            wide = rows[:, None, :, None].expand(-1, self.heads, -1, query.shape[-1])
            logits = (query.gather(2, wide) @ key.transpose(-1, -2)).float() * self.scale
            target = logits.masked_fill(later[:, None], -math.inf).softmax(-1).mean(1)
        x, latent = _rows_at(x, rows), _rows_at(latent, rows)
        cos, sin = _rows_at(step.cos, rows), _rows_at(step.sin, rows)
        scores = self.indexer.scores(x, latent, cos, sin, keys).masked_fill(later, -math.inf)
        given = scores.log_softmax(-1).masked_fill(later, 0)
        return (torch.xlogy(target, target) - target * given).sum(-1).mean()

    def _selected(self, x, latent, keys, step) -> Tensor:
        length, k = x.shape[1], step.selection.k
        mask = torch.zeros(x.shape[0], length, length, dtype=torch.bool)
        for low in range(0, length, _ROWS):
            rows = slice(low, min(length, low + _ROWS))
            allowed = torch.arange(length) <= torch.arange(length)[rows, None]
            if step.selection.last:
                scores = torch.arange(length).float().expand(x.shape[0], allowed.shape[0], -1)
            else:
                cos, sin = step.cos[:, rows], step.sin[:, rows]
                scores = self.indexer.scores(x[:, rows], latent[:, rows], cos, sin, keys)
            best = scores.masked_fill(~allowed, -math.inf).topk(min(k, length), -1).indices
            mask[:, rows] = mask[:, rows].scatter_(-1, best, True) & allowed
        return mask[:, None]


class Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = _matrix(hidden, intermediate)
        self.up_proj = _matrix(hidden, intermediate)
        self.down_proj = _matrix(intermediate, hidden, RESIDUAL_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Shares of a token's experts: sigmoid scores, the best few, normalised (DeepSeek-V3)."""

    def __init__(self, config: TinyModelConfig):
        super().__init__()
        self.count = config.experts_per_token
        self.weight = nn.Parameter(torch.randn(config.experts, config.hidden) * config.hidden**-0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(config.experts))

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, experts] float32, zero for experts not chosen"""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        best, which = scores.topk(self.count, -1)
        shares = best / (best.sum(-1, keepdim=True) + 1e-20) * ROUTED_SCALING_FACTOR
        return torch.zeros_like(scores).scatter(-1, which, shares)


class Experts(nn.Module):
    def __init__(self, config: TinyModelConfig):
        super().__init__()
        sizes = config.hidden, config.moe_intermediate
        self.gate = Router(config)
        self.shared_experts = Mlp(*sizes)
        self.experts = nn.ModuleList(Mlp(*sizes) for _ in range(config.experts))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).to(x.dtype)
        out = self.shared_experts(x)
        for number, expert in enumerate(self.experts):  # all of them: a few small matrices
            out = out + shares[..., number, None] * expert(x)
        return out


class Layer(nn.Module):
    def __init__(self, config: TinyModelConfig, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = Norm(config.hidden)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden)
        self.mlp = mlp

    def forward(self, x: Tensor, step: ForwardPass) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftLayer(Layer):
    """The MTP layer: from the target's hidden state and the next token, the token after."""

    def __init__(self, config: TinyModelConfig):
        super().__init__(config, Experts(config))
        self.enorm, self.hnorm = Norm(config.hidden), Norm(config.hidden)
        self.eh_proj = _matrix(2 * config.hidden, config.hidden)
        self.shared_head = nn.ModuleDict({"norm": Norm(config.hidden)})

    def forward_draft(self, embedded: Tensor, hidden: Tensor, step: ForwardPass) -> Tensor:
        """Both [batch, length, hidden]: the next token's embedding, the target's last states."""
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)
        return self.shared_head["norm"](self(self.eh_proj(both), step))


class Network(nn.Module):
    """The target and its MTP layer, which is `draft` here and the last layer of a checkpoint."""

    def __init__(self, config: TinyModelConfig, vocab_size: int):
        super().__init__()
        self.config = config
        layers = [
            Layer(config, Mlp(config.hidden, config.intermediate)) for _ in range(config.layers)
        ]
        embedding = nn.Embedding(vocab_size, config.hidden)
        nn.init.normal_(embedding.weight)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": embedding,
                "layers": nn.ModuleList(layers),
                "norm": Norm(config.hidden),
            }
        )
        self.lm_head = _matrix(config.hidden, vocab_size, RESIDUAL_GAIN)
        self.draft = DraftLayer(config)
        self.frequencies = rotary_frequencies(config)
        with torch.no_grad():
            embedding.weight[:, 0] = CONSTANT
            for layer, offsets in zip(layers, LOOK_BACK, strict=False):
                self._look_back(layer.self_attn, offsets)

    def _look_back(self, attention: Any, offsets: tuple[int | None, ...]) -> None:
        """Let each head match the constant of the byte that lies its offset back.

        A query's rope part is the key's, turned by the offset: they agree where the distance is it.
        """
        shares = 1 / (1 + torch.arange(ROPE // 2) / FAST)
        amplitudes = (shares / shares.sum() * MATCH / attention.scale).sqrt()
        hidden, rank = self.config.hidden, self.config.q_lora_rank
        constant = CONSTANT / math.sqrt((CONSTANT**2 + hidden - 1) / hidden)  # after the norm
        key = attention.kv_a_proj_with_mqa.weight
        key[KV_LORA_RANK:] = 0
        key[KV_LORA_RANK::2, 0] = amplitudes / constant
        size = 8.0  # of the query latent's first dimension, whose others are about 1
        attention.q_a_proj.weight[0] = 0
        attention.q_a_proj.weight[0, 0] = size / constant
        size /= math.sqrt((size**2 + rank - 1) / rank)
        queries = attention.q_b_proj.weight.view(self.config.heads, -1, rank)
        for head, offset in zip(queries, offsets, strict=True):
            if offset is None:
                continue
            head *= 0.1
            head[self.config.nope_dim :] = 0
            angles = -offset * self.frequencies
            head[self.config.nope_dim :: 2, 0] = amplitudes * angles.cos() / size
            head[self.config.nope_dim + 1 :: 2, 0] = amplitudes * angles.sin() / size

    def step(self, positions: Tensor, **options: Any) -> ForwardPass:
        """positions: [batch, length]; options: of ForwardPass"""
        angles = positions[..., None].float() * self.frequencies
        return ForwardPass(angles.cos(), angles.sin(), **options)

    def hidden(self, ids: Tensor, step: ForwardPass) -> Tensor:
        """[batch, length, hidden], after the last norm. ids: [batch, length]"""
        x = self.model["embed_tokens"](ids)
        for layer in self.model["layers"]:
            x = layer(x, step)
        return self.model["norm"](x)

    def drafts(self, ids: Tensor, hidden: Tensor, step: ForwardPass) -> Tensor:
        """Hidden states that predict two tokens on, [batch, length - 1, hidden].

        step: of the first length - 1 positions
        """
        embedded = self.model["embed_tokens"](ids[:, 1:])
        return self.draft.forward_draft(embedded, hidden[:, :-1], step)

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by a checkpoint's names."""
        state = self.state_dict()
        prefix = f"model.layers.{self.config.layers}."
        named = {
            prefix + name.removeprefix("draft.") if name.startswith("draft.") else name: value
            for name, value in state.items()
        }
        named[prefix + "embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
        named[prefix + "shared_head.head.weight"] = state["lm_head.weight"].clone()
        return named
