"""Records and events of a trace's frames, as its readers get them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import NamedTuple

import numpy as np

from sglang_ess.trace.format import HAS_RUNS, HAS_TOPK, PLANS, Kind, TraceFrame

NOTHING = np.empty(0, np.int64)


class Record(NamedTuple):
    """One decode query of one layer. In a verify step a request has several, which adjoin.

    step       of the layer, counted from 0
    length     positions that the query sees
    positions  [count] int32, ascending: those that it selected
    runner_ups [m] int32: positions of ranks count + 1 to count + m; None: a trace without scores
    scores     [count + m] float32: of positions and then of runner_ups; None as runner_ups
    """

    layer: int
    step: int
    request_id: str
    length: int
    positions: np.ndarray
    runner_ups: np.ndarray | None = None
    scores: np.ndarray | None = None


class Event(NamedTuple):
    """An operation on one layer's HotCache, or a GAP or ACCEPTED, which belong to no layer.

    slots     PLAN, WARM: the top-k [queries, width] int32, -1 pads; INSTALL, INVALIDATE: [n] int64;
              ACCEPTED: tokens [requests] int64 that each request of the last step kept
    argument  PLAN: same_step; INSTALL: min_age; RESIZE: hot rows; GAP: missing events; ACCEPTED:
              queries of a request
    counters  [7] int64 format.STATE after it; meaningless for a GAP and ACCEPTED
    runner_ups, scores  of a PLAN with scores, as PlanScores has them; else None
    """

    kind: Kind
    layer: int
    argument: int
    slots: np.ndarray
    counters: np.ndarray
    runner_ups: np.ndarray | None = None
    scores: np.ndarray | None = None


Query = tuple[int, Record]  # a row of the request table and its query


def queries_of(frame: TraceFrame, first: int, end: int) -> Iterator[Query]:
    """Yield a frame's records [first, end), each with its row of the request table."""
    offsets = frame.offsets[first : end + 1].tolist()
    names = [frame.request_ids[i] for i in frame.ids[first:end].tolist()]
    columns = (
        c[first:end].tolist() for c in (frame.rows, frame.layers, frame.steps, frame.lengths)
    )
    scored = _record_scores(frame, first, end) if len(frame.halves) else repeat((None, None))
    each = zip(names, *columns, scored, strict=False)
    for i, (name, row, layer, step, length, of_query) in enumerate(each):
        positions = frame.positions[offsets[i] : offsets[i + 1]]
        yield row, Record(layer, step, name, length, positions, *of_query)


def _record_scores(
    frame: TraceFrame, first: int, end: int
) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
    """Yield the runner-ups and scores of a frame's records [first, end), without pads."""
    events = np.flatnonzero(frame.kinds == Kind.PLAN)
    for plan in np.flatnonzero((frame.starts[1:] > first) & (frame.starts[:-1] < end)):
        scored, start = frame.scored(events[plan]), frame.starts[plan]
        for record in range(max(first, start), min(end, frame.starts[plan + 1])):
            if scored is None:
                yield None, None
                continue
            others, width = scored.runner_ups[record - start], frame.arguments[events[plan]] // 2
            scores, count = scored.scores[record - start], np.diff(frame.offsets[record:][:2])[0]
            kept = others >= 0
            yield others[kept], np.concatenate([scores[:count], scores[width:][kept]])


def accepted_of(step: dict[int, list[Query]], kept: np.ndarray, width: int) -> Iterator[Record]:
    """Yield the first kept[i] of each request's `width` queries, in each layer that has all."""
    wanted = np.arange(width) < kept[:, None]
    for queries in step.values():
        if len(queries) == wanted.size:
            for (_, record), is_kept in zip(queries, wanted.ravel().tolist(), strict=True):
                if is_kept:
                    yield record


def whole(queries: list[Query]) -> Iterator[Record]:
    """Yield the queries of a step, unless a request has several and nobody knows which count."""
    rows = [row for row, _ in queries]
    if len(set(rows)) == len(rows):
        for _, record in queries:
            yield record


def events_of(frame: TraceFrame, table: dict[int, np.ndarray], slots: int) -> Iterator[Event]:
    """Decode a frame's events. table: updated. Raises: ValueError for impossible slots."""
    plan = 0
    columns = frame.kinds.tolist(), frame.event_layers.tolist(), frame.arguments.tolist()
    for i, (kind, layer, argument) in enumerate(zip(*columns, strict=True)):
        found, others, scores = NOTHING, None, None
        if kind == Kind.SLOTS:
            table[argument] = _row(frame, i, table.get(argument, NOTHING), slots)
            continue
        if kind == Kind.SCORES:  # the plan before it has taken them
            continue
        if kind in PLANS and (scored := frame.scored(i)):
            others, scores = scored
        if kind == Kind.PLAN:
            first, end = frame.starts[plan : plan + 2]
            if others is not None:
                others = _slots_at(frame.rows[first:end].tolist(), others, table)
            found = _topk(frame, range(first, end), argument // 2, table)
            argument, plan = argument % 2, plan + 1
        elif kind in HAS_TOPK:
            found = _within(frame.topk(i), -1, slots).astype(np.int32)
            if others is not None:
                others = _within(others, -1, slots)
            argument %= 2
        elif kind in HAS_RUNS:
            found = _within(frame.slots(i), 0, slots)
        elif kind == Kind.ACCEPTED:
            found = _within(frame.accepted(i), 1, argument + 1, "accepted lengths")
        elif kind == Kind.RESIZE and not 1 <= argument <= slots:
            raise ValueError(f"hot rows must be 1 to {slots}: got {argument}")
        shown = Kind.PLAN if kind == Kind.PLAN_SLOTS else Kind(kind)
        yield Event(shown, layer, argument, found, frame.counters[i], others, scores)


def _row(frame: TraceFrame, event: int, known: np.ndarray, slots: int) -> np.ndarray:
    """Return a row of the request table after a SLOTS event."""
    start = frame.start(event)
    if not 0 <= start <= len(known):
        raise ValueError(f"a row's slots must go on where they end, at {len(known)}: got {start}")
    found = _within(frame.slots(event), 0, slots)
    row: np.ndarray = np.concatenate([known[:start], found]).astype(np.int32)
    return row


def _topk(
    frame: TraceFrame, records: range, width: int, table: dict[int, np.ndarray]
) -> np.ndarray:
    """Return the slots of a plan's queries: [queries, width] int32, -1 pads."""
    topk = np.full((len(records), width), -1, np.int32)
    offsets = frame.offsets[records.start : records.stop + 1].tolist()
    rows = frame.rows[records.start : records.stop].tolist()
    for query, row in enumerate(rows):
        positions = frame.positions[offsets[query] : offsets[query + 1]]
        if len(positions):
            known = table.get(row, NOTHING)
            if positions[-1] >= len(known):
                raise ValueError(f"row {row} must have slots before it is read: got {len(known)}")
            topk[query, : len(positions)] = known[positions]
    return topk


def _slots_at(rows: list[int], positions: np.ndarray, table: dict[int, np.ndarray]) -> np.ndarray:
    """Return the slots of each query's positions [n, m]: [n, m] int32, -1 where they are -1."""
    slots = np.full(positions.shape, -1, np.int32)
    for query, row in enumerate(rows):
        chosen, known = positions[query] >= 0, table.get(row, NOTHING)
        wanted = positions[query][chosen]
        if wanted.max(initial=-1) >= len(known):
            raise ValueError(f"row {row} must have slots before it is read: got {len(known)}")
        slots[query, chosen] = known[wanted]
    return slots


def _within(numbers: np.ndarray, first: int, end: int, what: str = "slots") -> np.ndarray:
    if numbers.size and not first <= numbers.min() <= numbers.max() < end:
        got = f"{numbers.min()}, {numbers.max()}"
        raise ValueError(f"{what} must be {first} to {end - 1}: got {got}")
    return numbers
