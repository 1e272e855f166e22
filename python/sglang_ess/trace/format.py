"""The bytes of a trace file, versions 3 and 4. trace.py writes them, and reads version 2 too.

All numbers little-endian:

    magic    8 B  b"ESSTRACE"
    version  u32  3; 4 if the trace has scores
    length   u32  bytes of the header
    header   JSON in one line, with its newline:
             {"layers": int, "topk": int, "slots": int, "meta": {...}}
             and, with scores, "runner_ups": int, the most that a query has
    frames   each: tag 4 B b"FRAM", payload bytes u32, raw bytes u32, records u32,
             CRC-32 of the payload u32; then the payload, one zlib stream of the raw bytes
    trailer  a frame with tag b"TAIL" whose payload is JSON, not compressed (raw bytes =
             payload bytes, records = all written):
             {"records": int, "events": int, "dropped": int, "end": "closed" or "limit"}

A record is one decode query of one layer. The raw bytes of a frame:

    u32 n; then n request ids, each u16 bytes and UTF-8
    u32 events
    of each event: kinds u8, layers u16, arguments u32, sizes u32, a column at a time
    of each record: ids u32 (index of the request id), rows u32 (of the request table),
        lengths u32 (positions the query sees), counts u32 (positions it selected), likewise
    version 4: u32 halves; all their low bytes, then all their high ones (float16)
    numbers, event by event, as LEB128: 7 bits a byte, the last byte of a number below 128;
        signed ones as 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...

Events are in the order in which they happened. SLOTS, GAP, ACCEPTED and SCORES have no layer; each
other begins with 7 signed numbers: by how much STATE, the layer's counters after it, exceeds that
of the layer's last event in the file (zeros before the first).

    kind        argument              size     numbers after those
    0 PLAN      2 width + same_step   queries  of each query, which is a record: its positions,
                                               ascending: the first, then position - previous - 1
    1 PLAN_SLOTS  2 width + same_step queries  queries x width slots, -1 pads: signed, the
                                               first, then slot - previous. No records
    2 WARM      2 width               queries  as PLAN_SLOTS
    3 INSTALL   min_age               runs     slots in order, as runs of successive ones: signed
                                               first - end of the run before (0), then count - 1
    4 INVALIDATE  0                   runs     as INSTALL
    5 CLEAR     0                     0
    6 RESIZE    hot rows              0        the first event of each layer
    7 SLOTS     row of the table      runs     start, then as INSTALL: from position start on
                                               the row has these slots and ends with them
    8 GAP       events dropped here   0
    9 ACCEPTED  queries a request     requests  of each request of the last step: tokens it kept
    10 SCORES   runner-ups            queries  of the plan right before it. Signed: each query's
                                               exponent; then queries x runner-ups, -1 pads, as
                                               PLAN_SLOTS, but positions if it is a PLAN

A plan's query has its positions' slots in the row of the request table, in that order, pads
after them. In a verify step of speculative decoding a request has several queries, which adjoin and
see one position more each. The first ones, as many as ACCEPTED says, had the right tokens; the
positions of the others are computed again in the next step, on the same slots. Version 2 has no
ACCEPTED, and one query a request.

SCORES takes queries x (width + runner-ups) of the frame's halves: of each query its top-k's entries
in their order, and its runner-ups'. A score is a half times 2**exponent; NaN is none (a pad).

A file with no trailer was cut off (a crash, a killed server); its whole frames are good.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from sglang_ess.tiers.contract import COUNTERS
from sglang_ess.trace import codec
from sglang_ess.trace.scores import (
    PlanScores,
    from_halves,
    pack_halves,
    to_halves,
    unpack_halves,
)

MAGIC, VERSION, SCORED_VERSION = b"ESSTRACE", 3, 4
READABLE = (2, VERSION, SCORED_VERSION)
PREFIX = struct.Struct("<8sII")
FRAME = struct.Struct("<4sIIII")
FRAME_TAG, TRAILER_TAG = b"FRAM", b"TAIL"
EVENT_COLUMNS = ("<u1", "<u2", "<u4", "<u4")  # kinds, layers, arguments, sizes
RECORD_COLUMNS = ("<u4", "<u4", "<u4", "<u4")  # ids, rows, lengths, counts
MAX_ID_BYTES = 65535  # longer request ids, which clients may choose, are cut

STATE = ("steps", *COUNTERS)


class Kind(IntEnum):
    """The kinds of events; the table above describes each."""

    PLAN = 0
    PLAN_SLOTS = 1
    WARM = 2
    INSTALL = 3
    INVALIDATE = 4
    CLEAR = 5
    RESIZE = 6
    SLOTS = 7
    GAP = 8
    ACCEPTED = 9
    SCORES = 10


HAS_RUNS = (Kind.INSTALL, Kind.INVALIDATE, Kind.SLOTS)
HAS_TOPK = (Kind.PLAN_SLOTS, Kind.WARM)
PLANS = (Kind.PLAN, Kind.PLAN_SLOTS)
OF_NO_LAYER = (Kind.SLOTS, Kind.GAP, Kind.ACCEPTED, Kind.SCORES)
NO_DATA = np.empty((0, 2), np.int32)
NOTHING = np.empty(0, np.int64)


class Queries(NamedTuple):
    """The requests of a plan's queries. In a verify step a request has several, which adjoin.

    request_ids [n]; rows [n] of the request table; lengths [n] positions that each query sees
    """

    request_ids: Sequence[str]
    rows: np.ndarray
    lengths: np.ndarray


class Entry(NamedTuple):
    """An event to write.

    counters  [7] int64 the layer's STATE after the event; None for events of no layer
    data      PLAN: positions [n, width] int32, -1 pads; PLAN_SLOTS, WARM: slots [n, width] int32;
              INSTALL, INVALIDATE, SLOTS: runs [m, 2] int32; ACCEPTED: lengths [requests, 1] int32
    queries   requests of a PLAN; a PLAN_SLOTS with queries is written as a PLAN if possible
    start     first position of a SLOTS
    scored    scores of a PLAN or PLAN_SLOTS, written as a SCORES after it; runner_ups are positions
              or slots as data is. A PLAN's pads must be its last columns
    """

    kind: Kind
    layer: int
    argument: int
    counters: np.ndarray | None = None
    data: np.ndarray = NO_DATA
    queries: Queries | None = None
    start: int = 0
    scored: PlanScores | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scored.nbytes if self.scored else 0)


@dataclass(frozen=True)
class TraceFrame:
    """A frame's n records and its events, as columns of int64 unless another type is named.

    request_ids    the distinct request ids
    layers, steps  [n] layer and step of each record's plan
    ids            [n] index of each record's request id
    rows, lengths  [n] row of the request table, and positions that the query sees
    offsets        [n + 1] record i has positions[offsets[i] : offsets[i + 1]]
    positions      [offsets[n]] int32
    kinds, event_layers, arguments, sizes  [events]
    counters       [events, 7] the layer's STATE after each event; 0 for events of no layer
    numbers        of all events, without their counters
    places         [events] where in numbers each event begins
    starts         [plans + 1] the n-th PLAN has the records starts[n] to starts[n + 1]
    halves         float16, of all SCORES; half_places [events] where in it each of them begins
    """

    request_ids: tuple[str, ...]
    layers: np.ndarray
    steps: np.ndarray
    ids: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray
    kinds: np.ndarray
    event_layers: np.ndarray
    arguments: np.ndarray
    sizes: np.ndarray
    counters: np.ndarray
    numbers: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    halves: np.ndarray
    half_places: np.ndarray

    def slots(self, event: int) -> np.ndarray:
        """Return the slots [n] int64 of an event with runs."""
        first = self.places[event] + (self.kinds[event] == Kind.SLOTS)
        runs = self.numbers[first : first + 2 * self.sizes[event]].reshape(-1, 2)
        counts = runs[:, 1] + 1
        # The first number of a run is its distance from the end of the run before.
        firsts = np.cumsum(unsigned(runs[:, 0])) + np.cumsum(counts) - counts
        slots = np.empty(counts.sum(), np.int64)
        codec.decode_runs(firsts, counts, slots)
        return slots

    def start(self, event: int) -> int:
        """Return the first position of a SLOTS event."""
        return int(self.numbers[self.places[event]])

    def accepted(self, event: int) -> np.ndarray:
        """Return the tokens [requests] int64 that an ACCEPTED event says were kept."""
        return self.numbers[self.places[event] :][: self.sizes[event]]

    def topk(self, event: int) -> np.ndarray:
        """Return the slots [queries, width] int64 of a PLAN_SLOTS or WARM."""
        width, first = self.arguments[event] // 2, self.places[event]
        numbers = self.numbers[first : first + self.sizes[event] * width]
        return np.cumsum(unsigned(numbers)).reshape(self.sizes[event], width)

    def scored(self, event: int) -> PlanScores | None:
        """Return the scores of a plan, or None. Runner-ups of a PLAN are positions."""
        if event + 1 == len(self.kinds) or self.kinds[event + 1] != Kind.SCORES:
            return None
        queries, runner_ups = int(self.sizes[event + 1]), int(self.arguments[event + 1])
        first = self.places[event + 1]
        numbers = unsigned(self.numbers[first : first + queries * (1 + runner_ups)])
        found = np.cumsum(numbers[queries:]).reshape(queries, runner_ups).astype(np.int32)
        columns = int(self.arguments[event]) // 2 + runner_ups
        halves = self.halves[self.half_places[event + 1] :][: queries * columns]
        return PlanScores(found, from_halves(numbers[:queries], halves.reshape(queries, columns)))


def unsigned(numbers: np.ndarray) -> np.ndarray:
    """Decode signed numbers, which are written as 0, -1, 1, -2, ... -> 0, 1, 2, 3, ..."""
    return (numbers >> 1) ^ -(numbers & 1)


# --- bytes of a frame -------------------------------------------------------------------


class Packer:
    """Packs events into frames, in order: the contents of a frame depend on those before it.

    layers, slots: of the trace; has_scores: whether its frames are of version 4
    """

    def __init__(self, layers: int, slots: int, has_scores: bool = False):
        self._has_scores = has_scores
        self._last = np.zeros((layers, len(STATE)), np.int64)
        self._table = np.zeros((0, 0), np.int32)  # the request table as far as the file has it
        self._marks = np.zeros(slots, np.uint8)

    def pack(self, entries: Sequence[Entry]) -> tuple[bytes, int]:
        """Pack events into a frame. Returns it and its number of records.

        Raises: ValueError for positions that do not ascend, queries without an id, and scores that
        do not fit their plan.
        """
        # One number of at most LEB_BYTES for 4 bytes, and an exponent for a query with scores.
        size = sum(codec.LEB_BYTES * (entry.nbytes // 4 + len(entry.data)) for entry in entries)
        counters_bytes = (1 + len(STATE)) * codec.COUNTER_BYTES
        out = np.empty(size + len(entries) * counters_bytes, np.uint8)
        events, records, end = [], [], 0
        halves = []
        ids: dict[str, int] = {}
        for entry in entries:
            if entry.scored is not None:
                _check_scores(entry, entry.scored, self._has_scores)
            entry = self._as_positions(entry)
            kind, layer, data = entry.kind, entry.layer, entry.data
            events.append((kind, layer, entry.argument, len(data)))
            if entry.counters is not None:
                end = codec.encode_signed(entry.counters - self._last[layer], out, end)
                self._last[layer] = entry.counters
            if kind == Kind.PLAN:
                counts = np.zeros(len(data), np.uint32)
                end = codec.encode_positions(data, counts, out, end)
                records.append(_record_columns(entry, ids, counts, end))
            elif kind in HAS_TOPK:
                end = codec.encode_slots(data, out, end)
            elif kind in HAS_RUNS:
                if kind == Kind.SLOTS:
                    end = codec.encode_number(entry.start, out, end)
                    self._learn(entry)
                end = codec.encode_runs(data, out, end)
            elif kind == Kind.ACCEPTED:
                for number in data.ravel().tolist():
                    end = codec.encode_number(number, out, end)
            if entry.scored is not None:
                events.append((Kind.SCORES, 0, entry.scored.runner_ups.shape[1], len(data)))
                exponents, found = to_halves(entry.scored.scores)
                halves.append(found.ravel())
                end = codec.encode_signed(exponents, out, end)
                end = codec.encode_slots(entry.scored.runner_ups, out, end)
        names = [name.encode(errors="replace")[:MAX_ID_BYTES] for name in ids]
        raw = [
            struct.pack("<I", len(names)),
            *(struct.pack("<H", len(name)) + name for name in names),
            struct.pack("<I", len(events)),
            *_columns(zip(*events, strict=True), EVENT_COLUMNS),
            *_columns(map(np.concatenate, zip(*records, strict=True)), RECORD_COLUMNS),
        ]
        if self._has_scores:
            found = np.concatenate(halves) if halves else np.empty(0, np.float16)
            raw += [struct.pack("<I", len(found)), pack_halves(found)]
        raw.append(out[:end].tobytes())
        num_records = sum(len(rows) for _, rows, _, _ in records)
        return frame_bytes(FRAME_TAG, b"".join(raw), num_records), num_records

    def _learn(self, entry: Entry) -> None:
        """Update a row of the request table by a SLOTS event."""
        counts = entry.data[:, 1].astype(np.int64)
        row, end = entry.argument, entry.start + int(counts.sum())
        rows, length = self._table.shape
        if row >= rows or end > length:
            table = np.zeros((max(2 * row, 8, rows), max(2 * end, length)), np.int32)
            table[:rows, :length] = self._table
            self._table = table
        slots = np.empty(end - entry.start, np.int64)
        codec.decode_runs(entry.data[:, 0].astype(np.int64), counts, slots)
        self._table[row, entry.start : end] = slots

    def _as_positions(self, entry: Entry) -> Entry:
        """Turn a plan's slots into positions of its requests, if these reproduce the slots."""
        if entry.kind != Kind.PLAN_SLOTS or entry.queries is None:
            return entry
        _, rows, lengths = entry.queries
        table = rows, lengths, self._table
        positions = codec.slots_to_positions(entry.data, *table, self._marks)
        if not codec.positions_give(entry.data, rows, self._table, positions):
            return entry
        if (scored := entry.scored) is not None:
            others = codec.slots_to_positions(scored.runner_ups, *table, self._marks)
            if not codec.positions_give(scored.runner_ups, rows, self._table, others):
                return entry
            scored = scored._replace(runner_ups=others)
        return entry._replace(kind=Kind.PLAN, data=positions, scored=scored)


def _check_scores(entry: Entry, scored: PlanScores, has_scores: bool) -> None:
    """Raise ValueError if these cannot be the scores of this plan."""
    queries, width = entry.data.shape
    shapes = (queries, width + scored.runner_ups.shape[1]), (queries, scored.runner_ups.shape[1])
    if (scored.scores.shape, scored.runner_ups.shape) != shapes:
        got = f"{scored.scores.shape} and {scored.runner_ups.shape} for {entry.data.shape}"
        raise ValueError(f"a plan's scores and runner-ups must have its queries: got {got}")
    if entry.kind not in PLANS or not has_scores:
        raise ValueError("only a plan, of a trace with scores, has scores")
    pads = entry.data < 0
    if entry.kind == Kind.PLAN and (pads[:, :-1] > pads[:, 1:]).any():
        raise ValueError("positions with scores must come before their pads")


def frame_bytes(tag: bytes, raw: bytes, num_records: int) -> bytes:
    """Return a frame with its head. Frames of events are compressed, the trailer is not."""
    payload = zlib.compress(raw, 1) if tag == FRAME_TAG else raw
    return FRAME.pack(tag, len(payload), len(raw), num_records, zlib.crc32(payload)) + payload


def _record_columns(
    entry: Entry, ids: dict[str, int], counts: np.ndarray, end: int
) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids, rows, lengths and counts of a PLAN's records.

    ids: request id -> its number in the frame; new ones are added
    """
    names, rows, lengths = entry.queries or Queries((), NOTHING, NOTHING)
    where = f"layer {entry.layer}"
    sizes = len(names), len(rows), len(lengths), len(entry.data)
    if len(set(sizes)) != 1:
        raise ValueError(f"a query must have one request id, row and length: got {where}, {sizes}")
    if end < 0:
        raise ValueError(f"positions must ascend: got {where}")
    return [ids.setdefault(name, len(ids)) for name in names], rows, lengths, counts


def _columns(columns: Iterable[Any], kinds: Sequence[str]) -> list[bytes]:
    return [np.asarray(c).astype(kind).tobytes() for c, kind in zip(columns, kinds, strict=False)]


def unpack(
    payload: bytes, raw_bytes: int, num_records: int, last: np.ndarray, has_scores: bool = False
) -> TraceFrame:
    """Decode a frame's records and events.

    last: [layers, 7] int64 each layer's STATE after the frame before; updated
    has_scores: whether it is of version 4
    Raises: ValueError if the payload is not a frame of this version.
    """
    try:
        raw = zlib.decompressobj().decompress(payload, raw_bytes)
        (num_ids,), place, names = struct.unpack_from("<I", raw), 4, []
        for _ in range(num_ids):
            (size,) = struct.unpack_from("<H", raw, place)
            names.append(raw[place + 2 : place + 2 + size].decode(errors="replace"))
            place += 2 + size
        (num_events,) = struct.unpack_from("<I", raw, place)
        columns, place = [], place + 4
        kinds = [(kind, num_events) for kind in EVENT_COLUMNS]
        for kind, count in kinds + [(kind, num_records) for kind in RECORD_COLUMNS]:
            column = np.frombuffer(raw, kind, count, place)
            columns.append(column.astype(np.int64))
            place += column.nbytes
        halves = np.empty(0, np.float16)
        if has_scores:
            (num_halves,) = struct.unpack_from("<I", raw, place)
            halves = unpack_halves(np.frombuffer(raw, np.uint8, 2 * num_halves, place + 4))
            place += 4 + 2 * num_halves
        numbers = _numbers(np.frombuffer(raw, np.uint8, offset=place))
    except (zlib.error, struct.error) as error:
        raise ValueError(str(error)) from None
    return _frame(tuple(names), columns, numbers, halves, last)


def _numbers(data: np.ndarray) -> np.ndarray:
    numbers = np.empty(np.count_nonzero(data < 128), np.int64)
    if not codec.decode(data, numbers):
        raise ValueError("numbers must end with a byte below 128, after 9 at most")
    return numbers


def _frame(
    names: tuple[str, ...],
    columns: Sequence[np.ndarray],
    numbers: np.ndarray,
    halves: np.ndarray,
    last: np.ndarray,
) -> TraceFrame:
    kinds, layers, arguments, sizes, ids, rows, lengths, counts = columns
    plans, widths = kinds == Kind.PLAN, arguments // 2
    of_layer = ~np.isin(kinds, OF_NO_LAYER)
    _expect(sizes[plans].sum() == len(ids), "its records must be those of its plans")
    _expect((kinds <= max(Kind)).all(), "its events must be of known kinds")
    _expect((ids < len(names)).all(), "its records must have ids that it names")
    _expect((layers[of_layer] < len(last)).all(), f"its layers must be below {len(last)}")
    fits = counts <= np.repeat(widths[plans], sizes[plans])
    _expect(fits.all(), "its queries must be as wide as their plan")
    offsets = np.concatenate([[0], np.cumsum(counts)])
    starts = np.concatenate([[0], np.cumsum(sizes[plans])])
    num_data = np.where(np.isin(kinds, HAS_RUNS), 2 * sizes, 0) + (kinds == Kind.SLOTS)
    num_data += np.where(np.isin(kinds, HAS_TOPK), sizes * widths, 0)
    num_data += np.where(kinds == Kind.ACCEPTED, sizes, 0)
    num_data += np.where(kinds == Kind.SCORES, sizes * (1 + arguments), 0)
    num_data[plans] = np.diff(offsets[starts])
    _expect((num_data <= len(numbers)).all(), "its events must have the numbers that they claim")
    ends = np.cumsum(num_data + of_layer * len(STATE))
    _expect(np.append(0, ends)[-1] == len(numbers), "all numbers must be of its events")
    places = ends - num_data
    counters = np.zeros((len(kinds), len(STATE)), np.int64)
    counters[of_layer] = unsigned(numbers[places[of_layer, None] + np.arange(-len(STATE), 0)])
    codec.accumulate(counters, of_layer, layers, last)
    of_plan = np.repeat(places[plans] - offsets[starts[:-1]], sizes[plans])
    positions = np.empty(offsets[-1], np.int32)
    fits = codec.decode_positions(numbers, of_plan + offsets[:-1], counts, positions)
    _expect(fits, "its positions must be below 2**31")
    of_record = np.repeat(np.flatnonzero(plans), sizes[plans])
    return TraceFrame(
        names, layers[of_record], counters[of_record, 0] - 1, ids, rows, lengths, offsets,
        positions, kinds, layers, arguments, sizes, counters, numbers, places, starts, halves,
        _half_places(kinds, arguments, sizes, len(halves)),
    )  # fmt: skip


def _half_places(
    kinds: np.ndarray, arguments: np.ndarray, sizes: np.ndarray, num_halves: int
) -> np.ndarray:
    """Return where each SCORES' halves begin; num_halves for other events."""
    scores = np.flatnonzero(kinds == Kind.SCORES)
    plans = scores - 1
    fits = np.isin(kinds[plans], PLANS) & (sizes[plans] == sizes[scores])
    _expect(fits.all() and (plans >= 0).all(), "its scores must be those of the plan before")
    columns = arguments[plans] // 2 + arguments[scores]
    ends = np.cumsum(sizes[scores] * columns)
    _expect(np.append(0, ends)[-1] == num_halves, "all halves must be of its scores")
    places = np.full(len(kinds), num_halves)
    places[scores] = ends - sizes[scores] * columns
    return places


def _expect(holds: bool | np.bool_, rule: str) -> None:
    if not holds:
        raise ValueError(rule)
