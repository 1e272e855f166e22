"""The trace: what is recorded is read back, and nothing that goes wrong reaches serving."""

import json
import logging
import struct
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.tiers import trace
from sglang_ess.tiers.trace import TraceWriter, read_trace, slots_to_positions

TOPK = 8


def call(rng, queries=2, limit=1000):
    """(request ids, lengths, positions) of one step, with pads anywhere."""
    positions = np.full((queries, TOPK), -1, np.int32)
    for row in positions:
        places = rng.random(TOPK) < 0.7
        row[places] = np.sort(rng.choice(limit, places.sum(), replace=False))
    ids = [f"request {i}" for i in range(queries)]
    return ids, np.full(queries, limit, np.int32), positions


def expected(layer, step, ids, lengths, positions):
    """The records of one call, positions as lists."""
    return [
        (layer, step, name, int(length), row[row >= 0].tolist())
        for name, length, row in zip(ids, lengths, positions, strict=True)
    ]


def records(opened):
    return [(*record[:4], record.positions.tolist()) for record in opened]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


gaps = st.one_of(st.integers(1, 200), st.integers(1, (1 << 31) // TOPK - 1))


@st.composite
def calls(draw):
    """Calls as (layer, ids, lengths, positions): gaps of every size, ids of every kind."""
    made = []
    for _ in range(draw(st.integers(0, 8))):
        queries = draw(st.integers(0, 3))
        positions = np.full((queries, TOPK), -1, np.int32)
        for row in positions:
            places = draw(st.lists(st.booleans(), min_size=TOPK, max_size=TOPK))
            steps = draw(st.lists(gaps, min_size=sum(places), max_size=sum(places)))
            row[places] = np.cumsum([0, *steps], dtype=np.int64)[1:] - 1
        ids = draw(st.lists(st.text(max_size=5), min_size=queries, max_size=queries))
        lengths = draw(st.lists(st.integers(0, 1 << 31), min_size=queries, max_size=queries))
        lengths = np.minimum(lengths, (1 << 31) - 1).astype(np.int32)
        made.append((draw(st.integers(0, 2)), ids, lengths, positions))
    return made


@settings(max_examples=60, deadline=None)
@given(calls=calls(), frame_bytes=st.sampled_from([1, 200, 1 << 20]))
def test_round_trip(tmp_path_factory, calls, frame_bytes):
    path = tmp_path_factory.mktemp("trace") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "FRAME_BYTES", frame_bytes)
        writer = TraceWriter(path, layers=3, topk=TOPK, meta={"model": "tiny"})
        wrote, steps = [], [0] * 3
        for layer, ids, lengths, positions in calls:
            writer.record(layer, ids, lengths, positions)
            wrote += expected(layer, steps[layer], ids, lengths, positions)
            steps[layer] += 1
            positions[:] = 7  # the caller's arrays are its own again
        writer.close()
    opened = read_trace(path)
    assert opened.header == {"layers": 3, "topk": TOPK, "meta": {"model": "tiny"}}
    assert records(opened) == wrote
    assert opened.trailer == {"records": len(wrote), "dropped": 0, "end": "closed"}
    assert records(opened) == wrote  # a trace can be read again


def test_columns(tmp_path):
    rng = np.random.default_rng(0)
    writer = TraceWriter(tmp_path / "t", 2, TOPK)
    for layer in (0, 1, 0):
        writer.record(layer, *call(rng))
    writer.close()
    (frame,) = read_trace(tmp_path / "t").frames()
    assert frame.request_ids == ("request 0", "request 1")
    assert frame.layers.tolist() == [0, 0, 1, 1, 0, 0]
    assert frame.steps.tolist() == [0, 0, 0, 0, 1, 1]
    assert frame.ids.tolist() == [0, 1] * 3
    assert frame.offsets[-1] == len(frame.positions) and frame.lengths.tolist() == [1000] * 6


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_slots_to_positions(data):
    """Against one loop; shared prefixes, repeated slots and slots of nobody included."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    context, slots, queries, width = 40, 100, data.draw(st.integers(0, 4)), 12
    table = np.stack([rng.permutation(slots)[:context] for _ in range(5)]).astype(np.int32)
    others = rng.permutation(np.setdiff1d(np.arange(slots), table[1]))
    table[2] = np.concatenate([table[1, :20], others[:20]])
    rows = rng.integers(0, 5, queries)
    lengths = rng.integers(0, context + 1, queries).astype(np.int32)
    topk = rng.integers(-1, slots, (queries, width)).astype(np.int32)
    scratch = np.zeros(slots, np.uint8)
    found = slots_to_positions(topk, rows, lengths, table, scratch)
    assert found.dtype == np.int32 and not scratch.any()
    for query in range(queries):
        mine = table[rows[query], : lengths[query]].tolist()
        right = sorted({mine.index(slot) for slot in topk[query].tolist() if slot in mine})
        assert found[query].tolist() == right + [-1] * (width - len(right))


@pytest.fixture
def many_frames(tmp_path, monkeypatch):
    """(path, records) of a trace with a frame for each of its 6 calls."""
    monkeypatch.setattr(trace, "FRAME_BYTES", 1)
    rng, wrote = np.random.default_rng(1), []
    writer = TraceWriter(tmp_path / "t", 1, TOPK)
    for step in range(6):
        made = call(rng)
        writer.record(0, *made)
        wrote += expected(0, step, *made)
    writer.close()
    return tmp_path / "t", wrote


def test_a_truncated_file_gives_its_whole_frames(many_frames):
    path, wrote = many_frames
    whole, seen = path.read_bytes(), set()
    first = trace.PREFIX.size + trace.PREFIX.unpack(whole[: trace.PREFIX.size])[2]
    for size in range(first, len(whole)):
        path.write_bytes(whole[:size])
        opened = read_trace(path)
        found = records(opened)
        assert found == wrote[: len(found)] and opened.trailer is None
        seen.add(len(found))
    assert seen == {0, 2, 4, 6, 8, 10, 12}


@pytest.mark.parametrize(
    "end",
    [b"", b"TAIL", bytes(100), b"FRAM" + b"\xff" * 16 + b"x"],
    ids=["nothing", "a tag", "zeros", "a length past the end"],
)
def test_other_bytes_after_the_frames_end_it(many_frames, end):
    path, wrote = many_frames
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"TAIL")] + end)
    opened = read_trace(path)
    assert records(opened) == wrote and opened.trailer is None


def test_a_changed_byte_ends_it(many_frames):
    path, wrote = many_frames
    whole = bytearray(path.read_bytes())
    third = [i for i in range(len(whole)) if whole[i : i + 4] == b"FRAM"][2]
    whole[third + trace.FRAME.size + 3] ^= 1
    path.write_bytes(whole)
    assert records(read_trace(path)) == wrote[:4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin with"),
        (b"layer,step,positions\n", "must begin with"),
        (trace.MAGIC, "must begin with"),
        (trace.PREFIX.pack(trace.MAGIC, 2, 0), "must be of version 1: got 2"),
        (trace.PREFIX.pack(trace.MAGIC, 1, 99) + b'{"layers": 1', "got 12 of 99 bytes"),
        (trace.PREFIX.pack(trace.MAGIC, 1, 2) + b"{}", "KeyError: 'layers'"),
        (trace.PREFIX.pack(trace.MAGIC, 1, 2) + b"[]", "whole header"),
        (trace.PREFIX.pack(trace.MAGIC, 1, 2) + b"\xff\xff", "whole header"),
    ],
)
def test_not_a_trace(tmp_path, content, message):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_trace(tmp_path / "t")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_the_limit(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trace, "FRAME_BYTES", 1)
    rng, limit, sent = np.random.default_rng(2), 4096, 0
    writer = TraceWriter(tmp_path / "t", 1, TOPK, limit_bytes=limit)
    while writer.recording:
        writer.record(0, *call(rng))
        sent += 2
    writer.record(0, *call(rng))  # does nothing
    writer.close()
    opened = read_trace(tmp_path / "t")
    size = (tmp_path / "t").stat().st_size
    assert limit - 512 < size == writer.written_bytes <= limit
    assert len(records(opened)) == writer.records == opened.trailer["records"]
    assert opened.trailer["end"] == "limit"
    assert 0 <= sent - writer.records - opened.trailer["dropped"] <= 2  # one call in flight
    (line,) = warnings(caplog)
    assert f"{size} bytes of at most {limit}" in line and f"{writer.records} records" in line


def test_a_limit_below_the_header(tmp_path):
    with pytest.raises(ValueError, match="must be at least"):
        TraceWriter(tmp_path / "t", 1, TOPK, limit_bytes=100)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        TraceWriter(tmp_path / "no" / "t", 1, TOPK)


def test_a_slow_disk_drops_and_never_waits(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trace, "FRAME_BYTES", 1)
    rng, go, write = np.random.default_rng(3), threading.Event(), TraceWriter._write
    writer = TraceWriter(tmp_path / "t", 1, TOPK)
    monkeypatch.setattr(writer, "_write", lambda data: (go.wait(60), write(writer, data)))
    made = call(rng)
    monkeypatch.setattr(trace, "QUEUE_BYTES", 4 * made[2].nbytes)
    for _ in range(20):  # would hang here if it waited for the disk
        writer.record(0, *made)
    assert not go.is_set()
    assert 2 * 15 <= writer.dropped <= 2 * 16  # 4 queued, perhaps 1 in the writer's hands
    go.set()
    while writer._queue:
        go.wait(0.01)
    writer.record(0, *made)
    writer.close()
    opened = read_trace(tmp_path / "t")
    assert [r.step for r in opened][-1] == 20  # dropped steps leave a gap
    assert opened.trailer["dropped"] == writer.dropped
    assert len(records(opened)) + writer.dropped == 2 * 21
    (line,) = warnings(caplog)
    assert line.endswith(f"{writer.dropped} records dropped")


def test_a_full_disk_is_one_line(tmp_path, caplog, monkeypatch):
    writer = TraceWriter(tmp_path / "t", 1, TOPK)

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", full)
    made = call(np.random.default_rng(4))
    writer.record(0, *made)
    writer.close()
    writer.record(0, *made)
    assert not writer.recording and not writer._queue
    (line,) = warnings(caplog)
    assert "No space left" in line and "\n" not in line and str(tmp_path / "t") in line
    assert records(read_trace(tmp_path / "t")) == []


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        (["a"], [[5, 3]], "positions must ascend"),
        (["a"], [[5, 5]], "positions must ascend"),
        (["a"], [[1, 2], [3, 4]], "one request id"),
    ],
)
def test_what_is_no_record_ends_the_trace(tmp_path, caplog, ids, positions, message):
    writer = TraceWriter(tmp_path / "t", 1, 2)
    writer.record(0, ids, np.ones(1, np.int32), np.array(positions, np.int32))
    writer.close()
    assert not writer.recording and message in warnings(caplog)[0]


def test_unclosed_frames_are_in_the_file(tmp_path, monkeypatch):
    """What a killed server leaves behind: all but the last second."""
    monkeypatch.setattr(trace, "FLUSH_SECONDS", 0.01)
    made = call(np.random.default_rng(5))
    writer = TraceWriter(tmp_path / "t", 1, TOPK)
    writer.record(0, *made)
    for _ in range(1000):
        if found := records(read_trace(tmp_path / "t")):
            break
        threading.Event().wait(0.01)
    assert found == expected(0, 0, *made)
    writer.close()


def test_concurrent_closes(tmp_path):
    writer = TraceWriter(tmp_path / "t", 4, TOPK)

    def recording(layer):
        rng = np.random.default_rng(layer)
        while writer.recording:
            writer.record(layer, *call(rng))

    threads = [threading.Thread(target=recording, args=(layer,)) for layer in range(4)]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.1)
    closers = [threading.Thread(target=writer.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    for thread in closers + threads:
        thread.join(30)
        assert not thread.is_alive()
    opened = read_trace(tmp_path / "t")
    found = records(opened)
    assert opened.trailer["end"] == "closed" and opened.trailer["records"] == len(found) > 0
    for layer in range(4):
        steps = [step for at, step, name, *_ in found if at == layer and name == "request 0"]
        assert steps == list(range(len(steps)))


def test_bytes_per_index(tmp_path):
    """2,048 of 32,768 positions in clusters, nine tenths kept from step to step."""
    rng, length, width = np.random.default_rng(6), 32_768, 2048
    centers = rng.integers(0, length, 60)
    chosen = np.unique(np.abs(rng.normal(rng.choice(centers, 6000), 200)).astype(int) % length)
    mask = np.zeros(length, bool)
    mask[rng.choice(chosen, width, replace=False)] = True
    writer = TraceWriter(tmp_path / "t", 1, width)
    for _ in range(50):
        writer.record(0, ["a"], np.array([length]), np.flatnonzero(mask)[None].astype(np.int32))
        out = rng.choice(np.flatnonzero(mask), width // 10, replace=False)
        mask[rng.choice(np.flatnonzero(~mask), width // 10, replace=False)] = True
        mask[out] = False
    writer.close()
    per_index = writer.written_bytes / (50 * width)
    print(f"{per_index:.3f} bytes per index")
    assert per_index < 1


def test_the_documented_format(tmp_path):
    """Read by hand, as the module's docstring says."""
    import zlib

    writer = TraceWriter(tmp_path / "t", 1, 4)
    positions = np.array([[3, -1, 4, 300]], np.int32)
    writer.record(0, ["ab"], np.array([301], np.int32), positions)
    writer.close()
    data = (tmp_path / "t").read_bytes()
    magic, version, size = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"ESSTRACE", 1)
    assert json.loads(data[16 : 16 + size]) == {"layers": 1, "topk": 4, "meta": {}}
    at = 16 + size
    tag, payload, raw_bytes, num_records, crc = struct.unpack_from("<4sIIII", data, at)
    body = data[at + 20 : at + 20 + payload]
    assert (tag, num_records, crc) == (b"FRAM", 1, zlib.crc32(body))
    raw = zlib.decompress(body)
    assert len(raw) == raw_bytes
    table = struct.pack("<IH2sHIIII", 1, 2, b"ab", 0, 0, 0, 301, 3)
    assert raw == table + bytes([3, 0, (295 & 127) | 128, 295 >> 7])
    at += 20 + payload
    assert data[at : at + 4] == b"TAIL"
    assert json.loads(data[at + 20 :]) == {"records": 1, "dropped": 0, "end": "closed"}
