"""SGLang's DSA backend over two tiers.

Upstream asks `hisparse_coordinator.swap_in_selected_pages` in decode and the pool's
`translate_loc_to_hisparse_device` in extend for the rows to read, and reads them from the pool's
get_key_buffer: those three are answered from the hot tier and from staging, so its own kernels
run unchanged. Only a decode step that overlaps, or one that takes several passes, is computed
here, since it needs log-sum-exps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from sglang.srt.configs.model_config import get_dsa_index_kpool
from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend
from sglang.srt.layers.attention.merge_state import merge_state
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant

from sglang_ess.attention import half_batch
from sglang_ess.attention.mla_kernels import Need, choose
from sglang_ess.attention.overlap import CostTable, Mode, OverlapPolicy
from sglang_ess.attention.two_tier_decode import Planned, TwoTierDecode
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache.pool_cuda import CudaEssTokenToKVPool
from sglang_ess.tiers.contract import CANARY_ROWS
from sglang_ess.tiers.warmup_window import warm_spans

logger = logging.getLogger(__name__)

MIRROR_STEPS = 8  # steps between two copies of the counters to the host

active: EssDsaBackend | None = None  # this process's, for the hooks


class _RowsOfThePlan:
    """What upstream knows as the HiSparse coordinator."""

    def __init__(self, backend: EssDsaBackend):
        self._backend = backend

    def swap_in_selected_pages(self, req_pool_indices, seq_lens, topk_indices, layer_id):
        """Hot rows [T, K] int32 of the step's plan, once they are filled."""
        return self._backend.rows_of_plan


class EssDsaBackend(DeepseekSparseAttnBackend):
    """DeepseekSparseAttnBackend whose pool is a CudaEssTokenToKVPool.

    Raises: RuntimeError where the server's options leave no way to serve two tiers.
    """

    def __init__(self, model_runner, *args, **kwargs):
        global active
        super().__init__(model_runner, *args, **kwargs)
        pool = self.token_to_kv_pool
        _check(self, pool, get_dsa_index_kpool(model_runner.model_config.hf_config))
        config = EssConfig.from_env()
        self._warms, self._canary_rate = config.warmup == "on", config.canary_rate
        self._random = np.random.default_rng(0)
        # Of short lists or not, chosen at the first use: then the softmax scale is known.
        self._kernels: dict[bool, object] = {}
        self._short_lists = False
        self.decode = TwoTierDecode(
            pool.tier, pool.transfer, self._attend_rows, merge_state, self._attend_late
        )
        modes = tuple(Mode) if config.overlap == "auto" else (Mode(config.overlap),)
        table = CostTable.read(config.overlap_costs) if config.overlap_costs else None
        self.policy = OverlapPolicy(pool.layer_num, table, modes)
        # chosen: for the steps to come; mode: of the one that is being issued or captured
        self.chosen = self.mode = self.policy.choose(1).mode
        self.rows_of_plan: torch.Tensor | None = None
        self._started: dict[int, Planned] = {}  # layer -> what select() set off
        self._halves: list[tuple[slice, object]] = []  # queries, the indexer's metadata of them
        self._warm_spans: list[tuple[int, int]] = []
        self._steps = 0
        # Ranks that must agree on top-k get rank 0's behind the indexer: too late for select().
        self._selects = not envs.SGLANG_DSA_TOPK_BROADCAST.get()
        self.hisparse_coordinator = _RowsOfThePlan(self)
        pool.tier.mirror()  # so that no step is the first to wait for one
        if self.dsa_kv_cache_store_fp8:
            self.dsa_prefill_impl = "flashmla_kv"  # the one that reads fp8 rows by index
            self.enable_auto_select_prefill_impl = False
        active = self
        logger.info("ESS: overlap %s, costs %s", config.overlap, table and table.source)

    # --- metadata -------------------------------------------------------------------------

    def get_topk_transform_method(self, forward_mode=None) -> TopkTransformMethod:
        """Slots, not offsets into a flattened prefix: they are what the tiers are keyed by."""
        return TopkTransformMethod.PAGED

    def get_indexer_metadata(self, layer_id, forward_batch):
        """Fused top-k, whose indices are slots; upstream unfuses it for its own coordinator."""
        metadata = super().get_indexer_metadata(layer_id, forward_batch)
        return replace(metadata, force_unfused_topk=False)

    @contextmanager
    def _as_one_tier(self) -> Iterator[None]:
        """Upstream decides as if it had no coordinator: it has what it would look for."""
        coordinator, self.hisparse_coordinator = self.hisparse_coordinator, None
        try:
            yield
        finally:
            self.hisparse_coordinator = coordinator

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Without the table of every slot of every request, which HiSparse needs translated."""
        with self._as_one_tier():
            super().init_cuda_graph_state(max_bs, max_num_tokens)

    def set_dsa_prefill_impl(self, forward_batch=None) -> None:
        """Dense MHA only for prompts without a prefix: it would read one from the host tier.

        Upstream takes none where it has a coordinator.
        """
        prefix = None if forward_batch is None else forward_batch.extend_prefix_lens_cpu
        with nullcontext() if prefix is None or any(prefix) else self._as_one_tier():
            super().set_dsa_prefill_impl(forward_batch)

    def init_forward_metadata(self, forward_batch) -> None:
        _check_mode(forward_batch.forward_mode)
        super().init_forward_metadata(forward_batch)
        self._forget_pass()
        self._warm_spans = []
        if forward_batch.forward_mode.is_extend_without_speculative():
            self._begin_prompts(forward_batch)
        elif forward_batch.forward_mode.is_decode():
            self.mode = self.chosen
            self.next_step(forward_batch.batch_size)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        _check_mode(forward_batch.forward_mode)
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if in_capture:
            self._forget_pass()
            self.mode = Mode(get_capture_attention_variant() or self.chosen.value)
        else:
            self.next_step(forward_batch.batch_size)

    def _forget_pass(self) -> None:
        """Nothing of the pass before, which may have ended in an error, is taken for this one's."""
        self._started.clear()
        self._halves.clear()
        self.decode.begin_pass()

    def next_step(self, batch: int) -> None:
        """Once a decode step, on the host: read the counters, choose for the steps to come.

        The counters are a copy that set off steps ago; where it is not there yet nobody waits.
        """
        tier = self.token_to_kv_pool.tier
        self.token_to_kv_pool.transfer.begin_step()
        self.token_to_kv_pool.before_decode_step(batch)
        self._canary()
        self._steps += 1
        if self._steps % MIRROR_STEPS or not tier.is_mirrored():
            return
        self.policy.observe(tier.read()[0], self.dsa_index_topk)
        tier.mirror()
        self._choose(batch)

    def _choose(self, batch: int) -> None:
        choice = self.policy.choose(batch)
        self.chosen = choice.mode
        self.token_to_kv_pool.tier.set_split(choice.split)

    def force_mode(self, mode: Mode | None, batch: int) -> None:
        """Use one mode from the next step on; None: choose by the cost table. For measurements.

        The decode graphs of the mode must have been captured: it is one of policy.modes.
        """
        if mode != self.policy.forced:
            self.policy.forced = mode
            self._choose(batch)

    def _begin_prompts(self, forward_batch) -> None:
        prefix = list(forward_batch.extend_prefix_lens_cpu)
        new = list(forward_batch.extend_seq_lens_cpu)
        requests = forward_batch.req_pool_indices.long()
        tables = self.req_to_token[:, : max(prefix, default=0)].index_select(0, requests)
        self.token_to_kv_pool.staging.begin(prefix, new, tables, forward_batch.out_cache_loc)
        # The rows that a chunk in the middle of a prompt selects are not what decode wants.
        if self._warms and forward_batch.contains_last_prefill_chunk:
            self._warm_spans = warm_spans(new)

    # --- prefill --------------------------------------------------------------------------

    def forward_extend(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None,
        topk_indices=None, **kwargs,
    ):  # fmt: skip
        def upstream(save):
            return super(EssDsaBackend, self).forward_extend(
                q, k, v, layer, forward_batch, save, q_rope=q_rope, k_rope=k_rope,
                topk_indices=topk_indices, **kwargs,
            )  # fmt: skip

        pool = self.token_to_kv_pool
        if self.use_mha:
            return upstream(save_kv_cache)
        rows = pool.pack(k, k_rope)
        if save_kv_cache:
            pool.write_prompt(layer.layer_id, forward_batch.out_cache_loc, rows)
        index, outs = layer.layer_id - pool.start_layer, []
        for queries, staged in pool.staged(layer.layer_id, rows):
            with pool.reading(staged):
                outs.append((queries, upstream(False)))
        self._warm(index, topk_indices)
        out = outs[0][1]
        for queries, part in outs[1:]:  # each pass gives all queries, its own rightly
            out[queries] = part[queries]
        return out

    def _warm(self, index: int, topk: torch.Tensor) -> None:
        pool = self.token_to_kv_pool
        if not self._warm_spans:
            return
        # Copies: a prefill graph has one top-k buffer for all layers, and nobody waits for this.
        parts = [topk[first:end].clone() for first, end in self._warm_spans]
        with pool.transfer.on_transfer_stream():
            for part in parts:
                pool.hot_caches[index].warm(part)
            pool.transfer.record_stream(*parts)

    # --- decode ---------------------------------------------------------------------------

    def select(self, get_topk, forward_batch, layer_id, q_fp8, weights, metadata):
        """The indexer's top-k; plan and fetch set off at once, behind what precedes attention.

        get_topk(q_fp8, weights, metadata): upstream's, of the whole batch or of a half
        """
        index = layer_id - self.token_to_kv_pool.start_layer
        slots, width = forward_batch.out_cache_loc, self.dsa_index_topk
        batch = len(q_fp8)
        cache = self.token_to_kv_pool.hot_caches[index]
        if not self._selects or not batch or len(slots) != batch:
            return get_topk(q_fp8, weights, metadata)
        if len(cache.passes(batch, width)) > 1 or not cache.has_room_for_writes(batch, width):
            return get_topk(q_fp8, weights, metadata)
        self.decode.reserve(index, slots, width, self.token_to_kv_pool.page_size)
        cuts = []
        if self.mode is Mode.DBA and self.decode.can_halve(index, batch, width):
            cuts = self._cut(metadata, batch)
        parts = []
        for queries, cut in cuts:
            part = get_topk(q_fp8[queries], weights[queries], cut)
            self.decode.plan_half(index, part, queries.start, batch, slots[queries])
            parts.append(part)
        topk = torch.cat(parts) if parts else get_topk(q_fp8, weights, metadata)
        self._started[layer_id] = self.decode.start(index, topk, slots)
        return topk

    def _cut(self, metadata, batch: int) -> list[tuple[slice, object]]:
        """The indexer's metadata for each half; none where it has no row for each query."""
        if not self._halves:  # the same for every layer of a step
            parts = slice(0, batch // 2), slice(batch // 2, batch)
            self._halves = [
                (queries, half_batch.slice_metadata(metadata, queries)) for queries in parts
            ]
        return [] if any(cut is None for _, cut in self._halves) else self._halves

    def forward_decode(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None,
        topk_indices=None, **kwargs,
    ):  # fmt: skip
        pool, index = self.token_to_kv_pool, layer.layer_id - self.token_to_kv_pool.start_layer
        heads = q.view(-1, layer.tp_q_head_num, layer.v_head_dim if q_rope is not None
                       else layer.head_dim)  # fmt: skip
        if not len(heads):
            return heads.new_empty(0, layer.tp_q_head_num, layer.v_head_dim)
        topk = self._pad_topk_indices(topk_indices, len(heads))
        pool.sample.take(index, topk)
        slots = forward_batch.out_cache_loc
        planned = self._started.pop(layer.layer_id, None)
        if planned is not None and planned.topk.shape != topk.shape:
            planned = None
        if planned is None and save_kv_cache:
            self.decode.reserve(index, slots, topk.shape[1], pool.page_size)
        if save_kv_cache:
            self.decode.write(index, slots, pool.pack(k, k_rope))
        if planned is None:
            planned = self.decode.start(index, topk, slots if len(slots) == len(topk) else None)
        if planned is not None and self.mode is Mode.OFF:
            self.decode.wait(planned)
            self.rows_of_plan = planned.buffers.rows
            with pool.reading(planned.cache.rows):
                out = super().forward_decode(
                    q, None, None, layer, forward_batch, False, q_rope=q_rope,
                    topk_indices=topk, **kwargs,
                )  # fmt: skip
        else:
            if kwargs.get("attn_sink") is not None:
                way = "--ess-overlap off"
                if planned is None:  # several passes, whatever overlaps
                    way = "a larger hot tier (--ess-hot-ratio or --ess-hot-gib)"
                raise RuntimeError(
                    f"attention in parts must have no sink: got one. Add {way}, or --disable-ess."
                )
            out = self._with_lse(index, layer, heads, q_rope, topk, planned)
        if index == pool.layer_num - 1:
            pool.transfer.join()  # what is left of the step: a capture must end in one stream
            # What a warm-up cut is not refreshed when the graph that follows it is replayed.
            self._halves.clear()
        return out

    def _with_lse(self, index, layer, heads, q_rope, topk, planned) -> torch.Tensor:
        q_all = heads if q_rope is None else torch.cat(
            [heads, q_rope.view(len(heads), layer.tp_q_head_num, -1)], dim=-1
        )  # fmt: skip
        self._scale = layer.scaling
        if planned is None:
            return self.decode.in_passes(index, q_all, topk)
        return self.decode.finish(q_all, planned, self.mode)

    def _attend_rows(self, q_all, rows, indices, lengths):
        short = self._short_lists
        if short not in self._kernels:
            need = Need(rows.dtype, self.device_capability, q_all.shape[1], True, True)
            device = torch.device(self.device)
            self._kernels[short] = choose(need, self._scale, device, short_lists=short)
        return self._kernels[short].attend(q_all, rows, indices, lengths)

    def _attend_late(self, *args):
        """_attend_rows of the rows that came late: few of many columns."""
        self._short_lists = True
        try:
            return self._attend_rows(*args)
        finally:
            self._short_lists = False

    def _canary(self) -> None:
        """Now and then compare hot rows with their host rows (invariant 2); waits for both."""
        if not self._canary_rate or self._random.random() >= self._canary_rate:
            return
        pool = self.token_to_kv_pool
        pool.synchronize()
        index = int(self._random.integers(pool.layer_num))
        picks = self._random.integers(0, 2**31, CANARY_ROWS)
        name = f"layer {index + pool.start_layer}"
        pool.hot_caches[index].check_rows(picks, name, first_slot=pool.page_size)


def _check(backend: EssDsaBackend, pool, index_kpool: int = 1) -> None:
    """Raises: RuntimeError, one line, for what this backend cannot serve."""
    if not isinstance(pool, CudaEssTokenToKVPool):
        raise RuntimeError(
            f"ESS must have its own KV pool: got {type(pool).__name__}. Report the server's "
            "options; --disable-ess serves them."
        )
    if envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH.get():
        raise RuntimeError(
            "ESS must see every decode step on the host: got SGLANG_ENABLE_METADATA_GLUE_GRAPH "
            "on. Unset it or add --disable-ess."
        )
    if index_kpool > 1:
        raise RuntimeError(
            "ESS must have an index key for each token: got index_kpool "
            f"{index_kpool}. Add --disable-ess."
        )
    if not backend.use_fused_topk:
        raise RuntimeError(
            "ESS must have fused top-k: got SGLANG_DSA_FUSE_TOPK off. Unset it or add "
            "--disable-ess."
        )
    impls = (backend.dsa_prefill_impl, backend.dsa_decode_impl)
    for impl in ("trtllm", "flashmla_sparse_q8"):  # one reads pages, one flattens the prefix
        if impl in impls:
            raise RuntimeError(
                f"ESS must read rows by index: got the DSA backend {impl}. Add "
                "--dsa-decode-backend and --dsa-prefill-backend flashmla_kv (fp8 rows) or "
                "flashmla_sparse (bf16 rows)."
            )


def _check_mode(mode) -> None:
    """Raises: RuntimeError for drafts and their verification: several queries a request."""
    if mode.is_target_verify() or mode.is_draft_extend_v2():
        raise RuntimeError(
            f"ESS must decode one query a request: got {mode.name}. Drop "
            "--speculative-algorithm or add --disable-ess."
        )
