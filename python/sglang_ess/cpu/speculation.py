"""SGLang's kernels for speculative decoding, in torch, for chains of drafts.

ess_patches.speculation puts them where SGLang has CUDA or Triton kernels alone. A chain has one
draft a position (--speculative-eagle-topk 1): node j of a request follows node j - 1, and its row
goes to the j-th of the D slots after the request's prefix. D: draft tokens of a verify step.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import Tensor


def chain_links(bs: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The links of chains: (index, next node, next sibling), each [bs, width] int64.

    index counts the nodes of the whole batch; the others count those of a request, -1: none.
    """
    nodes = torch.arange(width)
    index = torch.arange(bs * width).view(bs, width)
    next_node = torch.where(nodes == width - 1, -1, nodes + 1)
    return index, next_node.repeat(bs, 1), torch.full((bs, width), -1)


def build_chain(parents, scores, seq_lens, tree_mask, positions, *links_and_sizes) -> None:
    """build_tree_kernel_efficient_func for chains: fills positions [bs * D] and the three links.

    links_and_sizes: the links [bs, D] each, top-k, steps, D and the mode of the mask
    The mask stays as it is: the sparse backend of the CPU platform derives what a node sees from
    its position.
    Source: sglang/kernels/ops/speculative/spec_tree.py.
    """
    *links, _topk, _steps, width, _mode = links_and_sizes
    for target, values in zip(links, chain_links(len(seq_lens), width), strict=True):
        target.copy_(values)
    positions.view(-1, width).copy_(seq_lens.unsqueeze(1) + torch.arange(width))


def chain_of_mask(
    tree_mask, verified_seq_len, positions, retrieve_index, retrieve_next_token,
    retrieve_next_sibling, batch_size, draft_token_num,
) -> None:  # fmt: skip
    """reconstruct_indices_from_tree_mask_func for chains, whose masks [bs, D, D] are triangles.

    Source: sglang/kernels/ops/speculative/reconstruct_tree.py.
    """
    links = retrieve_index, retrieve_next_token, retrieve_next_sibling
    sizes = 1, draft_token_num - 1, draft_token_num, None
    build_chain(None, None, verified_seq_len, tree_mask, positions, *links, *sizes)


def verify_chain(
    *, predicts, accept_index, accept_token_num, candidates, target_predict, **links
) -> tuple[Tensor, Tensor, Tensor]:
    """verify_tree_greedy_func for chains: accepts drafts up to the first that is not the argmax.

    predicts [bs * D] int32: at each accepted node the token that follows it; others stay
    accept_index [bs, at most D] int32: the accepted nodes, node 0 first; others stay
    accept_token_num [bs] int32: accepted drafts, node 0 not counted
    candidates [bs, D]: token of each node; target_predict [bs, D]: the argmax after each node
    Source: sglang/kernels/ops/speculative/spec_tree.py.
    """
    accepted = _before_first_miss(candidates[:, 1:] == target_predict[:, :-1], accept_index)
    _accept(predicts, accept_index, accept_token_num, accepted, target_predict)
    return predicts, accept_index, accept_token_num


def _before_first_miss(matches: Tensor, accept_index: Tensor) -> Tensor:
    """Drafts that a verification accepts, [bs]: no more than accept_index has room for.

    matches [bs, D - 1]: whether each draft would be accepted by itself
    """
    return matches.int().cumprod(1).sum(1).clamp(max=accept_index.shape[1] - 1)


def _accept(predicts, accept_index, accept_token_num, accepted, tokens) -> None:
    """Write the outputs of a verification: accepted [bs] drafts, tokens [bs, D] after each node.

    As a kernel does, it leaves what belongs to no accepted node as it is.
    """
    bs, width = tokens.shape
    taken = torch.arange(width) <= accepted.unsqueeze(1)
    predicts.view(bs, width)[taken] = tokens[taken].to(predicts.dtype)
    accept_token_num.copy_(accepted)
    width = min(width, accept_index.shape[1])
    index = torch.arange(taken.numel(), dtype=accept_index.dtype).view(taken.shape)
    taken = taken[:, :width]
    accept_index[:, :width][taken] = index[:, :width][taken]


def sample_chain(
    *, predicts, accept_index, accept_token_num, candidates, target_probs, uniform_samples,
    uniform_samples_for_final_sampling, **others,
) -> None:  # fmt: skip
    """tree_speculative_sampling_target_only for chains: each token has the target's distribution.

    A draft of target probability p > 0 is accepted where the coin of the node before it, in
    uniform_samples [bs, D], is below p / threshold_acc, or where p is at least threshold_single.
    At the first that is not, a token is drawn from the target without that draft; after the last
    node, from the whole.
    target_probs [bs, D, vocab]; others: the two thresholds, and what chains do not need
    Source: sglang/kernels/jit/include/sgl_kernel/speculative/sampling.cuh.
    """
    bs, width, _ = target_probs.shape
    next_tokens = candidates.long().roll(-1, 1)  # the last node has no draft after it
    p = target_probs.gather(2, next_tokens.unsqueeze(2)).squeeze(2)[:, :-1]
    matches = uniform_samples[:, : width - 1] < p / others["threshold_acc"]
    matches |= p >= others["threshold_single"]
    accepted = _before_first_miss(matches & (p > 0), accept_index)
    rows = torch.arange(bs)
    last = target_probs[rows, accepted].clone()
    rejected = rows[accepted < min(width, accept_index.shape[1]) - 1]
    last[rejected, next_tokens[rejected, accepted[rejected]]] = 0
    next_tokens[rows, accepted] = _draw(last, uniform_samples_for_final_sampling)
    _accept(predicts, accept_index, accept_token_num, accepted, next_tokens)


def _draw(weights: Tensor, coins: Tensor) -> Tensor:
    """The first token at which the sum of weights [n, vocab] exceeds coin [n] times the whole.

    Where rounding lets none exceed it, the last of weight above 0; without such a token, the last.
    """
    sums = weights.double().cumsum(1)
    found = torch.searchsorted(sums, (coins.double() * sums[:, -1]).unsqueeze(1), right=True)
    tokens = torch.arange(weights.shape[1])
    last = torch.where((weights > 0) | (sums[:, -1:] == 0), tokens, -1).amax(1)
    return torch.minimum(found.squeeze(1), last)


def top_k_renorm(probs: Tensor, top_ks: Tensor) -> Tensor:
    """probs [n, vocab] of the top_ks [n] likeliest tokens and of those as likely as the last.

    Each row sums to 1 again.
    Source: flashinfer.sampling.top_k_renorm_probs, as in
    sglang/kernels/ops/sampling/renorm_triton.py.
    """
    ranks = (top_ks.long() - 1).clamp(0, probs.shape[1] - 1).unsqueeze(1)
    return _keep_from(probs, probs.sort(1, descending=True).values.gather(1, ranks))


def top_p_renorm(probs: Tensor, top_ps: Tensor) -> Tensor:
    """probs [n, vocab] of the likeliest tokens whose sum is at least top_ps [n], and equals.

    Each row sums to 1 again.
    Source: flashinfer.sampling.top_p_renorm_probs, as in
    sglang/kernels/ops/sampling/renorm_triton.py.
    """
    ascending = probs.sort(1).values
    ranks = torch.searchsorted(ascending.cumsum(1), (1 - top_ps.to(probs.dtype)).unsqueeze(1))
    return _keep_from(probs, ascending.gather(1, ranks.clamp(max=probs.shape[1] - 1)))


def _keep_from(probs: Tensor, least: Tensor) -> Tensor:
    """probs [n, vocab] from least [n, 1] on, as shares of their sum."""
    kept = torch.where(probs >= least, probs, 0)
    return kept / kept.sum(1, keepdim=True)


def fill_bonus_tokens(accept_tokens, accept_lens, bonus_tokens, accept_stride, batch_size) -> None:
    """bonus_tokens[i] = the last accepted token of request i, of accept_tokens [bs, stride].

    Source: fill_bonus_tokens_func of sglang/kernels/ops/speculative/eagle.py.
    """
    rows = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens.copy_(rows.gather(1, (accept_lens.long() - 1).unsqueeze(1)).squeeze(1))


def slots_after(req_to_token: Tensor, req_rows: Tensor, starts: Tensor, count: int) -> Tensor:
    """The slots of `count` positions from starts [bs] on, of these requests: [bs * count] int64."""
    columns = starts.long().unsqueeze(1) + torch.arange(count)
    return req_to_token[req_rows.long().unsqueeze(1), columns].view(-1).long()


def draft_slots(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, topk, num_cols, positions=None,
    mrope=None,
) -> None:  # fmt: skip
    """assign_draft_cache_locs_contiguous_func: out_cache_loc = slots_after(seq_lens, num_cols)."""
    out_cache_loc.copy_(slots_after(req_to_token, req_pool_indices, seq_lens, topk * num_cols))
    if positions is not None:
        positions.copy_(seq_lens)


def verify_slots(
    req_pool_indices, req_to_token, start_offset, end_offset, batch_size, draft_token_num, device
) -> Tensor:
    """SRTPlatform.get_speculative_cache_locs_fn: the slots of a verify step, [bs * D] int64."""
    return slots_after(req_to_token, req_pool_indices, start_offset, draft_token_num)


def note_slots(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size
) -> None:
    """assign_req_to_token_pool_func: put new slots into the request table, request by request."""
    counts = (end_offset - start_offset).long()
    rows = torch.repeat_interleave(req_pool_indices.long(), counts)
    firsts = torch.repeat_interleave(start_offset.long() - (counts.cumsum(0) - counts), counts)
    columns = firsts + torch.arange(len(rows))
    req_to_token[rows, columns] = out_cache_loc[: len(rows)].to(req_to_token.dtype)


def drafts_accepted(outputs: tuple, verify_input: Any, batch: Any, *args: Any, **kw: Any) -> None:
    """AFTER eagle_sample: tell the observers of a pool with two tiers."""
    pool = batch.token_to_kv_pool_allocator.get_kvcache()
    if not batch.forward_mode.is_idle():
        for observer in getattr(pool, "topk_observers", ()):
            observer.accepted(outputs[1].tolist())


def seeds_are_positions(on_a_gpu: bool) -> bool:
    """AFTER should_remap_pd_dsa_seed_to_local_slots: a decode server of this platform maps, too."""
    from sglang.srt.runtime_context import get_disagg

    return on_a_gpu or get_disagg().disaggregation_mode == "decode"


def last_slots(*args: Tensor) -> Tensor:
    """get_last_loc: the slot before each request's new ones, by SGLang's torch form."""
    from sglang.srt.mem_cache.allocation import get_last_loc_torch

    return get_last_loc_torch(*args)


def nothing_to_wait_for(device: Any = None) -> None:
    """torch.cuda.synchronize, which would raise."""


def use_torch_kernels() -> None:
    """Put these functions where SGLang's draft workers call kernels. Once a process.

    Raises: Refusal where SGLang is not as the contract has it.
    """
    from ess_patches import contract, speculation

    # NGRAM imports this module, and the module a library that does not load without a GPU.
    name = "sglang.kernels.ops.speculative.reconstruct_tree"
    module: Any = types.ModuleType(name)
    module.reconstruct_indices_from_tree_mask_func = chain_of_mask
    sys.modules[name] = module
    contract.register_late(speculation.HOOKS + speculation.NGRAM_HOOKS + speculation.TOUCHED, "cpu")
    from sglang.srt.speculative import eagle_utils

    eagle_utils.tree_speculative_sampling_target_only = sample_chain
    eagle_utils.top_k_renorm_prob = top_k_renorm
    eagle_utils.top_p_renorm_prob = top_p_renorm


def draft_pool_class(pool_class: type, configurator: Any, *, kind: str, default: type) -> type:
    """AFTER KVCacheConfigurator._resolve_kv_pool_class: one tier for a draft model."""
    from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool

    drafts = kind == "dsa" and configurator.is_draft_worker
    return CpuDsaTokenToKVPool if drafts else pool_class


def create_decode_backend(original: Any, factory: Any) -> tuple[str, Any]:
    """AROUND DraftBackendFactory._create_dsa_decode_backend: a sparse CPU backend for each step."""
    from sglang_ess.cpu.attention_backend import CpuDraftBackends

    return "dsa", CpuDraftBackends(factory.draft_model_runner, factory.speculative_num_steps)


def create_extend_backend(original: Any, factory: Any) -> tuple[str, Any]:
    """AROUND DraftBackendFactory._create_dsa_prefill_backend."""
    from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend

    return "dsa", CpuSparseMlaBackend(factory.draft_model_runner)
