"""A HotCache of several layers: each layer reads its own rows, by one plan for all of them."""

import numpy as np
import pytest
import torch

from sglang_ess.tiers import HotCache, HotGroups
from sglang_ess.tiers.contract import RowCorruption
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.index_groups import IndexGroups

SLOTS, WORDS = 48, 4


class Group:
    """A group of layers in decode. alone: the same operations on a cache of one layer, no rows.

    content [layers, slots, WORDS]: what each layer wrote last
    """

    def __init__(self, layers, rows, seed=0):
        self.random = np.random.default_rng(seed)
        self.content = torch.zeros(layers, SLOTS, WORDS, dtype=torch.int64)
        self.host = [rows.clone() for rows in self.content]
        self.cache = HotCache(self.host, rows)
        self.alone = HotCache(None, rows, SLOTS)
        self.version = 0

    def save(self, layer, slots) -> torch.Tensor:
        """Write new values of slots to the host rows of one layer."""
        self.version += 1
        values = slots[:, None] * 1_000_000 + layer * 10_000 + self.version
        self.host[layer][slots] = self.content[layer, slots] = values.expand(-1, WORDS)
        return self.content[layer, slots]

    def step(self, written, topk) -> int:
        """One decode step of every layer, in turn. Returns its passes."""
        slots, plans, start = torch.tensor(written), [], (0, 0)
        self.alone.install(slots, torch.zeros(len(slots), 1))
        self.cache.install(slots, self.save(0, slots))
        while start is not None:
            plan = self.cache.plan(topk, start)
            plans.append(plan.kept())
            self._read(0, plan, topk)
            other = self.alone.plan(topk, start)
            assert plan.miss_slots.tolist() == other.miss_slots.tolist() and plan.stop == other.stop
            start = plan.stop
        for layer in range(1, len(self.host)):
            self.cache.refill(layer, self.save(layer, slots))
            for plan in plans:
                self._read(layer, plan, topk)
        return len(plans)

    def _read(self, layer, plan, topk) -> None:
        self.cache.fetch(plan, layer)
        rows, slots = plan.rows.long(), topk[plan.queries].long()
        read = rows >= 0
        got = self.cache.arena.layers[layer][rows[read]]
        assert torch.equal(got, self.content[layer, slots[read]]), f"layer {layer}"

    def draw(self, queries, width) -> torch.Tensor:
        lists = [self.random.permutation(SLOTS)[:width] for _ in range(queries)]
        topk = torch.from_numpy(np.stack(lists)).int()
        topk[torch.from_numpy(self.random.random(topk.shape) < 0.1)] = -1
        return topk

    def any_operation(self) -> int:
        """One of what serving does, on both caches. Returns the passes of a step, or 0."""
        kind, slots = self.random.random(), self.random.permutation(SLOTS)[:3]
        if kind < 0.6:
            return self.step(slots.tolist(), self.draw(3, int(self.random.integers(1, 9))))
        if kind < 0.75:  # a prompt, whose slots become hot when all layers have written
            places = torch.from_numpy(slots)
            self.cache.invalidate(places)
            self.alone.invalidate(places)
            rows = [self.save(layer, places) for layer in range(len(self.host))]
            assert self.cache.install(places, rows, 5) == self.alone.install(places, rows[0], 5)
        elif kind < 0.9:
            topk = self.draw(4, 6)
            assert self.cache.warm(topk) == self.alone.warm(topk)
        else:
            self.cache.invalidate(torch.from_numpy(slots))
            self.alone.invalidate(torch.from_numpy(slots))
        self.cache.check_integrity()
        return 0


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("rows", [SLOTS, 24, 10, 4])
def test_any_order_of_operations(layers, rows):
    group = Group(layers, rows, seed=rows)
    passes = max(group.any_operation() for _ in range(150))
    assert group.cache.counters == group.alone.counters
    assert (passes > 1) == (rows < 24)
    for layer in range(layers):
        group.cache.check_rows(np.arange(rows), "layer", layer=layer)


@pytest.mark.parametrize("fault", ["wrong layer", "third layer stale", "no fetch"])
def test_corruptions_are_noticed(fault, monkeypatch):
    group = Group(4, 24)
    if fault == "wrong layer":
        words = group.cache._host_words
        words[2] = words[1]
    elif fault == "third layer stale":
        refill = group.cache.refill
        group.cache.refill = lambda layer, rows: None if layer == 2 else refill(layer, rows)
    else:
        fetch = group.cache.fetch
        group.cache.fetch = lambda plan, layer: None if layer == 3 else fetch(plan, layer)
    with pytest.raises((AssertionError, RuntimeError), match="layer|hot row"):
        for _ in range(20):
            group.any_operation()


def test_the_canary_compares_each_layer():
    group = Group(3, 8)
    group.step([0], torch.tensor([[1, 2, 3]], dtype=torch.int32))
    group.cache.arena.layers[2][group.cache.slot_row[2], 0] += 1
    for layer in (0, 1):
        group.cache.check_rows(np.arange(8), "layer", layer=layer)
    with pytest.raises(RowCorruption, match="got layer 2, slot 2, hot row"):
        group.cache.check_rows(np.arange(8), "layer 2", layer=2)


def test_whether_all_installed_slots_are_still_hot():
    """Only then may the other layers' rows be fetched before these layers have written."""
    group = Group(2, 4)
    slots = torch.tensor([0, 1])
    assert group.cache.keeps_installed()
    group.cache.install(slots, group.save(0, slots))
    group.cache.plan(torch.tensor([[0, 2, 3]], dtype=torch.int32))
    assert group.cache.keeps_installed()
    group.cache.plan(torch.tensor([[0, 2, 3, 4]], dtype=torch.int32))  # takes the row of slot 1
    assert not group.cache.keeps_installed()
    group.cache.install(torch.arange(5), group.save(0, torch.arange(5)))  # one has no row
    assert not group.cache.keeps_installed()


# --- groups of several sizes --------------------------------------------------------------


def test_of_layers():
    glm52 = [layer < 3 or (layer - 2) % 4 == 0 for layer in range(78)]
    groups = IndexGroups.of_layers(glm52)
    assert groups.sizes == (1, 1, *[4] * 19) and groups.layers == 78 and len(groups) == 21
    assert groups.firsts[:4] == (0, 1, 2, 6) and list(groups.members(20)) == [74, 75, 76, 77]
    assert groups.places[:5] == ((0, 0), (1, 0), (2, 0), (2, 1), (2, 2))
    assert groups.by_size() == {1: [0, 1], 4: list(range(2, 21))}
    assert IndexGroups.of_layers([False, False, True]).sizes == (2, 1)
    assert IndexGroups.single(3) == IndexGroups.of_layers([True] * 3)
    for sizes in ((), (2, 0)):
        with pytest.raises(ValueError, match="must have a layer each"):
            IndexGroups(sizes)


def test_rows_move_between_groups_of_as_many_layers_only():
    host = torch.zeros(SLOTS, WORDS, dtype=torch.int64)
    arenas = {size: HotArena(16, [host] * size) for size in (1, 3)}
    caches = [HotCache([host] * size, 8, arena=arenas[size]) for size in (1, 3, 1, 3)]
    tiers = HotGroups(caches)
    assert tiers.sizes == (8,) * 4 and tiers.spare == 0
    assert tiers.resize([10, 4, 6, 12]) == 6 and tiers.sizes == (10, 4, 6, 12)
    tiers.check_integrity()
    # The rows of a group of three are none for a group of one; and no size is outside its limits.
    for sizes, match in [([12, 2, 6, 12], "got 2, limit 0 spare"), ([2, 4, 8, 0], "got 0")]:
        with pytest.raises(ValueError, match=match):
            tiers.resize(sizes)
        assert tiers.sizes == (10, 4, 6, 12), "refused before any row moves"
    rows = WORDS * 8
    assert tiers.nbytes > 16 * rows + 16 * 3 * rows
    assert [group["layers"] for group in tiers.figures()] == [1, 3, 1, 3]
    for cache in caches:
        cache.plan(torch.tensor([[1, 2]], dtype=torch.int32))
    assert tiers.totals() == (2 * (1 + 3 + 1 + 3), 0, 0)  # rows of all layers


def test_an_arena_is_for_one_number_of_layers():
    host = torch.zeros(SLOTS, WORDS, dtype=torch.int64)
    with pytest.raises(ValueError, match="got 1 for 2 layers"):
        HotCache([host, host], 8, arena=HotArena(8, [host]))
