"""Decode attention over two tiers, with the fetch of missed rows behind other work.

    off   plan, fetch; attend to everything
    DA    plan; fetch on the transfer stream | attend to the hits; attend to the misses; merge
    DBA   DA with the batch planned in halves: the first half's fetch runs behind the second
          half of the indexer (ESS section 3.3, figure 6)

Everything that touches the tiers runs on one stream, the transfer stream, in order: saves and
installs of new rows, plans, fetches, reorders. So a row is never fetched before it is saved
(invariant 1), and the main stream waits for events only. All of it can be captured: streams
fork from and join the main one inside a step, and no shape depends on data (invariant 7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ess_kernels.plan import PlanBuffers
from ess_kernels.scatter import scatter_rows
from sglang_ess.attention.overlap import Mode
from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache, DeviceTier, Pass
from sglang_ess.tiers.transfer_stream import TransferStream, wait

# decode_kernels.py's: (q [T, H, 576], rows [n, width], indices [T, K] int32, lengths [T] int32)
#   -> (out [T, H, 512], lse [T, H] float32, natural log)
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# SGLang's merge_state(out_a, lse_a, out_b, lse_b) -> (out, lse), or one like it
Merge = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# Stands for the log-sum-exp of no rows: merge_state gives NaN for two infinities.
NO_ROWS_LSE = -1e30


@dataclass
class Planned:
    """One layer's batch on its way.

    buffers   of the whole batch; valid until the next layer's plan
    ready     the lists are there; fetched: the rows are
    """

    cache: DeviceHotCache
    topk: torch.Tensor
    buffers: PlanBuffers
    ready: torch.cuda.Event | None
    fetched: torch.cuda.Event | None


@dataclass
class TwoTierDecode:
    """Decode attention of all layers.

    tier, transfer: of the pool; merge_state: SGLang's
    attend, attend_late: the attention kernel, and the one for the rows that came late: few of
    many columns, so it should stop at a list's length (decode_kernels' stops_early)
    """

    tier: DeviceTier
    transfer: TransferStream
    attend: Attend
    merge_state: Merge
    attend_late: Attend | None = None
    # layer -> (queries planned so far, the point where the last half's lists were there)
    _halves: dict[int, tuple[int, torch.cuda.Event | None]] = field(default_factory=dict)
    _targets: torch.Tensor | None = None  # rows of the reserved slots
    _written: torch.cuda.Event | None = None

    def begin_pass(self) -> None:
        """A forward pass begins: what one that ended in an error planned in halves is void."""
        self._halves.clear()

    def reserve(self, layer: int, slots: torch.Tensor, width: int, first_slot: int = 0) -> bool:
        """Make a step's new slots [T] int64 hot, a slot a query, before their rows are there.

        Returns whether they got rows: then start() may come before write(). Else they are hot
        no more, and their rows are fetched like others, after write() has saved them.
        width: of top-k; first_slot: slots below it are a batch's padding
        """
        cache = self.tier.caches[layer]
        fits = cache.has_room_for_writes(len(slots), width)
        with self.transfer.on_transfer_stream():
            if fits:
                self._targets = cache.reserve(slots, first_slot)
            else:
                cache.invalidate(slots)
                self._targets = None
            self.transfer.record_stream(slots)
        return fits

    def write(self, layer: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Save the rows [T, ...] of the reserved slots, packed, and fill their hot rows."""
        cache = self.tier.caches[layer]
        with self.transfer.on_transfer_stream():
            scatter_rows(rows, slots, cache.host_rows)
            if self._targets is not None:
                scatter_rows(rows, self._targets, cache.rows)
            self._written = self.transfer.event()
            self.transfer.record_stream(slots, rows)

    def plan_half(
        self, layer: int, topk: torch.Tensor, first: int, batch: int, written=None
    ) -> None:
        """DBA: plan and fetch queries [first, first + len(topk)) of a batch of `batch`.

        Halves come in order; start() with the whole top-k takes what they gave.
        """
        cache = self.tier.caches[layer]
        last = first + len(topk) == batch
        with self.transfer.on_transfer_stream():
            planned = cache.plan(topk, first, int(first > 0), advance=last, written=written)
            ready = self.transfer.event()  # behind the first half's fetch: that one is in
            cache.fetch(planned)
            self.transfer.record_stream(topk)
        self._halves[layer] = first + len(topk), ready

    def can_halve(self, layer: int, batch: int, width: int) -> bool:
        """Whether a batch can be planned in halves: both must be hot at the same time."""
        return batch > 1 and len(self.tier.caches[layer].passes(batch, width)) == 1

    def start(self, layer: int, topk: torch.Tensor, written=None) -> Planned | None:
        """Plan topk [T, K] int32 slots and fetch its misses, behind what the caller does next.

        written: the reserved slots [T]
        None where the batch takes several passes: then everything waits for attention.
        """
        cache = self.tier.caches[layer]
        if len(cache.passes(*topk.shape)) > 1:
            return None
        whole = self.tier.buffers_for(*topk.shape)
        halves, ready = self._halves.pop(layer, (0, None))
        with self.transfer.on_transfer_stream():
            if halves != len(topk):
                cache.plan(topk, written=written)
                ready = self.transfer.event()
                cache.fetch(whole)
            fetched = self.transfer.event()
            cache.rebuild_order()
            self.transfer.record_stream(topk)
        return Planned(cache, topk, whole, ready, fetched)

    def finish(self, q: torch.Tensor, planned: Planned, mode: Mode) -> torch.Tensor:
        """Attention of q [T, H, 576] over what start() is bringing: out [T, H, 512]."""
        buffers, cache = planned.buffers, planned.cache
        if mode is Mode.OFF:
            self.wait(planned)
            return self._attend(q, cache, buffers.rows)[0]
        wait(planned.ready)
        early = self._attend(q, cache, buffers.hit_rows, buffers.hit_lengths)
        self.wait(planned)
        attend_late = self.attend_late or self.attend
        late = attend_late(q, cache.rows.flatten(1), buffers.late_rows, buffers.late_lengths)
        return self.merge(early, late)[0]

    def wait(self, planned: Planned) -> None:
        """Until every row of the plan is there, fetched or written."""
        wait(planned.fetched)
        wait(self._written)

    def in_passes(self, layer: int, q: torch.Tensor, topk: torch.Tensor) -> torch.Tensor:
        """Attention of a batch that the hot tier cannot hold at once (invariant 5).

        Parts of a query are merged in float32 and rounded once: their number adds no error.
        """
        cache, outs = self.tier.caches[layer], []
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
        with (
            self.transfer.on_transfer_stream()
        ):  # after the attention whose rows this pass may evict
            planned = cache.plan(lookups)  # the fork waited for who read the buffers last
            cache.fetch(planned)
            fetched = self.transfer.event()
            cache.rebuild_order()
            self.transfer.record_stream(lookups)
        wait(fetched)
        return self._attend(q, cache, planned.rows)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """FlashMLA marks a query without rows by +inf, others by -inf."""
    return torch.nan_to_num(lse, neginf=NO_ROWS_LSE, posinf=NO_ROWS_LSE)
