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

    Each token a request keeps half of its top-k and draws the others from its pool.
    admission: decides who runs; without, as many as `batch` do.
    queries: lists of a request in a step, of successive drafts; each is accepted with ACCEPTED if
        those before it are, and the lists of the others are selected in vain.
    """

    KEPT, ACCEPTED = 0.5, 0.7

    def __init__(self, hot_rows, topk, batch, admission=None, seed=0, measures=True, queries=1):
        self.rng = np.random.default_rng(seed)
        self.topk, self.batch, self.admission, self.queries = topk, batch, admission, queries
        self.cache = HotCache(None, min(hot_rows, REGION * batch), REGION * batch)
        width = queries * topk
        self.window = WorkingSetWindow(REGION * batch, SAMPLES, width) if measures else None
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
        """The lists of this step [running, queries * topk], and the tokens of each request."""
        drawn = self.rng.random((len(self.running), self.queries - 1)) < self.ACCEPTED
        gained = 1 + drawn.cumprod(1).sum(1)
        lists = [self.lists_of(*pair) for pair in zip(self.running, gained, strict=True)]
        return np.stack(lists).astype(np.int32), gained

    def lists_of(self, request, gained):
        lists, accepted = [], None
        for query in range(1, self.queries + 1):
            drawn = self.rng.random(self.topk) >= self.KEPT
            new = REGION * request.region + self.rng.integers(request.pool, size=drawn.sum())
            request.topk[drawn] = new
            lists.append(request.topk.copy())
            if query == gained:
                accepted = lists[-1].copy()
        request.topk = accepted
        return np.concatenate(lists)

    def step(self):
        self.join()
        before, (lists, gained) = self.cache.counters, self.select()
        topk = lists.reshape(-1, self.topk)
        plan = self.cache.plan(torch.from_numpy(topk))
        while plan.stop is not None:
            plan = self.cache.plan(torch.from_numpy(topk), plan.stop)
        delta = {name: count - before[name] for name, count in self.cache.counters.items()}
        n = len(self.running)
        seconds = 0.010 + 0.0001 * n + delta["misses"] * ROW_BYTES / SLOW_LINK
        self.seconds, self.tokens, self.steps = (
            self.seconds + seconds,
            self.tokens + int(gained.sum()),
            self.steps + 1,
        )
        if self.admission:
            self.report(lists, Step(1, n, seconds, delta["misses"], delta["evictions"],
                                    delta["evicted_age"], float(gained.mean())))  # fmt: skip
        for request, tokens in zip(list(self.running), gained, strict=False):  # the last are shed
            request.done += int(tokens)
            if request.done >= request.output:
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


def served(hot_rows_told, steps, measures, seed=0, queries=1, itl_seconds=None):
    """A server of HOT_ROWS after many steps, its throughput, and what its admission did."""
    limits = AdmissionLimits(
        hot_rows_told, TOPK, layers=1, row_bytes=ROW_BYTES, itl_seconds=itl_seconds, queries=queries
    )
    admission = Admission(limits, SLOW_LINK)
    server = Server(HOT_ROWS, TOPK, BATCH, admission, seed, measures, queries)
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


@pytest.mark.parametrize("queries", [2, 4])
def test_with_drafts_too(queries):
    """A step's union of lists is what wants hot rows, so fewer requests run than without drafts."""

    def at(batch):
        return Server(HOT_ROWS, TOPK, batch, queries=queries).throughput(300)

    peak = max(map(at, (8, 12, 14, 16, 18, 20, 24)))
    assert at(BATCH) < 0.2 * peak
    throughput, server, admission = served(HOT_ROWS, 800, True, queries=queries)
    assert throughput >= 0.9 * peak
    assert admission.retractions == 0
    expected = sum(Server.ACCEPTED**i for i in range(queries))
    assert admission.accept_length == pytest.approx(expected, rel=0.15)


def test_the_latency_target_is_that_of_an_accepted_token():
    """A cold joiner makes a step 30 ms long. At 25 ms a token, drafts alone let others join."""
    target = 0.025
    _, alone, _ = served(10**6, 200, True, itl_seconds=target)
    assert len(alone.running) == 1
    _, server, admission = served(10**6, 600, True, queries=4, itl_seconds=target)
    assert len(server.running) > 8 and admission.deferred["link"] > 0
    # `throughput` leaves out the first quarter.
    step_seconds = server.seconds / (600 - 600 // 4)
    assert target < step_seconds <= target * admission.accept_length


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
