"""Replacement policies a second time, in plain Python and by their definitions; and an optimum.

An oracle knows slots and steps, a list or a dict, and min(): no rows' lists, no kernels.
"""

import itertools
import math

import numpy as np

from sglang_ess.sim.policies.aged_clock import RULE

MASK = (1 << 64) - 1


def stack_stream(steps=60, queries=2, width=8, num_slots=64, seed=0) -> np.ndarray:
    """[steps, queries, width] int32 slots: some stay, some return by recency, few are anyone.

    What sim/locality.py generates, in a few lines and for tiny sizes; pads at the ends of some.
    """
    random = np.random.default_rng(seed)
    recent = random.permutation(num_slots).tolist()  # most recently selected first
    chosen = recent[:width]
    found = np.full((steps, queries, width), -1, np.int32)
    for step, query in itertools.product(range(steps), range(queries)):
        for place in np.flatnonzero(random.random(width) < 0.3):
            rank = int(random.exponential(width)) if random.random() < 0.85 else num_slots
            outside = [slot for slot in recent if slot not in chosen]
            place_of = rank if rank < len(outside) else random.integers(len(outside))
            chosen[place] = outside[int(place_of)]
        recent = chosen + [slot for slot in recent if slot not in chosen]
        found[step, query] = chosen
        if random.random() < 0.1:
            found[step, query, -2:] = -1
    return found


def first_queries(topk) -> dict[int, int]:
    """The first query that looks each slot up."""
    found: dict[int, int] = {}
    for query, slots in enumerate(topk.tolist()):
        for slot in slots:
            if slot >= 0:
                found.setdefault(slot, query)
    return found


class Oracle:
    """hot: slots and what the policy knows of them. Subclasses say who goes."""

    def __init__(self, rows: int):
        self.rows, self.hot, self.uses, self.now = rows, {}, 0, -1

    def step(self, topk) -> list[int]:
        """Misses by query: hits before misses, none of this step's slots evicted."""
        self.now += 1
        first_query = first_queries(topk)
        pinned, missed = set(first_query), [s for s in first_query if s not in self.hot]
        for slot in first_query:
            if slot in self.hot:
                self.use(slot)
        misses = [0] * len(topk)
        for slot in missed:
            if len(self.hot) == self.rows:
                self.evict(pinned)
            self.fill(slot)
            misses[first_query[slot]] += 1
        return misses

    def evict(self, pinned) -> None:
        free = [slot for slot in self.hot if slot not in pinned]
        del self.hot[min(free, key=self.value)]

    def value(self, slot):
        """Of keeping it: the least goes."""
        return self.hot[slot]

    def use(self, slot) -> None:
        pass

    def fill(self, slot) -> None:
        self.uses += 1
        self.hot[slot] = self.uses


class Fifo(Oracle):
    pass


class Lru(Oracle):
    def use(self, slot):
        self.fill(slot)


class VerifiedLru(Oracle):
    """order: hot slots, the next to go first. rule: as verified_lru.RULES, said once more."""

    def __init__(self, rows, queries, rule):
        super().__init__(rows)
        self.order, self.queries, self.rule = [], queries, rule

    def step(self, topk):
        self.topk = topk.tolist()
        first_query = first_queries(topk)
        self.hits = [slot for slot in first_query if slot in self.order]
        self.missed = [slot for slot in first_query if slot not in self.order]
        for slot in self.missed:
            if len(self.order) == self.rows:
                self.order.remove(next(s for s in self.order if s not in first_query))
            self.order.append(slot)
        misses = [0] * len(topk)
        for slot in self.missed:
            misses[first_query[slot]] += 1
        return misses

    def accepted(self, kept):
        """Here every rule may wait until now: no row goes before the next step."""
        if self.rule in ("all", "first"):
            kept = [self.queries if self.rule == "all" else 1] * len(kept)
        right = {
            slot
            for request, count in enumerate(kept)
            for slots in self.topk[request * self.queries :][:count]
            for slot in slots
        }
        young = [slot for slot in self.hits + self.missed if slot in right]
        old = [slot for slot in self.missed if slot not in right]
        if self.rule == "kept, misses young":
            old = []
        rest = [slot for slot in self.order if slot not in young and slot not in old]
        self.order = old + rest + young


class Clock(Oracle):
    """ring: slots in the order of the rows; hot: whether it was reused."""

    def __init__(self, rows):
        super().__init__(rows)
        self.ring, self.hand, self.place = [], 0, None

    def use(self, slot):
        self.hot[slot] = True

    def evict(self, pinned):
        while True:
            place, slot = self.hand, self.ring[self.hand]
            self.hand = (self.hand + 1) % self.rows
            if slot in pinned:
                continue
            if not self.hot[slot]:
                break
            self.hot[slot] = False
        del self.hot[slot]
        self.place = place

    def fill(self, slot):
        if len(self.ring) < self.rows:
            self.ring.append(slot)
        else:
            self.ring[self.place] = slot
        self.hot[slot] = False


class AgedClock(Oracle):
    """ring: the slot of each row, or None; hot: the step that used a slot last."""

    def __init__(self, rows, rule=RULE):
        super().__init__(rows)
        self.ring, self.hand, self.age, self.rule = [None] * rows, 0, rule.max_age, rule

    def step(self, topk):
        self.now += 1
        queues = [[] for _ in topk]
        for slot, query in first_queries(topk).items():
            if slot in self.hot:
                self.hot[slot] = self.now
            else:
                queues[query].append(slot)
        misses, before = [len(queue) for queue in queues], self.age
        seen = [0, 0]  # rows, and the eligible ones among them
        while any(queues):
            age = self.age
            for queue in filter(None, queues):
                counts = self.scan(queue, age)
                seen = [seen[0] + counts[0], seen[1] + counts[1]]
                if queue and counts[1] * 2**self.rule.barren < counts[0]:
                    lower = age - max(1, age // 2**self.rule.lower)
                    self.age = max(0, min(self.age, lower))
        if self.age == before and seen[1] * 2**self.rule.density > seen[0]:
            self.age = min(self.rule.max_age, before + max(2, before // 2**self.rule.grow))
        return misses

    def scan(self, queue, age):
        """Take the first slots off the queue. Returns the rows passed and the eligible ones."""
        chunks = math.ceil(len(queue) * 2**self.rule.density / self.rule.chunk)
        passed = min(chunks * self.rule.chunk, self.rule.span, self.rows)
        places = [(self.hand + i) % self.rows for i in range(passed)]
        old = [p for p in places if self.now - self.hot.get(self.ring[p], -math.inf) > age]
        for place in old[: len(queue)]:
            self.hot.pop(self.ring[place], None)
            self.ring[place] = queue.pop(0)
            self.hot[self.ring[place]] = self.now
        self.hand = (self.hand + passed) % self.rows
        return passed, len(old)


class Random(Oracle):
    """ring: slots in the order of the rows. One draw without replacement for each victim."""

    def __init__(self, rows, seed=0):
        super().__init__(rows)
        self.ring, self.state, self.left, self.place = [], seed, None, None

    def step(self, topk):
        self.left = None
        return super().step(topk)

    def draw(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def evict(self, pinned):
        if self.left is None:
            self.left = [row for row, slot in enumerate(self.ring) if slot not in pinned]
        pick = self.draw() % len(self.left)
        self.place, self.left[pick] = self.left[pick], self.left[-1]
        self.left.pop()
        del self.hot[self.ring[self.place]]

    def fill(self, slot):
        if len(self.ring) < self.rows:
            self.ring.append(slot)
        else:
            self.ring[self.place] = slot
        self.hot[slot] = None


class Keyed(Oracle):
    """times: of every slot's uses, kept whole; their worth is summed by the definition."""

    def __init__(self, rows, rule):
        super().__init__(rows)
        self.rule, self.times, self.strength, self.pinned = rule, {}, {}, set()

    def step(self, topk, strengths=None):
        self.pinned = {int(slot) for slot in topk[topk >= 0]}
        self.strength = {}
        for slot, strength in zip(topk.ravel().tolist(), np.ravel(strengths), strict=False):
            if slot >= 0 and strengths is not None:
                self.strength[slot] = max(strength, self.strength.get(slot, 0))
        now = self.now + 1
        for slot in self.pinned:
            age = self.rule.weak_age * (1 - self.strength[slot]) if self.strength else 0
            age += self.rule.miss_age * (slot not in self.hot)
            self.times.setdefault(slot, []).append(now - age)
        return super().step(topk)

    def use(self, slot):
        self.fill(slot)

    def evict(self, pinned):
        victim = min((s for s in self.hot if s not in pinned), key=self.value)
        self.drop(victim)

    def drop(self, slot):
        del self.hot[slot]
        if not self.rule.remember:
            self.times.pop(slot)

    def value(self, slot):
        return self.worth(slot), self.hot.get(slot, 0)

    def worth(self, slot):
        times = self.times[slot]
        if self.rule.half_lives == (0.0,):
            return max(times)
        total = sum(
            share * 2 ** ((time - self.now) / half_life)
            for share, half_life in zip(self.rule.shares, self.rule.half_lives, strict=True)
            for time in times
        )
        return self.now + self.rule.half_lives[0] * math.log2(total)

    def hint(self, hints):
        """The rows fetched ahead."""
        lists = [[slot for slot in one[: self.rule.hints] if slot >= 0] for one in hints.tolist()]
        at = self.now - self.rule.hint_age
        for slot in itertools.chain(*lists):
            if self.rule.remember or slot in self.hot:
                self.times.setdefault(slot, []).append(at)
        best = itertools.chain(*(one[: self.rule.ahead] for one in hints.tolist()))
        cold = {slot for slot in best if slot >= 0 and slot not in self.hot}
        if not self.rule.remember:
            self.times |= {slot: [at] for slot in cold}
        fetched = 0
        for slot in sorted(cold, key=lambda slot: (-self.worth(slot), slot)):
            if len(self.hot) == self.rows:
                free = [s for s in self.hot if s not in self.pinned and s not in cold]
                victim = min(free, key=self.value, default=None)
                if victim is None or self.worth(victim) + self.rule.margin >= self.worth(slot):
                    break
                self.drop(victim)
            self.fill(slot)
            fetched += 1
        if not self.rule.remember:
            for slot in cold - set(self.hot):
                self.times.pop(slot)
        return fetched


class Belady(Oracle):
    def __init__(self, rows, steps):
        super().__init__(rows)
        self.sets = [set(topk[topk >= 0].tolist()) for topk in steps]

    def value(self, slot):
        later = range(self.now + 1, len(self.sets))
        return -next((step for step in later if slot in self.sets[step]), len(self.sets))


def fewest_misses(steps: np.ndarray, rows: int) -> int:
    """Over all ways to evict: what of each step's slots was not kept, summed, at the least.

    costs: of every set of slots that may be hot after a step. Nothing is fetched unasked.
    """
    costs = {frozenset(): 0}
    for topk in steps:
        needed = frozenset(topk[topk >= 0].tolist())
        after: dict[frozenset, int] = {}
        for hot, cost in costs.items():
            others = hot - needed
            keep = min(len(others), rows - len(needed))
            for kept in itertools.combinations(sorted(others), keep):
                state = needed | frozenset(kept)
                after[state] = min(after.get(state, 1 << 30), cost + len(needed - hot))
        costs = after
    return min(costs.values())
