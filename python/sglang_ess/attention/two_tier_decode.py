"""Decode attention over two tiers, with the fetch of missed rows behind other work.

    off   plan, fetch; attend to everything
    DA    plan; fetch on the transfer stream | attend to the hits; attend to the misses; merge
    DBA   DA with the batch planned in halves: the first half's fetch runs behind the second
          half of the indexer (ESS section 3.3, figure 6)

Everything that touches the tiers runs on one stream, the transfer stream, in order: saves to the
host tier, installs, plans, fetches, rebuilds of the order. So a row is never fetched before it is
saved, and the main stream only waits for events. The one exception are the hot rows that a step
reserves for its new rows: nothing else touches them in this step, so the main stream fills them
itself and waits for no fetch. All of it can be captured in a CUDA graph: the transfer stream forks
from and joins the main one inside a step, and no shape depends on data.

Layers that read one top-k, an index group, share a plan. Its first layer makes it and goes by one
of the modes above. The rows of the others are known then: the transfer stream fetches them in the
layers' order, behind the layers before. A layer waits for its own rows and for none that come
later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ess_kernels.plan import PlanBuffers
from ess_kernels.scatter import scatter_rows
from sglang_ess.attention.overlap import Mode
from sglang_ess.tiers.batch_passes import Pass
from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache, DeviceTier
from sglang_ess.tiers.hot_groups_cuda import DeviceTiers
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
    """One index group in a decode step, from its top-k until attention of its last layer is done.

    group, cache: the index group and its hot tier
    position: of the layer in the group whose turn it is
    slots    [T] int64: slots that the step writes, one a query; None where it writes none
    targets  [T] int32: hot rows reserved for slots; None before reserve(), and without room
    topk     [T, K] int32 slots, -1 pads; None before start()
    buffers  the plan of the whole batch, valid until the next group's plan; None where the batch
             takes several passes
    halves   the plans of plan_half()
    planned  queries that plan_half() has planned
    passes   copies of the plans of several passes, for the group's other layers
    reserved the targets are there; ready: the plan's lists; fetched: its rows, by layer
    """

    group: int
    cache: DeviceHotCache
    position: int = 0
    slots: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    topk: torch.Tensor | None = None
    buffers: PlanBuffers | None = None
    halves: list[PlanBuffers] = field(default_factory=list)
    planned: int = 0
    passes: list[PlanBuffers] = field(default_factory=list)
    reserved: torch.cuda.Event | None = None
    ready: torch.cuda.Event | None = None
    fetched: list[torch.cuda.Event | None] = field(default_factory=list)

    @property
    def rows(self) -> torch.Tensor:
        """The hot rows of the layer whose turn it is."""
        return self.cache.hot_layers[self.position]

    @property
    def is_last(self) -> bool:
        """Whether the group ends with this layer."""
        return self.position == self.cache.num_layers - 1


@dataclass
class TwoTierDecode:
    """Decode attention of all layers. Its state is in the LayerStep that each call is given.

    The first layer of an index group begins with layer(). Each other one begins with follow(), then
    calls write() and finish() or in_passes().

    tier, transfer: the pool's; merge_state: SGLang's
    attend, attend_late: the attention kernel, and the one for rows that come late. Those are few
    of many columns, so it should stop at a list's length (mla_kernels' stops_early)
    """

    tier: DeviceTier | DeviceTiers
    transfer: TransferStream
    attend: Attend
    merge_state: Merge
    attend_late: Attend | None = None

    def layer(self, group: int, slots: torch.Tensor | None = None) -> LayerStep:
        """Begin a group's step in its first layer. slots: see LayerStep."""
        return LayerStep(group, self.tier.caches[group], slots=slots)

    def follow(self, step: LayerStep, position: int) -> None:
        """Go on with another layer of the group."""
        step.position, step.reserved = position, None  # the main stream has waited for it

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
                step.reserved = self.transfer.event()
            else:
                cache.invalidate(slots)
            self.transfer.record_stream(slots)
        return fits

    def write(self, step: LayerStep, rows: torch.Tensor) -> None:
        """Save the packed rows [T, ...] of the step's slots, and fill their reserved hot rows."""
        slots, host_rows = step.slots, step.cache.host_layers[step.position]
        assert slots is not None
        with self.transfer.on_transfer_stream():
            scatter_rows(rows, slots, host_rows)
            self.transfer.record_stream(slots, rows)
        if step.targets is not None:
            # On the main stream: the transfer stream may be busy with the rows of later layers.
            wait(step.reserved)
            scatter_rows(rows, step.targets, step.rows)

    def plan_half(self, step: LayerStep, topk: torch.Tensor, first: int, batch: int) -> None:
        """DBA: plan and fetch topk [n, K], the queries from `first` on of a batch of `batch`.

        Halves come in order. start() with the whole top-k goes on from there.
        """
        cache, last = step.cache, first + len(topk)
        with self.transfer.on_transfer_stream():
            half = cache.plan(topk, first, int(first > 0), advance=last == batch)
            step.ready = self.transfer.event()  # after the first half's fetch: its rows are there
            cache.fetch(half)
            self.transfer.record_stream(topk)
        step.halves.append(half)
        step.planned = last

    def can_halve(self, group: int, batch: int, width: int) -> bool:
        """Whether a batch can be planned in halves: both must be hot at the same time."""
        return batch > 1 and len(self.tier.caches[group].passes(batch, width)) == 1

    def start(self, step: LayerStep, topk: torch.Tensor) -> bool:
        """Plan topk [T, K] int32 slots and fetch its misses, behind what the caller does next.

        Returns False, having done nothing, where the batch takes several passes: use in_passes.
        """
        cache, slots = step.cache, step.slots
        if len(cache.passes(*topk.shape)) > 1:
            return False
        step.topk, step.buffers = topk, cache.buffers_for(*topk.shape)
        with self.transfer.on_transfer_stream():
            if step.planned != len(topk):
                step.halves.clear()
                cache.plan(topk)
                step.ready = self.transfer.event()
                cache.fetch(step.buffers)
            step.fetched = [self.transfer.event()]
            cache.rebuild_order()
            if slots is None or step.targets is not None:
                # The new slots have reserved rows: no row is fetched that is still to be saved.
                for layer in range(1, cache.num_layers):
                    self._fetch_layer(step, layer)
            self.transfer.record_stream(topk)
        return True

    def _fetch_layer(self, step: LayerStep, layer: int) -> None:
        """Fetch the rows of the group's next layer. Call it on the transfer stream."""
        assert step.buffers is not None
        for plan in step.halves or [step.buffers]:
            step.cache.fetch(plan, layer)
        step.fetched.append(self.transfer.event())

    def finish(self, q: torch.Tensor, step: LayerStep, mode: Mode) -> torch.Tensor:
        """Attention of q [T, H, 576] over the rows that start() fetches: out [T, H, 512]."""
        buffers = step.buffers
        assert buffers is not None, "start() has planned the batch"
        if mode is Mode.OFF or step.position:
            self.wait(step)
            return self._attend(q, step.rows, buffers.rows)[0]
        wait(step.ready)
        early = self._attend(q, step.rows, buffers.hit_rows, buffers.hit_lengths)
        self.wait(step)
        attend_late = self.attend_late or self.attend
        late = attend_late(q, step.rows.flatten(1), buffers.late_rows, buffers.late_lengths)
        return self.merge(early, late)[0]

    def wait(self, step: LayerStep) -> None:
        """Have the main stream wait until every row of the plan is there in the step's layer."""
        if step.position == len(step.fetched):  # the new rows had to be saved first
            with self.transfer.on_transfer_stream():
                self._fetch_layer(step, step.position)
        wait(step.fetched[step.position])

    def in_passes(self, step: LayerStep, q: torch.Tensor, topk: torch.Tensor) -> torch.Tensor:
        """Attention of a batch that the hot tier cannot hold at once: out [T, H, 512].

        Parts of a query are merged in float32 and rounded once: their number adds no error.
        """
        outs: list[torch.Tensor] = []
        parts: tuple[torch.Tensor, torch.Tensor] | None = None
        for index, part in enumerate(step.cache.passes(*topk.shape)):
            out, lse = self._one_pass(step, q[part.queries], topk, index, part)
            if part.columns != slice(0, topk.shape[1]):
                wide = out.float(), lse
                parts = wide if part.columns.start == 0 else self.merge(parts, wide)
                if part.columns.stop < topk.shape[1]:
                    continue
                out = parts[0].to(out.dtype)
            outs.append(out)
        return torch.cat(outs)

    def _attend(self, q, rows: torch.Tensor, indices, lengths=None):
        if lengths is None:  # pads are -1
            lengths = indices.new_full((len(indices),), indices.shape[1])
        return self.attend(q, rows.flatten(1), indices, lengths)

    def merge(self, a, b) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of attention over two disjoint sets of rows, either of which may be empty."""
        (out_a, lse_a), (out_b, lse_b) = a, b
        return self.merge_state(out_a, _finite(lse_a), out_b, _finite(lse_b))

    def _one_pass(self, step: LayerStep, q, topk, index: int, part: Pass):
        """Attention of one pass. The group's first layer plans it; the others repeat its fetches.

        Each layer's hot rows take the same steps, in its own turn.
        """
        cache, position = step.cache, step.position
        lookups = None if position else topk[part.queries, part.columns].contiguous()
        # The transfer stream starts after the attention whose rows this pass may evict, and which
        # reads the plan buffers.
        with self.transfer.on_transfer_stream():
            planned = step.passes[index] if lookups is None else cache.plan(lookups)
            cache.fetch(planned, position)
            fetched = self.transfer.event()
            if lookups is None:
                for used in (planned.miss_slots, planned.miss_rows, planned.num_misses):
                    self.transfer.record_stream(used)
            else:
                cache.rebuild_order()
                self.transfer.record_stream(lookups)
        wait(fetched)
        if position == 0 and cache.num_layers > 1:
            step.passes.append(_copy_of(planned))
        return self._attend(q, step.rows, planned.rows)


def _copy_of(plan: PlanBuffers) -> PlanBuffers:
    """A copy of what fetch and attention read of a plan, which later passes overwrite."""
    names = ("rows", "miss_slots", "miss_rows", "num_misses")
    return replace(plan, **{name: getattr(plan, name).clone() for name in names})


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """lse with finite marks of "no rows": FlashMLA marks them by +inf, other kernels by -inf."""
    return torch.nan_to_num(lse, neginf=NO_ROWS_LSE, posinf=NO_ROWS_LSE)
