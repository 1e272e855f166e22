"""DeviceTiers: index groups of several sizes, each with its rows, state and figures."""

import numpy as np
import pytest
import torch

from ess_kernels import hot_state
from ess_kernels.gather_rows import gather_rows
from ess_kernels.scatter import scatter_rows
from sglang_ess.tiers.contract import RowCorruption
from sglang_ess.tiers.hot_groups_cuda import DeviceTiers
from sglang_ess.tiers.index_groups import IndexGroups
from tests.support.hot_state import check_state
from tests.support.served_tier import DEVICE

SIZES, SLOTS, ROWS, TOPK, QUERIES = (1, 3, 1, 3, 2), 64, 30, 6, 3
ROW = (1, 16)


class Lab:
    """DeviceTiers over host rows that say their layer, slot and version."""

    def __init__(self, rows=ROWS):
        self.random = np.random.default_rng(0)
        self.groups, self.version = IndexGroups(SIZES), 0
        self.host = [torch.zeros(SLOTS, *ROW, dtype=torch.int32) for _ in range(sum(SIZES))]
        if DEVICE == "cuda":
            self.host = [one.pin_memory() for one in self.host]
        self.save(torch.arange(SLOTS))
        self.tier = DeviceTiers(self.groups, self.host, rows, TOPK, QUERIES, DEVICE)

    def save(self, slots, layers=None):
        """New rows of these slots in the host tier. Returns them, by layer."""
        self.version += 1
        for layer in range(sum(SIZES)) if layers is None else layers:
            values = slots.int()[:, None, None] * 10_000 + layer * 100 + self.version
            self.host[layer][slots] = values.expand(-1, *ROW).contiguous()
        return [rows[slots].to(DEVICE) for rows in self.host]

    def draw(self, queries=QUERIES, universe=SLOTS):
        lists = [self.random.permutation(universe)[:TOPK] for _ in range(queries)]
        return torch.from_numpy(np.stack(lists)).int()

    def decode(self, group, topk):
        """One step: every layer of the group must read its own rows. Returns the misses."""
        cache, hosts = self.tier.caches[group], self.host_of(group)
        planned = cache.plan_and_fetch(topk.to(DEVICE))
        for layer, host in enumerate(hosts):
            if layer:
                cache.fetch(planned, layer)
            got = cache.hot_layers[layer][planned.rows.long()].cpu()
            assert torch.equal(got, host[topk.long()]), f"layer {layer} of group {group}"
        return int(planned.num_misses)

    def prompt(self, slots, layers, min_age=0):
        """A pass that makes these slots hot where there is room, and writes these layers."""
        self.tier.install(slots.to(DEVICE), min_age)
        self.write(slots, layers)

    def write(self, slots, layers):
        rows = self.save(slots, layers)
        for layer in layers:
            group, position = self.groups.places[layer]
            cache = self.tier.caches[group]
            targets = gather_rows(slots.int().to(DEVICE), cache.state.slot_row)
            scatter_rows(rows[layer], targets, cache.hot_layers[position])

    def host_of(self, group):
        return [self.host[layer] for layer in self.groups.members(group)]

    def check(self):
        """Each state, and each hot row of each layer against its host row."""
        for group, cache in enumerate(self.tier.caches):
            check_state(cache.state)
            for layer in range(SIZES[group]):
                cache.check_rows(np.arange(cache.num_rows), f"{group}, {layer}", 0, layer)


def test_each_layer_of_a_group_has_its_own_rows():
    lab = Lab()
    for step in range(10):
        group = step % len(SIZES)
        lab.decode(group, lab.draw())
        lab.check()
    for group, cache in enumerate(lab.tier.caches):
        assert cache.num_layers == SIZES[group] and cache.counters["short"] == 0
        assert 18 <= cache.counters["misses"] <= 36


def test_a_layer_that_read_anothers_rows_is_found():
    lab = Lab()
    lab.decode(1, lab.draw())
    cache = lab.tier.caches[1]
    cache.hot_layers[2].copy_(cache.hot_layers[1])
    for layer in (0, 1):
        cache.check_rows(np.arange(ROWS), "sound", 0, layer)
    with pytest.raises(RowCorruption, match="got third, slot"):
        cache.check_rows(np.arange(ROWS), "third", 0, 2)


def test_prompts_become_hot_in_every_layer():
    """A layer that is written alone updates its copies of what is hot, and nothing else."""
    lab = Lab()
    cache, all_layers = lab.tier.caches[3], range(sum(SIZES))
    for slots in (torch.arange(10, 50), torch.arange(30, 60)):
        lab.prompt(slots, all_layers, min_age=1000)
        lab.check()
    assert cache.occupied == ROWS and (cache.state.slot_row[:10] < 0).all()
    lab.write(torch.arange(5, 25), [lab.groups.members(3)[2]])
    lab.check()
    lab.decode(3, torch.arange(18, dtype=torch.int32).view(3, 6) + 30)  # the others grow older
    lab.decode(3, torch.arange(18, dtype=torch.int32).view(3, 6) + 30)
    lab.prompt(torch.arange(5, 15), all_layers)
    lab.check()
    assert (cache.state.slot_row[5:15] >= 0).sum() >= 10


def test_warm_and_invalidate_reach_every_layer():
    lab = Lab()
    topk = lab.draw(5)
    lab.tier.caches[4].warm(topk.to(DEVICE))
    lab.check()
    assert lab.tier.caches[4].counters["misses"] == 0
    assert lab.decode(4, topk[2:]) == 0
    for group in range(len(SIZES)):
        lab.decode(group, topk[:3])
    stale = topk[0].long()
    lab.save(stale)
    lab.tier.invalidate(stale.to(DEVICE))
    lab.check()
    assert [lab.decode(group, topk[:1]) for group in range(len(SIZES))] == [6] * len(SIZES)


def test_figures_are_the_groups_in_the_pools_order():
    lab = Lab()
    tier = lab.tier
    tier.mirror()
    assert tier.is_mirrored() and tier.totals() == (0, 0, 0)
    for group in range(len(SIZES)):
        for _ in range(group):  # 18 lookups each: 0, 18, 36, 54 and 72
            lab.decode(group, torch.arange(18, dtype=torch.int32).view(3, 6) + 18 * (group % 2))
    tier.mirror()
    lab.decode(0, lab.draw())  # after the copy
    figures = tier.figures()
    assert [one["lookups"] for one in figures] == [0, 18, 36, 54, 72]
    assert [one["misses"] for one in figures] == [0, 18, 18, 18, 18]
    assert [one["occupied"] for one in figures] == [0, 18, 18, 18, 18]
    assert [one["layers"] for one in figures] == list(SIZES)
    assert [one["rows"] for one in figures] == [ROWS] * 5
    assert tier.counters()[:, hot_state.LOOKUPS].tolist() == [0, 18, 36, 54, 72]
    assert tier.totals() == (18 * (3 + 1 + 3 + 2), 0, 0)  # rows of all layers
    assert [one["steps"] for one in figures] == [0, 1, 2, 3, 4]


def test_evictions_are_rows_of_all_layers_too():
    lab = Lab(rows=20)
    for first in (0, 18, 36):
        lab.decode(1, torch.arange(18, dtype=torch.int32).view(3, 6) + first)
    lab.tier.mirror()
    figures = lab.tier.figures()[1]
    assert figures["evictions"] == 34 and figures["evicted_age"] >= 34
    assert lab.tier.totals() == (3 * 54, 3 * 34, 3 * figures["evicted_age"])


def test_a_split_goes_to_the_groups_it_is_for():
    lab = Lab()
    wanted = np.array([True, False, False, True, True])
    lab.tier.set_split(wanted)
    got = [bool(cache.state.words[hot_state.SPLIT]) for cache in lab.tier.caches]
    assert got == wanted.tolist()
    lab.tier.set_split(~wanted)
    got = [bool(cache.state.words[hot_state.SPLIT]) for cache in lab.tier.caches]
    assert got == (~wanted).tolist()


def test_tiers_share_one_scratch():
    lab = Lab()
    parts = [tier for _, tier in lab.tier.parts]
    assert [same for same, _ in lab.tier.parts] == [[0, 2], [1, 3], [4]]
    assert all(tier.scratch is lab.tier.scratch for tier in parts)
    assert lab.tier.nbytes == lab.tier.scratch.nbytes + sum(tier.nbytes for tier in parts)
    assert len(lab.tier.rows) == sum(SIZES)
    assert lab.tier.has_room(QUERIES, TOPK) and not lab.tier.has_room(QUERIES + 1, TOPK)
    assert not Lab(rows=QUERIES * (TOPK + 1) - 1).tier.has_room(QUERIES, TOPK)
