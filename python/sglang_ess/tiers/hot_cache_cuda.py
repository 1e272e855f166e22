"""The hot tier on a CUDA device: rows and state of index groups, and a DeviceHotCache for each.

Shapes are static, counts stay on the device, and a batch that one plan cannot hold is cut into
passes beforehand, so that decode never waits for the device and can be captured. Without a GPU the
tests run the same kernels on CPU tensors: CUDA sources compiled for the host, Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ess_kernels import hot_state, plan_fetch
from ess_kernels.hot_state import HotState
from ess_kernels.invalidate import invalidate
from ess_kernels.plan_fetch import PlanBuffers
from sglang_ess.layout import PAGE_SLOTS
from sglang_ess.tiers.batch_passes import Pass, passes
from sglang_ess.tiers.contract import Device, HotTier, HotTiers, RowCorruption


def whole_pages(num_rows: int) -> int:
    """num_rows rounded up to whole pages of rows."""
    return -(-num_rows // PAGE_SLOTS) * PAGE_SLOTS


@dataclass(frozen=True)
class TierScratch:
    """Memory that index groups use one after another.

    plan        of a batch; both halves of a two-batch overlap are live at once
    num_misses  [HALVES] int32
    """

    HALVES = 2

    plan: PlanBuffers
    num_misses: torch.Tensor

    @classmethod
    def new(cls, topk: int, max_queries: int, device: Device) -> TierScratch:
        """topk, max_queries: of the largest plan."""
        return cls(
            PlanBuffers.new(max_queries, topk, device),
            torch.zeros(cls.HALVES, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.plan.nbytes + self.num_misses.nbytes


class DeviceTier:
    """Hot rows and state of index groups that have as many layers each. Implements HotTiers.

    host_rows  per group: [slots, ...] of each of its layers, or of its only one. The host tier,
               pinned where the device is a GPU
    num_rows   hot rows of each group
    topk, max_queries: width and queries of the largest plan
    scratch    shared with other tiers; None: its own
    rows       per layer [num_rows rounded up to a page, ...] on the device
    caches     by group
    Effect: compiles the kernels of a plan if nobody has on this machine, so that no capture does.
    Raises: ValueError for a num_rows outside [1, slots] or a topk wider than a plan.
    """

    def __init__(
        self,
        host_rows: Sequence[torch.Tensor | Sequence[torch.Tensor]],
        num_rows: int,
        topk: int,
        max_queries: int,
        device: Device,
        scratch: TierScratch | None = None,
    ):
        if topk > (widest := plan_fetch.max_width()):
            raise ValueError(f"topk must be at most {widest}, the widest plan: got {topk}.")
        members = [(one,) if isinstance(one, torch.Tensor) else tuple(one) for one in host_rows]
        first, groups = members[0][0], len(members)
        self.num_layers = len(members[0])
        self.num_rows, self.num_slots, self.topk = num_rows, len(first), topk
        self.max_queries = max_queries
        self.state = HotState.new(groups, self.num_slots, num_rows, device, self.num_layers)
        shape = whole_pages(num_rows), *first.shape[1:]
        hot_rows = [
            [torch.zeros(shape, dtype=first.dtype, device=device) for _ in layers]
            for layers in members
        ]
        self.rows = [rows for layers in hot_rows for rows in layers]
        self._own_scratch = scratch is None
        self.scratch = scratch or TierScratch.new(topk, max_queries, device)
        pairs = zip(members, hot_rows, strict=True)
        self.caches = [DeviceHotCache(self, i, *pair) for i, pair in enumerate(pairs)]
        self._pinned = torch.device(device).type == "cuda"
        self._split = np.ones(groups, bool)  # what the groups' words[SPLIT] say
        self._mirror: tuple[torch.Tensor, ...] | None = None
        self._copied: torch.cuda.Event | None = None

    def buffers_for(self, queries: int, width: int, first: int = 0, half: int = 0) -> PlanBuffers:
        """Buffers for a plan [queries, width] that starts at query `first` of the batch."""
        start, stop = first * self.topk, first * self.topk + queries * width
        b, rows = self.scratch.plan, slice(first, first + queries)

        def grid(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.view(-1)[start:stop].view(queries, width)

        return PlanBuffers(
            rows=grid(b.rows),
            hit_rows=grid(b.hit_rows),
            hit_lengths=b.hit_lengths[rows],
            late_rows=grid(b.late_rows),
            late_lengths=b.late_lengths[rows],
            miss_slots=b.miss_slots[start:stop],
            miss_rows=b.miss_rows[start:stop],
            num_misses=self.scratch.num_misses[half : half + 1],
        )

    # --- a pass's new rows ----------------------------------------------------------------

    def has_room(self, num_queries: int, width: int) -> bool:
        """Return whether a decode step may reserve a row per query, and one plan still fits.

        num_queries: of which each writes a row; a request may have several

        If not, the caller invalidates the written slots, and plans fetch them like others: a later
        pass might evict a reserved row before another layer of the group has filled its own.
        """
        if len(self.passes(num_queries, width)) > 1:
            return False
        return (width + 1) * num_queries <= self.num_rows or self.num_rows >= self.num_slots

    def passes(self, num_queries: int, width: int, lists: int = 1) -> list[Pass]:
        """The passes of a decode step. lists: queries of each request."""
        limits = self.num_rows, self.max_queries, lists, self.num_slots
        return passes(num_queries, width, *limits)

    def reserve(self, slots: torch.Tensor, first_slot: int = 0) -> None:
        """Give the slots [n] that a decode step writes hot rows in every layer.

        The step's plans do not evict them. The rows are filled by whoever writes the slots
        (ess_kernels.pack_write), before attention reads them. first_slot: lower ones are padding
        """
        plan_fetch.install(self.state, slots, first_slot, reserve=True)

    def install(self, slots: torch.Tensor, min_age: int = 0, first_slot: int = 0) -> None:
        """Give the slots [n] that a prefill pass writes hot rows where there is room.

        A slot takes a free row, or one that no step has used for min_age steps. As reserve, but
        the next plan, or a warm-up of the same pass, may evict the rows.
        """
        plan_fetch.install(self.state, slots, first_slot, min_age)

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64 in every layer."""
        invalidate(self.state, slots)

    def set_split(self, split: np.ndarray) -> None:
        """Set whether each group lists hits and misses apart, from its next plan on.

        split: [groups] bool
        """
        if np.array_equal(split, self._split):
            return
        self._split = split.copy()
        host = torch.from_numpy(split.astype(np.int32))
        if self._pinned:
            host = host.pin_memory()
        self.state.words[:, hot_state.SPLIT].copy_(host, non_blocking=True)

    # --- figures --------------------------------------------------------------------------

    def is_mirrored(self) -> bool:
        """Return whether the copy of the last mirror() is complete."""
        return self._mirror is not None and (self._copied is None or self._copied.query())

    def mirror(self) -> None:
        """Start a copy of counters and words to the host, unless one is under way."""
        if self._copied is not None and not self._copied.query():
            return
        figures = self.state.counters, self.state.words
        if self._mirror is None:
            self._mirror = tuple(
                torch.empty(t.shape, dtype=t.dtype, pin_memory=self._pinned) for t in figures
            )
        for host, device in zip(self._mirror, figures, strict=True):
            host.copy_(device, non_blocking=True)
        if self._pinned:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the last mirror(). Returns counters [groups, NUM_COUNTERS] int64 and words
        [groups, NUM_WORDS] int32.
        """
        if self._mirror is None:
            self.mirror()
        assert self._mirror is not None
        if self._copied is not None:
            self._copied.synchronize()
        counters, words = self._mirror
        return counters.numpy().copy(), words.numpy().copy()

    def totals(self) -> tuple[int, int, int] | None:
        """misses, evictions and evicted_age in rows of all layers, as of the last mirror().

        None while the copy is under way; nobody waits for it.
        """
        if self._mirror is None or not self.is_mirrored():
            return None
        counters = self._mirror[0].numpy().sum(axis=0)
        misses, evictions, evicted_age = (
            int(counters[figure]) * self.num_layers
            for figure in (hot_state.MISSES, hot_state.EVICTIONS, hot_state.EVICTED_AGE)
        )
        return misses, evictions, evicted_age

    def figures(self) -> list[dict[str, int]]:
        """For each group, as of the last mirror(): counters, "occupied", "rows" and "layers"."""
        counters, words = self.read()
        return [
            {
                **dict(zip(hot_state.COUNTERS, group.tolist(), strict=True)),
                "occupied": int(word[hot_state.OCCUPIED]),
                "rows": self.num_rows,
                "layers": self.num_layers,
            }
            for group, word in zip(counters, words, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Device bytes of all groups, and the scratch unless it is shared."""
        scratch = self.scratch.nbytes if self._own_scratch else 0
        return sum(rows.nbytes for rows in self.rows) + self.state.nbytes + scratch


class DeviceHotCache:
    """One index group of a DeviceTier. Implements contract.HotTier.

    host_layers, hot_layers: rows of each of its layers; host_rows, rows: of the first

    The caller orders a step on one stream, or by events: the tier's reserve or invalidate, then for
    each pass a plan and its fetches, then attention.
    """

    def __init__(
        self,
        tier: DeviceTier,
        index: int,
        host_layers: Sequence[torch.Tensor],
        hot_layers: Sequence[torch.Tensor],
    ):
        self._tier = tier
        self.host_layers, self.hot_layers = tuple(host_layers), tuple(hot_layers)
        self.host_rows, self.rows = host_layers[0], hot_layers[0]
        self.state, self.num_slots = tier.state.group(index), tier.num_slots
        self.num_layers, self.num_rows = len(self.host_layers), tier.num_rows

    def passes(self, num_queries: int, width: int, lists: int = 1) -> list[Pass]:
        """The passes of a decode step. lists: queries of each request."""
        return self._tier.passes(num_queries, width, lists)

    def plan(
        self,
        topk: torch.Tensor,
        first: int = 0,
        half: int = 0,
        advance: bool = True,
        lists: bool = False,
    ) -> PlanBuffers:
        """Give the slots of topk [queries, K] int32, -1 pads, hot rows; fetch copies what misses.

        first: the batch's query at which topk begins; half: 0 or 1; see TierScratch
        advance, lists: plan_fetch.plan_fetch
        Returns buffers that are valid until the next plan of any group.
        """
        queries, width = topk.shape
        buffers = self._tier.buffers_for(queries, width, first, half)
        plan_fetch.plan_fetch(self.state, topk.contiguous(), buffers, advance=advance, lists=lists)
        return buffers

    def plan_and_fetch(
        self, topk: torch.Tensor, warm: bool = False, step_pass: tuple[int, int] = (0, 1)
    ) -> PlanBuffers:
        """plan() and fetch() of the group's first layer, in one launch.

        warm: of lookups that no step makes; step_pass: (i, n), plan i of a step's n. See
        plan_fetch.PlanOptions
        """
        buffers = self._tier.buffers_for(*topk.shape)
        plan_fetch.plan_fetch(
            self.state,
            topk.contiguous(),
            buffers,
            self.host_rows,
            self.rows,
            advance=not warm,
            warm=warm,
            step_pass=step_pass,
        )
        return buffers

    def fetch(self, planned: PlanBuffers, layer: int = 0, is_step: bool = True) -> None:
        """Copy the plan's missed rows of one layer from the host tier.

        is_step: a decode step waits for it, so its end counts in "stall_ns"
        """
        host, hot = self.host_layers[layer], self.hot_layers[layer]
        plan_fetch.fetch(
            host, hot, planned.miss_slots, planned.miss_rows, planned.num_misses,
            self.state.times if is_step else None, layer,
        )  # fmt: skip

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64."""
        invalidate(self.state, slots)

    def warm(self, topk: torch.Tensor) -> None:
        """Make the slots of topk [queries, K] int32 hot where there is room.

        The last queries come first, so theirs are hot if not all can be.
        """
        for part in reversed(self.passes(*topk.shape)):
            planned = self.plan_and_fetch(topk[part.queries, part.columns], warm=True)
            for layer in range(1, self.num_layers):
                self.fetch(planned, layer, is_step=False)

    # --- figures and checks; they wait for the device ---------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """contract.COUNTERS and the others of hot_state.COUNTERS."""
        return dict(zip(hot_state.COUNTERS, self.state.counters.tolist(), strict=True))

    @property
    def steps(self) -> int:
        return int(self.state.counters[hot_state.STEPS])

    @property
    def occupied(self) -> int:
        return int(self.state.words[hot_state.OCCUPIED])

    def check_rows(self, picks: np.ndarray, name: str, first_slot: int = 0, layer: int = 0) -> None:
        """Compare a sample of one layer's hot rows with their host rows.

        picks [n] int: rows of the group, each taken modulo num_rows; free rows pass
        name: of the layer, for the message; first_slot: lower slots take padding's writes and pass
        Raises: RowCorruption with the slot and both checksums.
        """
        rows = torch.from_numpy(np.unique(np.asarray(picks) % self.num_rows))
        slots = self.state.row_slot.cpu()[rows].long()
        rows, slots = rows[slots >= first_slot], slots[slots >= first_slot]
        hot_rows, host_rows = self.hot_layers[layer], self.host_layers[layer]
        hot = hot_rows[rows.to(hot_rows.device)].cpu().flatten(1).view(torch.uint8)
        host = host_rows[slots].flatten(1).view(torch.uint8)
        differ = (hot != host).any(1).nonzero().flatten()
        if not len(differ):
            return
        i = int(differ[0])
        raise RowCorruption.of(name, int(slots[i]), int(rows[i]), hot[i].numpy(), host[i].numpy())


if TYPE_CHECKING:

    def _is_hot_tier(cache: DeviceHotCache) -> HotTier[PlanBuffers]:
        return cache

    def _is_hot_tiers(tier: DeviceTier) -> HotTiers:
        return tier
