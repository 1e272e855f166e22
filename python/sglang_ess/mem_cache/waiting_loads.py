"""Stored prefixes are loaded while their requests wait, and while other requests go on.

SGLang would load a prefix when its request joins a batch: the scheduler waits for the files, and
every running request with it. Here a round of the scheduler starts the load of a waiting request,
into slots that nobody else can see, and hides the request from SGLang. A later round finds the
load ended. If every byte has passed its checksum, the rows join the radix tree, where the request
finds them like any other prefix. If not, the slots are freed and the request is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_ess.mem_cache.linker import EssLinker, Reading

MAX_LOADS = 4  # at a time: one alone keeps a disk busy, and each takes its slots early
IDLE_SECONDS = 0.005  # a scheduler with nothing else to do waits so long for a load's end


def waiting_loads_of(scheduler: Any) -> WaitingLoads | None:
    """The scheduler's loads; None without --ess-store, and with several ranks.

    Ranks would have to agree on each load's end; there, a load still ends within its round.
    """
    if "ess_waiting_loads" not in vars(scheduler):
        wrapper = getattr(getattr(scheduler, "tree_cache", None), "linker", None)
        linker = getattr(wrapper, "cache_linker", None)
        scheduler.ess_waiting_loads = None
        if isinstance(linker, EssLinker) and linker.loads_while_waiting:
            scheduler.ess_waiting_loads = WaitingLoads(scheduler, linker)
    return scheduler.ess_waiting_loads


class _Load(NamedTuple):
    """A load of a waiting request.

    key: of the prefix up to the end of what is loaded; device_tokens: its first part, in the tree
    node, lock: of that part, locked meanwhile; slots: int64 [tokens loaded]
    """

    req: Any
    reading: Reading
    key: RadixKey
    device_tokens: int
    node: Any
    lock: Any
    slots: Any


class WaitingLoads:
    """The loads of one scheduler's waiting requests."""

    def __init__(self, scheduler: Any, linker: EssLinker):
        self._scheduler, self._linker = scheduler, linker
        self._tree = scheduler.tree_cache
        self._loads: list[_Load] = []
        self._failed: list[_Load] = []  # whose slots are still being written
        # Requests whose prefix was looked up, and with how many output tokens: a request that
        # SGLang retracted is looked up again.
        self._asked: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        linker.on_reset = self._forget

    @contextmanager
    def hiding(self, running_batch: Any) -> Iterator[None]:
        """A round of SGLang that does not see the requests whose prefix is being loaded."""
        scheduler, queue = self._scheduler, self._scheduler.waiting_queue
        if not (queue or self._loads or self._failed):
            yield
            return
        kept = self._finish_loads(queue) if self._loads else []
        if self._failed:
            self._free_failed(queue, running_batch)
        if self._linker.refused:
            self._linker.refused &= {req.rid for req in queue}
        try:
            hidden = self._start_loads(queue, running_batch)
            if not hidden:
                yield
                return
            scheduler.waiting_queue = [req for req in queue if id(req) not in hidden]
            try:
                self._wait_if_idle(running_batch)
                yield
            finally:
                shown = scheduler.waiting_queue
                left = hidden.union(map(id, shown))
                were = set(map(id, queue))
                scheduler.waiting_queue = [req for req in queue if id(req) in left]
                scheduler.waiting_queue += [req for req in shown if id(req) not in were]
        finally:
            for node, lock in kept:
                self._tree.dec_lock_ref(node, lock)

    def _finish_loads(self, queue: list[Any]) -> list[tuple[Any, Any]]:
        """Take in what has been read. Returns the nodes of it, which are locked: their requests
        have this round to join.
        """
        waiting, kept, going = set(map(id, queue)), [], []
        for load in self._loads:
            if id(load.req) not in waiting:  # aborted
                load.reading.cancel()
                self._failed.append(load)
            elif not load.reading.has_ended():
                going.append(load)
            elif load.reading.failure:
                self._linker.refused.add(load.req.rid)
                self._failed.append(load)
            else:
                kept.append(self._insert(load))
        self._loads = going
        return kept

    def _free_failed(self, queue: list[Any], running_batch: Any) -> None:
        """Free the slots of failed loads that no thread writes to any more."""
        running = (self._scheduler.chunked_req, *running_batch.reqs)
        is_idle = not queue and all(req is None or req.finished() for req in running)
        writing = []
        for load in self._failed:
            if is_idle:  # SGLang checks now that no slot is lost
                load.reading.wait()
            if load.reading.writes():
                writing.append(load)
            else:
                self._scheduler.token_to_kv_pool_allocator.free(load.slots)
                self._tree.dec_lock_ref(load.node, load.lock)
        self._failed = writing

    def _insert(self, load: _Load) -> tuple[Any, Any]:
        """Give the rows to the radix tree, which frees slots of rows that it has got meanwhile."""
        self._linker.drop_hot_rows(load.slots)
        before = self._tree.tree_core.collect_full_device_indices(
            load.node, self._tree.root_node_handle(load.req.extra_key)
        )
        params = InsertParams(
            key=load.key,
            value=before.new_empty(len(load.key)),
            prev_prefix_len=load.device_tokens,
            priority=load.req.priority or 0,
        )
        params.value[: load.device_tokens] = before[: load.device_tokens]
        params.value[load.device_tokens :] = load.slots
        node = self._tree.insert(params).last_device_node
        lock = self._tree.inc_lock_ref(node).to_dec_params()
        self._tree.dec_lock_ref(load.node, load.lock)
        self._linker.count_load(load.reading)
        return node, lock

    def _start_loads(self, queue: list[Any], running_batch: Any) -> set[int]:
        """Start what there is room for. Returns the ids of the requests that SGLang must not see:
        those whose prefix is being loaded, and all that come behind while no more may begin.
        """
        hidden = {id(load.req) for load in self._loads}
        running = len(running_batch.reqs)
        if (running and running_batch.batch_is_full) or not queue:
            return hidden
        places = max(1, self._scheduler.max_running_requests - running)
        for place, req in enumerate(itertools.islice(queue, places)):
            if id(req) in hidden or self._asked.get(req) == len(req.output_ids):
                continue
            if len(self._loads) >= MAX_LOADS:
                return hidden.union(map(id, queue[place:]))
            if not self._ask(req, running_batch):
                break
            if self._loads and self._loads[-1].req is req:
                hidden.add(id(req))
        return hidden

    def _ask(self, req: Any, running_batch: Any) -> bool:
        """Look a request's prefix up, and start to load it. False: there is no room for it now."""
        if req.session is not None or req.positional_embed_overrides is not None:
            return True
        allocator = self._scheduler.token_to_kv_pool_allocator
        needed = req.seqlen + _new_tokens(req) + self._promised(running_batch)
        if needed > allocator.available_size() + self._tree.evictable_size():
            return False
        req.init_next_round_input(self._tree)  # as SGLang does before it admits a request
        marker = self._tree.linker.hit_markers.pop(req.rid, None)
        if marker is None:
            self._asked[req] = len(req.output_ids)
            self._linker.refused.add(req.rid)  # SGLang would look the same pages up once more
            return True
        num_tokens = len(marker.tail_hashes) * self._tree.page_size
        lock = self._tree.inc_lock_ref(req.last_node).to_dec_params()
        if (short := num_tokens - allocator.available_size()) > 0:
            self._tree.evict(EvictParams(num_tokens=short))
        slots = allocator.alloc(num_tokens)
        if slots is None:
            self._tree.dec_lock_ref(req.last_node, lock)
            return False
        self._asked[req] = len(req.output_ids)
        slots = slots.long()
        key = RadixKey(
            req.full_untruncated_fill_ids,
            req.extra_key,
            is_bigram=self._tree.tree_core.is_eagle,
            cache_salt=req.cache_salt,
        )[: marker.device_hit_len + num_tokens]
        transfer = PoolTransfer(name=PoolName.KV, device_indices=slots, keys=marker.tail_hashes)
        reading = self._linker.begin(transfer)
        self._loads.append(
            _Load(req, reading, key, marker.device_hit_len, req.last_node, lock, slots)
        )
        return True

    def _promised(self, running_batch: Any) -> int:
        """Slots that running requests, and those that wait for a load, will take.

        As many for the former as SGLang expects, but no less than any one can take: SGLang retracts
        all others for the last one, and a load's slots cannot be taken away.
        """
        ratio = self._scheduler.new_token_ratio_tracker.current
        running = [_new_tokens(req) for req in running_batch.reqs]
        loading = sum(load.req.seqlen - len(load.key) for load in self._loads)
        return max([int(ratio * sum(running)), *running]) + loading

    def _wait_if_idle(self, running_batch: Any) -> None:
        """Let the threads read where the scheduler would turn in circles."""
        scheduler = self._scheduler
        if not (scheduler.waiting_queue or running_batch.reqs or scheduler.chunked_req):
            wait_for([load.reading.ended for load in self._loads], IDLE_SECONDS, "FIRST_COMPLETED")

    def _forget(self) -> None:
        """The tree and the allocator begin anew, with all slots free."""
        for load in (*self._loads, *self._failed):
            load.reading.cancel()
            load.reading.wait()
        self._loads, self._failed = [], []
        self._linker.refused.clear()


def _new_tokens(req: Any) -> int:
    """What SGLang's own admission takes for the rest of a request's output, at most."""
    return min(max(req.sampling_params.max_new_tokens - len(req.output_ids), 0),
               CLIP_MAX_NEW_TOKENS)  # fmt: skip
