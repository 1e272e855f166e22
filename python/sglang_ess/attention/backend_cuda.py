"""SGLang's DSA backend over two tiers.

SGLang asks `hisparse_coordinator.swap_in_selected_pages` in decode and the pool's
`translate_loc_to_hisparse_device` in prefill which rows to read, and reads them from the pool's
get_key_buffer. The hot tier and the staging buffers answer all three, so SGLang's own kernels run
unchanged. This module computes attention itself only where it needs log-sum-exps, in a decode
step that overlaps fetch and attention or that takes several passes, and where the operator asks
for FlashInfer.

A verification of drafts is a decode step with several queries a request, one for each draft token.
It writes as many rows, to ordinary slots; the next step writes those of the rejected tokens again.
The draft model has SGLang's own backend and a pool in one tier.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from sglang.srt.configs.model_config import get_dsa_index_kpool
from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend
from sglang.srt.layers.attention.merge_state import merge_state
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant
from sglang.srt.runtime_context import get_parallel

from sglang_ess.attention import half_batch
from sglang_ess.attention.backend_checks import check_mode, check_no_sink, check_server
from sglang_ess.attention.mla_kernels import Need, choose
from sglang_ess.attention.overlap import Mode, policy_for
from sglang_ess.attention.planned_lists import PlannedLists, planned_lists_for
from sglang_ess.attention.two_tier_decode import LayerStep, TwoTierDecode
from sglang_ess.config import EssConfig
from sglang_ess.tiers.contract import CANARY_ROWS
from sglang_ess.tiers.warmup_window import warm_spans

logger = logging.getLogger(__name__)

MIRROR_STEPS = 8  # steps between two copies of the counters to the host

active: EssDsaBackend | None = None  # this process's backend, for the hooks


@dataclass
class StepState:
    """The state of one forward pass between SGLang's calls. Each pass replaces it.

    A captured decode graph holds the tensors of the state that it was captured with.

    mode        how a decode step orders transfer and attention
    lists       queries of each request in a decode step
    warm_spans  (first, end) of the queries that warm the hot tier in prefill
    reserved    whether the pass's new slots have hot rows; None until its first layer asks
    halves      (queries, the indexer's metadata of these queries) of a DBA batch, the same for
                every layer; None until a layer asks
    layer       the index group whose top-k is known and whose attention is not done
    """

    mode: Mode
    lists: int = 1
    warm_spans: list[tuple[int, int]] = field(default_factory=list)
    reserved: bool | None = None
    halves: list[tuple[slice, Any]] | None = None
    layer: LayerStep | None = None

    def take_layer(self, group: int, shape: torch.Size) -> LayerStep | None:
        """The group that select() started, if it is this one and its top-k has this shape."""
        step, self.layer = self.layer, None
        if step is None or step.group != group or step.topk is None:
            return None
        return step if step.topk.shape == shape else None


class _PlannedRows:
    """Minimal stand-in for HiSparseCoordinator: hands upstream the hot rows of the current plan.

    SGLang 0.5.23 calls it by position with seq_lens and topk_indices; its coming coordinator
    protocol (managers/hisparse_protocol.py) by keyword with compressed_seq_lens and top_k_result.
    """

    def __init__(self, backend: EssDsaBackend):
        self._backend = backend

    def swap_in_selected_pages(
        self, req_pool_indices, seq_lens=None, topk_indices=None, layer_id=None, *,
        compressed_seq_lens=None, top_k_result=None,
    ):  # fmt: skip
        """Hot rows [T, K] int32 of the layer under way; they are filled."""
        step, place = self._backend.step.layer, self._backend.token_to_kv_pool.place(layer_id)
        assert (step.group, step.position) == place, f"layer {layer_id} is not under way"
        return step.buffers.rows


class EssDsaBackend(DeepseekSparseAttnBackend):
    """DeepseekSparseAttnBackend whose pool is a CudaEssTokenToKVPool.

    Raises: RuntimeError where the server's options leave no way to serve two tiers.
    """

    def __init__(self, model_runner, *args, **kwargs):
        global active
        super().__init__(model_runner, *args, **kwargs)
        pool = self.token_to_kv_pool
        check_server(self, pool, get_dsa_index_kpool(model_runner.model_config.hf_config))
        config = EssConfig.from_env()
        self._warms, self._canary_rate = config.warmup == "on", config.canary_rate
        self._random = np.random.default_rng(0)
        self._observers = pool.topk_observers
        # Kernels for whole lists and for short ones; the softmax scale is known at the first use.
        self._kernels: dict[bool, Any] = {}
        self._scale = 0.0
        attend, attend_short = (partial(self._attend_rows, short) for short in (False, True))
        self.decode = TwoTierDecode(
            pool.tier, pool.transfer, attend, merge_state, attend_short, pool.is_writer,
            pool.meet if pool.is_shared else None,
        )  # fmt: skip
        self.policy = policy_for(config, len(pool.groups), get_parallel())
        self.chosen = self.policy.choose(1).mode  # for the steps to come
        self.step = StepState(self.chosen)
        self.indexer_metadata: Any = None  # the last that the indexer got: the target model's
        self._steps = 0
        # With this option ranks get rank 0's top-k after the indexer: too late for select().
        self._selects = not envs.SGLANG_DSA_TOPK_BROADCAST.get()
        self.hisparse_coordinator = _PlannedRows(self)
        self.planned_lists: PlannedLists | None = None
        if config.attention == "flashinfer":
            self.planned_lists = planned_lists_for(self, model_runner.model_config.scaling)
            self.needs_cpu_seq_lens = True  # SGLang keeps lengths on the host for those who ask
        pool.tier.mirror()  # so that no step has to wait for the first one
        if self.dsa_kv_cache_store_fp8:
            self.dsa_prefill_impl = "flashmla_kv"  # the only one that reads fp8 rows by index
            self.enable_auto_select_prefill_impl = False
        active = self
        said = config.overlap, self.policy.source, config.attention
        logger.info("ESS: overlap %s, costs %s, attention %s", *said)

    # --- metadata -------------------------------------------------------------------------

    def get_topk_transform_method(self, forward_mode=None) -> TopkTransformMethod:
        """Top-k as slots, by which the tiers are keyed, not as offsets into a flattened prefix."""
        return TopkTransformMethod.PAGED

    def get_indexer_metadata(self, layer_id, forward_batch):
        """Metadata with fused top-k, whose indices are slots. Upstream unfuses it for HiSparse."""
        metadata = super().get_indexer_metadata(layer_id, forward_batch)
        self.indexer_metadata = replace(metadata, force_unfused_topk=False)
        return self.indexer_metadata

    @contextmanager
    def _as_one_tier(self) -> Iterator[None]:
        """Have upstream decide as if it had no coordinator."""
        coordinator, self.hisparse_coordinator = self.hisparse_coordinator, None
        try:
            yield
        finally:
            self.hisparse_coordinator = coordinator

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Without HiSparse: upstream would keep a table of all slots of all requests for it."""
        with self._as_one_tier():
            super().init_cuda_graph_state(max_bs, max_num_tokens)

    def set_dsa_prefill_impl(self, forward_batch=None) -> None:
        """Allow dense MHA for prompts without a prefix. A prefix would be read from the host tier.

        Upstream never uses it where it has a coordinator.
        """
        prefix = None if forward_batch is None else forward_batch.extend_prefix_lens_cpu
        with nullcontext() if prefix is None or any(prefix) else self._as_one_tier():
            super().set_dsa_prefill_impl(forward_batch)

    def init_forward_metadata(self, forward_batch) -> None:
        mode = forward_batch.forward_mode
        check_mode(mode)
        super().init_forward_metadata(forward_batch)
        self.step = StepState(self.chosen, self._lists(mode))
        if mode.is_extend_without_speculative():
            self._begin_prompts(forward_batch)
        elif is_decode_step(mode):
            self._plan_lists(forward_batch, captured=False)
            self.next_step(forward_batch.batch_size * self.step.lists)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture: bool = False) -> None:
        mode = forward_batch.forward_mode
        check_mode(mode)
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        if is_decode_step(mode):
            self._plan_lists(forward_batch, captured=True)
        if in_capture:
            variant = get_capture_attention_variant() or self.chosen.value
            self.step = StepState(Mode(variant), self._lists(mode))
        else:
            self.next_step(forward_batch.batch_size * self._lists(mode))

    def _lists(self, mode) -> int:
        """Queries of each request in a decode step of this forward mode."""
        return self.speculative_num_draft_tokens if mode.is_target_verify() else 1

    def _plan_lists(self, forward_batch, captured: bool) -> None:
        if self.planned_lists is not None:
            lengths, batch = forward_batch.seq_lens_cpu, forward_batch.batch_size
            self.planned_lists.plan(lengths, batch, captured)

    def next_step(self, batch: int) -> None:
        """Read the counters and choose the mode of the next steps: once a decode step, on the host.

        batch: queries of the step
        The counters come from a copy that began some steps ago. If it is not done, nobody waits.
        """
        tier = self.token_to_kv_pool.tier
        self.token_to_kv_pool.transfer.begin_step()
        self.token_to_kv_pool.before_decode_step()
        self._canary()
        self._steps += 1
        if self._steps % MIRROR_STEPS or not tier.is_mirrored():
            return
        self.policy.observe(tier.counters(), self.dsa_index_topk)
        tier.mirror()
        self._choose(batch)

    def _choose(self, batch: int) -> None:
        choice = self.policy.choose(batch)
        self.chosen = choice.mode
        self.token_to_kv_pool.tier.set_split(choice.split)

    def agree(self, mode: Mode) -> None:
        """Take rank 0's mode for the next steps, whatever this rank's own misses say."""
        self.policy.agree(mode)
        if self.policy.forced is None:
            self.chosen = mode

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
        self.token_to_kv_pool.begin_prompts(prefix, new, tables, forward_batch.out_cache_loc)
        # Decode does not want the rows that a chunk in the middle of a prompt selects.
        if self._warms and forward_batch.contains_last_prefill_chunk:
            self.step.warm_spans = warm_spans(new)

    # --- prefill --------------------------------------------------------------------------

    def forward_extend(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None,
        topk_indices=None, **kwargs,
    ):  # fmt: skip
        def upstream(save, topk=topk_indices):
            return super(EssDsaBackend, self).forward_extend(
                q, k, v, layer, forward_batch, save, q_rope=q_rope, k_rope=k_rope,
                topk_indices=topk, **kwargs,
            )  # fmt: skip

        def over_hot_rows(step, _):
            # They are the slots that it reads. As HiSparse's it would want whole requests, and
            # data-parallel padding has none.
            with self._as_one_tier():
                return upstream(False, step.buffers.rows)

        if forward_batch is not None and forward_batch.forward_mode.is_target_verify():
            new, sink = (k, k_rope) if save_kv_cache else None, kwargs.get("attn_sink")
            return self._decode_layer(
                over_hot_rows, layer, forward_batch, q, q_rope, topk_indices, new, sink
            )
        pool = self.token_to_kv_pool
        if self.use_mha:
            return upstream(save_kv_cache)
        slots = pool.prompt_slots
        if len(slots) != len(k):  # a pass of another size than the one that began
            slots = forward_batch.out_cache_loc.clone()
        rows = pool.pack_staged(layer.layer_id, k, k_rope, slots)
        if save_kv_cache:
            pool.write_prompt(layer.layer_id, slots, rows)
        outs = []
        for queries, staged in pool.staged(layer.layer_id, rows):
            with pool.reading(staged):
                outs.append((queries, upstream(False)))
        self._warm(layer.layer_id, topk_indices)
        out = outs[0][1]
        for queries, part in outs[1:]:  # each call answers all queries, its own group's rightly
            out[queries] = part[queries]
        return out

    def _warm(self, layer_id: int, topk: torch.Tensor) -> None:
        """Warm an index group with the last queries of each prompt that ends in this batch.

        Its last layer does so, when each layer has saved the rows of the new tokens.
        """
        pool, spans = self.token_to_kv_pool, self.step.warm_spans
        group, position = pool.place(layer_id)
        if not spans or position < pool.hot_caches[group].num_layers - 1:
            return
        # A copy: a prefill graph has one top-k buffer for all layers, and nobody waits for this.
        pool.warm_prompt(layer_id, torch.cat([topk[first:end] for first, end in spans]))

    # --- decode ---------------------------------------------------------------------------

    def select(self, get_topk, forward_batch, layer_id, q_fp8, weights, metadata):
        """The indexer's top-k. Plan and fetch start at once, behind what precedes attention.

        get_topk(q_fp8, weights, metadata): upstream's, for the whole batch or a half of it
        Effect: step.layer is the index group's step, which forward_decode goes on with.
        """
        pool, slots, width = self.token_to_kv_pool, forward_batch.out_cache_loc, self.dsa_index_topk
        group, batch = pool.place(layer_id)[0], len(q_fp8)
        cache = pool.hot_caches[group]
        if not self._selects or not batch or len(slots) != batch:
            return get_topk(q_fp8, weights, metadata)
        lists = self.step.lists
        if not self._reserve(slots, width) or len(cache.passes(batch, width, lists)) > 1:
            return get_topk(q_fp8, weights, metadata)
        step, mode = self.decode.layer(group, lists=lists), self.step.mode
        halves = []
        if mode is Mode.DBA and self.decode.can_halve(group, batch, width, lists):
            halves = self._halves(metadata, batch)
        parts = []
        for queries, half in halves:
            part = get_topk(q_fp8[queries], weights[queries], half)
            self.decode.plan_half(step, part, queries.start, batch)
            parts.append(part)
        topk = torch.cat(parts) if parts else get_topk(q_fp8, weights, metadata)
        self.decode.start(step, topk, mode)
        self.step.layer = step
        return topk

    def _reserve(self, slots: torch.Tensor, width: int) -> bool:
        """Whether this pass's new slots have hot rows; its first layer asks for them."""
        if self.step.reserved is None:
            pool = self.token_to_kv_pool
            self.step.reserved = self.decode.reserve(slots, width, pool.page_size)
        return self.step.reserved

    def _halves(self, metadata, batch: int) -> list[tuple[slice, Any]]:
        """The indexer's metadata for each half of the requests; empty where it lacks queries."""
        if self.step.halves is None:
            lists = self.step.lists
            middle = batch // lists // 2 * lists
            parts = slice(0, middle), slice(middle, batch)
            halves = [(part, half_batch.slice_metadata(metadata, part, lists)) for part in parts]
            self.step.halves = [] if any(half is None for _, half in halves) else halves
        return self.step.halves

    def forward_decode(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, q_rope=None, k_rope=None,
        topk_indices=None, **kwargs,
    ):  # fmt: skip
        def upstream(_, topk):
            return super(EssDsaBackend, self).forward_decode(
                q, None, None, layer, forward_batch, False, q_rope=q_rope, topk_indices=topk,
                **kwargs,
            )  # fmt: skip

        new, sink = (k, k_rope) if save_kv_cache else None, kwargs.get("attn_sink")
        return self._decode_layer(
            upstream, layer, forward_batch, q, q_rope, topk_indices, new, sink
        )

    def _decode_layer(
        self, upstream, layer, forward_batch, q, q_rope, topk_indices, new, sink
    ) -> torch.Tensor:
        """A layer of a decode step: write its new rows, see to its hot rows, attend to them.

        upstream(step, topk): SGLang's attention over the layer's hot rows; new: as _write
        """
        pool = self.token_to_kv_pool
        group, position = pool.place(layer.layer_id)
        heads = q.view(-1, layer.tp_q_head_num, layer.v_head_dim if q_rope is not None
                       else layer.head_dim)  # fmt: skip
        if not len(heads):
            return heads.new_empty(0, layer.tp_q_head_num, layer.v_head_dim)
        topk = self._pad_topk_indices(topk_indices, len(heads))
        if position == 0:
            self.step.layer = self._write_and_start(group, forward_batch, topk, new)
            self._observe(group, topk)
        step = self.step.layer
        assert step is not None and step.group == group, "a group's first layer begins its step"
        if position:
            self.decode.follow(step, position)
            self._write(step, new, forward_batch)
        if step.buffers is not None and (position or self.step.mode is Mode.OFF):
            self.decode.wait(step)
            if self.planned_lists is not None:
                check_no_sink(sink, step, "--ess-attention sglang")
                q_all, rows = _whole(heads, q_rope), step.rows.flatten(1)
                out = self.planned_lists.attend(q_all, rows, step.buffers.rows, layer.scaling)
            else:
                with pool.reading(step.rows):
                    out = upstream(step, topk)
        else:
            check_no_sink(sink, step)
            out = self._with_lse(layer, heads, q_rope, topk, step)
        if step.is_last:  # in a capture it would keep the group's buffers from the next one
            self.step.layer = None
        if layer.layer_id - pool.start_layer == pool.layer_num - 1:
            pool.transfer.join()  # a capture must end in one stream
            # A warm-up and the capture after it are one pass for SGLang. The capture must make
            # what it reads, or a replay would read the warm-up's metadata.
            self.step = StepState(self.step.mode, self.step.lists)
        return out

    def _observe(self, group: int, topk: torch.Tensor) -> None:
        """Show the observers a top-k, behind the fetch and not on the main stream."""
        observers = [one for one in self._observers if one.watches(group)]
        if not observers:
            return
        transfer = self.token_to_kv_pool.transfer
        with transfer.on_transfer_stream():
            for observer in observers:
                observer.decode_topk(group, topk)
            transfer.record_stream(topk)

    def _write(self, step: LayerStep, new, forward_batch) -> None:
        """Save a layer's new rows: (latents [T, 1, 512], rope keys [T, 1, 64]), or None."""
        if new is not None:
            slots, first_slot = forward_batch.out_cache_loc, self.token_to_kv_pool.page_size
            self.decode.write(step, *new, slots, first_slot)

    def _write_and_start(self, group, forward_batch, topk, new) -> LayerStep:
        """The group's step with its plan under way, started by select() or here.

        new: as _write, or None where the step writes none
        """
        step = self.step.take_layer(group, topk.shape)
        selected = step is not None
        if not selected:
            slots = forward_batch.out_cache_loc
            reserved = new is None or self._reserve(slots, topk.shape[1])
            step = self.decode.layer(group, reserved, self.step.lists)
        self._write(step, new, forward_batch)
        if not selected:
            self.decode.start(step, topk, self.step.mode)
        return step

    def _with_lse(self, layer, heads, q_rope, topk, step: LayerStep) -> torch.Tensor:
        """Attention in parts: a step that overlaps, or that takes several passes."""
        q_all = _whole(heads, q_rope)
        self._scale = layer.scaling
        if step.buffers is None:
            return self.decode.in_passes(step, q_all, topk)
        return self.decode.finish(q_all, step, self.step.mode)

    def _attend_rows(self, short_lists: bool, q_all, rows, indices, lengths):
        """short_lists: the lists are few of many columns"""
        if short_lists not in self._kernels:
            need = Need(rows.dtype, self.device_capability, q_all.shape[1], True, True)
            device = torch.device(self.device)
            self._kernels[short_lists] = choose(need, self._scale, device, short_lists=short_lists)
        return self._kernels[short_lists].attend(q_all, rows, indices, lengths)

    def _canary(self) -> None:
        """Now and then compare hot rows with their host rows. Waits for the device.

        Ranks draw the same steps and rows, each from its own hot tier. The writer waits for all.
        """
        if not self._canary_rate or self._random.random() >= self._canary_rate:
            return
        pool = self.token_to_kv_pool
        pool.synchronize()
        layer_id = pool.start_layer + int(self._random.integers(pool.layer_num))
        picks = self._random.integers(0, 2**31, CANARY_ROWS)
        group, position = pool.place(layer_id)
        pool.hot_caches[group].check_rows(picks, f"layer {layer_id}", pool.page_size, position)
        pool.change_rows(lambda: None)


def is_decode_step(mode: Any) -> bool:
    """Whether a pass of this forward mode reads hot rows: decode, or a verification of drafts."""
    return bool(mode.is_decode() or mode.is_target_verify())


def _whole(heads: torch.Tensor, q_rope: torch.Tensor | None) -> torch.Tensor:
    """The queries [T, H, 576] of heads [T, H, 512] and q_rope, or of heads that have both."""
    if q_rope is None:
        return heads
    return torch.cat([heads, q_rope.view(*heads.shape[:2], -1)], dim=-1)
