"""A round of admission in SGLang's scheduler: as bounded as its places, and it loses nobody."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from benchmarks.sim import admission_rounds
from benchmarks.sim.admission_rounds import PLACES, RUNNING, WAITING, fill_places
from sglang_ess import scheduler_gate
from sglang_ess.admission.policy import LOOK_AHEAD, Admission, AdmissionLimits, Candidate, Step
from sglang_ess.mem_cache.allocator import EssPagedAllocator

ROOMY = AdmissionLimits(hot_rows=1 << 26, topk=2048, layers=61, row_bytes=656)


# --- bounded, and deciding the same ---------------------------------------------------------

steps = st.builds(
    Step,
    steps=st.integers(1, 4),
    running=st.integers(1, 20),
    seconds=st.floats(0.0, 0.2),
    missed_rows=st.integers(0, 2000),
    evictions=st.integers(1, 2000),
    evicted_age=st.integers(0, 4000),
)
candidates = st.builds(
    Candidate, st.integers(1, 2000), st.none() | st.integers(1, 500), st.booleans()
)


@settings(max_examples=300, deadline=None)
@given(
    history=st.lists(steps, max_size=30),
    rounds=st.integers(0, 3),
    running=st.integers(0, 20),
    waiting=st.lists(candidates, max_size=60),
    places=st.integers(0, 40),
    slots=st.integers(0, 40),
    hot_rows=st.integers(100, 20_000),
    itl_seconds=st.none() | st.floats(0.01, 0.3),
)
def test_those_with_a_place_join_whether_or_not_others_are_asked(
    history, rounds, running, waiting, places, slots, hot_rows, itl_seconds
):
    limits = AdmissionLimits(hot_rows, topk=100, layers=2, row_bytes=1000, itl_seconds=itl_seconds)
    whole = Admission(limits, 1e7)
    for step in history:
        whole.observe(step)
    for _ in range(rounds):  # refusals and sheds before
        whole.admit(running, waiting)
        whole.keep(running)
    bounded, within = deepcopy(whole), min(places, slots)
    expected = min(places, whole.admit(running, waiting, within).count)
    assert bounded.admit(running, waiting[:places], within).count == expected


class Counted(SimpleNamespace):
    """A request that counts how often anyone asks for its length."""

    asked = 0

    @property
    def seqlen(self):
        Counted.asked += 1
        return 1000


def round_over(waiting, admission=None, **changes):
    """One round over a queue; (those who joined, the scheduler, lengths asked for)."""
    scheduler = admission_rounds.scheduler_of(0)
    scheduler.waiting_queue = waiting
    vars(scheduler).update(changes)
    gate = admission_rounds.gate_of(scheduler, admission or Admission(ROOMY, 25e9))
    batch, Counted.asked = SimpleNamespace(reqs=[None] * RUNNING), 0
    return gate.round(fill_places, batch), scheduler, Counted.asked


def test_a_round_asks_no_more_requests_than_have_a_place():
    asked = []
    for waiting in WAITING:
        queue = [Counted(rid=i) for i in range(waiting)]
        joined, scheduler, count = round_over(list(queue))
        assert joined == queue[:PLACES] and scheduler.waiting_queue == queue[PLACES:]
        asked.append(count)
    assert asked == [asked[0]] * len(WAITING)
    assert asked[0] <= 2 * (PLACES + LOOK_AHEAD)


def test_the_whole_queue_is_asked_where_sglang_passes_requests_over():
    for changes in (
        {"schedule_policy": "lpm"},
        {"enable_priority_preemption": True},
        {"enable_lora": True},
        {"enable_hicache_storage": True},
        {"enable_lmcache": True},
    ):
        queue = [Counted(rid=i) for i in range(500)]
        assert round_over(queue, **changes)[2] >= 500


def test_a_full_batch_is_shown_one_request():
    """So that SGLang notes that it is full; a decode server has nothing to note."""
    seen = []
    queue = [Counted(rid=i) for i in range(5)]
    scheduler = admission_rounds.scheduler_of(0, RUNNING, 0)
    scheduler.waiting_queue = queue
    gate = admission_rounds.gate_of(scheduler, Admission(ROOMY, 25e9))
    batch = SimpleNamespace(reqs=[None] * RUNNING)
    for gate._is_decode_server in (False, True):
        gate.round(lambda scheduler, _: seen.append(len(scheduler.waiting_queue)), batch)
    assert seen == [1, 0] and scheduler.waiting_queue is queue


def test_what_is_added_meanwhile_comes_last():
    """SGLang's own round may put requests back, or take in those whose grammar is ready."""
    queue = [Counted(rid=i) for i in range(20)]
    late = [Counted(rid="late"), Counted(rid="later")]

    def upstream(scheduler, batch):
        scheduler.waiting_queue.append(late[0])
        joined = fill_places(scheduler, batch)
        scheduler.waiting_queue.append(late[1])
        return joined

    scheduler = admission_rounds.scheduler_of(0)
    scheduler.waiting_queue = list(queue)
    gate = admission_rounds.gate_of(scheduler, Admission(ROOMY, 25e9))
    joined = gate.round(upstream, SimpleNamespace(reqs=[None] * RUNNING))
    assert joined == queue[:PLACES]
    assert scheduler.waiting_queue == queue[PLACES:] + late


# --- nobody is lost -------------------------------------------------------------------------


class Injected(RuntimeError):
    pass


def fail(*args, **kwargs):
    raise Injected


class Batch:
    """A running batch of which the last requests are the first to go."""

    spec_algorithm = SpeculativeAlgorithm.NONE

    def __init__(self, reqs):
        self.reqs, self.batch_is_full = reqs, False

    def _get_decode_retraction_order(self, reqs):
        return range(len(reqs))

    def filter_batch(self, keep_indices):
        self.reqs = [self.reqs[i] for i in keep_indices]


def decode_server(monkeypatch, running, waiting):
    """(scheduler, batch, gate) whose gate keeps two of the running requests."""
    scheduler = admission_rounds.scheduler_of(0, len(running), 4)
    scheduler.waiting_queue, batch = list(waiting), Batch(list(running))
    scheduler.enable_overlap, scheduler.last_batch = False, None
    scheduler.req_to_token_pool = SimpleNamespace(req_to_token=None)
    scheduler.disagg_decode_transfer_queue = SimpleNamespace(
        queue=[], has_pending_deferred_releases=lambda: False
    )
    gate = admission_rounds.gate_of(scheduler, Admission(ROOMY, 25e9))
    gate._is_decode_server = True
    gate._warm_up = SimpleNamespace(warm=lambda *args: None, working_set=lambda req: None)
    gate.keep = lambda running_batch: 2
    monkeypatch.setattr(scheduler_gate, "gate_of", lambda scheduler: gate)
    return scheduler, batch, gate


POINTS = {
    "park": lambda scheduler, batch, gate: setattr(batch, "filter_batch", fail),
    "order": lambda scheduler, batch, gate: setattr(batch, "_get_decode_retraction_order", fail),
    "priorities": lambda scheduler, batch, gate: vars(scheduler).update(
        enable_priority_scheduling=True, policy=SimpleNamespace(calc_priority=fail)
    ),
    "working sets": lambda scheduler, batch, gate: setattr(gate._warm_up, "working_set", fail),
    "admit": lambda scheduler, batch, gate: setattr(gate.admission, "admit", fail),
    "agree": lambda scheduler, batch, gate: setattr(gate, "_agreed", fail),
    "warm up": lambda scheduler, batch, gate: setattr(gate._warm_up, "warm", fail),
    "upstream": lambda scheduler, batch, gate: None,
}


@pytest.mark.parametrize("point", POINTS)
def test_requests_come_back_whatever_fails(monkeypatch, point):
    running = [SimpleNamespace(rid=i, seqlen=100, finished=lambda: False) for i in range(6)]
    waiting = [SimpleNamespace(rid=10 + i, seqlen=100) for i in range(30)]
    scheduler, batch, gate = decode_server(monkeypatch, running, waiting)
    POINTS[point](scheduler, batch, gate)
    with pytest.raises(Injected):
        scheduler_gate.prebuilt_round(fail, scheduler, batch)
    parked = running[2:] if len(batch.reqs) == 2 else []
    assert batch.reqs + parked == running
    assert scheduler.waiting_queue == parked + waiting


def test_without_a_failure_the_parked_come_first(monkeypatch):
    running = [SimpleNamespace(rid=i, seqlen=100, finished=lambda: False) for i in range(6)]
    waiting = [SimpleNamespace(rid=10 + i, seqlen=100) for i in range(30)]
    allocator = EssPagedAllocator.__new__(EssPagedAllocator)
    scheduler, batch, _ = decode_server(monkeypatch, running, waiting)
    scheduler.token_to_kv_pool_allocator = allocator
    joined = scheduler_gate.prebuilt_round(fill_places, scheduler, batch)
    assert batch.reqs == running[:2] and scheduler.waiting_queue[:4] == running[2:]
    assert joined + scheduler.waiting_queue[4:] == waiting and allocator.is_idle is False


def test_the_benchmark_times_both_ways_and_leaves_the_queue_whole():
    found = admission_rounds.round_seconds(100, 3)
    assert {look: len(seconds) for look, seconds in found.items()} == dict.fromkeys(
        admission_rounds.LOOKS, 3
    )
    queue = [Counted(rid=i) for i in range(500)]
    policy = admission_rounds.SCHEDULE_POLICY[admission_rounds.WHOLE]
    joined, scheduler, asked = round_over(list(queue), schedule_policy=policy)
    assert joined == queue[:PLACES] and scheduler.waiting_queue == queue[PLACES:]
    assert asked >= 500
