"""What a round of admission costs the scheduler by how many wait: part of benchmarks/admission.py.

The production SchedulerGate.round over a scheduler that takes as many requests as it has places,
with nothing else in it, so its time is admission's own. Beside it the same round, looking at the
whole queue, and copies what does not join: the two alternate, so that what slows one slows both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

WAITING = (100, 1_000, 10_000)
RUNNING, PLACES = 24, 8
BOUNDED, WHOLE = LOOKS = "places", "whole queue"
ROUNDS, QUICK_ROUNDS = 200, 20


def scheduler_of(waiting: int, running: int = RUNNING, places: int = PLACES) -> SimpleNamespace:
    """What SchedulerGate asks of a colocated scheduler: first come, first served, one rank."""
    return SimpleNamespace(
        waiting_queue=[SimpleNamespace(seqlen=1000 + i % 7) for i in range(waiting)],
        max_running_requests=running + places,
        chunked_req=None,
        schedule_policy="fcfs",
        enable_priority_scheduling=False,
        enable_priority_preemption=False,
        enable_lora=False,
        enable_hicache_storage=False,
        enable_lmcache=False,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 10**9),
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        attn_tp_cpu_group=None,
    )


def gate_of(scheduler: Any, admission: Any) -> Any:
    """A SchedulerGate of one rank with this policy, without a pool."""
    from sglang_ess import scheduler_gate

    gate = object.__new__(scheduler_gate.SchedulerGate)
    gate._scheduler, gate.admission, gate._warm_up = scheduler, admission, None
    gate._is_decode_server = gate._arrives_cold = False
    gate._agreed = lambda number: number
    return gate


@contextmanager
def over_the_whole_queue() -> Iterator[None]:
    """Meanwhile a round asks about every request that waits, and copies those that do not join."""
    from sglang_ess.scheduler_gate import SchedulerGate

    @contextmanager
    def copying(self, count):
        scheduler = self._scheduler
        held = scheduler.waiting_queue[count:]
        scheduler.waiting_queue = scheduler.waiting_queue[:count]
        yield
        scheduler.waiting_queue = scheduler.waiting_queue + held

    production = SchedulerGate._reach, SchedulerGate._hiding_all_but
    SchedulerGate._reach = lambda self, running: len(self._scheduler.waiting_queue)
    SchedulerGate._hiding_all_but = copying
    try:
        yield
    finally:
        SchedulerGate._reach, SchedulerGate._hiding_all_but = production


def fill_places(scheduler: Any, running_batch: Any) -> list[Any]:
    """SGLang's own round: the queue's head takes the free places. Returns who joined."""
    places = scheduler.max_running_requests - len(running_batch.reqs)
    joined = scheduler.waiting_queue[:places]
    scheduler.waiting_queue = scheduler.waiting_queue[places:]
    return joined


def round_seconds(waiting: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by how far it looks. Who joined waits again, at the end."""
    from sglang_ess.admission.policy import Admission, AdmissionLimits

    limits = AdmissionLimits(hot_rows=1 << 26, topk=2048, layers=61, row_bytes=656)
    scheduler = scheduler_of(waiting)
    gate = gate_of(scheduler, Admission(limits, 25e9))
    batch = SimpleNamespace(reqs=[None] * RUNNING)
    joined: list[Any] = []

    def timed() -> float:
        began = time.perf_counter()
        gate.round(lambda *args: joined.extend(fill_places(*args)), batch)
        seconds = time.perf_counter() - began
        scheduler.waiting_queue += joined
        joined.clear()
        return seconds

    found: dict[str, list[float]] = {look: [] for look in LOOKS}
    for number in range(rounds + 2):
        for look in LOOKS:
            if look == WHOLE:
                with over_the_whole_queue():
                    seconds = timed()
            else:
                seconds = timed()
            if number >= 2:  # the first ones import and warm up
                found[look].append(seconds)
    return found
