"""The trace: what is recorded is read back, and nothing that goes wrong reaches serving."""

import json
import logging
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.trace import format as trace_format
from sglang_ess.trace import trace
from sglang_ess.trace.format import STATE, Entry, Queries
from sglang_ess.trace.trace import Kind, TraceWriter, read_trace, slots_to_positions
from sglang_ess.trace.trace_recorder import TraceRecorder
from tests.support.recorded import Life

TOPK, SLOTS = 8, 4096
NO_ROWS = torch.empty(0)


def open_writer(path, layers=1, topk=TOPK, **kwargs):
    return TraceWriter(path, layers, topk, SLOTS, **kwargs)


def plan(layer, step, ids, lengths, positions):
    """The event of a layer's step as the step-th of it, all of whose queries are in one plan."""
    counters = np.zeros(len(STATE), np.int64)
    counters[0] = step + 1
    queries = Queries(ids, np.arange(len(ids)), lengths)
    return Entry(Kind.PLAN, layer, 2 * positions.shape[1], counters, positions, queries)


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


@settings(max_examples=40, deadline=None)
@given(calls=calls(), frame_bytes=st.sampled_from([1, 200, 1 << 20]))
def test_round_trip(tmp_path_factory, calls, frame_bytes):
    path = tmp_path_factory.mktemp("trace") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "FRAME_BYTES", frame_bytes)
        writer = open_writer(path, layers=3, meta={"model": "tiny"})
        wrote, steps = [], [0] * 3
        for layer, ids, lengths, positions in calls:
            assert writer.put(plan(layer, steps[layer], ids, lengths, positions))
            wrote += expected(layer, steps[layer], ids, lengths, positions)
            steps[layer] += 1
        writer.close()
    opened = read_trace(path)
    facts = {"layers": 3, "topk": TOPK, "slots": SLOTS}
    assert opened.header == facts | {"meta": {"model": "tiny"}}
    assert records(opened) == wrote
    counts = {"records": len(wrote), "events": len(calls), "dropped": 0}
    assert opened.trailer == counts | {"end": "closed"}
    assert records(opened) == wrote  # a trace can be read again


def test_columns(tmp_path):
    rng = np.random.default_rng(0)
    writer = open_writer(tmp_path / "t", 2)
    for layer, step in ((0, 0), (1, 0), (0, 1)):
        writer.put(plan(layer, step, *call(rng)))
    writer.close()
    (frame,) = read_trace(tmp_path / "t").frames()
    assert frame.request_ids == ("request 0", "request 1")
    assert frame.layers.tolist() == [0, 0, 1, 1, 0, 0]
    assert frame.steps.tolist() == [0, 0, 0, 0, 1, 1]
    assert frame.ids.tolist() == frame.rows.tolist() == [0, 1] * 3
    assert frame.kinds.tolist() == [Kind.PLAN] * 3 and frame.starts.tolist() == [0, 2, 4, 6]
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
    writer = open_writer(tmp_path / "t")
    for step in range(6):
        made = call(rng)
        writer.put(plan(0, step, *made))
        wrote += expected(0, step, *made)
    writer.close()
    return tmp_path / "t", wrote


def test_a_truncated_file_gives_its_whole_frames(many_frames):
    path, wrote = many_frames
    whole, seen = path.read_bytes(), set()
    first = trace.PREFIX.size + trace.PREFIX.unpack(whole[: trace.PREFIX.size])[2]
    for size in range(first, len(whole), 13):
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


PREFIX_2 = trace.PREFIX.pack(trace.MAGIC, 2, 33)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin with"),
        (b"layer,step,positions\n", "must begin with"),
        (trace.MAGIC, "must begin with"),
        (trace.PREFIX.pack(trace.MAGIC, 1, 0), "must be of version 2 to 4: got 1"),
        (trace.PREFIX.pack(trace.MAGIC, 2, 99) + b'{"layers": 1', "got 12 of 99 bytes"),
        (trace.PREFIX.pack(trace.MAGIC, 2, 2) + b"{}", "KeyError: 'layers'"),
        (trace.PREFIX.pack(trace.MAGIC, 2, 2) + b"[]", "whole header"),
        (trace.PREFIX.pack(trace.MAGIC, 2, 2) + b"\xff\xff", "whole header"),
        (
            trace.PREFIX.pack(trace.MAGIC, 2, 38) + b'{"layers": 1, "topk": 2, "slots": "3"}',
            "positive",
        ),
        (
            trace.PREFIX.pack(trace.MAGIC, 2, 36) + b'{"layers": 0, "topk": 2, "slots": 3}',
            "positive",
        ),
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
    writer = open_writer(tmp_path / "t", limit_bytes=limit)
    while writer.recording:
        writer.put(plan(0, sent, *call(rng)))
        sent += 1
    assert not writer.put(plan(0, sent, *call(rng)))  # does nothing
    writer.close()
    opened = read_trace(tmp_path / "t")
    size = (tmp_path / "t").stat().st_size
    assert limit - 512 < size == writer.written_bytes <= limit
    assert len(records(opened)) == writer.records == opened.trailer["records"]
    assert opened.trailer["end"] == "limit"
    assert writer.records == 2 * writer.events
    assert 0 <= sent - writer.events - opened.trailer["dropped"] <= 1  # one in flight
    (line,) = warnings(caplog)
    assert f"{size} bytes of at most {limit}" in line and f"{writer.records} records" in line


def test_a_limit_below_the_header(tmp_path):
    with pytest.raises(ValueError, match="must be at least"):
        open_writer(tmp_path / "t", limit_bytes=100)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError):
        open_writer(tmp_path / "no" / "t")


def test_a_slow_disk_drops_and_never_waits(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trace, "FRAME_BYTES", 1)
    rng, go, write = np.random.default_rng(3), threading.Event(), TraceWriter._write
    writer = open_writer(tmp_path / "t")
    monkeypatch.setattr(writer, "_write", lambda data: (go.wait(60), write(writer, data)))
    made = call(rng)
    monkeypatch.setattr(trace, "QUEUE_BYTES", 4 * (made[2].nbytes + trace.ENTRY_BYTES))
    kept = [writer.put(plan(0, step, *made)) for step in range(20)]  # would hang here if it waited
    assert not go.is_set()
    assert 15 <= writer.dropped == kept.count(False) <= 16  # 4 queued, perhaps 1 being written
    go.set()
    while writer._queue:
        go.wait(0.01)
    assert writer.put(plan(0, 20, *made))
    writer.close()
    opened = read_trace(tmp_path / "t")
    steps = [step for step in range(20) if kept[step]] + [20]
    assert [r.step for r in opened] == np.repeat(steps, 2).tolist()  # dropped steps leave a gap
    assert opened.trailer["dropped"] == writer.dropped
    assert opened.trailer["events"] + writer.dropped == 21
    kinds = [kind for frame in opened.frames() for kind in frame.kinds.tolist()]
    gaps = [int(a) for f in opened.frames() for a in f.arguments[f.kinds == Kind.GAP]]
    assert kinds[-2:] == [Kind.GAP, Kind.PLAN] and gaps == [writer.dropped]
    (line,) = warnings(caplog)
    assert line.endswith(f"{writer.dropped} events dropped")


def test_a_full_disk_is_one_line(tmp_path, caplog, monkeypatch):
    writer = open_writer(tmp_path / "t")

    def full(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write", full)
    made = call(np.random.default_rng(4))
    writer.put(plan(0, 0, *made))
    writer.close()
    writer.put(plan(0, 1, *made))
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
    writer = open_writer(tmp_path / "t", topk=2)
    writer.put(plan(0, 0, ids, np.ones(1, np.int32), np.array(positions, np.int32)))
    writer.close()
    assert not writer.recording and message in warnings(caplog)[0]


def test_unclosed_frames_are_in_the_file(tmp_path, monkeypatch):
    """What a killed server leaves behind: all but the last second."""
    monkeypatch.setattr(trace, "FLUSH_SECONDS", 0.01)
    made = call(np.random.default_rng(5))
    writer = open_writer(tmp_path / "t")
    writer.put(plan(0, 0, *made))
    for _ in range(1000):
        if found := records(read_trace(tmp_path / "t")):
            break
        threading.Event().wait(0.01)
    assert found == expected(0, 0, *made)
    writer.close()


def test_concurrent_closes(tmp_path):
    writer = open_writer(tmp_path / "t", 4)

    def recording(layer):
        rng, step = np.random.default_rng(layer), 0
        while writer.recording:
            writer.put(plan(layer, step, *call(rng)))
            step += 1

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
    writer = open_writer(tmp_path / "t", topk=width)
    for step in range(50):
        positions = np.flatnonzero(mask)[None].astype(np.int32)
        writer.put(plan(0, step, ["a"], np.array([length]), positions))
        out = rng.choice(np.flatnonzero(mask), width // 10, replace=False)
        mask[rng.choice(np.flatnonzero(~mask), width // 10, replace=False)] = True
        mask[out] = False
    writer.close()
    per_index = writer.written_bytes / (50 * width)
    print(f"{per_index:.3f} bytes per index")
    assert per_index < 1


def test_the_documented_format(tmp_path):
    """Read by hand, as format.py's docstring says."""
    recorder = TraceRecorder(tmp_path / "t", 1, 4, 500, {"page": 64})
    cache = recorder.hot_cache(None, 400, 500)
    table = np.arange(100, 401, dtype=np.int32)[None]
    recorder.begin_step(["ab"], np.zeros(1, np.int64), np.array([301], np.int32), table)
    cache.install(torch.tensor([9, 10, 4]), NO_ROWS, 64)
    cache.plan(torch.tensor([[103, 104, 400, -1]], dtype=torch.int32))
    recorder.writer.close()
    data = (tmp_path / "t").read_bytes()
    magic, version, size = struct.unpack_from("<8sII", data)
    assert (magic, version) == (b"ESSTRACE", 3)
    facts = {"layers": 1, "topk": 4, "slots": 500, "meta": {"page": 64}}
    assert json.loads(data[16 : 16 + size]) == facts
    at = 16 + size
    tag, payload, raw_bytes, num_records, crc = struct.unpack_from("<4sIIII", data, at)
    body = data[at + 20 : at + 20 + payload]
    assert (tag, num_records, crc) == (b"FRAM", 1, zlib.crc32(body))
    raw = zlib.decompress(body)
    assert len(raw) == raw_bytes
    events = [[6, 7, 3, 0], [0] * 4, [400, 0, 64, 8], [0, 1, 2, 1]]  # kinds, layers, ...
    columns = [
        struct.pack(f"<4{kind}", *column) for kind, column in zip("BHII", events, strict=True)
    ]
    head = struct.pack("<IH2sI", 1, 2, b"ab", 4) + b"".join(columns)
    resize = bytes(7)
    slots = bytes([0, 200 & 127 | 128, 200 >> 7, 300 & 127 | 128, 300 >> 7])  # from 0: 301 from 100
    install = bytes([0, 0, 0, 0, 0, 6, 0, 18, 1, 13, 0])  # 3 installs; 9 and 1 more; 7 before 11
    planned = bytes([2, 6, 6, 0, 0, 0, 0, 3, 0, (295 & 127) | 128, 295 >> 7])
    assert raw == head + struct.pack("<IIII", 0, 0, 301, 3) + resize + slots + install + planned
    at += 20 + payload
    assert data[at : at + 4] == b"TAIL"
    counts = {"records": 1, "events": 4, "dropped": 0, "end": "closed"}
    assert json.loads(data[at + 20 :]) == counts


# --- events -----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32), frame_bytes=st.sampled_from([1, 3000, 1 << 20]))
def test_events_are_what_happened(tmp_path_factory, seed, frame_bytes):
    """Kind by kind, slot by slot in order, with the counters after each."""
    path = tmp_path_factory.mktemp("trace") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "FRAME_BYTES", frame_bytes)
        happened = Life(path, np.random.default_rng(seed)).run(25)
    found = [
        (e.kind, e.layer, e.argument, e.slots.tolist(), e.counters.tolist())
        for e in read_trace(path).events()
    ]
    assert found == happened


def test_positions_only_where_they_give_the_slots(tmp_path):
    """In context order the plan is a record; in another order, or outside a step, it is not."""
    recorder = TraceRecorder(tmp_path / "t", 1, 3, 128, {})
    cache = recorder.hot_cache(None, 64, 128)
    table = np.arange(128, dtype=np.int32)[None, ::-1].copy()
    recorder.begin_step(["a"], np.zeros(1, np.int64), np.array([40], np.int32), table)
    orders = [[127, 120, 100], [120, 127, 100], [127, -1, 100], [127, 120, 5], [127, 120, -1]]
    for order in orders:
        cache.plan(torch.tensor([order], dtype=torch.int32))
    recorder.end_step()
    cache.plan(torch.tensor([orders[0]], dtype=torch.int32))
    recorder.writer.close()
    opened = read_trace(tmp_path / "t")
    (frame,) = opened.frames()
    kinds = [Kind.PLAN] + [Kind.PLAN_SLOTS] * 3 + [Kind.PLAN, Kind.PLAN_SLOTS]
    assert frame.kinds.tolist() == [Kind.RESIZE, Kind.SLOTS, *kinds]
    plans = [event.slots.tolist() for event in opened.events() if event.kind == Kind.PLAN]
    assert plans == [[order] for order in [*orders, orders[0]]]
    assert [record.positions.tolist() for record in opened] == [[0, 7, 27], [0, 7]]


def test_a_table_that_was_dropped_is_recorded_again(tmp_path, monkeypatch):
    """Until it is, plans are recorded as slots: none is read with another request's."""
    recorder = TraceRecorder(tmp_path / "t", 1, 2, 128, {})
    cache = recorder.hot_cache(None, 64, 128)
    table = np.arange(40, dtype=np.int32)[None].copy()
    step = ["a"], np.zeros(1, np.int64), np.array([40], np.int32), table
    recorder.begin_step(*step)
    cache.plan(torch.tensor([[3, 4]], dtype=torch.int32))
    table += 50
    put = recorder.writer.put
    monkeypatch.setattr(recorder.writer, "put", lambda e: e.kind != Kind.SLOTS and put(e))
    recorder.begin_step(*step)
    cache.plan(torch.tensor([[53, 54]], dtype=torch.int32))
    monkeypatch.undo()
    recorder.begin_step(*step)
    cache.plan(torch.tensor([[53, 55]], dtype=torch.int32))
    recorder.writer.close()
    opened = read_trace(tmp_path / "t")
    kinds = [Kind(kind).name for frame in opened.frames() for kind in frame.kinds]
    assert kinds == ["RESIZE", "SLOTS", "PLAN", "PLAN_SLOTS", "SLOTS", "PLAN"]
    plans = [event.slots.tolist() for event in opened.events() if event.kind == Kind.PLAN]
    assert plans == [[[3, 4]], [[53, 54]], [[53, 55]]]


@pytest.fixture(scope="module")
def one_frame(tmp_path_factory):
    """(header, raw bytes, records) of a trace of one frame with every kind of event."""
    path = tmp_path_factory.mktemp("trace") / "t"
    Life(path, np.random.default_rng(8)).run(30)
    data = path.read_bytes()
    start = trace.PREFIX.size + trace.PREFIX.unpack(data[: trace.PREFIX.size])[2]
    _, size, _, num_records, _ = trace.FRAME.unpack_from(data, start)
    body = start + trace.FRAME.size
    return data[:start], zlib.decompress(data[body : body + size]), num_records


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_frame_of_any_bytes_is_read_or_refused(tmp_path_factory, one_frame, data):
    """With a right checksum: what comes out is within the trace's layers and slots."""
    header, raw, num_records = one_frame
    raw = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    path = tmp_path_factory.mktemp("trace") / "t"
    path.write_bytes(header + trace_format.frame_bytes(trace.FRAME_TAG, raw, num_records))
    try:
        for event in read_trace(path).events():
            assert event.kind == Kind.GAP or event.layer < Life.LAYERS
            assert event.slots.size == 0 or -1 <= event.slots.min() <= event.slots.max() < 128
    except ValueError as error:
        assert "has a frame of another kind" in str(error) and "\n" not in str(error)
