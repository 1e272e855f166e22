"""What a round of admission costs the scheduler by how many requests wait: part of admission.py.

The production SchedulerGate runs a round over a scheduler that does nothing but fill its free
places, so the time is that of admission alone. Two schedulers alternate: with one, admission asks
only about requests that have a place; with the other (a policy that may sort the whole queue) about
every request that waits.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

WAITING = (100, 1_000, 10_000)
RUNNING, PLACES = 24, 8
BOUNDED, WHOLE = LOOKS = "places", "whole queue"
SCHEDULE_POLICY = {BOUNDED: "fcfs", WHOLE: "lpm"}  # SGLang sorts the queue for "lpm"
ROUNDS, QUICK_ROUNDS = 200, 20


def scheduler_of(
    waiting: int, running: int = RUNNING, places: int = PLACES, schedule_policy: str = "fcfs"
) -> SimpleNamespace:
    """A stand-in for SGLang's colocated scheduler with one rank: what SchedulerGate reads of it."""
    return SimpleNamespace(
        waiting_queue=[SimpleNamespace(seqlen=1000 + i % 7) for i in range(waiting)],
        max_running_requests=running + places, chunked_req=None, metrics_reporter=None,
        schedule_policy=schedule_policy, enable_priority_scheduling=False,
        enable_priority_preemption=False, enable_lora=False, enable_hicache_storage=False,
        enable_lmcache=False,
        token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: 10**9),
        tree_cache=SimpleNamespace(evictable_size=lambda: 0),
        attn_tp_cpu_group=SimpleNamespace(size=lambda: 1),
    )  # fmt: skip


def gate_of(scheduler: Any, admission: Any = None) -> Any:
    """A SchedulerGate over a stand-in for the pool. admission: replaces the gate's own policy"""
    from sglang_ess.config import EssConfig
    from sglang_ess.scheduler_gate import SchedulerGate

    geometry = SimpleNamespace(topk=2048, layers=61, row_bytes=656, queries=1)
    pool = SimpleNamespace(
        capacity=SimpleNamespace(hot_rows=1 << 26, slots=1 << 27, geometry=geometry),
        measure_link=lambda: 25e9,
        host_tier=SimpleNamespace(num_slots=64),
        sample=SimpleNamespace(groups=[0]),
        totals=lambda: None,
    )
    gate = SchedulerGate(scheduler, pool, EssConfig(admission="on", warmup="on"))
    gate.admission = admission or gate.admission
    return gate


def fill_places(scheduler: Any, running_batch: Any) -> list[Any]:
    """SGLang's own round: the queue's head takes the free places. Returns who joins."""
    places = scheduler.max_running_requests - len(running_batch.reqs)
    joined = scheduler.waiting_queue[:places]
    scheduler.waiting_queue = scheduler.waiting_queue[places:]
    return joined


def round_seconds(waiting: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by LOOKS. Requests that join go back to the end of the queue."""
    gates = []
    for look in LOOKS:
        scheduler = scheduler_of(waiting, schedule_policy=SCHEDULE_POLICY[look])
        gates.append((look, scheduler, gate_of(scheduler)))
    batch = SimpleNamespace(reqs=[None] * RUNNING)
    found: dict[str, list[float]] = {look: [] for look in LOOKS}
    for number in range(rounds + 2):
        for look, scheduler, gate in gates:
            began = time.perf_counter()
            joined = gate.round(fill_places, batch)
            seconds = time.perf_counter() - began
            scheduler.waiting_queue += joined
            if number >= 2:  # the first rounds import and warm up
                found[look].append(seconds)
    return found
