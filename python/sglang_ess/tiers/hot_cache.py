"""One index group's hot tier on the CPU: copies of host rows, keyed by slot, for all requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sglang_ess.tiers import lru
from sglang_ess.tiers.contract import COUNTERS, HotTier, LookupObserver, RowCorruption
from sglang_ess.tiers.early_rows import FETCHED, MIN_AGE, USED, EarlyRows
from sglang_ess.tiers.hot_arena import ARENA_ROW_BYTES, HotArena
from sglang_ess.tiers.row_words import as_words
from sglang_ess.tiers.shared_fetch import SharedFetch
from sglang_ess.tiers.throttled_link import ThrottledLink

NOTHING = np.empty(0, np.int32)
# Per hot row: its part of the arena, its entry in the free list, and two entries of the queue with
# their steps (4 B each).
HOT_ROW_OVERHEAD_BYTES = ARENA_ROW_BYTES + 20


class PlanBuffers:
    """Scratch of plan and install. Index groups share it and use it one after another.

    It grows to the largest plan seen and keeps that size.
    """

    def __init__(self, num_lookups: int = 0):
        self._allocate(num_lookups)

    def _allocate(self, num_lookups: int) -> None:
        self.rows = np.empty(num_lookups, np.int32)
        self.miss_slots = np.empty(num_lookups, np.int32)
        self.miss_rows = np.empty(num_lookups, np.int32)

    def reserve(self, num_lookups: int) -> None:
        """Make room for a plan of num_lookups. Effect: earlier Plans may become invalid."""
        if num_lookups > len(self.rows):
            self._allocate(num_lookups)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.miss_slots.nbytes + self.miss_rows.nbytes


@dataclass(frozen=True)
class Plan:
    """The hot rows that one pass of attention reads, and the rows to fetch before it.

    first       the pass covers the batch's queries [first, first + len(rows))
    column      column of the first query where the pass begins; an earlier pass has the others
    rows        [queries, K] int32 hot rows; -1 for a pad and for a slot that another pass covers
    miss_slots  [misses] int32 host rows to fetch, each once
    miss_rows   [misses] int32 the hot rows that take them
    stop        (query, column) where the next pass begins; None after the last
    The arrays are views of PlanBuffers, valid until the next plan or install of any group.
    """

    first: int
    column: int
    rows: torch.Tensor
    miss_slots: np.ndarray
    miss_rows: np.ndarray
    stop: tuple[int, int] | None

    @property
    def queries(self) -> slice:
        """The batch's queries that the pass covers."""
        return slice(self.first, self.first + self.rows.shape[0])

    def kept(self) -> Plan:
        """A copy, which later plans leave alone."""
        slots, rows = self.miss_slots.copy(), self.miss_rows.copy()
        return replace(self, rows=self.rows.clone(), miss_slots=slots, miss_rows=rows)


class Installed(NamedTuple):
    """slots [n] int64 as given to install; slots[sources] got the hot rows targets, both int32."""

    slots: np.ndarray
    sources: np.ndarray
    targets: np.ndarray


NONE_INSTALLED = Installed(NOTHING, NOTHING, NOTHING)


class HotCache:
    """An LRU cache of the host rows of one index group. Implements contract.HotTier.

    plan and warm make slots hot, install may, invalidate and eviction end it. After writing a
    host row, call install or invalidate for its slot before the next plan. A plan whose slots all
    fit is one pass, and no miss of it evicts a slot that the plan looks up, earlier or later.
    Otherwise a pass ends when every row left is in use by the pass, and Plan.stop says where the
    next pass goes on.

    A group of several layers has one state for all of them. Its first layer plans and installs.
    Each layer, in its turn, calls refill with its own new rows and fetch for each pass, in the
    order of the first layer.

    host_rows  [slots, ...] of each layer of the group, or of the only one; None to run the policy
               without rows
    num_rows   hot rows, 1 to the number of slots
    num_slots  slots of the host tier, where host_rows is None
    buffers    scratch shared with other groups; None: its own
    link       delays each copy from the host tier; None: no delay
    arena      has the hot rows, shared with other groups of as many layers; None: its own
    ghost      optional observer of the same lookups; set it and reset it at any time
    installed  the last install of the first layer alone, until the group's last layer has refilled
    sharing    None, or the ranks that fetch a share of a plan's misses each; warm copies all
    query_misses [queries] int64: misses of the last step, by query
    With as many rows as slots nothing is evicted, and no order of use is kept.
    Raises: ValueError for a num_rows outside its limits, rows not of 8-byte words or an arena for
    another number of layers, RuntimeError for rows whose strides would take a copy.
    """

    def __init__(
        self,
        host_rows: torch.Tensor | Sequence[torch.Tensor] | None,
        num_rows: int,
        num_slots: int | None = None,
        buffers: PlanBuffers | None = None,
        link: ThrottledLink | None = None,
        arena: HotArena | None = None,
    ):
        if isinstance(host_rows, torch.Tensor):
            host_rows = (host_rows,)
        self.host_layers: tuple[torch.Tensor, ...] = tuple(host_rows or ())
        self.num_slots = len(self.host_layers[0]) if self.host_layers else num_slots or 0
        self.check_size(num_rows)
        self._link = link
        self.arena = arena or HotArena(num_rows, self.host_layers)
        if len(self.arena.layers) != len(self.host_layers):
            raise ValueError(
                f"an arena must have rows for each layer of a group: got {len(self.arena.layers)} "
                f"for {len(self.host_layers)} layers."
            )
        self._host_words = [as_words(rows) for rows in self.host_layers]
        self._hot_words = [as_words(rows) for rows in self.arena.layers]
        self.row_slot, self.row_place = self.arena.row_slot, self.arena.row_place
        self.buffers = buffers or PlanBuffers()
        self.query_misses = np.zeros(0, np.int64)
        self.installed = NONE_INSTALLED
        self.ghost: LookupObserver | None = None
        self.sharing: SharedFetch | None = None
        self.early = EarlyRows()
        self.number = self.arena.next_number()
        self._use_arrays(lru.new_state(self.num_slots, self.arena.take(self.number, num_rows)))

    @property
    def num_layers(self) -> int:
        """Layers of the group."""
        return max(1, len(self.host_layers))

    @property
    def host_rows(self) -> torch.Tensor | None:
        """The first layer's host rows."""
        return self.host_layers[0] if self.host_layers else None

    @property
    def rows(self) -> torch.Tensor | None:
        """The first layer's hot rows; those of the others are in arena.layers."""
        return self.arena.layers[0] if self.arena.layers else None

    def check_size(self, num_rows: int) -> None:
        """Raises: ValueError for a num_rows outside its limits."""
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
        """Give the slots of topk [queries, K] int32 hot rows, from start as far as rows suffice.

        start: (query, column) where the pass begins. (0, 0) clears query_misses and begins a
            step, the unit of ages, unless same_step is true
        same_step: these are more queries of the step before
        Effect: the missed slots own their rows from now on; call fetch before anything reads them.
        """
        topk = topk.contiguous()
        if self.ghost is not None and start == (0, 0):
            self.ghost.access(topk)
        lookups = topk.numpy()
        num_queries, width = lookups.shape
        buffers, (query, column) = self.buffers, start
        buffers.reserve(num_queries * width)
        if start == (0, 0):
            self.state[lru.STEP] += not same_step
            if len(self.query_misses) != num_queries:
                self.query_misses = np.zeros(num_queries, np.int64)
            self.query_misses[:] = 0
        rows = buffers.rows[: num_queries * width].reshape(num_queries, width)
        count, stop_query, stop_column, misses = lru.plan(
            lookups,
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
        self._settle_early(counts_uses=True)
        return Plan(
            query,
            column,
            torch.from_numpy(rows[query : query + count]),
            buffers.miss_slots[:misses],
            buffers.miss_rows[:misses],
            None if stop_query == num_queries else (stop_query, stop_column),
        )

    def fetch(self, plan: Plan, layer: int = 0) -> None:
        """Copy the plan's missed rows of one layer of the group from the host tier."""
        slots, rows = plan.miss_slots, plan.miss_rows
        if self.sharing is None:
            self._load(layer, slots, rows)
            return
        own = self.sharing.share(len(slots))
        self._load(layer, slots[own], rows[own])
        self.sharing.exchange(self._hot_words[layer], slots, rows)

    def fetch_ahead(self, slots: np.ndarray, most: int, min_age: int = MIN_AGE) -> int:
        """Make slots hot that no plan has asked for yet. Returns the rows filled.

        slots [requests, m] int32, -1 pads: of each request, the likeliest first. At most `most`
            of them that are not hot are fetched
        Call it between steps. It takes free rows, then the least recently used ones that are at
        least min_age steps old: with the default, none of the last step, and none that was warmed
        since. What it fetches is the first to be evicted, and counts as no lookup.
        """
        self._settle_early()
        if self.num_rows == self.num_slots:  # no order of use is kept
            return 0
        taken, rows = self.early.fetch(slots, most, min_age, (*self._lru, self.free, self.state))
        for layer in range(len(self.host_layers)):
            self._load(layer, taken, rows)
        return len(rows)

    def _settle_early(self, counts_uses: bool = False) -> None:
        """Forget the early rows that this call has used or evicted."""
        self.early.settle(counts_uses, (*self._lru, self.free, self.state))

    # --- writes -------------------------------------------------------------------------

    def install(
        self, slots: torch.Tensor, rows: torch.Tensor | Sequence[torch.Tensor], min_age: int = 0
    ) -> int:
        """Make the slots just written hot where there is room. Returns how many are hot.

        slots [n] int64; rows [n, ...] their values as the host tier has them, of the first layer
        or a sequence of those of each layer written so far. Call refill for the others.
        A hot slot is updated. Another takes a free row, or the least recently used one if that
        is at least min_age steps old.
        """
        if self.ghost is not None:
            self.ghost.install(slots, min_age)
        self.buffers.reserve(len(slots))
        sources, targets = self.buffers.miss_slots, self.buffers.miss_rows
        count: int = lru.install(
            slots.numpy(), min_age, *self._lru, self.free, self.state, sources, targets
        )
        self._settle_early()
        sources, targets = sources[:count], targets[:count]
        values = [rows] if isinstance(rows, torch.Tensor) else rows
        if len(values) < self.num_layers:
            self.installed = Installed(slots.numpy().copy(), sources.copy(), targets.copy())
        for layer, written in enumerate(values):
            self._copy(layer, written, sources, targets)
        return count

    def refill(self, layer: int, rows: torch.Tensor) -> None:
        """Fill the hot rows of the last install in another layer of the group.

        rows [n, ...]: that layer's values of the installed slots, as the host tier has them
        """
        self._copy(layer, rows, self.installed.sources, self.installed.targets)
        if layer == self.num_layers - 1:
            self.installed = NONE_INSTALLED

    def keeps_installed(self) -> bool:
        """Whether all slots of the last install got a row and have it still.

        If so, the plans made since then fetch none of these slots, and none into their rows.
        """
        slots, sources, targets = self.installed
        whole = len(sources) == len(slots)
        return whole and bool((self.slot_row[slots[sources]] == targets).all())

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64."""
        if self.ghost is not None:
            self.ghost.invalidate(slots)
        lru.invalidate(
            slots.numpy(), self.slot_row, self.row_slot, self.row_place, self.free, self.state
        )
        self._settle_early()

    def warm(self, topk: torch.Tensor) -> int:
        """Make the slots of topk [queries, K] int32 hot, in order. Returns the rows filled.

        ESS's LRU-warmup: as if each query were a decode step, but lookups are not counted.
        """
        if self.ghost is not None:
            self.ghost.warm(topk)
        self.buffers.reserve(topk.numel())
        slots, rows = self.buffers.miss_slots, self.buffers.miss_rows
        unread = self.buffers.rows[: topk.numel()].reshape(topk.shape)
        lookups = topk.contiguous().numpy()
        count: int = lru.warm(lookups, *self._lru, self.free, self.state, unread, slots, rows)
        self._settle_early()
        for layer in range(len(self.host_layers)):
            self._load(layer, slots[:count], rows[:count])
        return count

    def clear(self) -> None:
        """Free every row and reset the counters."""
        rows = self.arena.rows_of(self.number)
        self.row_slot[rows] = self.row_place[rows] = -1
        self._use_arrays(lru.new_state(self.num_slots, rows))
        self.early = EarlyRows()
        if self.ghost is not None:
            self.ghost.clear()

    # --- size ---------------------------------------------------------------------------

    def resize(self, num_rows: int) -> None:
        """Give rows up to the arena, or take spare ones. Call it between steps.

        Free rows go first, then the least recently used ones, which are evicted. Slots that stay
        hot keep their rows and their order of use.
        Raises: ValueError for a num_rows outside its limits, or more rows than are spare.
        """
        self.check_size(num_rows)
        self.early.forget()
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
        """contract.COUNTERS since the start, rows fetched ahead, and of these the used ones."""
        values = self.state[lru.LOOKUPS : lru.STATE_SIZE].tolist()
        early = {"early": int(self.early.counters[FETCHED])}
        early["early_used"] = int(self.early.counters[USED])
        return dict(zip(COUNTERS, values, strict=True)) | early

    @property
    def steps(self) -> int:
        """Steps planned since the start: the unit of ages."""
        return int(self.state[lru.STEP])

    @property
    def num_rows(self) -> int:
        """Hot rows that the group has now, in each of its layers."""
        return int(self.state[lru.ROWS])

    @property
    def occupied(self) -> int:
        """Hot rows in use."""
        return self.num_rows - int(self.state[lru.FREE])

    @property
    def nbytes(self) -> int:
        """Device bytes of rows, maps and queue, without the shared buffers and the ghost."""
        row_bytes = ARENA_ROW_BYTES + sum(rows[0].nbytes for rows in self.arena.layers)
        state = sum(array.nbytes for array in self._arrays.values())
        return self.num_rows * row_bytes + state + self.early.nbytes

    def slots_by_recency(self) -> np.ndarray:
        """The hot slots [n] int32, least recently used first."""
        rows = self.queue[self.state[lru.HEAD] : self.state[lru.TAIL]]
        places = np.arange(self.state[lru.HEAD], self.state[lru.TAIL])
        slots: np.ndarray = self.row_slot[rows[self.row_place[rows] == places]]
        return slots

    def check_rows(self, picks: np.ndarray, name: str, first_slot: int = 0, layer: int = 0) -> None:
        """Compare a sample of hot rows of one layer of the group with their host rows.

        picks [n] int64: rows of the arena, each taken modulo its size; free rows and those of
            other groups pass
        name: of the layer, for the message; first_slot: lower slots pass
        Raises: RowCorruption with the slot and both checksums.
        """
        if not self.host_layers:
            return
        host, hot = self._host_words[layer], self._hot_words[layer]
        row = lru.first_difference(host, hot, self.slot_row, self.row_slot, picks, first_slot)
        if row >= 0:
            slot = int(self.row_slot[row])
            raise RowCorruption.of(name, slot, int(row), hot[row], host[slot])

    def check_integrity(self) -> None:
        """Check the state of every row and that hot rows equal host rows. Raises: RuntimeError."""
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
            "a group must own as many rows as it has": len(own) == self.num_rows,
            "a free row must have no place in the queue": (
                (self.row_place[own[self.row_slot[own] < 0]] < 0).all()
            ),
            "an owned row must have one live place in the queue": (
                ((head <= live) & (live < tail)).all() and (self.queue[live] == rows).all()
            ),
            "a hot row must equal its host row": (
                all(
                    np.array_equal(hot[rows], host[self.row_slot[rows]])
                    for hot, host in zip(self._hot_words, self._host_words, strict=True)
                )
            ),
        }  # fmt: skip
        if broken := [rule for rule, holds in problems.items() if not holds]:
            raise RuntimeError("; ".join(broken))

    def _load(self, layer: int, slots: np.ndarray, rows: np.ndarray) -> None:
        """Copy a layer's host rows of the slots into its hot rows, delayed by the link."""
        if not self.host_layers or not len(rows):
            return
        since = time.perf_counter()
        host, hot = self._host_words[layer], self._hot_words[layer]
        lru.copy_rows(host, hot, slots, rows, len(rows))
        if self._link is not None:
            self._link.carried(len(slots) * hot[0].nbytes, time.perf_counter() - since)

    def _copy(
        self, layer: int, values: torch.Tensor, sources: np.ndarray, targets: np.ndarray
    ) -> None:
        if self.host_layers and len(targets):
            hot = self._hot_words[layer]
            lru.copy_rows(as_words(values), hot, sources, targets, len(targets))


if TYPE_CHECKING:

    def _is_hot_tier(cache: HotCache) -> HotTier[Plan]:
        return cache
