"""What a hot tier promises, whichever device it is on.

The host tier has a row for every slot and layer. A hot tier belongs to an index group, the layers
that read one top-k (index_groups.py). It has copies of the rows that decode is using, keyed by
slot: a slot's hot row has the same number in each layer of the group. `hot_cache.py` (CPU) and
`hot_cache_cuda.py` (CUDA) implement the protocols below; tests/tiers/test_hot_tier_contract.py
runs against both.

The invariants. Each has a test that fails when it is broken:

1. Host first. A row is in the host tier before its hot copy may be evicted. Every write goes to
   the host tier, and to the hot row if the slot has one. There is no dirty state.
2. Equal copies. A hot row equals its host row. check_rows compares a sample while serving.
3. No stale copy. Every path that writes a slot (decode, prefill, PD arrival, load) updates or
   invalidates the slot's hot rows in every layer. A reused slot never hits its former owner's row.
4. One plan, one row each. A plan never gives one hot row to two slots, and never evicts a slot
   that is in the same step's top-k.
5. Too small is slower, never wrong. When a step selects more slots than there are hot rows,
   attention runs in several passes and merges them by log-sum-exp.
6. Back-pressure. Running out of host rows, hot rows or link time makes requests wait. It never
   raises an exception in the scheduler.
7. Static shapes. On a CUDA device no shape depends on data, and decode never waits for the host:
   a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

Device: TypeAlias = torch.device | str

# What every hot tier counts, in this order:
#   lookups      top-k entries resolved, repeats included, pads (-1) not
#   misses       rows fetched from the host tier
#   evictions    rows taken from a slot for another one
#   evicted_age  sum over the evictions of the steps since the row's last use
#   installs     rows filled by install or warm
#   skipped      written slots that got no row
COUNTERS = ("lookups", "misses", "evictions", "evicted_age", "installs", "skipped")

CANARY_ROWS = 16  # hot rows that one check_rows of a serving process compares


class RowCorruption(RuntimeError):
    """A hot row differs from its host row."""

    @classmethod
    def of(cls, name: str, slot: int, row: int, hot: np.ndarray, host: np.ndarray) -> RowCorruption:
        """name: of the layer; hot, host: both rows' contents, for their checksums."""
        hot_sum, host_sum = zlib.crc32(hot.tobytes()), zlib.crc32(host.tobytes())
        return cls(
            f"hot row must equal its host row: got {name}, slot {slot}, hot row {row}: crc32 "
            f"{hot_sum:08x}, host row crc32 {host_sum:08x}. Stop this server, keep its log and "
            "report it; --disable-ess serves without hot rows."
        )


class Planned(Protocol):
    """The result of a plan: the hot rows that attention reads."""

    @property
    def rows(self) -> torch.Tensor:
        """[queries, K] int32 hot rows; -1 for a pad, and for a slot that another pass covers."""


class LookupObserver(Protocol):
    """Observes a hot tier's lookups and writes (GhostCache does)."""

    def access(self, topk: torch.Tensor) -> None:
        """A plan looks up topk [queries, K] int32, -1 pads, in one step."""

    def warm(self, topk: torch.Tensor) -> None:
        """warm uses the slots of topk [queries, K] int32, a step per query."""

    def install(self, slots: torch.Tensor, min_age: int = 0) -> None:
        """install writes slots [n] int64."""

    def invalidate(self, slots: torch.Tensor) -> None:
        """invalidate frees the rows of slots [n] int64."""

    def clear(self) -> None:
        """Every row is free again, and the counters restart."""


PlanT = TypeVar("PlanT", bound=Planned)


class HotTier(Protocol[PlanT]):
    """The hot tier of one index group. `layer` is a position in the group, 0 for the first.

    A slot is hot (it has a hot row, equal to its host row) or not. A hot row is free or belongs to
    one slot. On the CPU free rows are taken first, then the least recently used one. On a CUDA
    device a row is taken that is free or among the least recently used few (hot_state.py).
    """

    @property
    def num_slots(self) -> int:
        """Slots of the host tier."""

    @property
    def num_rows(self) -> int:
        """Hot rows that the group has now, in each of its layers."""

    def plan(self, topk: torch.Tensor) -> PlanT:
        """Give the slots of topk [queries, K] int32, -1 pads, hot rows. Begins a step.

        The missed slots own their rows from now on; fetch fills them.
        """

    def fetch(self, planned: PlanT, /, layer: int = 0) -> None:
        """Copy the plan's missed rows of one layer from the host tier to the device."""

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64."""

    def warm(self, topk: torch.Tensor) -> int | None:
        """Make the slots of topk [queries, K] int32 hot, the last queries' rather than others'.

        ESS's LRU-warmup: as if the queries were decode steps, but lookups are not counted.
        Returns the rows filled; None where the host does not know without waiting.
        """

    @property
    def counters(self) -> dict[str, int]:
        """COUNTERS since the start, and others of the implementation. Waits for the device."""

    @property
    def steps(self) -> int:
        """Plans since the start, the unit of ages. Waits for the device."""

    @property
    def occupied(self) -> int:
        """Hot rows in use. Waits for the device."""

    def check_rows(self, picks: np.ndarray, name: str, first_slot: int = 0, layer: int = 0) -> None:
        """Compare a sample of one layer's hot rows with their host rows. Waits for the device.

        picks [n] int64: rows, each taken modulo the row count; free rows pass
        name: of the layer, for the message; first_slot: lower slots take padding's writes and pass
        Raises: RowCorruption with the slot and both checksums.
        """


class HotTiers(Protocol):
    """The hot tiers of all index groups."""

    @property
    def caches(self) -> Sequence[HotTier[Any]]:
        """By group."""

    @property
    def nbytes(self) -> int:
        """Device bytes of all layers."""

    def invalidate(self, slots: torch.Tensor) -> None:
        """Free the hot rows of slots [n] int64 in every layer."""

    def figures(self) -> list[dict[str, int]]:
        """For each group: its counters, "steps", "occupied", "rows" (hot rows) and "layers"."""

    def totals(self) -> tuple[int, int, int] | None:
        """misses, evictions and evicted_age since the start, in rows of all layers.

        None where the device has not reported since the last call; nobody waits for it.
        """
