"""Replay a recorded trace through the production HotCache, at the recorded sizes or at others.

At the recorded sizes a replay's counters equal the server's after every event. A difference is a
fault in the server, in the trace or here. At other sizes the counters are those that the server
would have had with that many hot rows.
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

SCALES = (0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # factors on the recorded hot rows
NO_ROWS = torch.empty(0)  # a HotCache without row contents reads none

Progress = Callable[[int], object]  # called with the bytes read from the file


class ReplayError(ValueError):
    """A trace cannot be replayed."""


@dataclass(frozen=True)
class Difference:
    """The first event of a layer after which the counters of replay and server differ."""

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
    """One layer at the end of a replay.

    rows      hot rows
    counters  of trace.format.STATE, as replayed; server: as recorded
    union     distinct slots of the layer's largest plan; 0 if not counted (see replay)
    """

    rows: int
    counters: dict[str, int]
    server: dict[str, int]
    union: int

    @property
    def hit_ratio(self) -> float:
        """Hits / lookups; 1 without lookups, as in the server's log line."""
        lookups = self.counters["lookups"]
        return 1 - self.counters["misses"] / lookups if lookups else 1.0

    @property
    def misses_per_step(self) -> float:
        return self.counters["misses"] / max(1, self.counters["steps"])


@dataclass
class Replay:
    """Result of a replay.

    layers       one for each layer of the trace
    missing      events that the recording dropped; the replay is inexact if there are any
    differences  the first of each layer; only looked for at the recorded sizes
    num_events   of the trace
    verifies     decode steps of a request; with speculation: verify steps
    tokens       tokens that these kept: as many without speculation
    queries      queries of a request in a verify step; 1 without speculation
    """

    layers: list[LayerReplay] = field(default_factory=list)
    missing: int = 0
    differences: list[Difference] = field(default_factory=list)
    num_events: int = 0
    verifies: int = 0
    tokens: int = 0
    queries: int = 1

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
        """Mean misses in a decode step, all layers of the trace together.

        Where these are index groups, a miss fetched a row for each layer of its group.
        """
        return sum(layer.misses_per_step for layer in self.layers)

    @property
    def misses_per_verify(self) -> float:
        """Mean misses in a step of one request, all layers of the trace together."""
        return self.total("misses") / max(1, self.verifies)

    @property
    def misses_per_token(self) -> float:
        """Mean misses for each token that was kept, all layers of the trace together."""
        return self.total("misses") / max(1, self.tokens)


# --- one size ---------------------------------------------------------------------------


def replay(
    trace: Trace,
    rows: int | Sequence[int] | None = None,
    scale: float | None = None,
    progress: Progress = lambda _: None,
) -> Replay:
    """Replay a trace's events in order through production HotCaches, one for each layer.

    rows   fixed hot rows of each layer (one number, or one for each)
    scale  factor on the recorded hot rows, each time they change
    With neither, the sizes are the recorded ones and each event is checked against the server's
    counters. Sizes are kept within 1 and the number of slots.
    Raises: ReplayError if a layer has no events, or an event before its first size; ValueError
    for both rows and scale, for rows of another number of layers, and as Trace.frames.
    """
    found, is_exact, lists = Replay(), rows is None and scale is None, 0
    tier = _Tier(trace, _sizes(trace, rows, scale), is_exact)
    server: list[np.ndarray | None] = [None] * trace.layers
    differing: set[int] = set()
    for event in trace.events(progress):
        found.num_events += 1
        if event.kind == Kind.GAP:
            found.missing += event.argument
            continue
        if event.kind == Kind.ACCEPTED:
            found.queries = max(found.queries, event.argument)
            found.verifies += len(event.slots)
            found.tokens += int(event.slots.sum())
            continue
        lists += len(event.slots) if event.kind == Kind.PLAN and event.layer == 0 else 0
        counters, layer = tier.apply(event), event.layer
        server[layer] = event.counters
        if is_exact and not found.missing and layer not in differing:
            if not np.array_equal(counters, event.counters):
                differing.add(layer)
                place = found.num_events - 1, layer, event.kind.name
                found.differences.append(
                    Difference(*place, _named(event.counters), _named(counters))
                )
    if not found.verifies:
        found.verifies = found.tokens = lists
    for layer, (cache, counted) in enumerate(zip(tier.caches, server, strict=True)):
        if cache is None:
            raise ReplayError(
                f"a trace must have events of every layer: got none of layer {layer}."
            )
        assert counted is not None  # a layer with a cache has had an event
        here = _named(cache.state[STATE_PLACES])
        union = tier.unions[layer]
        found.layers.append(LayerReplay(cache.num_rows, here, _named(counted), union))
    return found


def _named(counters: np.ndarray) -> dict[str, int]:
    return dict(zip(STATE, counters.tolist(), strict=True))


def _sizes(
    trace: Trace, rows: int | Sequence[int] | None, scale: float | None
) -> Callable[[int, int], int]:
    """Return a function (layer, recorded hot rows) -> hot rows."""
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
    """A HotCache without row contents for each layer that has a size.

    unions: as LayerReplay.union
    """

    def __init__(self, trace: Trace, size: Callable[[int, int], int], counts_unions: bool):
        self._slots, self._size, self._buffers = trace.slots, size, PlanBuffers()
        self._counts_unions = counts_unions
        self._marks = np.zeros(trace.slots, np.uint8)
        self.caches: list[HotCache | None] = [None] * trace.layers
        self.unions = [0] * trace.layers

    def apply(self, event: Event) -> np.ndarray:
        """Apply the event to its layer's cache. Returns the cache's STATE."""
        kind, layer, argument, slots, *_ = event
        if kind == Kind.RESIZE:
            self._resize(layer, min(max(1, self._size(layer, argument)), self._slots))
        cache = self.caches[layer]
        if cache is None:
            raise ReplayError(f"a layer's first event must be RESIZE: got {kind.name} ({layer}).")
        if kind == Kind.PLAN:
            topk = torch.from_numpy(slots)
            start: tuple[int, int] | None = (0, 0)
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
        state: np.ndarray = cache.state[STATE_PLACES]
        return state

    def _resize(self, layer: int, rows: int) -> None:
        cache = self.caches[layer]
        if cache is None:
            # Its own arena, with room to grow by the rows that other layers gave up.
            arena = HotArena(self._slots)
            self.caches[layer] = HotCache(None, rows, self._slots, self._buffers, arena=arena)
        elif rows != cache.num_rows:
            cache.resize(rows)


@numba.njit("i8(i4[::1], u1[::1])", cache=True, nogil=True)
def _count_distinct(slots: np.ndarray, marks: np.ndarray) -> int:
    """Count distinct slots without -1 pads. marks [slots of the tier]: zeros before and after."""
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
    """Replay at each scale of the recorded hot rows: exact points of the miss curves."""
    return {scale: replay(trace, scale=scale, progress=progress) for scale in sorted(scales)}


def layer_curves(replays: Iterable[Replay]) -> list[MissCurve]:
    """Return each layer's misses a step by hot rows, from replays of one trace."""
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


def best_budgets(
    replays: Iterable[Replay], total: int, layers: Sequence[int] | None = None
) -> Budgets:
    """Return the hot rows of each layer, `total` in all, that miss least by their curves.

    layers: indices of those that share the rows; None: all
    They stay within the replayed sizes. Raises: BudgetError if no budgets do.
    """
    curves = layer_curves(replays)
    curves = curves if layers is None else [curves[i] for i in layers]
    floor = max(one.rows[0] for one in curves)
    cap = min(one.rows[-1] for one in curves)
    return allot(curves, total, floor, cap)
