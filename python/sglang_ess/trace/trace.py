"""A trace of the hot tier in a file: a writer for serving, a reader for replay.

A trace has two contents. Records are for studies of locality: each is one decode query of one
layer, with the positions of its request that it attended to. Events are for exact replay
(sim/model/trace_replay.py), at the recorded size or any other: each operation on a layer's HotCache
in order, with its slots and the counters after it. format.py describes the bytes.
"""

from __future__ import annotations

import json
import logging
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sglang_ess.layout import MIB
from sglang_ess.trace.codec import slots_to_positions
from sglang_ess.trace.format import (
    FRAME,
    FRAME_TAG,
    HAS_RUNS,
    HAS_TOPK,
    MAGIC,
    PREFIX,
    READABLE,
    STATE,
    TRAILER_TAG,
    VERSION,
    Entry,
    Kind,
    Packer,
    TraceFrame,
    frame_bytes,
    unpack,
)  # fmt: skip

__all__ = [
    "Event", "Kind", "Record", "Trace", "TraceFrame", "TraceWriter", "read_trace",
    "slots_to_positions",
]  # fmt: skip

logger = logging.getLogger(__name__)

# A frame is written when this much is queued or after this time; a crash loses no more.
FRAME_BYTES = 4 * MIB  # as queued, in int32; the raw bytes are about a quarter of it
FLUSH_SECONDS = 1.0
QUEUE_BYTES = 64 * MIB  # when more is queued, the writer is behind and events are dropped
ENTRY_BYTES = 256  # of an event in the queue in addition to its data: tuples and small arrays
TRAILER_BYTES = 256  # reserved below the limit
CLOSE_SECONDS = 60.0
HEADER_NUMBERS = ("layers", "topk", "slots")
NOTHING = np.empty(0, np.int64)
OF_STEPS = (Kind.PLAN, Kind.PLAN_SLOTS, Kind.ACCEPTED)


# --- writer -----------------------------------------------------------------------------


class TraceWriter:
    """Writes a trace from a thread of its own; put() appends to a queue and returns.

    The trace ends at close(), at the limit or at an error; then put() does nothing. An error after
    the constructor is logged in one line and never raised.

    path         replaced if it exists
    layers, topk, slots  of the pool
    limit_bytes  the file never grows beyond it
    meta         JSON for the header
    Raises: OSError if the file cannot be written, ValueError if the limit leaves no room.
    """

    def __init__(
        self,
        path: str | Path,
        layers: int,
        topk: int,
        slots: int,
        limit_bytes: int = 1 << 30,
        meta: dict[str, Any] | None = None,
    ):
        facts = {"layers": layers, "topk": topk, "slots": slots, "meta": meta or {}}
        header = json.dumps(facts).encode() + b"\n"
        min_bytes = PREFIX.size + len(header) + TRAILER_BYTES
        if limit_bytes < min_bytes:
            raise ValueError(
                f"a trace's limit must be at least {min_bytes} bytes: got {limit_bytes}."
            )
        self.path, self.limit_bytes = Path(path), limit_bytes
        self.records = self.events = self.dropped = self.written_bytes = 0
        self._gap = 0  # events dropped since the last one queued
        self._packer = Packer(layers, slots)
        self._queue: deque[Entry] = deque()
        self._queued_bytes = 0
        self._closing = False
        self._recording = True
        self._wake = threading.Condition()
        # Unbuffered, so that written frames survive when the process is killed.
        self._file: BinaryIO = open(self.path, "wb", buffering=0)
        self._write(PREFIX.pack(MAGIC, VERSION, len(header)) + header)
        self._thread = threading.Thread(target=self._run, name="ess-trace", daemon=True)
        self._thread.start()

    @property
    def recording(self) -> bool:
        """Whether the trace has not ended yet."""
        return self._recording

    def put(self, entry: Entry) -> bool:
        """Append an event; its arrays must not change any more.

        Returns whether it will be written. If the writer is behind, the event is dropped, and a GAP
        precedes the next one.
        """
        if not self._recording:
            return False
        with self._wake:
            if self._queued_bytes + entry.data.nbytes + ENTRY_BYTES > QUEUE_BYTES:
                self.dropped += 1
                self._gap += 1
                return False
            if self._gap:
                self._queue.append(Entry(Kind.GAP, 0, self._gap))
                self._gap = 0
            self._queue.append(entry)
            self._queued_bytes += entry.data.nbytes + ENTRY_BYTES
            if self._queued_bytes >= FRAME_BYTES:
                self._wake.notify()
        return True

    def close(self) -> None:
        """Write the queued events and the trailer. Further calls, from any thread, wait too."""
        with self._wake:
            self._recording = False
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS)

    # --- the writer's thread ------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_frames()
        except Exception as error:  # an error of the trace must not reach serving
            logger.warning(
                "ESS: trace %s has failed after %d records (%d bytes) and is off: %s: %s",
                self.path,
                self.records,
                self.written_bytes,
                type(error).__name__,
                str(error).replace("\n", " "),
            )
        finally:
            with self._wake:
                self._recording = False
                self._queue.clear()
                self._queued_bytes = 0
            self._file.close()

    def _write_frames(self) -> None:
        while True:
            entries = self._next_entries()
            if entries is None:
                self._end("closed")
                return
            if not entries:
                continue
            frame, num_records = self._packer.pack(entries)
            if self.written_bytes + len(frame) + TRAILER_BYTES > self.limit_bytes:
                with self._wake:
                    self._recording = False
                    self.dropped += _num_events([*entries, *self._queue])
                self._end("limit")
                return
            self._write(frame)
            self.records += num_records
            self.events += _num_events(entries)

    def _next_entries(self) -> list[Entry] | None:
        """Return the events of the next frame, an empty list after a timeout, None at the end."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._closing or self._queued_bytes >= FRAME_BYTES, FLUSH_SECONDS
            )
            if self._closing and not self._queue:
                return None
            entries, size = [], 0
            while self._queue and size < FRAME_BYTES:
                entries.append(self._queue.popleft())
                if entries[-1].kind != Kind.GAP:
                    size += entries[-1].data.nbytes + ENTRY_BYTES
            self._queued_bytes -= size
            return entries

    def _end(self, how: str) -> None:
        facts = {"records": self.records, "events": self.events}
        payload = json.dumps(facts | {"dropped": self.dropped, "end": how}).encode()
        self._write(frame_bytes(TRAILER_TAG, payload, self.records))
        (logger.warning if how == "limit" or self.dropped else logger.info)(
            "ESS: trace %s has ended (%s): %d records, %d bytes of at most %d, %d events dropped",
            self.path,
            how,
            self.records,
            self.written_bytes,
            self.limit_bytes,
            self.dropped,
        )

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:  # an unbuffered file may take a part only
            view = view[self._file.write(view) :]
        self.written_bytes += len(data)


def _num_events(entries: Sequence[Entry]) -> int:
    return sum(entry.kind != Kind.GAP for entry in entries)


# --- reader -----------------------------------------------------------------------------


class Record(NamedTuple):
    """One decode query of one layer. In a verify step a request has several, which adjoin.

    step       of the layer, counted from 0
    length     positions that the query sees
    positions  [count] int32, ascending: those that it selected
    """

    layer: int
    step: int
    request_id: str
    length: int
    positions: np.ndarray


class Event(NamedTuple):
    """An operation on one layer's HotCache, or a GAP or ACCEPTED, which belong to no layer.

    slots     PLAN, WARM: the top-k [queries, width] int32, -1 pads; INSTALL, INVALIDATE: [n] int64;
              ACCEPTED: tokens [requests] int64 that each request of the last step kept
    argument  PLAN: same_step; INSTALL: min_age; RESIZE: hot rows; GAP: missing events; ACCEPTED:
              queries of a request
    counters  [7] int64 format.STATE after it; meaningless for a GAP and ACCEPTED
    """

    kind: Kind
    layer: int
    argument: int
    slots: np.ndarray
    counters: np.ndarray


class Trace:
    """A trace file. Iterating reads it and gives its Records in the order written.

    header   the file's header; layers, topk, slots: from it
    bytes    size of the file when it was opened
    trailer  the file's trailer after a whole iteration; None before, or if the file was cut off
    """

    def __init__(self, path: Path, header: dict[str, Any], start: int):
        self.path, self.header, self._start = path, header, start
        self.layers, self.topk, self.slots = (header[key] for key in HEADER_NUMBERS)
        self.bytes = path.stat().st_size
        self.trailer: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Record]:
        for frame in self.frames():
            for _, record in _queries(frame, 0, len(frame.ids)):
                yield record

    def kept(self) -> Iterator[Record]:
        """Read the Records of queries whose token was kept, each layer's in order.

        Of a verify step that are as many of each request's as were accepted. A verify step whose
        ACCEPTED is missing is left out. A step of one query a request is whole.
        """
        step: dict[int, list[_Query]] = {}  # layer -> the queries of its last step so far
        for frame in self.frames():
            plan = 0
            for event in np.flatnonzero(np.isin(frame.kinds, OF_STEPS)).tolist():
                kind, argument = frame.kinds[event], int(frame.arguments[event])
                if kind == Kind.ACCEPTED:
                    yield from _accepted(step, frame.accepted(event), argument)
                    step.clear()
                    continue
                layer = int(frame.event_layers[event])
                if argument % 2 == 0:  # it begins a step
                    yield from _whole(step.pop(layer, []))
                if kind == Kind.PLAN:
                    first, end = frame.starts[plan : plan + 2].tolist()
                    step.setdefault(layer, []).extend(_queries(frame, first, end))
                    plan += 1
        for queries in step.values():
            yield from _whole(queries)

    def frames(self, progress: Callable[[int], object] = lambda _: None) -> Iterator[TraceFrame]:
        """Read frame by frame, as columns. Ends at the first broken frame.

        progress: called with the bytes of each frame once it has been read
        Raises: ValueError for an undamaged frame that is not of this version.
        """
        last = np.zeros((self.layers, len(STATE)), np.int64)
        self.trailer = None
        with self.path.open("rb") as file:
            file.seek(self._start)
            while True:
                head = file.read(FRAME.size)
                if len(head) < FRAME.size or head[:4] not in (FRAME_TAG, TRAILER_TAG):
                    return
                tag, payload_bytes, raw_bytes, num_records, crc = FRAME.unpack(head)
                payload = file.read(payload_bytes)
                if len(payload) < payload_bytes or zlib.crc32(payload) != crc:
                    return
                if tag == TRAILER_TAG:
                    self.trailer = json.loads(payload)
                    return
                try:
                    yield unpack(payload, raw_bytes, num_records, last)
                except ValueError as error:
                    raise ValueError(f"{self.path} has a frame of another kind: {error}.") from None
                progress(len(head) + len(payload))

    def events(self, progress: Callable[[int], object] = lambda _: None) -> Iterator[Event]:
        """Read all events in order. progress, Raises: as frames()."""
        table: dict[int, np.ndarray] = {}  # row of the request table -> its slots
        for frame in self.frames(progress):
            try:
                yield from _events(frame, table, self.slots)
            except ValueError as error:
                raise ValueError(f"{self.path} has a frame of another kind: {error}.") from None


_Query = tuple[int, Record]  # a row of the request table and its query


def _queries(frame: TraceFrame, first: int, end: int) -> Iterator[_Query]:
    """Yield a frame's records [first, end), each with its row of the request table."""
    offsets = frame.offsets[first : end + 1].tolist()
    names = [frame.request_ids[i] for i in frame.ids[first:end].tolist()]
    columns = (
        c[first:end].tolist() for c in (frame.rows, frame.layers, frame.steps, frame.lengths)
    )
    for i, (name, row, layer, step, length) in enumerate(zip(names, *columns, strict=True)):
        positions = frame.positions[offsets[i] : offsets[i + 1]]
        yield row, Record(layer, step, name, length, positions)


def _accepted(step: dict[int, list[_Query]], kept: np.ndarray, width: int) -> Iterator[Record]:
    """Yield the first kept[i] of each request's `width` queries, in each layer that has all."""
    wanted = np.arange(width) < kept[:, None]
    for queries in step.values():
        if len(queries) == wanted.size:
            for (_, record), is_kept in zip(queries, wanted.ravel().tolist(), strict=True):
                if is_kept:
                    yield record


def _whole(queries: list[_Query]) -> Iterator[Record]:
    """Yield the queries of a step, unless a request has several and nobody knows which count."""
    rows = [row for row, _ in queries]
    if len(set(rows)) == len(rows):
        for _, record in queries:
            yield record


def _events(frame: TraceFrame, table: dict[int, np.ndarray], slots: int) -> Iterator[Event]:
    """Decode a frame's events. table: updated. Raises: ValueError for impossible slots."""
    plan = 0
    columns = frame.kinds.tolist(), frame.event_layers.tolist(), frame.arguments.tolist()
    for i, (kind, layer, argument) in enumerate(zip(*columns, strict=True)):
        found = NOTHING
        if kind == Kind.SLOTS:
            table[argument] = _row(frame, i, table.get(argument, NOTHING), slots)
            continue
        if kind == Kind.PLAN:
            first, end = frame.starts[plan : plan + 2]
            found = _topk(frame, range(first, end), argument // 2, table)
            argument, plan = argument % 2, plan + 1
        elif kind in HAS_TOPK:
            found = _within(frame.topk(i), -1, slots).astype(np.int32)
            argument %= 2
        elif kind in HAS_RUNS:
            found = _within(frame.slots(i), 0, slots)
        elif kind == Kind.ACCEPTED:
            found = _within(frame.accepted(i), 1, argument + 1, "accepted lengths")
        elif kind == Kind.RESIZE and not 1 <= argument <= slots:
            raise ValueError(f"hot rows must be 1 to {slots}: got {argument}")
        shown = Kind.PLAN if kind == Kind.PLAN_SLOTS else Kind(kind)
        yield Event(shown, layer, argument, found, frame.counters[i])


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


def _within(numbers: np.ndarray, first: int, end: int, what: str = "slots") -> np.ndarray:
    if len(numbers) and not first <= numbers.min() <= numbers.max() < end:
        got = f"{numbers.min()}, {numbers.max()}"
        raise ValueError(f"{what} must be {first} to {end - 1}: got {got}")
    return numbers


def read_trace(path: str | Path) -> Trace:
    """Open a trace.

    Raises: OSError if the file cannot be read, ValueError (one line) if it is no trace of this
    version.
    """
    path = Path(path)
    with path.open("rb") as file:
        prefix = file.read(PREFIX.size)
        if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
            raise ValueError(
                f"an ESS trace must begin with {MAGIC!r}: got {prefix[:8]!r} in {path}. "
                "Record one with --ess-trace."
            )
        _, version, length = PREFIX.unpack(prefix)
        if version not in READABLE:
            known = " or ".join(map(str, READABLE))
            raise ValueError(
                f"an ESS trace must be of version {known}: got {version} in {path}. Record it "
                "again with this version's --ess-trace."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        if not all(type(header[key]) is int and header[key] > 0 for key in HEADER_NUMBERS):
            raise TypeError(f"{', '.join(HEADER_NUMBERS)} must be positive integers")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"an ESS trace must have a whole header: got {len(text)} of {length} bytes in {path} "
            f"({type(error).__name__}: {error})."
        ) from None
    return Trace(path, header, PREFIX.size + length)
