"""Admission in SGLang's scheduler, colocated and in disaggregated decode.

Both schedulers fill a batch from the head of their waiting queue. So both hooks do the same:
tell the policy (admission.py) what the last steps did, and keep the tail of the queue out of
sight for this round. What SGLang decides about slots and rows of the request table stays its
own, and comes after: a request joins when both agree.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from sglang.srt.disaggregation.utils import all_reduce_flags

from sglang_ess.admission import Admission, Candidate, Limits, Step
from sglang_ess.attention.sampling import SAMPLES
from sglang_ess.config import EssConfig
from sglang_ess.disagg.metadata import EssMetadataBuffers
from sglang_ess.disagg.warmup import WarmUp
from sglang_ess.pool import EssTokenToKVPool
from sglang_ess.tiers.working_set import WorkingSetWindow

logger = logging.getLogger(__name__)

OBSERVED_STEPS = 4  # of one batch size, that are told to the policy at once
LINK_SECONDS = 30  # between two measurements of the link
SHED_LOG_SECONDS = 10


def prefill_round(original: Any, scheduler: Any, running_batch: Any) -> Any:
    """Body of the AROUND hook on Scheduler.get_new_batch_prefill: colocated serving."""
    gate = gate_of(scheduler)
    if gate is None:
        return original(scheduler, running_batch)
    if (keep := gate.keep(running_batch)) is not None:
        # Until it is done: this round may run a prompt instead of a decode step.
        scheduler.token_to_kv_pool_allocator.keep_running = keep
    return gate.round(original, running_batch)


def prebuilt_round(original: Any, scheduler: Any, running_batch: Any) -> Any:
    """Body of the AROUND hook on Scheduler._get_new_prebuilt_batch: disaggregated decode."""
    gate = gate_of(scheduler)
    if gate is None:
        return original(scheduler, running_batch)
    keep, parked = gate.keep(running_batch), []
    if keep is not None:
        parked = park(scheduler, running_batch, keep)
    batch = gate.round(original, running_batch)
    scheduler.waiting_queue[:0] = parked
    scheduler.token_to_kv_pool_allocator.is_idle = batch is None and not holds_slots(
        scheduler, running_batch
    )
    return batch


def holds_slots(scheduler: Any, running_batch: Any) -> bool:
    """Whether a request of a decode server has slots; those that were retracted have none."""
    transfers = scheduler.disagg_decode_transfer_queue
    return bool(
        running_batch.reqs
        or scheduler.waiting_queue
        or scheduler.last_batch
        or transfers.queue
        or transfers.has_pending_deferred_releases()
    )


def park(scheduler: Any, running_batch: Any, keep: int) -> list[Any]:
    """Take requests out of the running batch with all they hold; returns them, oldest first.

    A retraction would copy their rows out of the host tier and back, and let no transfer
    proceed meanwhile. A request whose rows have arrived and that waits to join is all that
    they need to be, so that is what they become.
    """
    _finish_step_under_way(scheduler)
    reqs = running_batch.reqs
    # Upstream's order of retraction: those that have the least to lose go.
    order = running_batch._get_decode_retraction_order(reqs)
    live = [i for i in order if not reqs[i].finished()]
    kept, gone = set(order) - set(live[keep:]), sorted(live[keep:])
    parked = [reqs[i] for i in gone]
    if parked:
        running_batch.filter_batch(keep_indices=sorted(kept))
        running_batch.batch_is_full = False
    for req in parked:
        req.retracted_stain = True  # its cached tokens are counted
    return parked


def _finish_step_under_way(scheduler: Any) -> None:
    """Take in the step whose result the overlapped loop would process after the next launch.

    A request that is out of the batch must not be finished by it: whoever aborts a waiting
    request frees what it holds. Upstream's own pause_generation does the same.
    """
    if scheduler.enable_overlap and scheduler.last_batch is not None and scheduler.result_queue:
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
        scheduler.last_batch = None


def gate_of(scheduler: Any) -> Gate | None:
    """The scheduler's gate; None where ESS serves one-tier."""
    if "ess_gate" not in vars(scheduler):
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        config = EssConfig.from_env()
        two_tiers = config is not None and isinstance(pool, EssTokenToKVPool)
        scheduler.ess_gate = Gate(scheduler, pool, config) if two_tiers else None
    return scheduler.ess_gate


class Gate:
    """One scheduler's admission: feeds the policy, and hides what may not join from SGLang.

    admission: the policy, or None with --ess-admission off
    """

    def __init__(self, scheduler: Any, pool: EssTokenToKVPool, config: EssConfig):
        self._scheduler, self._pool = scheduler, pool
        self.admission: Admission | None = None
        geometry = pool.capacity.geometry
        if config.admission == "on":
            limits = Limits(
                hot_rows=pool.capacity.hot_rows,
                topk=geometry.topk,
                layers=geometry.layers,
                row_bytes=geometry.row_bytes,
                itl_seconds=None if config.itl_ms is None else config.itl_ms / 1000,
                num_slots=pool.capacity.slots,
            )
            rate = pool.measure_link()
            self.admission = Admission(limits, rate)
            self._window = WorkingSetWindow(pool.host_tier.num_slots, SAMPLES, geometry.topk)
            logger.info("ESS: host-to-device link %.1f GB/s at row size", rate / 1e9)
        buffers = getattr(scheduler, "disagg_metadata_buffers", None)
        warms = config.pd_warmup == "on" and isinstance(buffers, EssMetadataBuffers)
        self._warm_up = WarmUp(pool, buffers) if warms else None
        self._layer = 0  # of the sample, whose window is under way
        self._before = pool.totals() or (0, 0, 0)
        self._steps, self._seconds, self._requests = 0, 0.0, 0
        self._round_began = self._link_measured = time.perf_counter()
        self._shed_logged = 0.0
        # Colocated, a prompt's own pass warms the tier.
        self._arrives_cold = buffers is not None or config.warmup == "off"

    # --- what the policy is told --------------------------------------------------------

    def keep(self, running_batch: Any) -> int | None:
        """Take note of the last step; how many may go on if not all of running_batch."""
        if self.admission is None:
            return None
        now = time.perf_counter()
        last, seconds = self._scheduler.last_batch, now - self._round_began
        self._round_began = now
        if last is None or not last.forward_mode.is_decode() or not last.reqs:
            return None
        told = self._decoded(last.reqs, seconds)
        if now - self._link_measured > LINK_SECONDS:
            self._link_measured = now
            self.admission.link(self._pool.measure_link())
        running = len(running_batch.reqs)
        # Only then, because ranks count steps alike, and to agree costs a message each.
        keep = self._agreed(self.admission.keep(running)) if told else running
        if keep >= running:
            return None
        if now - self._shed_logged > SHED_LOG_SECONDS:
            self._shed_logged = now
            logger.warning(
                "ESS: the hot tier thrashes (rows are evicted %.1f steps after their use): %d of "
                "%d requests go on, the others wait",
                self.admission.eviction_age or 0.0, keep, running,
            )  # fmt: skip
        return keep

    def _decoded(self, reqs: list[Any], seconds: float) -> bool:
        """One decode step of these requests, so many seconds after the round before.

        Returns whether the policy was told of it.
        """
        if len(reqs) != self._requests:
            self._flush()
            self._requests = len(reqs)
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        told = self._steps == OBSERVED_STEPS
        if told:
            self._flush()
        self._sample(reqs)
        return told

    def _sample(self, reqs: list[Any]) -> None:
        """Count what the step's first requests selected, when a window of steps is full."""
        sampled = {hash(req.rid): req for req in reqs[:SAMPLES]}
        if len(sampled) < min(len(reqs), SAMPLES):
            return
        topk = self._pool.sample.rows[self._layer, : len(sampled)].numpy()
        counts = self._window.add(topk, list(sampled))
        if counts is None:
            return
        self._layer = (self._layer + 1) % len(self._pool.sample.layers)
        sizes = [(sampled[owner].seqlen, rows) for owner, rows in counts.rows.items()]
        self.admission.observe_working_sets(sizes, counts.sharing)

    def _flush(self) -> None:
        """Tell the policy of the steps since the last time."""
        totals = self._pool.totals()
        if totals is None or not self._steps:
            self._steps, self._seconds = 0, 0.0  # the device has not reported: not these
            return
        misses, evictions, age = (now - old for now, old in zip(totals, self._before, strict=True))
        self._before = totals
        if min(misses, evictions, age) >= 0:  # else the counters began again
            seconds = self._seconds / self._steps
            self.admission.observe(
                Step(self._steps, self._requests, seconds, misses, evictions, age)
            )
        self._steps, self._seconds = 0, 0.0

    # --- the round ----------------------------------------------------------------------

    def round(self, original: Any, running_batch: Any) -> Any:
        """SGLang's own round, over the part of the waiting queue that may join."""
        scheduler = self._scheduler
        held: list[Any] = []
        if self.admission is not None and scheduler.waiting_queue:
            if scheduler.enable_priority_scheduling:
                scheduler.policy.calc_priority(scheduler.waiting_queue, running_batch)
            running = len(running_batch.reqs) + (scheduler.chunked_req is not None)
            count = self._agreed(self.admission.admit(running, self._candidates()).count)
            held = scheduler.waiting_queue[count:]
            scheduler.waiting_queue = scheduler.waiting_queue[:count]
        if self._warm_up is not None:
            self._warm(scheduler.waiting_queue, held)
        try:
            return original(scheduler, running_batch)
        finally:
            scheduler.waiting_queue = scheduler.waiting_queue + held

    def _agreed(self, number: int) -> int:
        """The least of all ranks that run one batch: their clocks and links differ."""
        group = self._scheduler.attn_tp_cpu_group
        return all_reduce_flags([number], group, torch.distributed.ReduceOp.MIN)[0]

    def _candidates(self) -> Iterator[Candidate]:
        for req in self._scheduler.waiting_queue:
            rows = self._warm_up.working_set(req) if self._warm_up else None
            yield Candidate(req.seqlen, rows, cold=self._arrives_cold and rows is None)

    def _warm(self, joining: list[Any], held: list[Any]) -> None:
        """Disaggregated decode: the rows that a joining prompt's end selected become hot."""
        table = self._scheduler.req_to_token_pool.req_to_token
        for req in joining:
            self._warm_up.warm(req, table)
        self._warm_up.forget_others(held)
