"""Decode attention over two tiers, with the fetch of missed rows behind other work.

    off   plan and fetch in one launch; attend to everything
    DA    plan; fetch on the transfer stream | attend to the hits; attend to the misses; merge
    DBA   DA with the batch planned in halves: the first half's fetch runs behind the second
          half of the indexer (ESS section 3.3, figure 6)

Plans and fetches run on one stream, the transfer stream, in order, behind what the main stream does
between top-k and attention. The main stream reserves hot rows for the step's new rows, once a step,
and writes each layer's new rows to both tiers (pack_write): no plan evicts a reserved row or
fetches it, so neither waits for the other. The main stream waits for events only. All of it can be
captured in a CUDA graph: the transfer stream forks from and joins the main one inside a step, and
no shape depends on data. In a steady step without overlap a layer takes two launches, plan_fetch
and pack_write, a fork and a wait.

Layers that read one top-k, an index group, share a plan. Its first layer makes it and goes by one
of the modes above. The rows of the others are known then: the transfer stream fetches them in the
layers' order, behind the layers before. A layer waits for its own rows and for none that come
later.

Where ranks share a host tier, one of them writes it: mem_cache/pool_cuda.py says in which order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ess_kernels import hot_state
from ess_kernels.pack_write import pack_write, packable
from ess_kernels.plan_fetch import PlanBuffers
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
    reserved the step's new slots have hot rows; else no plan may start before they are saved
    lists    queries of each request
    position: of the layer in the group whose turn it is
    topk     [T, K] int32 slots, -1 pads; None before start()
    buffers  the plan of the whole batch, valid until the next group's plan; None where the batch
             takes several passes
    halves   the plans of plan_half()
    planned  queries that plan_half() has planned
    passes   copies of the plans of several passes, for the group's other layers
    ready    the plan's lists are there; fetched: its rows, by layer
    """

    group: int
    cache: DeviceHotCache
    reserved: bool = True
    lists: int = 1
    position: int = 0
    topk: torch.Tensor | None = None
    buffers: PlanBuffers | None = None
    halves: list[PlanBuffers] = field(default_factory=list)
    planned: int = 0
    passes: list[PlanBuffers] = field(default_factory=list)
    ready: torch.cuda.Event | None = None
    fetched: list[torch.cuda.Event | None] = field(default_factory=list)

    @property
    def rows(self) -> torch.Tensor:
        """The hot rows of the layer whose turn it is."""
        return self.cache.hot_layers[self.position]

    def passes_of(self, topk: torch.Tensor) -> list[Pass]:
        """The passes that topk [T, K] takes."""
        queries, width = topk.shape
        return self.cache.passes(queries, width, self.lists)

    @property
    def is_last(self) -> bool:
        """Whether the group ends with this layer."""
        return self.position == self.cache.num_layers - 1


@dataclass
class TwoTierDecode:
    """Decode attention of all layers. Its state is in the LayerStep that each call is given.

    A step begins with reserve(). The first layer of an index group begins with layer(), each other
    one with follow(); then come write() and finish() or in_passes().

    tier, transfer: the pool's; merge_state: SGLang's
    attend, attend_late: the attention kernel, and the one for rows that come late. Those are few
    of many columns, so it should stop at a list's length (mla_kernels' stops_early)
    is_writer, meet: the pool's where ranks share its host tier; meet is None where they do not
    """

    tier: DeviceTier | DeviceTiers
    transfer: TransferStream
    attend: Attend
    merge_state: Merge
    attend_late: Attend | None = None
    is_writer: bool = True
    meet: Callable[[], None] | None = None

    def reserve(self, slots: torch.Tensor, width: int, first_slot: int = 0) -> bool:
        """Make the slots [T] that a step writes hot in every layer, before their rows are there.

        width: top-k's; first_slot: lower slots are a batch's padding
        Returns whether they got rows: then start() may come before write(). Otherwise they are
        not hot any more, and their rows are fetched like others once write() has saved them.
        Call it on the main stream, after what the transfer stream has done.
        """
        if fits := self.tier.has_room(len(slots), width):
            self.tier.reserve(slots, first_slot)
        else:
            self.tier.invalidate(slots)
        return fits

    def layer(self, group: int, reserved: bool = True, lists: int = 1) -> LayerStep:
        """Begin a group's step in its first layer.

        reserved: what reserve() said; lists: queries of each request
        """
        return LayerStep(group, self.tier.caches[group], reserved, lists)

    def follow(self, step: LayerStep, position: int) -> None:
        """Go on with another layer of the group."""
        step.position = position

    def write(
        self,
        step: LayerStep,
        latents: torch.Tensor,
        rope_keys: torch.Tensor,
        slots: torch.Tensor,
        first_slot: int = 0,
    ) -> None:
        """Pack a layer's new rows and store them in the host tier and, if reserved, in hot rows.

        Without a reservation the map is that of the group's last pass, not of the one to come.

        latents [T, 1, 512], rope_keys [T, 1, r], slots [T]; first_slot: lower slots are padding
        Nobody waits for the host tier: who fetches these rows does so in a later launch. Ranks that
        share it meet here, if the step's own plans may fetch them. Otherwise they do in the layer's
        reduction, and one fence covers all layers of a step.
        """
        cache, position = step.cache, step.position
        ready = cache.state.times[position, hot_state.MAIN_READY :][:1]
        pack_write(
            *packable(latents, rope_keys, step.rows), slots, cache.state.slot_row, step.rows,
            cache.host_layers[position], first_slot=first_slot, keeps_cold=not step.reserved,
            hot_only=not self.is_writer, publishes=self._publishes(step), main_ready=ready,
        )  # fmt: skip
        if self.meet is not None and not step.reserved:
            self.meet()

    def _publishes(self, step: LayerStep) -> bool:
        """Whether other ranks may fetch the rows of the layer, or of the step, after this write."""
        if self.meet is None or not self.is_writer:
            return False
        return not step.reserved or (step.cache is self.tier.caches[-1] and step.is_last)

    def plan_half(self, step: LayerStep, topk: torch.Tensor, first: int, batch: int) -> None:
        """DBA: plan and fetch topk [n, K], the queries from `first` on of a batch of `batch`.

        Halves come in order. start() with the whole top-k goes on from there.
        """
        cache, last = step.cache, first + len(topk)
        with self.transfer.on_transfer_stream():
            half = cache.plan(topk, first, int(first > 0), advance=last == batch, lists=True)
            step.ready = self.transfer.event()  # after the first half's fetch: its rows are there
            cache.fetch(half)
            self.transfer.record_stream(topk)
        step.halves.append(half)
        step.planned = last

    def can_halve(self, group: int, batch: int, width: int, lists: int = 1) -> bool:
        """Whether a batch can be planned in halves: both must be hot at the same time.

        lists: queries of each request, all of which are in one half
        """
        return batch > lists and len(self.tier.caches[group].passes(batch, width)) == 1

    def start(self, step: LayerStep, topk: torch.Tensor, mode: Mode) -> bool:
        """Plan topk [T, K] int32 slots and fetch its misses, behind what the caller does next.

        Returns False, having done nothing, where the batch takes several passes: use in_passes.
        """
        cache = step.cache
        if len(step.passes_of(topk)) > 1:
            return False
        step.topk, halved = topk, step.planned == len(topk)
        with self.transfer.on_transfer_stream():
            if halved:
                step.buffers = self.tier.buffers_for(*topk.shape)
            elif mode is Mode.OFF:
                step.halves.clear()
                step.buffers = cache.plan_and_fetch(topk)
            else:
                step.halves.clear()
                step.buffers = cache.plan(topk, lists=True)
                step.ready = self.transfer.event()
                cache.fetch(step.buffers)
            step.fetched = [self.transfer.event()]
            if step.reserved:  # no row is fetched that is still to be saved
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
        passes = step.passes_of(topk)
        for index, part in enumerate(passes):
            out, lse = self._one_pass(step, q[part.queries], topk, (index, len(passes)), part)
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

    def _one_pass(self, step: LayerStep, q, topk, number: tuple[int, int], part: Pass):
        """Attention of one pass. The group's first layer plans it; the others repeat its fetches.

        number: (i, n), pass i of the step's n
        Each layer's hot rows take the same steps, in its own turn.
        """
        cache, position = step.cache, step.position
        lookups = None if position else topk[part.queries, part.columns].contiguous()
        # The transfer stream starts after the attention whose rows this pass may evict, and which
        # reads the plan buffers.
        with self.transfer.on_transfer_stream():
            if lookups is None:
                planned = step.passes[number[0]]
                cache.fetch(planned, position)
                used = planned.miss_slots, planned.miss_rows, planned.num_misses
                self.transfer.record_stream(*used)
            else:
                planned = cache.plan_and_fetch(lookups, step_pass=number)
                self.transfer.record_stream(lookups)
            fetched = self.transfer.event()
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
