"""SGLang's speculative loop (EAGLE, topk 1) in transformers: a target and its MTP layer.

Each verify step takes the target's greedy tokens as given, which is what it accepts by. The MTP
layer runs over what was accepted with the target's hidden states (draft extend), then over its own
drafts with its own hidden states.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from tests.support.oracle import reference_model

Hidden = Callable[[torch.Tensor], torch.Tensor]


class DraftChain:
    """A tiny model with an MTP layer, of an architecture whose layers transformers can build.

    topk: set it, and the MTP layer reads these rows [k] and not those it would choose
    """

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32):
        self.target = reference_model(path, dtype=dtype, attn_implementation="eager").eval()
        self.config = copy.deepcopy(self.target.config)
        self.shares = getattr(self.config, "index_share_for_mtp_iteration", False)
        prefix = f"model.layers.{self.config.num_hidden_layers}."
        self.config.num_hidden_layers = 1
        self.config.mlp_layer_types, self.config.indexer_types = ["sparse"], ["full"]
        stored = load_file(path / "model.safetensors")
        weights = _stacked({n[len(prefix) :]: w for n, w in stored.items() if n.startswith(prefix)})
        self.layer = type(self.target.model.layers[0])(self.config, 0).to(dtype).eval()
        self.eh_proj = weights.pop("eh_proj.weight")
        self.enorm, self.hnorm, self.last_norm = (
            self._norm(weights.pop(f"{name}.weight"))
            for name in ("enorm", "hnorm", "shared_head.norm")
        )
        del weights["embed_tokens.weight"], weights["shared_head.head.weight"]
        self.layer.load_state_dict(weights)
        self.topk: torch.Tensor | None = None

    def _norm(self, weight):
        norm = type(self.target.model.norm)(len(weight), self.config.rms_norm_eps).to(weight.dtype)
        norm.weight.data.copy_(weight)
        return norm

    @torch.no_grad()
    def greedy(self, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
        """Continue prompt [n] by the target alone: [n + tokens]."""
        cache, ids, new = DynamicCache(config=self.target.config), prompt, prompt
        for _ in range(tokens):
            logits = self.target(new[None], past_key_values=cache, use_cache=True).logits
            new = logits[0, -1:].argmax(-1)
            ids = torch.cat([ids, new])
        return ids

    @torch.no_grad()
    def accept_lengths(
        self,
        ids: torch.Tensor,
        prompt: int,
        draft_tokens: int,
        hidden: Hidden = lambda given: given,
    ) -> list[int]:
        """Return how many tokens each verify step adds, the target's own among them.

        ids: of `greedy`, whose first `prompt` were given
        draft_tokens: SGLang's: tokens of a verify step, of which all but the first are drafts
        hidden: changes the target's hidden states [n, hidden_size] on their way to the MTP layer
        """
        states = hidden(self.target.model(ids[None]).last_hidden_state[0])
        cache = DynamicCache(config=self.config)
        # Row p of the MTP layer has token p + 1 and state p, and predicts token p + 2.
        outputs, lists = self._run(ids[1:], states[:-1], cache)
        row, lengths = prompt - 1, []
        while row + draft_tokens + 1 < len(ids):
            own = copy.deepcopy(cache)
            own.crop(row + 1 - outputs.shape[0])
            accepted, state = 0, outputs[row]
            while (draft := self.target.lm_head(state).argmax()) == ids[row + 2 + accepted]:
                accepted += 1
                if accepted == draft_tokens - 1:
                    break
                reused = lists[:, row : row + 1] if self.shares else None
                (state,), _ = self._run(draft[None], state[None], own, reused)
            lengths.append(1 + accepted)
            row += 1 + accepted
        return lengths

    def _run(self, tokens, states, cache, reused=None):
        """(normed outputs [n, hidden_size], top-k [1, n, k]) of rows that follow those in cache."""
        both = [self.enorm(self.target.model.embed_tokens(tokens)), self.hnorm(states)]
        mixed = (torch.cat(both, dim=-1) @ self.eh_proj.T)[None]
        before, count = cache.get_seq_length(), len(tokens)
        positions = torch.arange(before, before + count)[None]
        hides = torch.arange(before + count) > positions[0, :, None]
        mask = torch.zeros(hides.shape, dtype=mixed.dtype)
        mask.masked_fill_(hides, torch.finfo(mixed.dtype).min)
        forced = reused if self.topk is None else self.topk.expand(1, count, -1)
        lists = []

        def choose(indexer, inputs, chosen):
            lists.append(chosen if forced is None else forced)
            return lists[-1]

        hook = self.layer.self_attn.indexer.register_forward_hook(choose)
        output = self.layer(
            mixed, attention_mask=mask[None, None], position_ids=positions, past_key_values=cache,
            position_embeddings=self.target.model.rotary_emb(mixed, position_ids=positions),
        )  # fmt: skip
        hook.remove()
        output = output[0] if isinstance(output, tuple) else output
        return self.last_norm(output[0]), lists[0]


def _stacked(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack the experts as transformers has them."""
    name = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
    experts: dict[str, dict[int, torch.Tensor]] = {"gate": {}, "up": {}, "down": {}}
    for one in [one for one in weights if name.fullmatch(one)]:
        number, part = name.fullmatch(one).groups()
        experts[part][int(number)] = weights.pop(one)
    gate, up, down = (
        torch.stack([experts[part][i] for i in range(len(experts[part]))]) for part in experts
    )
    weights["mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
    weights["mlp.experts.down_proj"] = down
    return weights
