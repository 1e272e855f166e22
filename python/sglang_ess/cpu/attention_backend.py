"""SGLang attention backend of the CPU platform: sparse MLA over the selected slots."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.runtime_context import get_disagg

from sglang_ess.cpu.ops.sparse_mla import apply_sink, sparse_mla
from sglang_ess.layout import LATENT_DIM, PAGE_SLOTS
from sglang_ess.tiers.index_groups import IndexGroups
from sglang_ess.tiers.topk_observer import PassQueries, TopkObserver

# The length of a request that only pads a batch: it sees no position. With data-parallel attention
# SGLang pads the batch of a rank to the size of another's, and an idle rank's from nothing.
PAD_LENGTH = 0


@dataclass(frozen=True)
class SparseMetadata(PassQueries):
    """The queries of one forward pass, and the sizes that every layer needs.

    max_length: the largest of lengths
    page_table [T, P] int32: index-key pages of each query's request in decode; None in prefill
    """

    max_length: int
    page_table: torch.Tensor | None

    @staticmethod
    def of_batch(forward_batch, req_to_token, draft_step: int | None = None) -> "SparseMetadata":
        """Metadata of SGLang's ForwardBatch, without the requests that pad it (PAD_LENGTH).

        draft_step: of a draft model's decode step, from 0. SGLang counts the positions before the
            first draft in seq_lens, and leaves the drafts out.
        """
        mode, seq_lens = forward_batch.forward_mode, forward_batch.seq_lens
        padded, seq_lens = len(seq_lens), seq_lens[: int((seq_lens > PAD_LENGTH).sum())]
        rows = forward_batch.req_pool_indices[: len(seq_lens)].long()
        if mode.is_target_verify() or mode.is_draft_extend_v2():
            queries = len(forward_batch.input_ids) // max(1, padded)
            # A draft extend's lengths contain its tokens already; a verify step's do not.
            before = seq_lens - queries if mode.is_draft_extend_v2() else seq_lens
            lengths = before.unsqueeze(1) + torch.arange(1, queries + 1)
            rows = rows.repeat_interleave(queries)
            return SparseMetadata.for_decode(req_to_token, rows, lengths.view(-1), queries)
        if mode.is_decode_or_idle():
            lengths = seq_lens if draft_step is None else seq_lens + (draft_step + 1)
            return SparseMetadata.for_decode(req_to_token, rows, lengths)
        prefixes = list(forward_batch.extend_prefix_lens_cpu)
        return SparseMetadata.for_extend(
            req_to_token, rows, prefixes, list(forward_batch.extend_seq_lens_cpu)
        )

    @staticmethod
    def for_decode(req_to_token, req_rows, seq_lens, width: int = 1) -> "SparseMetadata":
        """Metadata of a decode step: width queries a request, one after the other."""
        lengths = seq_lens.to(torch.int32)
        max_length = int(lengths.max()) if len(lengths) else 0
        first_slots = req_to_token[req_rows, :max_length:PAGE_SLOTS]
        return SparseMetadata(
            req_to_token,
            req_rows,
            lengths,
            None,
            width,
            max_length,
            (first_slots // PAGE_SLOTS).contiguous(),
        )

    @staticmethod
    def for_extend(req_to_token, req_rows, prefix_lens, extend_lens) -> "SparseMetadata":
        """Metadata of a prefill pass: extend_lens[i] queries of request i, after prefix_lens[i]
        cached positions.
        """
        prefixes = torch.tensor(prefix_lens, dtype=torch.int32)
        tokens = torch.tensor(extend_lens)
        starts = torch.cumsum(tokens, 0) - tokens
        index = torch.arange(int(tokens.sum()), dtype=torch.int32)
        lengths = index + 1 + torch.repeat_interleave(prefixes - starts.int(), tokens)
        spans = tuple(zip(req_rows.tolist(), prefix_lens, extend_lens, strict=True))
        max_length = max((prefix + n for _, prefix, n in spans), default=0)
        rows = torch.repeat_interleave(req_rows, tokens)
        return SparseMetadata(req_to_token, rows, lengths.int(), spans, 1, max_length, None)


def own_tokens(forward_batch, metadata: SparseMetadata | None) -> int:
    """Tokens of a pass that are requests' own; those that pad the batch follow them.

    An idle rank has none. Its draft model's backend never saw the batch: it may have no metadata,
    or that of an earlier one.
    """
    if metadata is None or forward_batch.forward_mode.is_idle():
        return 0
    return len(metadata.lengths)


class CpuSparseMlaBackend(AttentionBackend):
    """Absorbed MLA on the CPU over the rows that the indexer selected.

    The indexer hands over slots, not positions, as SGLang's fused top-k does on CUDA.
    observers: see each index group's top-k list before attention reads its rows
    groups: the index groups of the layers; needed for observers only
    draft_step: the one decode step of a draft model that it serves, from 0; None: any pass
    """

    forward_metadata: SparseMetadata  # of the pass under way

    def __init__(
        self,
        model_runner,
        observers: Sequence[TopkObserver] = (),
        groups: IndexGroups | None = None,
        draft_step: int | None = None,
    ):
        super().__init__()
        self._draft_step = draft_step
        self._observers, self._groups = tuple(observers), groups
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.kv_cache_dtype = model_runner.kv_cache_dtype

    def init_forward_metadata(self, forward_batch) -> None:
        self.forward_metadata = SparseMetadata.of_batch(
            forward_batch, self.req_to_token, self._draft_step
        )
        for observer in self._observers:
            observer.begin_pass(forward_batch.rids, self.forward_metadata)

    def prepare_mtp_seed_indices(self, topk_indices, forward_mode) -> torch.Tensor:
        """The top-k [requests, K] from which a request's first drafts start, as SGLang wants it.

        That is the slots as they are, but on a prefill server the positions that they hold: the
        decode server has the request in other slots.
        Source: DeepseekSparseAttnBackend.prepare_mtp_seed_indices.
        """
        if get_disagg().disaggregation_mode != "prefill":
            return topk_indices
        positions = torch.full_like(topk_indices, -1)
        for (row, prefix, tokens), slots, found in zip(
            self.forward_metadata.spans or (), topk_indices, positions, strict=True
        ):
            context = self.req_to_token[row, : prefix + tokens]
            by_slot, order = context.sort()
            chosen = slots >= 0
            found[chosen] = order[torch.searchsorted(by_slot, slots[chosen])].to(found.dtype)
        return positions

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """The length of a padding request. SGLang asks with and without graphs."""
        return PAD_LENGTH

    def get_indexer_metadata(self, layer_id, forward_batch) -> SparseMetadata:
        return self.forward_metadata

    def forward_extend(
        self,
        q,
        k,
        v,
        layer,
        forward_batch,
        save_kv_cache=True,
        q_rope=None,
        k_rope=None,
        topk_indices=None,
        attn_sink=None,
        **kwargs,
    ):
        """Write this pass's rows, then attend. Returns [T, heads * 512] in q's dtype.

        Decode is the same.

        q [T, heads, 512] absorbed, q_rope [T, heads, 64]; k [T, 1, 512], k_rope [T, 1, 64]
        topk_indices [T, top-k] int32 slots, -1 pads
        attn_sink [heads] float32: the layer's own, the same at each call (Hy4)
        Tokens that pad the batch come last. Nothing is written or read for them; their rows are 0.
        """
        layer.ess_sink = attn_sink
        heads, tokens = layer.tp_q_head_num, own_tokens(forward_batch, self.forward_metadata)
        q = q.view(-1, heads, LATENT_DIM)
        # Not -1: GLM-5.3-Flash has no rope, and q_rope no elements.
        q_rope = q_rope.view(len(q), heads, q_rope.numel() // max(1, len(q) * heads))
        if tokens == 0:
            return q.new_zeros(len(q), heads * LATENT_DIM)
        if save_kv_cache:
            loc = forward_batch.out_cache_loc
            self._write(layer, loc[:tokens], k[:tokens], k_rope[:tokens])
        topk = topk_indices[:tokens]
        self._observe(layer.layer_id - self.token_to_kv_pool.start_layer, topk)
        out = self._attend(layer, q[:tokens], q_rope[:tokens], topk)
        if tokens < len(q):
            out = torch.cat([out, out.new_zeros(len(q) - tokens, *out.shape[1:])])
        return out.view(-1, heads * LATENT_DIM)

    forward_decode = forward_extend

    def _write(self, layer, loc, k, k_rope) -> None:
        self.token_to_kv_pool.set_mla_kv_buffer(layer, loc, k, k_rope)

    def _observe(self, layer_index: int, topk: torch.Tensor) -> None:
        """Show the list to the observers in the first layer that reads it."""
        if self._groups is None:
            return
        group, position = self._groups.places[layer_index]
        for observer in self._observers if position == 0 else ():
            if self.forward_metadata.spans is None:
                observer.decode_topk(group, topk)
            else:
                observer.prefill_topk(group, topk)

    def _attend(self, layer, q, q_rope, topk) -> torch.Tensor:
        """Attention over the slots topk [T, top-k]: out [T, heads, 512]."""
        rows = self.token_to_kv_pool.latent_rows(layer.layer_id)
        return attend_all(layer, q, q_rope, rows, topk)


def attend_all(layer, q, q_rope, rows, indices) -> torch.Tensor:
    """Attention of queries whose rows are all at hand: out [T, heads, 512]."""
    return with_sink(layer, *attend_rows(layer, q, q_rope, rows, indices))


def with_sink(layer, out, lse) -> torch.Tensor:
    """out [T, heads, dim] once the layer's sink, if it has one, has taken its share."""
    sink = getattr(layer, "ess_sink", None)
    return out if sink is None else apply_sink(out, lse, sink)


def attend_rows(layer, q, q_rope, rows, indices) -> tuple[torch.Tensor, torch.Tensor]:
    """sparse_mla with the layer's scale: (out [T, heads, 512], lse [T, heads]).

    Every attention of the CPU platform goes through here, so one place can time it.
    """
    return sparse_mla(q, q_rope, rows, indices, layer.scaling)


class CpuDraftBackends:
    """The backends of a draft model's decode steps, one for each, as SGLang's worker has them.

    attn_backends: of the steps 0 to num_steps - 2; the last draft is no step's input
    """

    needs_cpu_seq_lens = True

    def __init__(self, model_runner, num_steps: int):
        steps = range(num_steps - 1)
        self.attn_backends = [CpuSparseMlaBackend(model_runner, draft_step=i) for i in steps]

    def init_forward_metadata(self, forward_batch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)
