"""One layer's hot tier: device copies of host rows, keyed by slot, shared by all requests."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass

import numpy as np
import torch

from sglang_ess.tiers import lru
from sglang_ess.tiers.balance.ghost_cache import GhostCache
from sglang_ess.tiers.hot_arena import ARENA_ROW_BYTES, HotArena
from sglang_ess.tiers.row_words import as_words
from sglang_ess.tiers.throttled_link import ThrottledLink

# Per hot row: what the arena has of it, its entry in the free list, and two entries of the queue
# with their steps; 4 B each. Per slot: its row.
HOT_ROW_OVERHEAD_BYTES = ARENA_ROW_BYTES + 20
CANARY_ROWS = 16  # that one check_rows of the canary compares


class RowCorruption(RuntimeError):
    """A hot row that differs from its host row: invariant 2 is broken."""


class PlanBuffers:
    """Scratch of plan and install, shared by the layers, which use it one after another.

    Grows to the largest request seen and keeps that size: `nbytes` of device memory.
    """

    def __init__(self, num_lookups: int = 0):
        self._allocate(num_lookups)

    def _allocate(self, num_lookups: int) -> None:
        self.rows = np.empty(num_lookups, np.int32)
        self.miss_slots = np.empty(num_lookups, np.int32)
        self.miss_rows = np.empty(num_lookups, np.int32)

    def reserve(self, num_lookups: int) -> None:
        """Effect: what an earlier plan handed out is no longer valid."""
        if num_lookups > len(self.rows):
            self._allocate(num_lookups)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.miss_slots.nbytes + self.miss_rows.nbytes


@dataclass(frozen=True)
class Plan:
    """What one pass of attention reads, and what has to be fetched before it.

    first, queries: the pass covers top-k rows [first, first + queries)
    column      of the first query: the columns before it were in an earlier pass
    rows        [queries, K] int32 hot rows; -1 for a pad and for what another pass covers
    miss_slots  [misses] int32: host rows to fetch, each once
    miss_rows   [misses] int32: the hot rows that take them
    stop        (query, column) where the next pass begins; None after the last
    Views of PlanBuffers: valid until the next plan or install of any layer.
    """

    first: int
    column: int
    rows: torch.Tensor
    miss_slots: np.ndarray
    miss_rows: np.ndarray
    stop: tuple[int, int] | None

    @property
    def queries(self) -> slice:
        return slice(self.first, self.first + self.rows.shape[0])


class HotCache:
    """Copies of one layer's host rows, least recently used out first.

    A slot is *hot* (it has a hot row, equal to its host row) or not; a hot row is free or
    belongs to one slot. plan and warm make slots hot, install may, invalidate ends it, and
    so does eviction. There is no dirty state: whoever writes a host row calls install or
    invalidate for its slot before the next plan (invariants 1 to 3). A plan whose slots all
    fit is one pass, in which no miss evicts a slot of this plan, looked up already or not
    (invariant 4). Otherwise a pass ends where no row is left that it does not use itself, and
    the next one goes on (invariant 5).

    host_rows  [slots, ...] one layer of the host tier, or None to run the policy alone
    num_rows   hot rows, at least 1 and no more than slots
    link       how fast rows come from the host tier; None: as fast as they can
    arena      where its rows are, shared with other layers' caches; None: one of its own
    ghost      is told what this cache is asked, while there is one
    With as many rows as slots nothing is ever evicted, and no order of use is kept.
    counters: since the start; misses of the last step, by query, are in query_misses.
    Raises: ValueError for a num_rows outside its limits, or rows not of 8-byte words or not there.
    """

    def __init__(
        self,
        host_rows: torch.Tensor | None,
        num_rows: int,
        num_slots: int | None = None,
        buffers: PlanBuffers | None = None,
        link: ThrottledLink | None = None,
        arena: HotArena | None = None,
    ):
        self.num_slots = len(host_rows) if host_rows is not None else num_slots or 0
        self._check_size(num_rows)
        self.host_rows, self._link = host_rows, link
        self._host_words = self._hot_words = None
        if host_rows is not None:
            self._host_words = as_words(host_rows)
        self.arena = arena or HotArena(num_rows, host_rows)
        self.rows, self.row_slot = self.arena.rows, self.arena.row_slot
        self.row_place = self.arena.row_place
        if host_rows is not None:
            self._hot_words = as_words(self.rows)
        self.buffers = buffers or PlanBuffers()
        self.query_misses = np.zeros(0, np.int64)
        self.ghost: GhostCache | None = None
        # Its own arena does not know it: a cycle would keep the arrays until a collection.
        self.number = 0 if arena is None else arena.add(self)
        self._use_arrays(lru.new_state(self.num_slots, self.arena.take(self.number, num_rows)))

    def _check_size(self, num_rows: int) -> None:
        if not 1 <= num_rows <= self.num_slots:
            raise ValueError(
                f"hot rows must be 1 to {self.num_slots}, the slots of the host tier: "
                f"got {num_rows}."
            )

    def _use_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self.state, self.free, self.queue = arrays["state"], arrays["free"], arrays["queue"]
        self.slot_row, self.queue_step = arrays["slot_row"], arrays["queue_step"]
        self._lru = (self.slot_row, self.row_slot, self.row_place, self.queue, self.queue_step)

    # --- decode -------------------------------------------------------------------------

    def plan(
        self, topk: torch.Tensor, start: tuple[int, int] = (0, 0), same_step: bool = False
    ) -> Plan:
        """Give every slot of topk [queries, K] int32 a hot row, from start as far as they go.

        Effect: the misses' rows are theirs already; fetch has to fill them before anything
        reads them. start (0, 0) clears query_misses and begins a step, the unit of ages,
        unless same_step says that this is more queries of the step before.
        """
        topk = topk.contiguous()
        if self.ghost is not None and start == (0, 0):
            self.ghost.access(topk)
        topk = topk.numpy()
        num_queries, width = topk.shape
        buffers, (query, column) = self.buffers, start
        buffers.reserve(num_queries * width)
        if start == (0, 0):
            self.state[lru.STEP] += not same_step
            if len(self.query_misses) != num_queries:
                self.query_misses = np.zeros(num_queries, np.int64)
            self.query_misses[:] = 0
        rows = buffers.rows[: num_queries * width].reshape(num_queries, width)
        count, stop_query, stop_column, misses = lru.plan(
            topk,
            query,
            column,
            *self._lru,
            self.free,
            self.state,
            rows,
            buffers.miss_slots,
            buffers.miss_rows,
            self.query_misses,
        )
        return Plan(
            query,
            column,
            torch.from_numpy(rows[query : query + count]),
            buffers.miss_slots[:misses],
            buffers.miss_rows[:misses],
            None if stop_query == num_queries else (stop_query, stop_column),
        )

    def fetch(self, plan: Plan) -> None:
        """Copy the plan's missed rows from the host tier."""
        self._load(plan.miss_slots, plan.miss_rows)

    # --- writes -------------------------------------------------------------------------

    def install(self, slots: torch.Tensor, rows: torch.Tensor, min_age: int = 0) -> int:
        """Make the slots just written hot, where there is room. Returns how many are.

        slots [n] int64, rows [n, ...] their values as the host tier has them
        A slot that is hot is updated. Another takes a free row, or the least recently used
        if that was last used min_age steps ago or more.
        """
        if self.ghost is not None:
            self.ghost.install(slots, min_age)
        self.buffers.reserve(len(slots))
        sources, targets = self.buffers.miss_slots, self.buffers.miss_rows
        count = lru.install(
            slots.numpy(), min_age, *self._lru, self.free, self.state, sources, targets
        )
        if self.rows is not None:
            self._copy(as_words(rows), sources[:count], targets[:count])
        return count

    def invalidate(self, slots: torch.Tensor) -> None:
        """The slots [n] int64 are not hot any more; their rows are free."""
        if self.ghost is not None:
            self.ghost.invalidate(slots)
        lru.invalidate(
            slots.numpy(), self.slot_row, self.row_slot, self.row_place, self.free, self.state
        )

    def warm(self, topk: torch.Tensor) -> int:
        """Make the slots of topk [queries, K] int32 hot, in order. Returns rows filled.

        ESS's LRU-warmup (papers.md 1.5): as if each query were a decode step, uncounted.
        """
        if self.ghost is not None:
            self.ghost.warm(topk)
        self.buffers.reserve(topk.numel())
        slots, rows = self.buffers.miss_slots, self.buffers.miss_rows
        unread = self.buffers.rows[: topk.numel()].reshape(topk.shape)
        topk = topk.contiguous().numpy()
        count = lru.warm(topk, *self._lru, self.free, self.state, unread, slots, rows)
        self._load(slots[:count], rows[:count])
        return count

    def clear(self) -> None:
        """Every row free; the counters start again."""
        rows = self.arena.rows_of(self.number)
        self.row_slot[rows] = self.row_place[rows] = -1
        self._use_arrays(lru.new_state(self.num_slots, rows))
        if self.ghost is not None:
            self.ghost.clear()

    # --- size ---------------------------------------------------------------------------

    def resize(self, num_rows: int) -> None:
        """Have num_rows hot rows: give some up to the arena, or take spare ones. Between steps.

        Fewer: free rows go first, then the least recently used, which are evicted. What stays
        keeps its row and its order of use.
        Raises: ValueError for a num_rows outside its limits, or more than are spare.
        """
        self._check_size(num_rows)
        more = num_rows - self.num_rows
        taken = self.arena.take(self.number, max(0, more))
        if more < 0:
            released = np.empty(-more, np.int32)
            lru.release(*self._lru, self.free, self.state, released)
            self.arena.give_back(released)
        state, arrays = self.state, lru.new_state(0, np.empty(num_rows, np.int32))
        for name, count in (("queue", lru.TAIL), ("queue_step", lru.TAIL), ("free", lru.FREE)):
            arrays[name][: state[count]] = self._arrays[name][: state[count]]
        if more > 0:
            arrays["free"][state[lru.FREE] : state[lru.FREE] + more] = taken[::-1]
            state[lru.FREE] += more
            state[lru.ROWS] += more
        self._use_arrays(arrays | {"slot_row": self.slot_row, "state": state})

    # --- figures and checks -------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int]:
        """lookups, misses (rows fetched), evictions, evicted_age (sum, in steps), installs,
        skipped (written slots that got no row).
        """
        values = self.state[lru.LOOKUPS : lru.STATE_SIZE].tolist()
        return dict(zip(lru.COUNTERS, values, strict=True))

    @property
    def steps(self) -> int:
        """Plans so far: the unit of ages."""
        return int(self.state[lru.STEP])

    @property
    def num_rows(self) -> int:
        """Hot rows it has now."""
        return int(self.state[lru.ROWS])

    @property
    def occupied(self) -> int:
        """Hot rows in use."""
        return self.num_rows - int(self.state[lru.FREE])

    @property
    def nbytes(self) -> int:
        """Device bytes: its rows, maps and queue, without the shared buffers and the ghost."""
        row_bytes = ARENA_ROW_BYTES + (self.rows[0].nbytes if self.rows is not None else 0)
        return self.num_rows * row_bytes + sum(array.nbytes for array in self._arrays.values())

    def slots_by_recency(self) -> np.ndarray:
        """The hot slots [n] int32, least recently used first."""
        rows = self.queue[self.state[lru.HEAD] : self.state[lru.TAIL]]
        places = np.arange(self.state[lru.HEAD], self.state[lru.TAIL])
        return self.row_slot[rows[self.row_place[rows] == places]]

    def check_rows(self, picks: np.ndarray, name: str) -> None:
        """Compare hot rows, picked by number modulo the arena's rows, with their host rows.

        picks [n] int64; name: of the layer, for the message
        Raises: RowCorruption with the slot and both checksums.
        """
        if self.rows is None:
            return
        row = lru.first_difference(
            self._host_words, self._hot_words, self.slot_row, self.row_slot, picks
        )
        if row < 0:
            return
        slot = int(self.row_slot[row])
        pair = self._host_words[slot], self._hot_words[row]
        host, hot = (zlib.crc32(words.tobytes()) for words in pair)
        raise RowCorruption(
            f"hot row must equal its host row (invariant 2): got {name}, slot {slot}, hot row "
            f"{row}: crc32 {hot:08x}, host row crc32 {host:08x}. Stop this server, keep its log "
            "and report it; --disable-ess serves without hot rows."
        )

    def check_integrity(self) -> None:
        """Every row against every invariant a state can show. Raises: RuntimeError."""
        own = self.arena.rows_of(self.number)
        rows = own[self.row_slot[own] >= 0]
        slots = np.flatnonzero(self.slot_row >= 0)
        free = self.free[: self.state[lru.FREE]]
        head, tail = self.state[lru.HEAD], self.state[lru.TAIL]
        live = self.row_place[rows]
        problems = {
            "a hot row's slot must map back to it": (
                len(rows) == len(slots) and (self.slot_row[self.row_slot[rows]] == rows).all()
            ),
            "a row must be free or owned": np.array_equal(np.sort(np.append(free, rows)), own),
            "a layer must own as many rows as it has": len(own) == self.num_rows,
            "a free row must have no place in the queue": (
                (self.row_place[own[self.row_slot[own] < 0]] < 0).all()
            ),
            "an owned row must have one live place in the queue": (
                ((head <= live) & (live < tail)).all() and (self.queue[live] == rows).all()
            ),
            "a hot row must equal its host row": self.rows is None or np.array_equal(
                self._hot_words[rows], self._host_words[self.row_slot[rows]]
            ),
        }  # fmt: skip
        if broken := [rule for rule, holds in problems.items() if not holds]:
            raise RuntimeError("; ".join(broken))

    def _load(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Copy host rows of the slots into hot rows, over the link."""
        since = time.perf_counter()
        self._copy(self._host_words, slots, rows)
        if self._link is not None and self.rows is not None:
            num_bytes = len(slots) * self._hot_words[0].nbytes
            self._link.carried(num_bytes, time.perf_counter() - since)

    def _copy(self, source: np.ndarray, source_rows: np.ndarray, rows: np.ndarray) -> None:
        if self.rows is not None and len(rows):
            lru.copy_rows(source, self._hot_words, source_rows, rows, len(rows))
