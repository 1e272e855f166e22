"""transformers' DeepSeek-V3.2 and GLM-MoE-DSA as the oracle.

The oracle is run with the positions that the engine selected: one near-tie decided the
other way would otherwise move logprobs by whatever that row weighs, and hide real errors
behind a loose tolerance. That the selection itself is right is checked on its own, by the
rank the oracle's indexer gives each selected position.
"""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import hadamard
from transformers import AutoModelForCausalLM

from sglang_ess.cpu.ops.rows import (
    GROUP,
    LATENT_DIM,
    ROPE_DIM,
    pack_fp8_rows,
    quantize_index,
    unpack_rows,
)

Selection = dict[int, np.ndarray]  # query position -> selected positions


@dataclass
class Verdict:
    """One sequence as the oracle sees it.

    logprobs [S - 1] of tokens 1..; ranks: for each layer with an indexer, the oracle's rank
    of each position the engine selected (0 is best), by query
    """

    logprobs: np.ndarray
    ranks: dict[int, Selection]


class Oracle:
    """A checkpoint in transformers, eager attention."""

    def __init__(self, path, dtype=torch.float32):
        self.model = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, attn_implementation="eager"
        ).eval()
        self.topk = self.model.config.index_topk

    def indexers(self):
        for layer, block in enumerate(self.model.model.layers):
            if block.self_attn.indexer is not None:
                yield layer, block.self_attn.indexer

    @torch.no_grad()
    def judge(self, token_ids, selections=None, start=0) -> Verdict:
        """Run a sequence, forcing selections[layer][query] for queries from start on.

        Queries without a selection use the oracle's own.
        """
        ranks: dict[int, Selection] = {}
        with self._forced(selections or {}, ranks):
            ids = torch.tensor([token_ids])
            logits = self.model(ids, use_cache=False).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        return Verdict(logprobs.numpy(), ranks)

    @contextmanager
    def _forced(self, selections, ranks):
        originals = {}
        for layer, indexer in self.indexers():
            originals[indexer] = indexer.forward
            indexer.forward = _forcing(indexer, selections.get(layer, {}), ranks, layer, self.topk)
        try:
            yield
        finally:
            for indexer, forward in originals.items():
                indexer.forward = forward


def _forcing(indexer, selection: Selection, ranks, layer, topk):
    forward = indexer.forward

    def forced(*args, **kwargs):
        indexer.index_topk = 1 << 30  # the whole order, so that every position has a rank
        order = forward(*args, **kwargs)[0].long()
        indexer.index_topk = topk
        length = order.shape[0]
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(length).expand_as(order).contiguous()
        )
        chosen = order[:, : min(topk, length)].clone()
        ranks[layer] = {}
        for query, positions in selection.items():
            if query >= length:
                continue
            positions = torch.from_numpy(positions).long()
            ranks[layer][query] = rank[query, positions].numpy()
            chosen[query] = positions[0]
            chosen[query, : len(positions)] = positions
        return chosen.unsqueeze(0).int()

    return forced


class _RoundingTorch:
    """torch, but the indexer's query-key product rounds both sides to e4m3 first.

    interleaved: transformers rotates pairs by sorting them into halves and leaves them there.
    Products do not mind, rounding does, so the model's own order comes back first.
    """

    def __init__(self, interleaved: bool):
        self.interleaved = interleaved

    def __getattr__(self, name):
        return getattr(torch, name)

    def matmul(self, a, b):
        # The indexer's keys have one head where MLA's have as many as its queries.
        if a.dim() == 4 and b.dim() == 4 and b.shape[1] == 1 and a.shape[-1] == GROUP:
            a = self._fake_quantize(a, power_of_two=True)
            b = self._fake_quantize(b.transpose(-1, -2), power_of_two=False).transpose(-1, -2)
        return torch.matmul(a, b)

    def _fake_quantize(self, x, power_of_two):
        if self.interleaved:
            pairs = torch.stack(x[..., :ROPE_DIM].chunk(2, dim=-1), dim=-1).flatten(-2)
            x = torch.cat([pairs, x[..., ROPE_DIM:]], dim=-1)
        return _fake_quantize(x, power_of_two)


def _fake_quantize(x, power_of_two):
    rotated = x.float() @ torch.from_numpy(hadamard(GROUP)).float() * GROUP**-0.5
    values, scale = quantize_index(rotated, power_of_two)
    return values.float() * scale.unsqueeze(-1)


@contextmanager
def fp8_index(oracle: Oracle):
    """The oracle's indexer with queries and keys rotated and rounded as in fp8."""
    module = inspect.getmodule(type(oracle.model))
    interleaved = oracle.model.config.model_type == "glm_moe_dsa"
    module.torch = _RoundingTorch(interleaved)
    try:
        yield
    finally:
        module.torch = torch


@contextmanager
def bf16_rows(oracle: Oracle):
    """The oracle with latent rows rounded to bfloat16."""
    with _rounded_rows(oracle, lambda module, inputs, output: output.bfloat16().to(output.dtype)):
        yield


@contextmanager
def fp8_rows(oracle: Oracle):
    """The oracle with latent rows rounded as the 656-byte format rounds them."""
    with _rounded_rows(oracle, _round_latent):
        yield


def _round_latent(module, inputs, output):
    latent = output.reshape(-1, LATENT_DIM)
    rows = pack_fp8_rows(latent, torch.zeros(latent.shape[0], ROPE_DIM))
    return unpack_rows(rows)[:, :LATENT_DIM].to(output.dtype).view_as(output)


@contextmanager
def _rounded_rows(oracle, round_latent):
    """Round latents by a hook on their norm, rope keys to bfloat16 where they are rotated."""
    module = inspect.getmodule(type(oracle.model))
    hooks = [
        block.self_attn.kv_a_layernorm.register_forward_hook(round_latent)
        for block in oracle.model.model.layers
    ]
    original = module.apply_rotary_pos_emb_interleave

    def rounding(q, k, cos, sin, *args, **kwargs):
        q, k = original(q, k, cos, sin, *args, **kwargs)
        # GLM's indexer rotates by the same function, with heads in another dimension.
        is_latent = kwargs.get("unsqueeze_dim", 1) == 1
        return q, k.bfloat16().to(k.dtype) if is_latent else k

    module.apply_rotary_pos_emb_interleave = rounding
    try:
        yield
    finally:
        module.apply_rotary_pos_emb_interleave = original
        for hook in hooks:
            hook.remove()
