"""What the tiers promise, written a second time with an OrderedDict, and a driver of both.

Model knows slots and steps only: no rows, no queue. Driver does every operation on a
HostTier with several HotCaches and on their Models, and compares all that can be seen.
"""

from collections import OrderedDict

import numpy as np
import torch

from sglang_ess.tiers import HostTier, HotCache, HotGroups, PlanBuffers, lru
from sglang_ess.tiers.contract import COUNTERS
from sglang_ess.tiers.hot_arena import HotArena


class Model:
    """Exact LRU over slots. order: slot -> step of its last use, least recently used first."""

    def __init__(self, num_rows: int):
        self.num_rows, self.step = num_rows, 0
        self.order: OrderedDict[int, int] = OrderedDict()
        self.counters = dict.fromkeys((*COUNTERS, "early", "early_used"), 0)
        self.early: set[int] = set()  # slots fetched ahead, hot since and not yet used

    def _touch(self, slot: int, pinned: set[int]) -> None:
        """The most recently used, once per pass: repeats within it change nothing."""
        if slot not in pinned:
            self.order[slot] = self.step
            self.order.move_to_end(slot)
            pinned.add(slot)

    def _make_room(self, pinned: set[int], min_age: int = 0) -> bool:
        """A free row, or that of the oldest slot that is not pinned and old enough."""
        if len(self.order) < self.num_rows:
            return True
        victim = next((slot for slot in self.order if slot not in pinned), None)
        if victim is None or self.step - self.order[victim] < min_age:
            return False
        self.counters["evictions"] += 1
        self.counters["evicted_age"] += self.step - self.order.pop(victim)
        self.early.discard(victim)
        return True

    def _query(self, entries, pinned, missed) -> int | None:
        """Look up (column, slot) pairs. Returns the column that found no room, or None."""
        for column, slot in entries:
            if slot not in self.order:
                if not self._make_room(pinned):
                    return column
                missed.append(slot)
            self._touch(slot, pinned)
        return None

    def plan(self, topk: np.ndarray, start: tuple[int, int]):
        """Returns (covered [queries, K] bool, misses in order, misses by query, stop)."""
        found = self._plan(topk, start)
        self.counters["early_used"] += self._settle_early()
        return found

    def _settle_early(self) -> int:
        """Slots fetched ahead that the last operation has used, and that are no longer early."""
        used = {slot for slot in self.early if self.order[slot] == self.step}
        self.early -= used
        return len(used)

    def _plan(self, topk: np.ndarray, start: tuple[int, int]):
        self.step += start == (0, 0)
        first, column = start
        whole = self._plan_whole(topk, start)
        if whole is not None:
            return whole
        pinned, missed, by_query = set(), [], {}
        covered = np.zeros(topk.shape, bool)
        for query in range(first, len(topk)):
            begin = column if query == first else 0
            entries = [(j, int(s)) for j, s in enumerate(topk[query]) if s >= 0 and j >= begin]
            before = len(missed)
            stop = self._query(entries, pinned, missed)
            by_query[query] = len(missed) - before
            if stop is not None and query > first:  # attended whole, in a pass of its own
                return covered[first:query], *self._counted(missed, by_query, covered, query, 0)
            columns = [j for j, _ in entries if stop is None or j < stop]
            covered[query, columns] = True
            if stop is not None:
                part = covered[first : query + 1]
                return part, *self._counted(missed, by_query, covered, query, stop)
        return covered[first:], *self._counted(missed, by_query, covered, None, None)

    def _plan_whole(self, topk: np.ndarray, start: tuple[int, int]):
        """One pass to the end, hits before misses, if all its slots fit; else only the hits."""
        first, column = start
        left = topk.size - first * topk.shape[1] - column
        if start != (0, 0) and left > self.num_rows:
            return None  # a later pass: the first one has seen that this takes several
        entries = [(q, j) for q, j in np.argwhere(topk >= 0).tolist() if (q, j) >= start]
        slots = [int(topk[entry]) for entry in entries]
        missed, pinned = {}, set()
        for (query, _), slot in zip(entries, slots, strict=True):
            if slot in self.order:
                self._touch(slot, pinned)
            else:
                missed.setdefault(slot, query)
        if len(pinned) + len(missed) > self.num_rows:
            return None
        by_query = dict.fromkeys(range(len(topk)), 0)
        for slot, query in missed.items():
            assert self._make_room(pinned)
            self._touch(slot, pinned)
            by_query[query] += 1
        covered = np.zeros(topk.shape, bool)
        if entries:
            covered[tuple(np.array(entries).T)] = True
        return covered[first:], *self._counted(list(missed), by_query, covered, None, None)

    def _counted(self, missed, by_query, covered, query, column):
        self.counters["lookups"] += int(covered.sum())
        self.counters["misses"] += len(missed)
        return missed, by_query, None if query is None else (query, column)

    def install(self, slots, min_age: int) -> int:
        pinned: set[int] = set()
        count = 0
        for slot in slots:
            if slot in self.order or self._make_room(pinned, min_age):
                self._touch(slot, pinned)
                count += 1
        self._settle_early()
        self.counters["installs"] += count
        self.counters["skipped"] += len(slots) - count
        return count

    def invalidate(self, slots) -> None:
        for slot in slots:
            self.order.pop(slot, None)
            self.early.discard(slot)

    def fetch_ahead(self, slots: np.ndarray, most: int, min_age: int) -> list[int]:
        """The slots fetched, best first: rank by rank, at most `most` of each request."""
        left, fetched = [most] * len(slots), []
        for request, slot in [(r, int(s)) for rank in slots.T for r, s in enumerate(rank)]:
            if slot < 0 or slot in self.order or slot in fetched or not left[request]:
                continue
            if len(self.order) + len(fetched) == self.num_rows:
                oldest, step = next(iter(self.order.items()), (None, self.step))
                if oldest is None or self.step - step < min_age:
                    break
                self.counters["evictions"] += 1
                self.counters["evicted_age"] += self.step - self.order.pop(oldest)
                self.early.discard(oldest)
            fetched.append(slot)
            left[request] -= 1
        oldest_step = min([*self.order.values(), self.step - 1])
        for slot in fetched:
            self.order[slot] = oldest_step
            self.order.move_to_end(slot, last=False)
        self.early |= set(fetched)
        self.counters["early"] += len(fetched)
        return fetched

    def warm(self, topk: np.ndarray) -> int:
        filled: list[int] = []
        for query in topk:
            self._query([(0, int(slot)) for slot in query if slot >= 0], set(), filled)
        self._settle_early()
        self.counters["installs"] += len(filled)
        return len(set(filled) & self.order.keys())

    def resize(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.early.clear()
        while len(self.order) > num_rows:
            _, step = self.order.popitem(last=False)
            self.counters["evictions"] += 1
            self.counters["evicted_age"] += self.step - step


class Driver:
    """A host tier and one hot tier a layer beside their models. Each method does and checks.

    The hot tiers share one arena.

    content [layers][slots, ...] is what each slot was last written with: the host tier is
    compared with it, so a write that got lost is seen whoever lost it.
    first_step: that every layer has counted before
    """

    def __init__(
        self, num_slots: int, layer_rows, row_shape=(1, 24), dtype=torch.uint8, first_step: int = 0
    ):
        self.host = HostTier(len(layer_rows), num_slots, row_shape, dtype)
        self.content = [torch.zeros(num_slots, *row_shape, dtype=dtype) for _ in layer_rows]
        buffers = PlanBuffers()
        pairs = zip(self.host.rows, layer_rows, strict=True)
        self.arena = HotArena(sum(layer_rows), self.host.rows[:1])
        self.caches = [
            HotCache(rows, count, buffers=buffers, arena=self.arena) for rows, count in pairs
        ]
        self.layers = HotGroups(self.caches)
        self.models = [Model(count) for count in layer_rows]
        for cache, model in zip(self.caches, self.models, strict=True):
            cache.state[lru.STEP] = model.step = first_step
        self._random = torch.Generator().manual_seed(0)
        self.write(list(range(num_slots)), [None] * len(layer_rows))

    def plan(self, layer: int, topk: np.ndarray) -> int:
        """All passes of one step. Returns how many."""
        cache, model = self.caches[layer], self.models[layer]
        topk = np.ascontiguousarray(topk, np.int32)
        seen, query_misses = np.zeros(topk.shape, int), np.zeros(len(topk), int)
        start, passes = (0, 0), 0
        while start is not None:
            plan = cache.plan(torch.from_numpy(topk), start)
            covered, missed, by_query, stop = model.plan(topk, start)
            assert plan.stop == stop and (stop is None or stop > start)
            assert plan.miss_slots.tolist() == missed
            self._attend(layer, topk[plan.queries], plan, covered)
            seen[plan.queries] += covered
            for query, count in by_query.items():
                query_misses[query] += count
            self.check(layer)
            start, passes = stop, passes + 1
        assert (seen == (topk >= 0)).all()  # every lookup in one pass, and in no more
        assert cache.query_misses.tolist() == query_misses.tolist()
        return passes

    def _attend(self, layer, topk, plan, covered) -> None:
        """Read what attention would: the hits before the fetch, everything after it."""
        cache, rows = self.caches[layer], plan.rows.numpy()
        assert rows.shape == topk.shape and ((rows >= 0) == covered).all()
        used, slots = rows[covered], topk[covered]
        assert len(set(zip(used, slots, strict=True))) == len(set(used)) == len(set(slots))
        assert len(set(plan.miss_rows.tolist())) == len(plan.miss_rows)
        hits = ~np.isin(used, plan.miss_rows)
        self._same_rows(cache.rows[used[hits]], self.content[layer][slots[hits]])
        cache.fetch(plan)
        self._same_rows(cache.rows[used], self.content[layer][slots])
        assert cache.slot_row[slots].tolist() == used.tolist()  # none evicted by this pass

    def write(self, slots: list[int], min_ages: list[int | None]) -> None:
        """New content for slots in every layer: installed at a min_age, or None to invalidate."""
        for layer, min_age in enumerate(min_ages):
            cache, model = self.caches[layer], self.models[layer]
            values = self._values(layer, len(slots))
            for slot, value in zip(slots, values, strict=True):  # in order: the last one stays
                self.host.rows[layer][slot] = value
                self.content[layer][slot] = value
            places = torch.tensor(slots, dtype=torch.int64)
            if min_age is None:
                cache.invalidate(places)
                model.invalidate(slots)
            else:
                assert cache.install(places, values, min_age) == model.install(slots, min_age)
            self.check(layer)

    def _values(self, layer: int, count: int) -> torch.Tensor:
        rows = self.content[layer]
        size = (count, *rows.shape[1:-1], rows.shape[-1] * rows.itemsize)
        made = torch.randint(256, size, generator=self._random, dtype=torch.uint8)
        if rows.is_floating_point():  # finite: compared by value nowhere, but kept readable
            return (made[..., : rows.shape[-1]].float() - 128).to(rows.dtype)
        return made.view(rows.dtype)

    def warm(self, layer: int, topk: np.ndarray) -> None:
        topk = np.ascontiguousarray(topk, np.int32)
        filled = self.caches[layer].warm(torch.from_numpy(topk))
        assert filled == self.models[layer].warm(topk)
        self.check(layer)

    def fetch_ahead(self, layer: int, slots: np.ndarray, most: int, min_age: int) -> None:
        cache, model = self.caches[layer], self.models[layer]
        slots = np.ascontiguousarray(slots, np.int32)
        hot = set(model.order)
        if cache.num_rows == cache.num_slots:
            expected = []
        else:
            expected = model.fetch_ahead(slots, most, min_age)
        assert cache.fetch_ahead(slots, most, min_age) == len(expected)
        kept = {slot for slot in hot if model.order.get(slot, -1) > model.step - min_age}
        assert kept <= set(np.flatnonzero(cache.slot_row >= 0).tolist())
        self.check(layer)

    def resize(self, layer: int, num_rows: int) -> None:
        """To num_rows, as far as there are spare rows."""
        cache, model = self.caches[layer], self.models[layer]
        num_rows = min(num_rows, cache.num_rows + self.arena.spare, cache.num_slots)
        if cache.num_rows == cache.num_slots:  # it kept no order: the one it has counts now
            slots = cache.slots_by_recency()
            stamps = cache.queue_step[cache.row_place[cache.slot_row[slots]]].astype(np.int64)
            steps = cache.steps - ((cache.steps - stamps) & lru.STEP_MASK)
            model.order = OrderedDict(zip(slots.tolist(), steps.tolist(), strict=True))
        cache.resize(num_rows)
        model.resize(num_rows)
        assert cache.num_rows == num_rows
        self.layers.check_integrity()
        self.check(layer)

    def clear(self) -> None:
        for layer, cache in enumerate(self.caches):
            cache.clear()
            self.models[layer] = Model(cache.num_rows)
            self.check(layer)

    def check_rows(self, layer: int, picks) -> None:
        self.caches[layer].check_rows(np.asarray(picks, np.int64), f"layer {layer}")

    def check(self, layer: int) -> None:
        """The layer's hot tier against its model, and every row against what was written."""
        cache, model = self.caches[layer], self.models[layer]
        cache.check_integrity()
        self._same_rows(self.host.rows[layer], self.content[layer])
        slots = np.flatnonzero(cache.slot_row >= 0)
        rows = cache.slot_row[slots]
        assert len(set(rows.tolist())) == len(slots) == cache.occupied
        self._same_rows(cache.rows[rows], self.content[layer][slots])
        if cache.num_rows == cache.num_slots:  # nothing to evict: no order is kept
            assert set(slots.tolist()) == set(model.order)
        else:
            by_recency = slots[np.argsort(cache.row_place[rows])]
            assert by_recency.tolist() == list(model.order)
        assert cache.counters == model.counters

    @staticmethod
    def _same_rows(got: torch.Tensor, expected: torch.Tensor) -> None:
        # In numpy: torch would start its threads for a few kilobytes.
        assert np.array_equal(got.view(torch.uint8).numpy(), expected.view(torch.uint8).numpy())


def random_step(driver: Driver, rng: np.random.Generator) -> None:
    """One operation on random arguments: what a script without hypothesis uses."""
    num_slots, layer = driver.host.num_slots, int(rng.integers(len(driver.caches)))
    kind = rng.integers(12)
    if kind < 5:
        driver.plan(layer, random_topk(rng, num_slots))
    elif kind < 8:
        slots = rng.integers(num_slots, size=rng.integers(1, 6)).tolist()
        driver.write(slots, rng.choice([None, 0, 1, 2, 50], size=len(driver.caches)).tolist())
    elif kind == 8:
        driver.warm(layer, random_topk(rng, num_slots))
        driver.resize(layer, int(rng.integers(1, num_slots + 1)))
    elif kind > 9:
        topk = random_topk(rng, num_slots)
        driver.fetch_ahead(layer, topk, int(rng.integers(1, 9)), int(rng.integers(4)))
    else:
        driver.check_rows(layer, rng.integers(1 << 40, size=8))


def random_topk(rng, num_slots: int, queries=None, width=None, span=None) -> np.ndarray:
    """[queries, width] int32 slots of a window of `span` slots, repeats and pads included."""
    queries = rng.integers(1, 5) if queries is None else queries
    width = rng.integers(1, 17) if width is None else width
    span = rng.integers(1, num_slots + 1) if span is None else min(span, num_slots)
    first = rng.integers(num_slots - span + 1)
    topk = rng.integers(first, first + span, size=(queries, width))
    return np.where(rng.random(topk.shape) < 0.15, -1, topk).astype(np.int32)
