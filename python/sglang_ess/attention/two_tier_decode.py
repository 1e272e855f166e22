"""Decode attention over two tiers, with the fetch of missed rows behind other work.

    off   plan, fetch; attend to everything
    DA    plan; fetch on the transfer stream | attend to the hits; attend to the misses; merge
    DBA   DA with the batch planned in halves: the first half's fetch runs behind the second
          half of the indexer (ESS section 3.3, figure 6)

Everything that touches the tiers runs on one stream, the transfer stream, in order: saves and
installs of new rows, plans, fetches, rebuilds of the order. So a row is never fetched before it is
saved, and the main stream only waits for events. All of it can be captured in a CUDA graph: the
transfer stream forks from and joins the main one inside a step, and no shape depends on data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ess_kernels.plan import PlanBuffers
from ess_kernels.scatter import scatter_rows
from sglang_ess.attention.overlap import Mode
from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache, DeviceTier, Pass
from sglang_ess.tiers.transfer_stream import TransferStream, wait

# The signature of the kernels in mla_kernels.py:
# (q [T, H, 576], rows [n, width], indices [T, K] int32, lengths [T] int32)
#   -> (out [T, H, 512], lse [T, H] float32, natural log)
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# SGLang's merge_state(out_a, lse_a, out_b, lse_b) -> (out, lse), or one like it
Merge = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# Stands for the log-sum-exp of no rows: merge_state gives NaN for two infinities.
NO_ROWS_LSE = -1e30


@dataclass
class LayerStep:
    """One layer of a decode step, from its top-k list until attention has read its rows.

    layer_index, cache: the layer and its hot tier
    slots    [T] int64: slots that the step writes, one a query; None where it writes none
    targets  [T] int32: hot rows reserved for slots; None before reserve(), and without room
    topk     [T, K] int32 slots, -1 pads; None before start()
    buffers  the plan of the whole batch, valid until the next layer's plan; None where the batch
             takes several passes
    planned  queries that plan_half() has planned
    ready    the plan's lists are there; fetched: its rows are; written: the new rows are
    """

    layer_index: int
    cache: DeviceHotCache
    slots: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    topk: torch.Tensor | None = None
    buffers: PlanBuffers | None = None
    planned: int = 0
    ready: torch.cuda.Event | None = None
    fetched: torch.cuda.Event | None = None
    written: torch.cuda.Event | None = None


@dataclass
class TwoTierDecode:
    """Decode attention of all layers. Its state is in the LayerStep that each call is given.

    tier, transfer: the pool's; merge_state: SGLang's
    attend, attend_late: the attention kernel, and the one for rows that come late. Those are few
    of many columns, so it should stop at a list's length (mla_kernels' stops_early)
    """

    tier: DeviceTier
    transfer: TransferStream
    attend: Attend
    merge_state: Merge
    attend_late: Attend | None = None

    def layer(self, layer_index: int, slots: torch.Tensor | None = None) -> LayerStep:
        """Begin a layer's step. slots: see LayerStep."""
        return LayerStep(layer_index, self.tier.caches[layer_index], slots)

    def reserve(self, step: LayerStep, width: int, first_slot: int = 0) -> bool:
        """Make the step's new slots hot before their rows are there.

        width: top-k's; first_slot: lower slots are a batch's padding
        Returns whether they got rows: then start() may come before write(). Otherwise they are
        not hot any more, and their rows are fetched like others once write() has saved them.
        """
        slots, cache = step.slots, step.cache
        assert slots is not None
        fits = cache.has_room_for_writes(len(slots), width)
        with self.transfer.on_transfer_stream():
            if fits:
                step.targets = cache.reserve(slots, first_slot)
            else:
                cache.invalidate(slots)
            self.transfer.record_stream(slots)
        return fits

    def write(self, step: LayerStep, rows: torch.Tensor) -> None:
        """Save the packed rows [T, ...] of the step's slots, and fill their reserved hot rows."""
        slots, cache = step.slots, step.cache
        assert slots is not None
        with self.transfer.on_transfer_stream():
            scatter_rows(rows, slots, cache.host_rows)
            if step.targets is not None:
                scatter_rows(rows, step.targets, cache.rows)
            step.written = self.transfer.event()
            self.transfer.record_stream(slots, rows)

    def plan_half(self, step: LayerStep, topk: torch.Tensor, first: int, batch: int) -> None:
        """DBA: plan and fetch topk [n, K], the queries from `first` on of a batch of `batch`.

        Halves come in order. start() with the whole top-k goes on from there.
        """
        cache, last = step.cache, first + len(topk)
        written = None if step.slots is None else step.slots[first:last]
        with self.transfer.on_transfer_stream():
            half = cache.plan(topk, first, int(first > 0), advance=last == batch, written=written)
            step.ready = self.transfer.event()  # after the first half's fetch: its rows are there
            cache.fetch(half)
            self.transfer.record_stream(topk)
        step.planned = last

    def can_halve(self, layer_index: int, batch: int, width: int) -> bool:
        """Whether a batch can be planned in halves: both must be hot at the same time."""
        return batch > 1 and len(self.tier.caches[layer_index].passes(batch, width)) == 1

    def start(self, step: LayerStep, topk: torch.Tensor) -> bool:
        """Plan topk [T, K] int32 slots and fetch its misses, behind what the caller does next.

        Returns False, having done nothing, where the batch takes several passes: use in_passes.
        """
        cache, slots = step.cache, step.slots
        if len(cache.passes(*topk.shape)) > 1:
            return False
        step.topk, step.buffers = topk, self.tier.buffers_for(*topk.shape)
        with self.transfer.on_transfer_stream():
            if step.planned != len(topk):
                fits = slots is not None and len(slots) == len(topk)
                cache.plan(topk, written=slots if fits else None)
                step.ready = self.transfer.event()
                cache.fetch(step.buffers)
            step.fetched = self.transfer.event()
            cache.rebuild_order()
            self.transfer.record_stream(topk)
        return True

    def finish(self, q: torch.Tensor, step: LayerStep, mode: Mode) -> torch.Tensor:
        """Attention of q [T, H, 576] over the rows that start() fetches: out [T, H, 512]."""
        buffers, cache = step.buffers, step.cache
        assert buffers is not None, "start() has planned the batch"
        if mode is Mode.OFF:
            self.wait(step)
            return self._attend(q, cache, buffers.rows)[0]
        wait(step.ready)
        early = self._attend(q, cache, buffers.hit_rows, buffers.hit_lengths)
        self.wait(step)
        attend_late = self.attend_late or self.attend
        late = attend_late(q, cache.rows.flatten(1), buffers.late_rows, buffers.late_lengths)
        return self.merge(early, late)[0]

    def wait(self, step: LayerStep) -> None:
        """Have the main stream wait until every row of the plan is there, fetched or written."""
        wait(step.fetched)
        wait(step.written)

    def in_passes(self, step: LayerStep, q: torch.Tensor, topk: torch.Tensor) -> torch.Tensor:
        """Attention of a batch that the hot tier cannot hold at once: out [T, H, 512].

        Parts of a query are merged in float32 and rounded once: their number adds no error.
        """
        cache, outs = step.cache, []
        parts: tuple[torch.Tensor, torch.Tensor] | None = None
        for part in cache.passes(*topk.shape):
            out, lse = self._one_pass(cache, q[part.queries], topk, part)
            if part.columns != slice(0, topk.shape[1]):
                wide = out.float(), lse
                parts = wide if part.columns.start == 0 else self.merge(parts, wide)
                if part.columns.stop < topk.shape[1]:
                    continue
                out = parts[0].to(out.dtype)
            outs.append(out)
        return torch.cat(outs)

    def _attend(self, q, cache: DeviceHotCache, indices, lengths=None):
        if lengths is None:  # pads are -1
            lengths = indices.new_full((len(indices),), indices.shape[1])
        return self.attend(q, cache.rows.flatten(1), indices, lengths)

    def merge(self, a, b) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of attention over two disjoint sets of rows, either of which may be empty."""
        (out_a, lse_a), (out_b, lse_b) = a, b
        return self.merge_state(out_a, _finite(lse_a), out_b, _finite(lse_b))

    def _one_pass(self, cache, q, topk, part: Pass):
        lookups = topk[part.queries, part.columns].contiguous()
        # The transfer stream starts after the attention whose rows this pass may evict, and which
        # reads the plan buffers.
        with self.transfer.on_transfer_stream():
            planned = cache.plan(lookups)
            cache.fetch(planned)
            fetched = self.transfer.event()
            cache.rebuild_order()
            self.transfer.record_stream(lookups)
        wait(fetched)
        return self._attend(q, cache, planned.rows)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """lse with finite marks of "no rows": FlashMLA marks them by +inf, other kernels by -inf."""
    return torch.nan_to_num(lse, neginf=NO_ROWS_LSE, posinf=NO_ROWS_LSE)
