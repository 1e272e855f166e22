"""Admission in closed loops: a decode server with a real LRU, and a policy that sees its steps."""

import itertools
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.admission.policy import Admission, AdmissionLimits, Candidate, Step
from sglang_ess.admission.working_set import WorkingSetWindow
from sglang_ess.tiers import HotCache

REGION = 256  # slots of a request, of which it selects from the first `pool`
SAMPLES = 4
ROW_BYTES = 1000
SLOW_LINK = 3e6  # 0.3 ms a row


@dataclass
class Request:
    name: int
    pool: int
    output: int
    done: int = 0
    region: int = -1
    topk: np.ndarray = field(default=None, repr=False)


class Server:
    """A decode server of one layer with a real LRU; a step takes 10 ms + n / 10 ms + fetches.

    Each step a request keeps half of its top-k and draws the others from its pool.
    admission: decides who runs; without, as many as `batch` do.
    """

    KEPT = 0.5

    def __init__(self, hot_rows, topk, batch, admission=None, seed=0, measures=True):
        self.rng = np.random.default_rng(seed)
        self.topk, self.batch, self.admission = topk, batch, admission
        self.cache = HotCache(None, min(hot_rows, REGION * batch), REGION * batch)
        self.window = WorkingSetWindow(REGION * batch, SAMPLES, topk) if measures else None
        self.free = list(range(batch))
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.seconds, self.tokens, self.steps, self.admitted = 0.0, 0, 0, []
        self.finished: list[int] = []
        self.sampled = 0

    def join(self):
        count = min(self.batch - len(self.running), len(self.waiting))
        if self.admission:
            ready = [Candidate(r.pool) for r in list(self.waiting)[:count]]
            count = self.admission.admit(len(self.running), ready).count
        for _ in range(count):
            request = self.waiting.popleft()
            request.region = self.free.pop()
            request.topk = REGION * request.region + self.rng.integers(request.pool, size=self.topk)
            self.running.append(request)
            self.admitted.append(request.name)

    def leave(self, request):
        slots = REGION * request.region + np.arange(REGION)
        self.cache.invalidate(torch.from_numpy(slots))
        self.free.append(request.region)
        self.running.remove(request)

    def shed(self):
        for _ in range(len(self.running) - self.admission.keep(len(self.running))):
            self.waiting.appendleft(self.running[-1])
            self.leave(self.running[-1])

    def select(self):
        """The top-k of this step [running, topk]."""
        for request in self.running:
            drawn = self.rng.random(self.topk) >= self.KEPT
            new = REGION * request.region + self.rng.integers(request.pool, size=drawn.sum())
            request.topk[drawn] = new
        return np.stack([request.topk for request in self.running]).astype(np.int32)

    def step(self):
        self.join()
        before, topk = self.cache.counters, self.select()
        plan = self.cache.plan(torch.from_numpy(topk))
        while plan.stop is not None:
            plan = self.cache.plan(torch.from_numpy(topk), plan.stop)
        delta = {name: count - before[name] for name, count in self.cache.counters.items()}
        n = len(self.running)
        seconds = 0.010 + 0.0001 * n + delta["misses"] * ROW_BYTES / SLOW_LINK
        self.seconds, self.tokens, self.steps = (
            self.seconds + seconds,
            self.tokens + n,
            self.steps + 1,
        )
        if self.admission:
            self.report(topk, Step(1, n, seconds, delta["misses"], delta["evictions"],
                                   delta["evicted_age"]))  # fmt: skip
        for request in list(self.running):
            request.done += 1
            if request.done == request.output:
                self.finished.append(request.name)
                self.leave(request)

    def report(self, topk, step):
        self.admission.observe(step)
        if self.window:
            first = self.sampled % max(1, len(self.running) - SAMPLES + 1)
            sample = slice(first, first + SAMPLES)
            tokens = {request.name: request.pool for request in self.running[sample]}
            if counts := self.window.add(topk[sample], list(tokens)):
                self.sampled += SAMPLES
                samples = [(tokens[name], rows) for name, rows in counts.rows.items()]
                self.admission.observe_working_sets(samples, counts.sharing, counts.growth)
        self.shed()

    def throughput(self, steps, seed=1):
        """Output tokens/s with a queue that never ends, after a quarter of the steps."""
        rng, names = np.random.default_rng(seed), itertools.count()
        for step in range(steps):
            while len(self.waiting) < self.batch:
                pool, output = int(rng.integers(70, 150)), int(rng.integers(60, 180))
                self.waiting.append(Request(next(names), pool, output))
            if step == steps // 4:
                self.seconds, self.tokens = 0.0, 0
            self.step()
        return self.tokens / self.seconds


HOT_ROWS, TOPK, BATCH = 2000, 64, 64


def served(hot_rows_told, steps, measures, seed=0):
    """A server of HOT_ROWS after many steps, its throughput, and what its admission did."""
    limits = AdmissionLimits(hot_rows_told, TOPK, layers=1, row_bytes=ROW_BYTES)
    admission = Admission(limits, SLOW_LINK)
    server = Server(HOT_ROWS, TOPK, BATCH, admission, seed, measures)
    return server.throughput(steps, seed + 1), server, admission


@pytest.fixture(scope="module")
def fixed():
    """Throughput by fixed batch: BATCH is what runs with admission off."""
    batches = (8, 12, 16, 18, 20, 24, BATCH)
    return {batch: Server(HOT_ROWS, TOPK, batch).throughput(300) for batch in batches}


@pytest.mark.parametrize("seed", [0, 1])
def test_admission_keeps_the_peak_where_off_collapses(fixed, seed):
    peak = max(fixed.values())
    assert fixed[BATCH] < 0.2 * peak
    throughput, _, admission = served(HOT_ROWS, 800, True, seed)
    assert throughput >= 0.9 * peak
    assert admission.retractions == 0


def test_shedding_makes_up_for_working_sets_that_are_far_too_small(fixed):
    """Told of four times the hot rows there are, it finds by eviction ages what it can run."""
    throughput, server, admission = served(4 * HOT_ROWS, 1600, False)
    assert throughput > 4 * fixed[BATCH]
    assert len(server.running) < 30
    assert admission.deferred["thrash"] > 0
    assert BATCH / 2 < admission.retractions < BATCH, "one way, with few tries back"


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, REGION), st.integers(1, 30)), min_size=1, max_size=20
    ),
    st.integers(1, 600),
    st.sampled_from([0.3, 1, 8]),
    st.none() | st.floats(1e-4, 0.1),
    st.integers(0, 5),
)  # fmt: skip
def test_everyone_finishes_and_nobody_overtakes(requests, hot_rows, told, itl, seed):
    """Whatever the working sets, limits that are wrong, and targets that cannot be kept."""
    limits = AdmissionLimits(max(1, int(hot_rows * told)), 16, 1, ROW_BYTES, itl)
    server = Server(hot_rows, 16, 8, Admission(limits, SLOW_LINK), seed)
    for name, (pool, output) in enumerate(requests):
        server.waiting.append(Request(name, pool, output))
    budget = sum(output for _, output in requests)  # one at least runs in every step
    while server.waiting or server.running:
        server.step()
        assert server.steps <= budget
    assert sorted(server.finished) == list(range(len(requests)))
    assert list(dict.fromkeys(server.admitted)) == list(range(len(requests)))
