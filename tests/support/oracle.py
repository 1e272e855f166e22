"""transformers' DeepSeek-V3.2, GLM-MoE-DSA and HY-V4 as the oracle.

Rounding turns decisions over: which positions a query attends to, which experts a token gets,
to which side a row is rounded. A decision turned over moves logprobs by a lot, whether it was
right or wrong, and so would hide real errors behind a loose tolerance. The oracle is therefore
run with the decisions that the engine made. It says what it decided them on (scores, rows before
they are rounded), so that each decision is checked on its own.
"""

import inspect
import json
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import hadamard
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from sglang_ess.cpu.ops.rows import quantize_index
from sglang_ess.layout import INDEX_DIM, LATENT_DIM, ROPE_DIM
from sglang_ess.testing.tiny_config import ARCHS

ByPosition = dict[int, np.ndarray]  # query position -> what was decided there
FLOAT32_UNIT = 2.0**-24  # unit roundoff


@dataclass
class Decisions:
    """Of one sequence, by layer: positions selected, expert ids, rows [576] as stored."""

    selection: dict[int, ByPosition] = field(default_factory=dict)
    experts: dict[int, ByPosition] = field(default_factory=dict)
    rows: dict[int, ByPosition] = field(default_factory=dict)


@dataclass
class Verdict:
    """One sequence as the oracle sees it.

    logprobs [S - 1] of tokens 1..; by layer: scores [S, S] of positions by query (-inf or very
    low: not visible), routing (scores [S, experts], scores of groups [S, groups]),
    rows [S, 576] before rounding
    """

    logprobs: np.ndarray
    scores: dict[int, torch.Tensor] = field(default_factory=dict)
    routing: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


def reference_model(path, changes=None, **options):
    """A tiny checkpoint as the model of transformers that computes the same (ARCHS.reference).

    changes: of config.json; options: of from_pretrained
    """
    stored = json.loads((Path(path) / "config.json").read_text()) | (changes or {})
    model_type = stored.pop("model_type")
    (reference,) = {one.reference for one in ARCHS.values() if one.model_type == model_type}
    config = AutoConfig.for_model(reference, **stored)
    result = AutoModelForCausalLM.from_pretrained(str(path), config=config, **options)
    if reference == "hy_v4":
        _pairs_to_halves(result[0] if isinstance(result, tuple) else result)
    return result


@torch.no_grad()
def _pairs_to_halves(model) -> None:
    """Reorder the rope dimensions of hy_v4's weights, in place.

    SGLang's Hy4 rotates dimensions (2i, 2i + 1), transformers' (i, i + rope/2). Which of the two
    the release has, a checkpoint of random weights does not say.
    """

    def reorder(parameter, heads):
        rows = parameter.view(heads, -1, *parameter.shape[1:])
        rope = rows[:, -ROPE_DIM:]
        rows[:, -ROPE_DIM:] = torch.cat([rope[:, 0::2], rope[:, 1::2]], 1)

    for block in model.model.layers:
        attention = block.self_attn
        reorder(attention.q_b_proj.weight, attention.num_heads)
        reorder(attention.kv_a_proj_with_mqa.weight, 1)
        if attention.indexer is not None:
            reorder(attention.indexer.wq_b.weight, attention.indexer.n_heads)
            for one in (attention.indexer.wk, attention.indexer.k_norm):
                for parameter in one.parameters():
                    reorder(parameter, 1)


class Oracle:
    """A checkpoint in transformers, eager attention."""

    def __init__(self, path, dtype=torch.float32):
        self.model = reference_model(path, dtype=dtype, attn_implementation="eager").eval()
        self.config, self.layers = self.model.config, self.model.model.layers
        self.topk, self.pool = self.config.index_topk, 1

    def attentions(self):
        for layer, block in enumerate(self.layers):
            if hasattr(block.self_attn, "kv_a_layernorm"):
                yield layer, block.self_attn

    def selection_of(self, selected: ByPosition) -> ByPosition:
        """What the indexer's topk chose, from the positions that were selected."""
        return selected

    @torch.no_grad()
    def judge(self, token_ids, decisions=None) -> Verdict:
        """Run a sequence with these decisions; where there are none, with the oracle's own."""
        decisions, verdict = decisions or Decisions(), Verdict(np.empty(0))
        ids = torch.tensor([token_ids])
        with ExitStack() as stack:
            for layer, block in enumerate(self.layers):
                indexer = getattr(block.self_attn, "indexer", None)
                gate = getattr(block.mlp, "gate", None)
                if indexer is not None:
                    choose = _selecting(decisions.selection.get(layer, {}), verdict, layer)
                    stack.enter_context(_choosing(indexer, choose))
                if gate is not None:
                    choose = _routing(decisions.experts.get(layer, {}), verdict, layer)
                    stack.enter_context(_choosing(gate, choose))
            stack.enter_context(self._rows(decisions.rows, verdict))
            logits = self.model(ids, use_cache=False).logits[0, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        verdict.logprobs = logprobs.numpy()
        return verdict

    @contextmanager
    def _rows(self, forced, verdict):
        """Note latents where they are normed and rope keys where they are rotated; force both."""
        module = inspect.getmodule(type(self.model))
        interleaved = hasattr(module, "apply_rotary_pos_emb_interleave")
        name = "apply_rotary_pos_emb" + "_interleave" * interleaved
        rotate, current = getattr(module, name), None

        def note_latent(layer):
            def hook(norm, inputs, output):
                nonlocal current
                current = layer
                verdict.rows[layer] = output.reshape(-1, LATENT_DIM).float()
                return _forced(output, forced.get(layer, {}), slice(0, LATENT_DIM))

            return hook

        def rotating(q, k, cos, sin, *args, **kwargs):
            q, k = rotate(q, k, cos, sin, *args, **kwargs)
            if kwargs.get("unsqueeze_dim", 1) != 1:  # an indexer's
                return q, k
            pairs = _paired(k.reshape(-1, ROPE_DIM))
            verdict.rows[current] = torch.cat([verdict.rows[current], pairs.float()], 1)
            pairs = _forced(pairs, forced.get(current, {}), slice(LATENT_DIM, None))
            return q, torch.cat([pairs[:, 0::2], pairs[:, 1::2]], -1).view_as(k)

        hooks = [
            attention.kv_a_layernorm.register_forward_hook(note_latent(layer))
            for layer, attention in self.attentions()
        ]
        setattr(module, name, rotating)
        try:
            yield
        finally:
            setattr(module, name, rotate)
            for hook in hooks:
                hook.remove()


def _paired(halves):
    """transformers leaves rotated pairs sorted into halves; the checkpoint's order is pairs."""
    return torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2)


def _forced(values, rows: ByPosition, part):
    """values [..., S, width] with what the rows have in their place."""
    if rows:
        values = values.clone()
        flat = values.view(-1, values.shape[-1])
        known = [position for position in rows if position < len(flat)]
        stored = np.stack([rows[position][part] for position in known])
        flat[torch.tensor(known)] = torch.from_numpy(stored).to(values.dtype)
    return values


class _Choosing(TorchFunctionMode):
    """Hands the input and the indices of each torch.topk to choose(input, indices) -> indices."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.topk, torch.Tensor.topk):
            result = torch.return_types.topk((result[0], self.choose(args[0], result[1])))
        return result


@contextmanager
def _choosing(module, choose):
    forward = module.forward

    def chosen(*args, **kwargs):
        with _Choosing(choose):
            return forward(*args, **kwargs)

    module.forward = chosen
    try:
        yield
    finally:
        module.forward = forward


def _selecting(selection: ByPosition, verdict, layer):
    """The indexer's only topk: scores [1, S, S]."""

    def choose(scores, indices):
        verdict.scores[layer] = scores[0].float()
        indices = indices.clone()
        for query, positions in selection.items():
            if query < scores.shape[1] and len(positions):
                chosen = indices[0, query]
                chosen[:] = int(positions[0])
                positions = torch.from_numpy(positions[: len(chosen)]).to(chosen.dtype)
                chosen[: len(positions)] = positions
        return indices

    return choose


def _routing(experts: ByPosition, verdict, layer):
    """The router's three: experts within groups, groups, experts of the groups chosen."""
    seen = []

    def choose(scores, indices):
        seen.append(scores.float())
        if len(seen) == 3:
            verdict.routing[layer] = (seen[0].flatten(1), seen[1])
            indices = indices.clone()
            for token, ids in experts.items():
                if token < len(indices):
                    ids = torch.from_numpy(ids[: indices.shape[1]].copy())
                    indices[token] = ids.to(indices.dtype)
        return indices

    return choose


@contextmanager
def summed_otherwise(oracle: Oracle, seed=0):
    """The oracle as a machine that sums in the least fortunate order would compute it.

    A float32 sum of K products, added one after the other, rounds K partial sums. Partial sum k
    of products of either sign is about sqrt(k / K) of what the result usually is, and rounding
    it errs by a number within u = 2^-24 of it, of variance u^2 / 3: together u^2 K / 6 of the
    result's variance. Elements of the vector that are off by a number within u sqrt(K / 2) of
    them, each for itself, give the same error (the backward error of a sum: Higham, Accuracy
    and Stability of Numerical Algorithms, 2nd ed., section 3.1). Here the input of every matrix
    is off by that: attention's projections, routers, experts, the head. Vectors, blocks and
    fused multiply-adds round fewer or smaller partial sums, so machines err by less; and no
    figure here is one machine's.
    """
    g = torch.Generator().manual_seed(seed)

    def disturb(module, inputs):
        x, *others = inputs
        size = FLOAT32_UNIT * (x.shape[-1] / 2) ** 0.5
        return x * (1 + size * (2 * torch.rand(x.shape, generator=g) - 1)), *others

    blocks = [block.mlp for block in oracle.layers if hasattr(block.mlp, "gate")]
    modules = [module for mlp in blocks for module in (mlp.gate, mlp.experts)]
    modules += [module for module in oracle.model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(disturb) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _RoundingTorch:
    """torch, but the indexer's query-key product rounds both sides to e4m3 first.

    interleaved: the indexer rotates pairs, which transformers leaves sorted into halves.
    rope_last: these are the last dimensions of a key, where SGLang has them first.
    Products do not mind, rounding does, so the engine's own order comes back first.
    disturbance: as fp8_index has it
    """

    def __init__(self, interleaved: bool, rope_last: bool, disturbance: float):
        self.interleaved, self.rope_last = interleaved, rope_last
        self.disturbance = disturbance
        self.generator = torch.Generator().manual_seed(0)

    def __getattr__(self, name):
        return getattr(torch, name)

    def matmul(self, a, b):
        # The indexer's keys have one head where MLA's have as many as its queries.
        if a.dim() == 4 and b.dim() == 4 and b.shape[1] == 1 and a.shape[-1] == INDEX_DIM:
            a = self._fake_quantize(a, power_of_two=True)
            b = self._fake_quantize(b.transpose(-1, -2), power_of_two=False).transpose(-1, -2)
        return torch.matmul(a, b)

    def _fake_quantize(self, x, power_of_two):
        if self.rope_last:
            x = x.roll(ROPE_DIM, -1)
        if self.interleaved:
            x = torch.cat([_paired(x[..., :ROPE_DIM]), x[..., ROPE_DIM:]], dim=-1)
        rotated = x.float() @ torch.from_numpy(hadamard(INDEX_DIM)).float() * INDEX_DIM**-0.5
        noise = 2 * torch.rand(rotated.shape, generator=self.generator) - 1
        values, scale = quantize_index(rotated * (1 + self.disturbance * noise), power_of_two)
        return values.float() * scale.unsqueeze(-1)


@contextmanager
def fp8_index(oracle: Oracle, disturbance: float = 0.0):
    """The oracle's indexer with queries and keys rotated and rounded as in fp8.

    disturbance: the largest error of an element, relative to it, before it is rounded
    """
    module = inspect.getmodule(type(oracle.model))
    model_type = oracle.config.model_type
    interleaved, rope_last = model_type in ("glm_moe_dsa", "hy_v4"), model_type == "hy_v4"
    module.torch = _RoundingTorch(interleaved, rope_last, disturbance)
    try:
        yield
    finally:
        module.torch = torch
