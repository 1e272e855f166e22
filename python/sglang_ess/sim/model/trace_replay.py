"""A recorded trace through the HotCache that serves: its own counts again, or those of others.

At the recorded sizes a replay's counters are the server's after every single event: what
differs is a fault, in the server, the trace or here. At other sizes they are what the server
would have counted had it done the same with so many hot rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numba
import numpy as np
import torch

from sglang_ess.tiers.balance.budgets import Budgets, allot
from sglang_ess.tiers.balance.ghost_cache import MissCurve
from sglang_ess.tiers.hot_arena import HotArena
from sglang_ess.tiers.hot_cache import HotCache, PlanBuffers
from sglang_ess.trace.format import STATE
from sglang_ess.trace.trace import Event, Kind, Trace
from sglang_ess.trace.trace_recorder import STATE_PLACES

SCALES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # of the recorded hot rows
NO_ROWS = torch.empty(0)  # a HotCache without rows reads none

Progress = Callable[[int], object]  # called with bytes of the file


class ReplayError(ValueError):
    """A trace that cannot be replayed."""


@dataclass(frozen=True)
class Difference:
    """The first event of a layer after which replay and server count differently."""

    event: int
    layer: int
    kind: str
    server: dict[str, int]
    replay: dict[str, int]

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {self.server[name]} on the server, {self.replay[name]} here"
            for name in STATE
            if self.server[name] != self.replay[name]
        )
        return f"event {self.event} ({self.kind}, layer {self.layer}): {parts}"


@dataclass
class LayerReplay:
    """One layer: hot rows at the end and STATE's counters, the server's beside them.

    union: distinct slots of its largest plan; 0 where nothing is compared with the server
    """

    rows: int
    counters: dict[str, int]
    server: dict[str, int]
    union: int

    @property
    def hit_ratio(self) -> float:
        """Of the lookups, 1 for none: as the server's log line has it."""
        lookups = self.counters["lookups"]
        return 1 - self.counters["misses"] / lookups if lookups else 1.0

    @property
    def misses_per_step(self) -> float:
        return self.counters["misses"] / max(1, self.counters["steps"])


@dataclass
class Replay:
    """What a replay found.

    layers      of the trace, all of which must have events
    missing     events that the recording dropped; a replay is not exact then
    differences of each layer the first; none are looked for at other sizes than the recorded
    """

    layers: list[LayerReplay] = field(default_factory=list)
    missing: int = 0
    differences: list[Difference] = field(default_factory=list)
    num_events: int = 0

    def total(self, counter: str) -> int:
        return sum(layer.counters[counter] for layer in self.layers)

    @property
    def rows(self) -> int:
        return sum(layer.rows for layer in self.layers)

    @property
    def hit_ratio(self) -> float:
        lookups = self.total("lookups")
        return 1 - self.total("misses") / lookups if lookups else 1.0

    @property
    def misses_per_step(self) -> float:
        """Rows fetched in all layers in a decode step, on average."""
        return sum(layer.misses_per_step for layer in self.layers)


# --- one size ---------------------------------------------------------------------------


def replay(
    trace: Trace,
    rows: int | Sequence[int] | None = None,
    scale: float | None = None,
    progress: Progress = lambda _: None,
) -> Replay:
    """A trace's events in their order through production HotCaches, one a layer.

    rows: hot rows of each layer, all along, in place of the recorded ones; or
    scale: times the recorded ones, whenever they change; neither: the recorded ones, each
        event checked against the server's counters
    A size past the slots is the slots, one below 1 is 1.
    Raises: ReplayError if a layer has no events, or no size before them; ValueError for both
    rows and scale, rows of other layers, and as Trace.frames.
    """
    found, is_exact = Replay(), rows is None and scale is None
    tier = _Tier(trace, _sizes(trace, rows, scale), is_exact)
    server: list[np.ndarray | None] = [None] * trace.layers
    differing: set[int] = set()
    for event in trace.events(progress):
        found.num_events += 1
        if event.kind == Kind.GAP:
            found.missing += event.argument
            continue
        counters, layer = tier.apply(event), event.layer
        server[layer] = event.counters
        if is_exact and not found.missing and layer not in differing:
            if not np.array_equal(counters, event.counters):
                differing.add(layer)
                place = found.num_events - 1, layer, event.kind.name
                found.differences.append(
                    Difference(*place, _named(event.counters), _named(counters))
                )
    for layer, (cache, counted) in enumerate(zip(tier.caches, server, strict=True)):
        if cache is None:
            raise ReplayError(
                f"a trace must have events of every layer: got none of layer {layer}."
            )
        here = _named(cache.state[STATE_PLACES])
        union = tier.unions[layer]
        found.layers.append(LayerReplay(cache.num_rows, here, _named(counted), union))
    return found


def _named(counters: np.ndarray) -> dict[str, int]:
    return dict(zip(STATE, counters.tolist(), strict=True))


def _sizes(trace: Trace, rows, scale) -> Callable[[int, int], int]:
    """(layer, recorded hot rows) -> hot rows."""
    if rows is not None and scale is not None:
        raise ValueError("a replay must have rows or a scale: got both.")
    if scale is not None:
        return lambda layer, recorded: round(scale * recorded)
    if rows is None:
        return lambda layer, recorded: recorded
    each = [rows] * trace.layers if isinstance(rows, int) else list(rows)
    if len(each) != trace.layers:
        raise ValueError(f"rows must be of {trace.layers} layers: got {len(each)}.")
    return lambda layer, recorded: each[layer]


class _Tier:
    """HotCaches without rows, for each layer once it has a size; unions: of LayerReplay."""

    def __init__(self, trace: Trace, size: Callable[[int, int], int], counts_unions: bool):
        self._slots, self._size, self._buffers = trace.slots, size, PlanBuffers()
        self._counts_unions = counts_unions
        self._marks = np.zeros(trace.slots, np.uint8)
        self.caches: list[HotCache | None] = [None] * trace.layers
        self.unions = [0] * trace.layers

    def apply(self, event: Event) -> np.ndarray:
        """Do to the event's layer what was done to it. Returns its STATE."""
        kind, layer, argument, slots, _ = event
        if kind == Kind.RESIZE:
            self._resize(layer, min(max(1, self._size(layer, argument)), self._slots))
        cache = self.caches[layer]
        if cache is None:
            raise ReplayError(f"a layer's first event must be RESIZE: got {kind.name} ({layer}).")
        if kind == Kind.PLAN:
            topk, start = torch.from_numpy(slots), (0, 0)
            while start is not None:
                start = cache.plan(topk, start, bool(argument)).stop
            if self._counts_unions:
                union = _count_distinct(slots.reshape(-1), self._marks)
                self.unions[layer] = max(self.unions[layer], union)
        elif kind == Kind.INSTALL:
            cache.install(torch.from_numpy(slots), NO_ROWS, argument)
        elif kind == Kind.INVALIDATE:
            cache.invalidate(torch.from_numpy(slots))
        elif kind == Kind.WARM:
            cache.warm(torch.from_numpy(slots))
        elif kind == Kind.CLEAR:
            cache.clear()
        return cache.state[STATE_PLACES]

    def _resize(self, layer: int, rows: int) -> None:
        cache = self.caches[layer]
        if cache is None:
            # An arena of its own with room to grow: what another layer gave up came from there.
            arena = HotArena(self._slots)
            self.caches[layer] = HotCache(None, rows, self._slots, self._buffers, arena=arena)
        elif rows != cache.num_rows:
            cache.resize(rows)


@numba.njit("i8(i4[::1], u1[::1])", cache=True, nogil=True)
def _count_distinct(slots, marks):
    """Distinct slots, -1 pads aside; marks [slots of the tier]: zeros before and after."""
    distinct = 0
    for slot in slots:
        if slot >= 0:
            distinct += 1 - marks[slot]
            marks[slot] = 1
    for slot in slots:
        if slot >= 0:
            marks[slot] = 0
    return distinct


# --- many sizes -------------------------------------------------------------------------


def curve(
    trace: Trace, scales: Sequence[float] = SCALES, progress: Progress = lambda _: None
) -> dict[float, Replay]:
    """Replays at each scale of the recorded hot rows: exact points of the miss-ratio curves."""
    return {scale: replay(trace, scale=scale, progress=progress) for scale in sorted(scales)}


def layer_curves(replays: Iterable[Replay]) -> list[MissCurve]:
    """Each layer's misses a step by hot rows, from replays of one trace at several sizes."""
    found = []
    for layers in zip(*(one.layers for one in replays), strict=True):
        points = sorted({layer.rows: layer for layer in layers}.items())
        misses = np.minimum.accumulate([layer.misses_per_step for _, layer in points])
        counters = layers[0].counters
        steps = counters["steps"]
        found.append(
            MissCurve(
                tuple(rows for rows, _ in points),
                tuple(misses.tolist()),
                counters["lookups"] / max(1, steps),
                max(layer.union for layer in layers),
                steps,
            )
        )
    return found


def best_budgets(replays: Iterable[Replay], total: int) -> Budgets:
    """Hot rows of each layer, `total` in all, with the fewest misses on their curves.

    Within the sizes that were replayed. Raises: BudgetError if no budgets are.
    """
    curves = layer_curves(replays)
    floor = max(one.rows[0] for one in curves)
    cap = min(one.rows[-1] for one in curves)
    return allot(curves, total, floor, cap)
