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
from transformers import AutoModelForCausalLM

from sglang_ess.cpu.ops.rows import (
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


@contextmanager
def fp8_rows(oracle: Oracle):
    """The oracle with latent rows rounded as the 656-byte format rounds them."""
    module = inspect.getmodule(type(oracle.model))
    hooks = [
        block.self_attn.kv_a_layernorm.register_forward_hook(_round_latent)
        for block in oracle.model.model.layers
    ]
    original = module.apply_rotary_pos_emb_interleave

    def rounding(q, k, cos, sin, *args, **kwargs):
        q, k = original(q, k, cos, sin, *args, **kwargs)
        # GLM's indexer rotates by the same function; its keys are 4-D with one head too,
        # but come [batch, tokens, 1, dim] where MLA's come [batch, 1, tokens, dim].
        is_latent = kwargs.get("unsqueeze_dim", 1) == 1
        return q, k.bfloat16().to(k.dtype) if is_latent else k

    module.apply_rotary_pos_emb_interleave = rounding
    try:
        yield
    finally:
        module.apply_rotary_pos_emb_interleave = original
        for hook in hooks:
            hook.remove()


def _round_latent(module, inputs, output):
    latent = output.reshape(-1, LATENT_DIM)
    rows = pack_fp8_rows(latent, torch.zeros(latent.shape[0], ROPE_DIM))
    return unpack_rows(rows)[:, :LATENT_DIM].to(output.dtype).view_as(output)


def fake_quantize_index(x: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    """x rounded to e4m3 with its scale, as the index keys and queries are."""
    values, scale = quantize_index(x, power_of_two)
    return values.float() * scale.unsqueeze(-1)
