"""Decode top-k streams in a file: the writer beside serving, the reader for replay.

One record is one query of one layer: which positions of its request it attended to. A step
of a layer is one call of TraceWriter.record for it, counted from 0; dropped ones count.

The file, all numbers little-endian:

    magic    8 B  b"ESSTRACE"
    version  u32  1
    length   u32  bytes of the header
    header   JSON in one line, with its newline:
             {"layers": int, "topk": int, "meta": {...}}
    frames   each: tag 4 B b"FRAM", payload bytes u32, raw bytes u32, records u32,
             CRC-32 of the payload u32; then the payload, one zlib stream of the raw bytes
    trailer  a frame with tag b"TAIL" whose payload is JSON, not compressed (raw bytes =
             payload bytes, records = all written):
             {"records": int, "dropped": int, "end": "closed" or "limit"}

The raw bytes of a frame, which needs no other frame to be read:

    u32 n; then n request ids, each u16 bytes and UTF-8
    layers u16 [records], steps u32 [records], ids u32 [records] (index of the request id),
    lengths u32 [records] (positions the query sees), counts u32 [records]
    the positions of each record in turn, counts of them, ascending: gaps as LEB128, 7 bits
    a byte, the last byte of a number below 128. The first gap is the first position, a
    later one position - previous - 1.

A file with no trailer was cut off (a crash, a full disk); its whole frames are good.
"""

from __future__ import annotations

import json
import logging
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from sglang_ess.tiers import trace_kernels
from sglang_ess.tiers.trace_kernels import slots_to_positions

__all__ = ["Record", "Trace", "TraceFrame", "TraceWriter", "read_trace", "slots_to_positions"]

logger = logging.getLogger(__name__)

MAGIC, VERSION = b"ESSTRACE", 1
PREFIX = struct.Struct("<8sII")
FRAME = struct.Struct("<4sIIII")
FRAME_TAG, TRAILER_TAG = b"FRAM", b"TAIL"
COLUMNS = ("<u2", "<u4", "<u4", "<u4", "<u4")  # layers, steps, ids, lengths, counts

MIB = 1 << 20
MAX_ID_BYTES = 65535  # of a request id, which the client may choose; the rest is cut off
# A frame is written when so much is queued, or after this time: what a crash loses.
FRAME_BYTES = 4 * MIB  # as queued, int32; about a quarter of it as raw bytes
FLUSH_SECONDS = 1.0
QUEUE_BYTES = 64 * MIB  # past it the writer is behind, and records are dropped
TRAILER_BYTES = 256  # kept free under the limit
CLOSE_SECONDS = 60.0


# --- writer -----------------------------------------------------------------------------


class _Call(NamedTuple):
    """One call of record(), copied."""

    layer: int
    step: int
    request_ids: tuple[str, ...]
    lengths: np.ndarray
    positions: np.ndarray


class TraceWriter:
    """Writes a trace from a thread of its own; record() copies and returns.

    States: recording -> stopped, by close(), by the limit or by an error. Stopped, record()
    does nothing. Nothing that goes wrong after the constructor is raised: it is logged, in
    one line, and ends the trace.

    path: replaced if it exists; layers, topk: of the model; meta: JSON values for the header
    limit_bytes: the file never grows past it
    Raises: OSError if the file cannot be written, ValueError if the limit leaves no room.
    """

    def __init__(
        self,
        path: str | Path,
        layers: int,
        topk: int,
        limit_bytes: int = 1 << 30,
        meta: dict | None = None,
    ):
        header = json.dumps({"layers": layers, "topk": topk, "meta": meta or {}}).encode() + b"\n"
        least = PREFIX.size + len(header) + TRAILER_BYTES
        if limit_bytes < least:
            raise ValueError(f"a trace's limit must be at least {least} bytes: got {limit_bytes}.")
        self.path, self.limit_bytes = Path(path), limit_bytes
        self.records = self.dropped = self.written_bytes = 0
        self._steps = [0] * layers
        self._queue: deque[_Call] = deque()
        self._queued_bytes = 0
        self._closing = False
        self._recording = True
        self._wake = threading.Condition()
        # Unbuffered: what is written survives the process's being killed.
        self._file: BinaryIO = open(self.path, "wb", buffering=0)
        self._write(PREFIX.pack(MAGIC, VERSION, len(header)) + header)
        self._thread = threading.Thread(target=self._run, name="ess-trace", daemon=True)
        self._thread.start()

    @property
    def recording(self) -> bool:
        """False once the trace has ended; record() then does nothing."""
        return self._recording

    def record(
        self,
        layer: int,
        request_ids: Sequence[str],
        lengths: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        """Append one step of one layer: a record a query.

        layer: 0 to layers - 1; request_ids [T]; lengths [T] int32, positions each query sees
        positions [T, K] int32: valid entries ascending, -1 pads anywhere
        Cost: a copy of positions. If the writer is behind, the records are dropped.
        """
        if not self._recording:
            return
        size = positions.nbytes
        with self._wake:
            step = self._steps[layer]
            self._steps[layer] = step + 1
            if self._queued_bytes + size > QUEUE_BYTES:
                self.dropped += len(request_ids)
                return
        call = _Call(
            layer,
            step,
            tuple(request_ids),
            np.array(lengths, np.int32),
            np.array(positions, np.int32, order="C"),
        )
        with self._wake:
            self._queue.append(call)
            self._queued_bytes += size
            if self._queued_bytes >= FRAME_BYTES:
                self._wake.notify()

    def close(self) -> None:
        """Write what is queued and the trailer. More calls, from any thread, wait too."""
        with self._wake:
            self._recording = False
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_SECONDS)

    # --- the writer's thread ------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_frames()
        except Exception as error:  # nothing of a trace may reach serving
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
            calls = self._next_calls()
            if calls is None:
                self._end("closed")
                return
            if not calls:
                continue
            frame, num_records = _frame(calls)
            if self.written_bytes + len(frame) + TRAILER_BYTES > self.limit_bytes:
                with self._wake:
                    self._recording = False
                    self.dropped += num_records + sum(len(c.request_ids) for c in self._queue)
                self._end("limit")
                return
            self._write(frame)
            self.records += num_records

    def _next_calls(self) -> list[_Call] | None:
        """The calls of the next frame; none if the time was up; None at the end."""
        with self._wake:
            self._wake.wait_for(
                lambda: self._closing or self._queued_bytes >= FRAME_BYTES, FLUSH_SECONDS
            )
            if self._closing and not self._queue:
                return None
            calls, size = [], 0
            while self._queue and size < FRAME_BYTES:
                calls.append(self._queue.popleft())
                size += calls[-1].positions.nbytes
            self._queued_bytes -= size
            return calls

    def _end(self, how: str) -> None:
        facts = {"records": self.records, "dropped": self.dropped, "end": how}
        payload = json.dumps(facts).encode()
        self._write(_with_head(TRAILER_TAG, payload, len(payload), self.records))
        (logger.warning if how == "limit" or self.dropped else logger.info)(
            "ESS: trace %s has ended (%s): %d records, %d bytes of at most %d, %d records dropped",
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


def _frame(calls: Sequence[_Call]) -> tuple[bytes, int]:
    """A frame's bytes and its number of records. Raises: ValueError for what is no record."""
    ids = {name: None for call in calls for name in call.request_ids}
    index = {name: i for i, name in enumerate(ids)}
    out = np.empty(trace_kernels.LEB_BYTES * sum(call.positions.size for call in calls), np.uint8)
    columns, end = [], 0
    for call in calls:
        num_queries, where = len(call.request_ids), f"layer {call.layer}, step {call.step}"
        shapes = call.positions.shape[:1], call.lengths.shape
        if shapes != ((num_queries,), (num_queries,)):
            raise ValueError(f"a query must have one request id and length: got {where}, {shapes}")
        counts = np.zeros(num_queries, np.uint32)
        end = trace_kernels.encode(call.positions, counts, out, end)
        if end < 0:
            raise ValueError(f"positions must ascend: got {where}")
        id_column = [index[name] for name in call.request_ids]
        columns.append(
            (
                np.full(num_queries, call.layer),
                np.full(num_queries, call.step),
                np.array(id_column, np.int64),
                call.lengths,
                counts,
            )
        )
    names = [name.encode(errors="replace")[:MAX_ID_BYTES] for name in ids]
    raw = b"".join(
        [
            struct.pack("<I", len(names)),
            *(struct.pack("<H", len(name)) + name for name in names),
            *(
                np.concatenate(column).astype(kind).tobytes()
                for kind, column in zip(COLUMNS, zip(*columns, strict=True), strict=True)
            ),
            out[:end].tobytes(),
        ]
    )
    num_records = sum(len(call.request_ids) for call in calls)
    return _with_head(FRAME_TAG, zlib.compress(raw, 1), len(raw), num_records), num_records


def _with_head(tag: bytes, payload: bytes, raw_bytes: int, num_records: int) -> bytes:
    return FRAME.pack(tag, len(payload), raw_bytes, num_records, zlib.crc32(payload)) + payload


# --- reader -----------------------------------------------------------------------------


class Record(NamedTuple):
    """One query of one layer. positions [count] int32, ascending; length as recorded."""

    layer: int
    step: int
    request_id: str
    length: int
    positions: np.ndarray


@dataclass(frozen=True)
class TraceFrame:
    """The records of one frame, as columns.

    request_ids: the distinct ones; ids [n] int64 says which each record has
    layers, steps, lengths [n] int64
    offsets [n + 1] int64: record i has positions[offsets[i] : offsets[i + 1]]
    positions [offsets[n]] int32
    """

    request_ids: tuple[str, ...]
    layers: np.ndarray
    steps: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    positions: np.ndarray


class Trace:
    """A trace file, read as often as it is iterated over: Records in the order written.

    header: the file's; layers, topk: from it
    trailer: the file's after a whole iteration; None before, or if the file was cut off
    """

    def __init__(self, path: Path, header: dict, start: int):
        self.path, self.header, self._start = path, header, start
        self.layers: int = header["layers"]
        self.topk: int = header["topk"]
        self.trailer: dict | None = None

    def __iter__(self) -> Iterator[Record]:
        for frame in self.frames():
            offsets = frame.offsets.tolist()
            for i, (layer, step, name, length) in enumerate(
                zip(
                    frame.layers.tolist(),
                    frame.steps.tolist(),
                    frame.ids.tolist(),
                    frame.lengths.tolist(),
                    strict=True,
                )
            ):
                positions = frame.positions[offsets[i] : offsets[i + 1]]
                yield Record(layer, step, frame.request_ids[name], length, positions)

    def frames(self) -> Iterator[TraceFrame]:
        """Frame by frame, for readers that want columns. Ends at the first broken frame."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            while True:
                head = file.read(FRAME.size)
                if len(head) < FRAME.size or head[:4] not in (FRAME_TAG, TRAILER_TAG):
                    return
                tag, payload_bytes, _, num_records, crc = FRAME.unpack(head)
                payload = file.read(payload_bytes)
                if len(payload) < payload_bytes or zlib.crc32(payload) != crc:
                    return
                if tag == TRAILER_TAG:
                    self.trailer = json.loads(payload)
                    return
                yield _unpack(zlib.decompress(payload), num_records)


def read_trace(path: str | Path) -> Trace:
    """Open a trace.

    Raises: OSError if the file cannot be read, ValueError (one line) if it is not a trace
    of this version.
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
        if version != VERSION:
            raise ValueError(f"an ESS trace must be of version {VERSION}: got {version} in {path}.")
        text = file.read(length)
    try:
        header = json.loads(text)
        if not all(isinstance(header[key], int) for key in ("layers", "topk")):
            raise TypeError("layers and topk must be integers")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"an ESS trace must have a whole header: got {len(text)} of {length} bytes in {path} "
            f"({type(error).__name__}: {error})."
        ) from None
    return Trace(path, header, PREFIX.size + length)


def _unpack(raw: bytes, num_records: int) -> TraceFrame:
    (num_ids,) = struct.unpack_from("<I", raw)
    place, names = 4, []
    for _ in range(num_ids):
        (size,) = struct.unpack_from("<H", raw, place)
        names.append(raw[place + 2 : place + 2 + size].decode(errors="replace"))
        place += 2 + size
    columns = []
    for kind in COLUMNS:
        column = np.frombuffer(raw, kind, num_records, place)
        columns.append(column.astype(np.int64))
        place += column.nbytes
    layers, steps, ids, lengths, counts = columns
    offsets = np.concatenate([[0], np.cumsum(counts)])
    positions = np.empty(offsets[-1], np.int32)
    trace_kernels.decode(np.frombuffer(raw, np.uint8, offset=place), counts, positions)
    return TraceFrame(tuple(names), layers, steps, ids, lengths, offsets, positions)
