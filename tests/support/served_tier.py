"""A host tier and the hot tiers of its layers, with what every written slot must read as.

CpuServed has HotGroups, CudaServed a DeviceTier (its kernels on the CPU where there is no GPU:
tests/support/cuda_host). Both decode steps the way that serving does, and check each row that
attention would read.
"""

import numpy as np
import torch

from ess_kernels.gather_rows import gather_rows
from ess_kernels.scatter import scatter_rows
from sglang_ess.tiers import HotCache, HotGroups, PlanBuffers
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.hot_cache_cuda import DeviceTier
from tests.support.hot_state import check_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW = (1, 16)


class Served:
    """content [layers, slots, ...]: the row that each slot has in each layer.

    planned: the plan of the last pass that decode made
    """

    device = "cpu"

    def __init__(self, slots, rows, topk, max_queries, seed=0, layers=2):
        self.random = np.random.default_rng(seed)
        self.content = torch.zeros(layers, slots, *ROW, dtype=torch.int32)
        self.host = [torch.zeros(slots, *ROW, dtype=torch.int32) for _ in range(layers)]
        if self.device == "cuda":
            self.host = [rows.pin_memory() for rows in self.host]
        self.planned = None
        self.version = 0
        self.tier = self._new_tier(rows, topk, max_queries)

    def save(self, slots):
        """Write new values of slots to the host tier. Returns them [layers, slots, ...]."""
        self.version += 1
        for layer, host in enumerate(self.host):
            values = slots.int()[:, None, None] * 10_000 + layer * 1000 + self.version
            self.content[layer, slots] = values.expand(-1, *ROW).contiguous()
            host[slots] = self.content[layer, slots]
        return self.content[:, slots].to(self.device)

    def decode(self, layer, topk, written=()):
        """One step of one layer, which writes these slots first. Returns the missed slots."""
        if len(written):
            slots = torch.tensor(written, dtype=torch.int64)
            self._write(layer, slots, self.save(slots), topk.shape[1])
        return self._passes(layer, topk)

    def prompt(self, slots, min_age=0):
        """A prefill pass writes these slots in every layer, and makes them hot where there is room.

        min_age: of the rows that they may take
        """
        raise NotImplementedError

    def check_read(self, layer, lookups, rows):
        """Hot rows [queries, K] of these slots, -1 pads, hold what was written last."""
        real = lookups >= 0
        assert torch.equal(rows >= 0, real)
        got = self.tier.caches[layer].rows[rows[real].long().to(self.device)].cpu()
        assert torch.equal(got, self.content[layer, lookups[real].long()])

    def draw(self, queries, width, universe):
        """A top-k [queries, width] of slots below universe, some of them pads."""
        lists = [self.random.permutation(universe)[:width] for _ in range(queries)]
        topk = torch.from_numpy(np.stack(lists)).int()
        topk[torch.from_numpy(self.random.random(topk.shape) < 0.15)] = -1
        return topk

    def hot(self, layer):
        """The slots that are hot in a layer, ascending."""
        return (self.slot_rows(layer) >= 0).nonzero().flatten().tolist()


class CpuServed(Served):
    def _new_tier(self, rows, topk, max_queries):
        arena, buffers = HotArena(max(0, rows) * len(self.host), self.host[:1]), PlanBuffers()
        return HotGroups([HotCache(one, rows, None, buffers, None, arena) for one in self.host])

    def _write(self, layer, slots, values, width):
        for other in self.tier.caches:
            if other is self.tier.caches[layer]:
                other.install(slots, values[layer])
            else:
                other.invalidate(slots)

    def prompt(self, slots, min_age=0):
        for cache, values in zip(self.tier.caches, self.save(slots), strict=True):
            cache.install(slots, values, min_age)

    def _passes(self, layer, topk):
        cache, start, missed = self.tier.caches[layer], (0, 0), []
        seen = torch.zeros(topk.shape, dtype=torch.int32)
        while start is not None:
            self.planned = plan = cache.plan(topk, start)
            cache.fetch(plan)
            covered = plan.rows >= 0
            lookups = torch.where(covered, topk[plan.queries], -1)
            self.check_read(layer, lookups, plan.rows)
            seen[plan.queries] += covered
            missed += plan.miss_slots.tolist()
            self.check_states()
            start = plan.stop
        assert torch.equal(seen, (topk >= 0).int()), "each lookup must be in one pass"
        return missed

    def check_states(self):
        self.tier.check_integrity()

    def slot_rows(self, layer):
        """[slots] the hot row of each slot, or negative."""
        return torch.from_numpy(self.tier.caches[layer].slot_row)


class CudaServed(Served):
    device = DEVICE

    def _new_tier(self, rows, topk, max_queries):
        return DeviceTier(self.host, rows, topk, max_queries, DEVICE)

    def _write(self, layer, slots, values, width):
        here = slots.to(DEVICE)
        if not self.tier.has_room(len(slots), width):
            return self.tier.invalidate(here)
        self.tier.reserve(here)
        self._refresh(slots, values)
        for other in self.tier.caches:
            if other is not self.tier.caches[layer]:  # whose step does not come
                other.invalidate(here)

    def _refresh(self, slots, values):
        """Fill the hot rows of slots, as pack_write does."""
        for cache, rows in zip(self.tier.caches, values, strict=True):
            scatter_rows(
                rows, gather_rows(slots.int().to(DEVICE), cache.state.slot_row), cache.rows
            )

    def prompt(self, slots, min_age=0):
        values = self.save(slots)
        self.tier.install(slots.to(DEVICE), min_age)
        self._refresh(slots, values)

    def _passes(self, layer, topk):
        cache, missed = self.tier.caches[layer], []
        for part in cache.passes(*topk.shape):
            lookups = topk[part.queries, part.columns]
            self.planned = planned = cache.plan_and_fetch(lookups.contiguous().to(DEVICE))
            self.check_read(layer, lookups, planned.rows.cpu())
            missed += planned.miss_slots[: int(planned.num_misses)].tolist()
            self.check_states()
        return missed

    def check_states(self):
        for cache in self.tier.caches:
            check_state(cache.state)

    def slot_rows(self, layer):
        """[slots] the hot row of each slot, or negative."""
        return self.tier.caches[layer].state.slot_row.cpu()
