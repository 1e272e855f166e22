"""Random doings of recorded hot tiers, for the trace and its replay."""

import numpy as np
import torch

from sglang_ess.trace.trace import Kind
from sglang_ess.trace.trace_recorder import STATE_PLACES, TraceRecorder

NO_ROWS = torch.empty(0)


def move_rows() -> None:
    """An engine's patch: every fourth decode step the first two layers trade a few hot rows."""
    from sglang_ess.tiers.balance.rebalance import Rebalancer

    steps = 0

    def trading(rebalancer):
        nonlocal steps
        steps += 1
        if steps % 4 == 0:
            first, second, *others = rebalancer.layers.sizes
            moved = 16 if steps % 8 else -16
            rebalancer.layers.resize([first + moved, second - moved, *others])

    Rebalancer.step = trading


class Life:
    """Random doings of two recorded layers, and the events that they should be.

    The rows of a request table share prefixes, and change under the requests' feet.
    """

    LAYERS, CONTEXT, WIDTH, SLOTS, ROWS = 2, 40, 6, 128, 24

    def __init__(self, path, rng):
        self.rng, self.expected = rng, []
        self.recorder = TraceRecorder(path, self.LAYERS, self.WIDTH, self.SLOTS, {})
        sizes = (None, self.ROWS, self.SLOTS)
        self.caches = [self.recorder.hot_cache(*sizes) for _ in range(self.LAYERS)]
        for cache in self.caches:
            self.note(cache, Kind.RESIZE, self.ROWS)
        self.table = np.zeros((4, self.CONTEXT), np.int32)
        for row in range(4):
            self.rewrite(row)

    def note(self, cache, kind, argument=0, slots=()):
        state = cache.state[STATE_PLACES].tolist()
        self.expected.append((kind, cache.layer, argument, np.array(slots).tolist(), state))

    def rewrite(self, row):
        """Other slots from some position on, as after a retraction; the first are shared."""
        first = self.rng.integers(0, 20)
        slots = self.rng.permutation(self.SLOTS)[: self.CONTEXT]
        self.table[row] = slots
        self.table[row, :first] = np.arange(first) + 100

    def queries(self, count):
        """Rows, lengths and top-k of a step, in context order unless shuffled."""
        rows = self.rng.permutation(4)[:count].astype(np.int64)
        lengths = self.rng.integers(1, self.CONTEXT + 1, count).astype(np.int32)
        topk = np.full((count, self.WIDTH), -1, np.int32)
        for query, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            chosen = self.rng.permutation(length)[: self.WIDTH]
            topk[query, : len(chosen)] = self.table[row, np.sort(chosen)]
        return rows, lengths, topk

    def step(self):
        count = int(self.rng.integers(1, 5))
        rows, lengths, topk = self.queries(count)
        names = [f"{row} of {len(self.expected)}" for row in rows]
        self.recorder.begin_step(names, rows, lengths, self.table)
        if self.rng.random() < 0.3:  # an indexer with another order
            topk = topk[:, self.rng.permutation(self.WIDTH)]
        if self.rng.random() < 0.2:
            self.recorder.end_step()
        for cache in self.caches:
            for first in range(0, count, 2):
                self.plan(cache, topk[first : first + 2].copy(), first > 0)

    def plan(self, cache, topk, same_step):
        start = (0, 0)
        while start is not None:
            start = cache.plan(torch.from_numpy(topk), start, same_step).stop
        self.note(cache, Kind.PLAN, int(same_step), topk)

    def write(self, kind):
        cache = self.caches[self.rng.integers(self.LAYERS)]
        first = self.rng.integers(self.SLOTS - 20)
        some = self.rng.permutation(self.SLOTS)[: self.rng.integers(8)]
        slots = torch.from_numpy(np.concatenate([some, np.arange(first, first + 20)]))
        if kind == Kind.INSTALL:
            age = int(self.rng.integers(3))
            cache.install(slots, NO_ROWS, age)
            self.note(cache, kind, age, slots)
        else:
            cache.invalidate(slots)
            self.note(cache, kind, 0, slots)

    def other(self):
        cache = self.caches[self.rng.integers(self.LAYERS)]
        if self.rng.random() < 0.6:
            *_, topk = self.queries(3)
            cache.warm(torch.from_numpy(topk))
            self.note(cache, Kind.WARM, 0, topk)
        elif self.rng.random() < 0.7:
            rows = int(self.rng.integers(1, self.ROWS + 1))
            cache.resize(rows)
            self.note(cache, Kind.RESIZE, rows)
        else:
            cache.clear()
            self.note(cache, Kind.CLEAR)

    def run(self, doings):
        for _ in range(doings):
            what = self.rng.random()
            if what < 0.5:
                self.step()
            elif what < 0.8:
                self.write(Kind.INSTALL if self.rng.random() < 0.5 else Kind.INVALIDATE)
            elif what < 0.9:
                self.other()
            else:
                self.rewrite(self.rng.integers(4))
        self.recorder.writer.close()
        return self.expected


class Verifies:
    """Recorded verify steps of speculative decoding, and in plain lists what the trace has of them.

    Each request has its row of the table. A step gives it `queries` lists of each layer, of which
    it keeps the first few; the positions of the others are selected again in the next step.

    steps     by layer: the top-k [requests * queries, WIDTH] of each step
    kept      [steps][requests] tokens
    records   as trace.Record with positions as a list, and the query's number in its request
    """

    REQUESTS, WIDTH, SLOTS, START = 3, 6, 576, 20

    def __init__(self, path, rng, queries=4, layers=2, rows=80, block=None):
        self.rng, self.queries, self.block = rng, queries, block
        self.recorder = TraceRecorder(path, layers, self.WIDTH, self.SLOTS, {})
        self.caches = [self.recorder.hot_cache(None, rows, self.SLOTS) for _ in range(layers)]
        slots = rng.permutation(self.SLOTS).astype(np.int32)
        self.table = slots.reshape(self.REQUESTS, -1)
        self.lengths = [self.START + 5 * request for request in range(self.REQUESTS)]
        self.names = [f"request {request}" for request in range(self.REQUESTS)]
        self.steps = [[] for _ in range(layers)]
        self.kept, self.records = [], []

    def step(self, tells=True):
        """One verify step. tells: whether its accepted lengths are recorded."""
        width, rows = self.queries, np.arange(self.REQUESTS).repeat(self.queries)
        seen = [length + j + 1 for length in self.lengths for j in range(width)]
        names = [name for name in self.names for _ in range(width)]
        lengths = np.array(seen, np.int32)
        self.recorder.begin_step(names, rows.astype(np.int64), lengths, self.table, width)
        kept = self.rng.integers(1, width + 1, self.REQUESTS).tolist()
        for cache, steps in zip(self.caches, self.steps, strict=True):
            positions = [self.positions(length) for length in seen]
            steps.append(self.table[rows[:, None], positions])
            for place, chosen in enumerate(positions):
                one = cache.layer, cache.steps, names[place], seen[place], chosen.tolist()
                self.records.append((*one, place % width < kept[place // width] and tells))
            self.plan(cache, steps[-1])
        if tells:
            self.recorder.accepted(kept)
            self.kept.append(kept)
        self.lengths = [length + n for length, n in zip(self.lengths, kept, strict=True)]

    def positions(self, length):
        """WIDTH of `length` positions in order, most of them among the last 30."""
        recent = self.rng.permutation(min(length, 30))[: self.WIDTH - 1]
        chosen = set((length - 1 - recent).tolist())
        others = [p for p in self.rng.permutation(length).tolist() if p not in chosen]
        return np.sort([*chosen, others[0]])

    def plan(self, cache, topk):
        block = self.block or len(topk)
        for first in range(0, len(topk), block):
            part, start = torch.from_numpy(topk[first : first + block].copy()), (0, 0)
            while start is not None:
                start = cache.plan(part, start, first > 0).stop

    def close(self):
        self.recorder.writer.close()
        return self.recorder.writer.path
