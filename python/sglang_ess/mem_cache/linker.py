"""Prefixes from a store of files: SGLang's linker between its radix tree and sglang_ess.store.

SGLang asks the linker for the part of a prompt that the radix tree does not have (lookup), gives it
slots for that part (load), and hands it each new node of the tree (offload). Host rows are the
pool's own memory: the store reads into them and writes from them.

A load ends before the request joins a batch. Every byte has passed its checksum by then. Where one
has not, or the store is slow or gone, SGLang computes the prompt as if nothing were stored.
On one rank the load runs while the request waits (waiting_loads.py); load() is for what remains.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)

from sglang_ess import errors
from sglang_ess.errors import Refusal, in_one_line
from sglang_ess.mem_cache import agreement
from sglang_ess.mem_cache.page_parts import PageParts
from sglang_ess.mem_cache.page_transfer import open_transfer
from sglang_ess.mem_cache.page_transfer import reason as reason_of
from sglang_ess.mem_cache.pool import EssTokenToKVPool
from sglang_ess.store.page_store import StoreStats

logger = logging.getLogger(__name__)

# A load must be faster than this, or else the request computes: a slow disk reads as much.
LEAST_BYTES_PER_SECOND = 50e6
GRACE_SECONDS = 2.0  # and may take this long in any case
REST_SECONDS = 30.0  # after a load that was too slow, the store rests
# Of the slots, at most this share waits for the store. Their nodes cannot be evicted meanwhile.
PENDING_SHARE = 0.25


class LinkerFigures:
    """Counts of one linker since the start, for the metrics.

    lookup_pages, hit_pages: asked for, and of these there
    loaded_pages, loaded_bytes: of loads that succeeded
    saved_pages: handed to the store; skipped_pages: not, because too many were waiting
    load_seconds: of the loads since the metrics were updated last
    failures: by reason: "missing", "damaged", "slow", "error"
    """

    def __init__(self) -> None:
        self.lookup_pages = self.hit_pages = 0
        self.loaded_pages = self.loaded_bytes = 0
        self.saved_pages = self.skipped_pages = 0
        self.load_seconds: deque[float] = deque(maxlen=1000)
        self.failures: dict[str, int] = {}


class EssLinker(UnifiedCacheLinker):
    """SGLang's UnifiedCacheLinker over a PageStore.

    extra_config: "path", the store's directory; "limit_bytes", its size
    Each rank of an attention-TP group makes one. The leader asks the store what it has, and saves;
    the tier's writer loads the rows that all share, and each rank the rest.
    Raises: Refusal for a pool or options that it does not serve.
    """

    def __init__(
        self, server_args, params, *, components, extra_config=None, forward_stream=None
    ) -> None:
        self.forward_stream = forward_stream
        self.page_size = params.page_size
        self.pool = pool = params.token_to_kv_pool_allocator.get_kvcache()
        _check(params, components, pool)
        _check_hash()
        self._group = params.attn_tp_cache_group or params.tp_cache_group
        self._order = getattr(getattr(pool, "host_tier", None), "order", None)
        self.is_leader = agreement.leads(self._group)
        self.parts = PageParts(pool, params.mtp_draft_device_pools)
        self._transfer = open_transfer(extra_config or {}, server_args, self.parts, pool)
        self.pools = {PoolName.KV: pool}
        self.layer_done_counter = LayerWiseLoadCounter(pool.layer_num)
        self.figures = LinkerFigures()
        self._saver = ThreadPoolExecutor(1, "ess-save")
        self._loader = ThreadPoolExecutor(1, "ess-load")
        self._saves: deque[_Save] = deque()
        self._limit = int(PENDING_SHARE * (pool.size // self.page_size))
        self._rests_until = 0.0
        self._warned: set[str] = set()
        self.loads_while_waiting = self._group.size() == 1
        self.refused: set[str] = set()  # requests that have asked, or whose load has failed
        self.on_reset: Callable[[], None] = lambda: None
        self._readings: list[Reading] = []

    # --- lookup and load ----------------------------------------------------------------

    def lookup(self, rid, transfers) -> list[int]:
        """Every number of pages that can be loaded: all up to the first page that is not there."""
        keys = _kv(transfers).keys or []
        if not self.is_leader:  # SGLang takes the lengths that every rank names
            return list(range(1, len(keys) + 1))
        if time.monotonic() < self._rests_until or rid in self.refused:
            return []
        hits = self._guarded(lambda: self._transfer.store.contains(keys), "lookup") or 0
        self.figures.lookup_pages += len(keys)
        self.figures.hit_pages += hits
        return list(range(1, hits + 1))

    def load(self, rid, transfers) -> bool:
        """Fill the slots of a request. False: computing has to.

        Returns the same on every rank, and when nothing writes to the slots any more.
        """
        kv = _kv(transfers)
        if not kv.keys:
            return False
        since = time.monotonic()
        self._quiet()
        self.drop_hot_rows(kv.device_indices)
        pages = self._pages(kv.device_indices)
        failures: list[str] = []

        def read(numbers: Sequence[int]) -> None:
            if numbers and not failures:
                failures.extend(self._read(kv.keys, pages, numbers))

        numbers: Sequence[int] = range(len(self.parts))
        if self._order is not None and not self._order.is_sole:
            shared = self.parts.shared
            self._order.begin()
            self._order.write(read, shared)  # by one rank
            numbers = [i for i in numbers if i not in shared]
        read(numbers)
        failed = self._agree(bool(failures))
        if self.is_leader and not failed:
            self._count(len(pages), time.monotonic() - since)
        return not failed

    def _count(self, pages: int, seconds: float) -> None:
        self.figures.loaded_pages += pages
        self.figures.loaded_bytes += pages * self.parts.page_bytes
        self.figures.load_seconds.append(seconds)

    def begin(self, transfer: Any) -> Reading:
        """Read pages in the background, all parts of them. Nobody else may see the slots yet."""
        pages = self._pages(transfer.device_indices)
        self._readings = [one for one in self._readings if one.writes()]
        queued = sum(one.num_pages for one in self._readings) + len(pages)
        limit = _read_seconds(queued * self.parts.page_bytes)
        reading = Reading(self, transfer.keys, pages, limit)
        self._readings.append(reading)
        return reading

    def drop_hot_rows(self, slots: torch.Tensor) -> None:
        """Of slots that have been filled: before anybody can look them up."""
        if isinstance(self.pool, EssTokenToKVPool):
            self.pool.invalidate_slots(slots)

    def count_load(self, reading: Reading) -> None:
        """A load that has ended without a failure."""
        self._count(reading.num_pages, reading.seconds)

    def _read(self, keys: list[str], pages: list[int], numbers: Sequence[int]) -> list[str]:
        """Read parts of all pages. Returns why not, if so; never raises."""
        num_bytes = len(pages) * sum(self.parts.sizes[i] for i in numbers)
        limit = _read_seconds(num_bytes)
        futures: list[Future] = []
        try:
            for key, page in zip(keys, pages, strict=True):
                futures.append(self._transfer.read(key, page, numbers))
            done, late = wait_for(futures, limit, "FIRST_EXCEPTION")
            error = next((e for one in done if (e := one.exception()) is not None), None)
        except Exception as failure:
            error, late = failure, set(futures)
        if error is None and not late:
            return []
        for one in futures:
            one.cancel()
        wait_for(futures)  # what runs still writes to the slots
        return [self.failed_load(error, num_bytes, limit)]

    def failed_load(self, error: BaseException | None, num_bytes: int, limit: float) -> str:
        """Count a load that has failed, by an error or, without one, by being slow. The reason."""
        if error is None:
            self._rests_until = time.monotonic() + REST_SECONDS
            return self._failed("slow", f"{num_bytes} bytes in {limit:.1f} s, not all there")
        return self._failed(reason_of(error), f"{type(error).__name__}: {error}")

    def _failed(self, reason: str, text: str) -> str:
        self.figures.failures[reason] = self.figures.failures.get(reason, 0) + 1
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning(
                "ESS: a stored prefix could not be loaded and is computed: %s (%s). Said once; "
                "sglang:ess_store_failures_total counts.", reason, text,
            )  # fmt: skip
        return reason

    def _agree(self, failed: bool) -> bool:
        """Whether any rank has failed."""
        if self._group.size() == 1:
            return failed
        return agreement.least([int(not failed)], self._group) == [0]

    def _quiet(self) -> None:
        """Wait until the device writes no slot that may have been freed since."""
        for event in self._events():
            event.synchronize()

    def start_layer_wise_loading(self) -> int:
        return -1  # all is there when load returns

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        return False  # none is queued; SGLang frees the slots as those of any request

    # --- offload ------------------------------------------------------------------------

    def offload(self, transfers, session_id=None) -> bool:
        """Save the pages of a node, which the tree keeps until pop_completed_offload.

        Returns the same on every rank. Where too many pages wait, the node is not saved.
        """
        kv = _kv(transfers)
        if not kv.keys:
            return False
        save = _Save(list(kv.keys))
        self._saves.append(save)
        waiting = sum(len(one.keys) for one in self._saves)
        is_full = len(self._saves) > 1 and waiting > self._limit  # one alone is never too large
        if not self.is_leader or is_full:
            self.figures.skipped_pages += len(kv.keys) if self.is_leader else 0
            save.done.set_result(not self.is_leader)
            return True
        self.figures.saved_pages += len(save.keys)
        events = self._events()
        pages = self._pages(kv.device_indices)
        self._saver.submit(self._save, save, pages, events)
        return True

    def _events(self) -> list[Any]:
        """What the device writes by now; nothing on the CPU, which has written it."""
        return self.record_offload_ready() if torch.cuda.is_available() else []

    def _save(self, save: _Save, pages: list[int], events: list[Any]) -> None:
        """Write the pages, in the saver's thread. Sets save.done; never raises."""
        writes: list[Future] = []
        try:
            for event in events:
                event.synchronize()
            for key, page in zip(save.keys, pages, strict=True):
                writes.append(self._transfer.write(key, page))
            for one in writes:
                one.result()
            save.done.set_result(self._transfer.store.contains(save.keys) == len(save.keys))
        except Exception as error:
            wait_for(writes)
            self._failed("error", f"{type(error).__name__}: {error}")
            save.done.set_result(False)

    def num_completed_offloads(self) -> int:
        count = 0
        for save in self._saves:
            if not save.done.done():
                break
            count += 1
        return count

    def pop_completed_offload(self) -> bool:
        return self._saves.popleft().done.result()

    # --- life ---------------------------------------------------------------------------

    def reset(self) -> None:
        """Wait for what is being saved, and give up what is being loaded. The store keeps all."""
        self.on_reset()
        wait_for([save.done for save in self._saves])
        self._saves.clear()
        self.layer_done_counter.reset()

    def close(self) -> None:
        self.reset()
        self._saver.shutdown()
        self._loader.shutdown()
        self._transfer.close()

    def store_stats(self) -> StoreStats:
        """What the store counts, and its size now."""
        return self._transfer.store.stats()

    def _pages(self, slots: torch.Tensor) -> list[int]:
        """The pages of the slots [pages x page size], which SGLang allocates whole."""
        return (slots[:: self.page_size] // self.page_size).tolist()

    def _guarded(self, action: Callable[[], int], name: str) -> int | None:
        try:
            return action()
        except Exception as error:
            self._failed("error", f"{name}: {type(error).__name__}: {error}")
            return None


def _read_seconds(num_bytes: int) -> float:
    """What a read may take before it counts as slow."""
    return GRACE_SECONDS + num_bytes / LEAST_BYTES_PER_SECOND


class Reading:
    """Pages on their way from the store into slots, in the store's threads.

    ended: done once there is nothing to wait for: all there, or one of them failed
    failure: why not, once has_ended() says so; seconds: from the beginning to the end
    """

    def __init__(self, linker: EssLinker, keys: Sequence[str], pages: list[int], limit: float):
        self._linker, self._limit, self.num_pages = linker, limit, len(pages)
        self._futures: list[Future] = []
        self.ended, self.failure = Future[None](), ""
        self._since, self.seconds = time.monotonic(), 0.0
        self._error: BaseException | None = None
        self._left, self._lock = len(pages), threading.Lock()
        self._is_cancelled = False
        # In a thread: to list the buffers of many pages takes longer than a step may.
        self._begun = linker._loader.submit(self._begin, keys, pages, linker._events())

    def _begin(self, keys: Sequence[str], pages: list[int], events: list[Any]) -> None:
        linker, numbers = self._linker, range(len(self._linker.parts))
        try:
            for event in events:  # a pass under way may still write to slots that were freed
                event.synchronize()
            for key, page in zip(keys, pages, strict=True):
                if self._is_cancelled:
                    return
                future = linker._transfer.read(key, page, numbers)
                self._futures.append(future)
                future.add_done_callback(self._read)
        except Exception as error:
            self._end(error)

    def _read(self, future: Future) -> None:
        """A page is there, or not; in any thread."""
        error = None if future.cancelled() else future.exception()
        with self._lock:
            self._left -= 1
            left = self._left
        if error is not None or not left:
            self._end(error)

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            if not self.ended.done():
                self._error, self.seconds = error, time.monotonic() - self._since
                self.ended.set_result(None)

    def has_ended(self) -> bool:
        """Whether all is there, or `failure` says why not. A load that is too slow ends here."""
        # Asked once: an error that comes in now is reported the next time, with its reason.
        is_done = self.ended.done()
        is_late = not is_done and time.monotonic() - self._since > self._limit
        if not self.failure and (is_late or self._error is not None):
            num_bytes = self.num_pages * self._linker.parts.page_bytes
            self.failure = self._linker.failed_load(self._error, num_bytes, self._limit)
            self.cancel()
        return is_done or is_late

    def cancel(self) -> None:
        """Read no further page."""
        self._is_cancelled = True
        for one in list(self._futures):
            one.cancel()

    def writes(self) -> bool:
        """Whether a thread may still write to the slots."""
        return not (self._begun.done() and all(one.done() for one in list(self._futures)))

    def wait(self) -> None:
        """Until no thread writes to the slots."""
        wait_for([self._begun])
        wait_for(list(self._futures))


class _Save:
    """Pages of a node on their way into the store. done: whether all of them are there"""

    def __init__(self, keys: list[str]):
        self.keys, self.done = keys, Future[bool]()


def _kv(transfers: Sequence[Any]) -> Any:
    return next(one for one in transfers if one.name == PoolName.KV)


def _check(params: Any, components: Any, pool: Any) -> None:
    """Raises: Refusal for what the launcher's own checks did not see."""
    if set(components) != {ComponentType.FULL} or not hasattr(pool, "index_k_with_scale_buffer"):
        raise Refusal(
            "--ess-store must have a model whose layers are all of DeepSeek sparse attention: got "
            f"{type(pool).__name__}. Drop it."
        )
    if params.sidecar_draft_device_pools:
        raise Refusal(
            "--ess-store must have the model's own draft layer, or none: got another draft model. "
            "Drop it or --speculative-draft-model-path."
        )


def _check_hash() -> None:
    """Let SGLang compile the hash of its keys now, a minute at a host's first start.

    Raises: Refusal where it cannot; the scheduler would end at the first prompt.
    """
    from sglang.srt.mem_cache.utils import get_hash_str

    try:
        get_hash_str([0], page_size=1)
    except RuntimeError as error:
        raise Refusal(
            "--ess-store must have a C++ compiler and OpenSSL's headers, with which SGLang builds "
            f"its hash of prompts: got {in_one_line(errors.root(error))}. Install them or drop it."
        ) from error
