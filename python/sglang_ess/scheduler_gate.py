"""Admission in SGLang's scheduler, colocated and in disaggregated decode.

Both schedulers fill a batch from the head of their waiting queue, so both hooks do the same: they
report the last step to the policy (admission/policy.py), and hide the tail of the queue from SGLang
for one round. SGLang then decides about slots and rows of the request table as always. A request
joins when both agree.

Ranks that run one batch must admit and preempt alike, but their clocks, links and sampled lists
differ. So the policy of one rank decides, by the slowest of their links, and the others follow.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from sglang_ess.admission.feed import AdmissionFeed, LastStep, Totals
from sglang_ess.admission.policy import Admission, AdmissionLimits, Candidate
from sglang_ess.admission.working_set import WorkingSetWindow
from sglang_ess.config import EssConfig
from sglang_ess.disagg.decode_side import RequestWarmup
from sglang_ess.disagg.metadata import EssMetadataBuffers
from sglang_ess.layout import KIB
from sglang_ess.mem_cache import agreement
from sglang_ess.mem_cache.allocator import sparse_pool
from sglang_ess.mem_cache.pool import EssTokenToKVPool
from sglang_ess.mem_cache.waiting_loads import waiting_loads_of
from sglang_ess.metrics import SpeculationCounts
from sglang_ess.tiers.topk_sample import SAMPLES

logger = logging.getLogger(__name__)

LINK_SECONDS = 30  # between two measurements of the link
PREEMPTION_LOG_SECONDS = 10  # between two warnings of a thrashing hot tier


def prefill_round(original: Any, scheduler: Any, running_batch: Any) -> Any:
    """Body of the AROUND hook on Scheduler.get_new_batch_prefill: colocated serving."""
    loads = waiting_loads_of(scheduler)
    with nullcontext() if loads is None else loads.hiding(running_batch):
        return _admitted_round(original, scheduler, running_batch)


def _admitted_round(original: Any, scheduler: Any, running_batch: Any) -> Any:
    gate = gate_of(scheduler)
    if gate is None:
        return original(scheduler, running_batch)
    if (keep := gate.keep(running_batch)) is not None:
        # It stays set until a decode step; this round may run a prompt instead.
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
    try:
        batch = gate.round(original, running_batch)
    finally:
        scheduler.waiting_queue[:0] = parked
    scheduler.token_to_kv_pool_allocator.is_idle = batch is None and not holds_slots(
        scheduler, running_batch
    )
    return batch


def holds_slots(scheduler: Any, running_batch: Any) -> bool:
    """Whether any request of a decode server holds slots. Retracted requests hold none."""
    transfers = scheduler.disagg_decode_transfer_queue
    return bool(
        running_batch.reqs
        or scheduler.waiting_queue
        or scheduler.last_batch
        or transfers.queue
        or transfers.has_pending_deferred_releases()
    )


def park(scheduler: Any, running_batch: Any, keep: int) -> list[Any]:
    """Take all but `keep` requests out of the running batch. Returns them, the oldest first.

    They keep their slots and become like requests whose rows have arrived and that wait to join.
    A retraction would copy their rows out of the host tier and back, and block all transfers
    meanwhile.
    """
    _finish_step_under_way(scheduler)
    reqs = running_batch.reqs
    # In upstream's order of retraction: requests that lose least go first.
    order = running_batch._get_decode_retraction_order(reqs)
    live = [i for i in order if not reqs[i].finished()]
    kept, gone = set(order) - set(live[keep:]), sorted(live[keep:])
    parked = [reqs[i] for i in gone]
    for req in parked:
        req.retracted_stain = True  # its cached tokens are counted already
    if parked:
        keep_drafts(scheduler, running_batch, gone)
        running_batch.batch_is_full = False
        # Last, because nothing may fail between here and the caller's having them.
        running_batch.filter_batch(keep_indices=sorted(kept))
    return parked


def keep_drafts(scheduler: Any, batch: Any, indices: list[int]) -> None:
    """Store with these requests of a decode batch what their next drafts start from.

    SGLang drafts for a joining request from these attributes, which a transfer set. By now they
    are those of the prompt's end, and every draft from them would be rejected.
    """
    if not batch.spec_algorithm.is_eagle():
        return
    drafts, rows = batch.spec_info, indices
    sources = drafts.topk_p, drafts.topk_index, drafts.hidden_states
    if drafts.future_indices is not None:  # the overlapped loop has them by row of the table
        relay, rows = scheduler.future_map, [batch.reqs[i].kv.req_pool_idx for i in indices]
        sources = relay.topk_p_buf, relay.topk_index_buf, relay.hidden_states_buf
    for i, row in zip(indices, rows, strict=True):
        req, copies = batch.reqs[i], [source[row].to("cpu", copy=True) for source in sources]
        req.output_topk_p, req.output_topk_index, req.hidden_states_tensor = copies
        # A list of slots here, one of positions in a transfer: the draft model selects again.
        req.output_dsa_topk_indices = None


def _finish_step_under_way(scheduler: Any) -> None:
    """Process the result that the overlapped loop would process after the next launch.

    That result must not finish a request which is out of the batch by then: aborting a waiting
    request frees what it holds. Upstream's pause_generation does the same.
    """
    if scheduler.enable_overlap and scheduler.last_batch is not None and scheduler.result_queue:
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
        scheduler.last_batch = None


def gate_of(scheduler: Any) -> SchedulerGate | None:
    """The scheduler's gate; None where ESS serves one-tier."""
    if "ess_gate" not in vars(scheduler):
        pool = sparse_pool(scheduler.token_to_kv_pool_allocator)
        config = EssConfig.from_env()
        scheduler.ess_gate = None
        if config is not None and isinstance(pool, EssTokenToKVPool):
            scheduler.ess_gate = SchedulerGate(scheduler, pool, config)
    return scheduler.ess_gate


class SchedulerGate:
    """The admission of one scheduler: feeds the policy, and hides requests that may not join.

    admission: the policy, or None with --ess-admission off. On a rank that does not lead its group
        it observes and decides nothing.
    """

    def __init__(self, scheduler: Any, pool: EssTokenToKVPool, config: EssConfig):
        self._scheduler, self._pool = scheduler, pool
        self.admission: Admission | None = None
        geometry = pool.capacity.geometry
        if config.admission == "on":
            limits = AdmissionLimits(
                hot_rows=pool.capacity.hot_rows,
                topk=geometry.topk,
                layers=geometry.layers,
                row_bytes=geometry.row_bytes,
                itl_seconds=None if config.itl_ms is None else config.itl_ms / 1000,
                num_slots=pool.capacity.slots,
                queries=geometry.queries,
            )
            rate = self._link = pool.measure_link()
            self.admission = Admission(limits, rate)
            width = geometry.queries * geometry.topk
            window = WorkingSetWindow(pool.host_tier.num_slots, SAMPLES, width)
            layers = len(pool.sample.groups)
            self._feed = AdmissionFeed(self.admission, window, layers, self._totals())
            logger.info("ESS: host-to-device link %.1f GB/s at row size", rate / 1e9)
        self._speculation = SpeculationCounts(scheduler.metrics_reporter)
        self._accepted = 1.0  # tokens per request in the newest steps with a result
        buffers = getattr(scheduler, "disagg_metadata_buffers", None)
        warms = config.pd_warmup == "on" and isinstance(buffers, EssMetadataBuffers)
        self._warm_up = RequestWarmup(pool, buffers) if warms else None
        self._round_began = self._link_measured = time.perf_counter()
        self._preemption_logged = 0.0
        self._is_decode_server = buffers is not None
        # In colocated serving a prompt's own pass warms the hot tier.
        self._arrives_cold = self._is_decode_server or config.warmup == "off"

    # --- reports to the policy ------------------------------------------------------------

    def keep(self, running_batch: Any) -> int | None:
        """Report the last step. Returns how many requests may go on; None if all may."""
        if self.admission is None:
            return None
        now = time.perf_counter()
        last, seconds = self._scheduler.last_batch, now - self._round_began
        self._round_began = now
        # SGLang gives the batch of a verify step the mode of a decode step again.
        if last is None or not last.forward_mode.is_decode() or not last.reqs:
            return None
        policy_updated = self._feed.decoded(self._last_step(last.reqs, seconds))
        if now - self._link_measured > LINK_SECONDS:
            self._link_measured, self._link = now, self._pool.measure_link()
        running = keep = len(running_batch.reqs)
        # Ranks count steps alike, so all of them agree at the same step, and seldom: each
        # agreement costs a message.
        if policy_updated:
            keep, kib = self._agreed(self.admission.keep, running, int(self._link / KIB))
            self.admission.link(max(1, kib) * KIB)  # the slowest of the ranks' links
        if keep >= running:
            return None
        if self._leads and now - self._preemption_logged > PREEMPTION_LOG_SECONDS:
            self._preemption_logged = now
            logger.warning(
                "ESS: the hot tier thrashes (rows are evicted %.1f steps after their use): %d of "
                "%d requests go on, the others wait",
                self.admission.eviction_age or 0.0, keep, running,
            )  # fmt: skip
        return keep

    def _last_step(self, reqs: list[Any], seconds: float) -> LastStep:
        """The decode step of these requests; seconds: since the round before."""
        requests, sampled, topk = [req.rid for req in reqs], reqs[:SAMPLES], None
        if len(set(requests[:SAMPLES])) == len(sampled):  # the window needs distinct owners
            topk = self._pool.sample.rows[self._feed.layer, : len(sampled)].numpy()
        tokens, request_steps = self._speculation.since_last()
        if request_steps:
            self._accepted = tokens / request_steps
        lengths = [req.seqlen for req in sampled]
        return LastStep(requests, seconds, self._totals, topk, lengths, self._accepted)

    def _totals(self) -> Totals | None:
        totals = self._pool.totals()
        return None if totals is None else Totals(*totals)

    # --- the round ----------------------------------------------------------------------

    def round(self, original: Any, running_batch: Any) -> Any:
        """Run SGLang's own round over the part of the waiting queue that may join."""
        scheduler, count = self._scheduler, len(self._scheduler.waiting_queue)
        if self.admission is not None and count:
            if scheduler.enable_priority_scheduling:
                scheduler.policy.calc_priority(scheduler.waiting_queue, running_batch)
            running = len(running_batch.reqs) + (scheduler.chunked_req is not None)
            (count,) = self._agreed(self._joining, running)
        with self._hiding_all_but(count):
            if self._warm_up is not None:
                for req in scheduler.waiting_queue:
                    self._warm_up.warm(req, scheduler.req_to_token_pool.req_to_token)
            return original(scheduler, running_batch)

    @contextmanager
    def _hiding_all_but(self, count: int) -> Iterator[None]:
        """Show SGLang only the first `count` requests of the waiting queue meanwhile.

        Afterwards the queue is whole again, even after an error. What SGLang added meanwhile comes
        last. The hidden part is neither walked nor copied, however long it is.
        """
        scheduler, queue = self._scheduler, self._scheduler.waiting_queue
        if count >= len(queue):
            yield
            return
        head = queue[:count]
        scheduler.waiting_queue = list(head)
        try:
            yield
        finally:
            were, left = set(map(id, head)), scheduler.waiting_queue
            queue[:count] = [req for req in left if id(req) in were]
            queue += [req for req in left if id(req) not in were]
            scheduler.waiting_queue = queue

    def _reach(self, running: int) -> int:
        """How many requests at the head of the queue one round of SGLang can take."""
        scheduler = self._scheduler
        places = max(0, scheduler.max_running_requests - running)
        if self._is_decode_server:
            return places
        if self._passes_over:
            return len(scheduler.waiting_queue)
        # SGLang must see at least one, to notice that the batch is full.
        return max(1, places)

    @property
    def _passes_over(self) -> bool:
        """Whether a prompt round may take requests from anywhere in the queue, or others' places.

        The schedule policy may sort the whole queue. SGLang skips requests whose adapter or stored
        prefix is not loaded yet. With preemption a place need not be free.
        """
        scheduler = self._scheduler
        return (
            not (scheduler.schedule_policy == "fcfs" or scheduler.enable_priority_scheduling)
            or scheduler.enable_priority_preemption
            or scheduler.enable_lora
            or scheduler.enable_hicache_storage
            or scheduler.enable_lmcache
        )

    def _max_joining(self, running: int) -> int:
        """How many requests at the head of the queue have a place in the batch, and slots.

        Slots are counted as if no request shared a prefix.
        """
        scheduler = self._scheduler
        places = max(0, scheduler.max_running_requests - running)
        if self._is_decode_server:  # every waiting request has its slots
            return places
        free = scheduler.token_to_kv_pool_allocator.available_size()
        free += scheduler.tree_cache.evictable_size()
        needs = itertools.accumulate(req.seqlen for req in scheduler.waiting_queue[:places])
        return sum(1 for _ in itertools.takewhile(lambda need: need <= free, needs))

    @property
    def _leads(self) -> bool:
        return agreement.leads(self._scheduler.attn_tp_cpu_group)

    def _agreed(self, decide: Callable[[int], int], running: int, *own: int) -> list[int]:
        """[the leading rank's decide(running), the smallest of each number in `own` of all ranks].

        With DP attention, each data-parallel rank has a batch and a group of its own.
        """
        choice = decide(running) if self._leads else agreement.UNDECIDED
        return agreement.least([choice, *own], self._scheduler.attn_tp_cpu_group)

    def _joining(self, running: int) -> int:
        """How many requests at the head of the queue may join, by the policy."""
        assert self.admission is not None
        head = self._candidates(self._reach(running))
        return self.admission.admit(running, head, self._max_joining(running)).count

    def _candidates(self, count: int) -> Iterator[Candidate]:
        for req in itertools.islice(self._scheduler.waiting_queue, count):
            rows = self._warm_up.working_set(req) if self._warm_up else None
            yield Candidate(req.seqlen, rows, cold=self._arrives_cold and rows is None)
