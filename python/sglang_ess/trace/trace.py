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
from typing import Any, BinaryIO

import numpy as np

from sglang_ess.layout import MIB
from sglang_ess.trace.codec import slots_to_positions
from sglang_ess.trace.format import (
    FRAME,
    FRAME_TAG,
    MAGIC,
    PREFIX,
    READABLE,
    SCORED_VERSION,
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
from sglang_ess.trace.records import (
    Event,
    Query,
    Record,
    accepted_of,
    events_of,
    queries_of,
    whole,
)
from sglang_ess.trace.scores import PlanScores

__all__ = [
    "Event", "Kind", "PlanScores", "Record", "Trace", "TraceFrame", "TraceWriter", "read_trace",
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
    runner_ups   the most that a query has beside its scores; None: a trace without scores
    waits        put() waits for the writer when it is behind, and drops nothing
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
        runner_ups: int | None = None,
        waits: bool = False,
    ):
        facts = {"layers": layers, "topk": topk, "slots": slots, "meta": meta or {}}
        has_scores = runner_ups is not None
        if has_scores:
            facts["runner_ups"] = runner_ups
        header = json.dumps(facts).encode() + b"\n"
        min_bytes = PREFIX.size + len(header) + TRAILER_BYTES
        if limit_bytes < min_bytes:
            raise ValueError(
                f"a trace's limit must be at least {min_bytes} bytes: got {limit_bytes}."
            )
        self.path, self.limit_bytes = Path(path), limit_bytes
        self.runner_ups, self._waits = runner_ups, waits
        self.error: Exception | None = None  # what has ended the trace, if anything has
        self.records = self.events = self.dropped = self.written_bytes = 0
        self._gap = 0  # events dropped since the last one queued
        self._packer = Packer(layers, slots, has_scores)
        self._queue: deque[Entry] = deque()
        self._queued_bytes = 0
        self._closing = False
        self._recording = True
        self._wake = threading.Condition()
        # Unbuffered, so that written frames survive when the process is killed.
        self._file: BinaryIO = open(self.path, "wb", buffering=0)
        version = SCORED_VERSION if has_scores else VERSION
        self._write(PREFIX.pack(MAGIC, version, len(header)) + header)
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
        size = entry.nbytes + ENTRY_BYTES
        with self._wake:
            if self._waits:
                self._wake.wait_for(
                    lambda: not self._recording or self._queued_bytes + size <= QUEUE_BYTES
                )
            if self._queued_bytes + size > QUEUE_BYTES:
                self.dropped += 1
                self._gap += 1
                return False
            if self._gap:
                self._queue.append(Entry(Kind.GAP, 0, self._gap))
                self._gap = 0
            self._queue.append(entry)
            self._queued_bytes += size
            if self._queued_bytes >= FRAME_BYTES:
                self._wake.notify_all()
        return True

    def close(self) -> None:
        """Write the queued events and the trailer. Further calls, from any thread, wait too."""
        with self._wake:
            self._recording = False
            self._closing = True
            self._wake.notify_all()
        self._thread.join(CLOSE_SECONDS)

    # --- the writer's thread ------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_frames()
        except Exception as error:  # an error of the trace must not reach serving
            self.error = error
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
                self._wake.notify_all()
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
                    size += entries[-1].nbytes + ENTRY_BYTES
            self._queued_bytes -= size
            self._wake.notify_all()
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


class Trace:
    """A trace file. Iterating reads it and gives its Records in the order written.

    header   the file's header; layers, topk, slots: from it; runner_ups: None without scores
    bytes    size of the file when it was opened
    trailer  the file's trailer after a whole iteration; None before, or if the file was cut off
    """

    def __init__(self, path: Path, header: dict[str, Any], start: int):
        self.path, self.header, self._start = path, header, start
        self.layers, self.topk, self.slots = (header[key] for key in HEADER_NUMBERS)
        self.runner_ups: int | None = header.get("runner_ups")
        self.bytes = path.stat().st_size
        self.trailer: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Record]:
        for frame in self.frames():
            for _, record in queries_of(frame, 0, len(frame.ids)):
                yield record

    def kept(self) -> Iterator[Record]:
        """Read the Records of queries whose token was kept, each layer's in order.

        Of a verify step that are as many of each request's as were accepted. A verify step whose
        ACCEPTED is missing is left out. A step of one query a request is whole.
        """
        step: dict[int, list[Query]] = {}  # layer -> the queries of its last step so far
        for frame in self.frames():
            plan = 0
            for event in np.flatnonzero(np.isin(frame.kinds, OF_STEPS)).tolist():
                kind, argument = frame.kinds[event], int(frame.arguments[event])
                if kind == Kind.ACCEPTED:
                    yield from accepted_of(step, frame.accepted(event), argument)
                    step.clear()
                    continue
                layer = int(frame.event_layers[event])
                if argument % 2 == 0:  # it begins a step
                    yield from whole(step.pop(layer, []))
                if kind == Kind.PLAN:
                    first, end = frame.starts[plan : plan + 2].tolist()
                    step.setdefault(layer, []).extend(queries_of(frame, first, end))
                    plan += 1
        for queries in step.values():
            yield from whole(queries)

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
                    has_scores = self.runner_ups is not None
                    yield unpack(payload, raw_bytes, num_records, last, has_scores)
                except ValueError as error:
                    raise ValueError(f"{self.path} has a frame of another kind: {error}.") from None
                progress(len(head) + len(payload))

    def events(self, progress: Callable[[int], object] = lambda _: None) -> Iterator[Event]:
        """Read all events in order. progress, Raises: as frames()."""
        table: dict[int, np.ndarray] = {}  # row of the request table -> its slots
        for frame in self.frames(progress):
            try:
                yield from events_of(frame, table, self.slots)
            except ValueError as error:
                raise ValueError(f"{self.path} has a frame of another kind: {error}.") from None


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
            raise ValueError(
                f"an ESS trace must be of version {READABLE[0]} to {READABLE[-1]}: got {version} "
                f"in {path}. Record it again with this version's --ess-trace."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        if not all(type(header[key]) is int and header[key] > 0 for key in HEADER_NUMBERS):
            raise TypeError(f"{', '.join(HEADER_NUMBERS)} must be positive integers")
        if (version == SCORED_VERSION) != (type(header.get("runner_ups")) is int):
            raise TypeError("runner_ups must be an integer of version 4 alone")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"an ESS trace must have a whole header: got {len(text)} of {length} bytes in {path} "
            f"({type(error).__name__}: {error})."
        ) from None
    return Trace(path, header, PREFIX.size + length)
