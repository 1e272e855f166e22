"""Scores in a trace: what the indexer thought of each entry is read back beside it."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim.model.trace_replay import replay
from sglang_ess.trace import format as trace_format
from sglang_ess.trace import trace
from sglang_ess.trace.format import PREFIX, Entry, Queries
from sglang_ess.trace.scores import from_halves, pack_halves, to_halves, unpack_halves
from sglang_ess.trace.trace import Kind, PlanScores, TraceWriter, read_trace
from sglang_ess.trace.trace_recorder import TraceRecorder

WIDTH, RUNNER_UPS, SLOTS, CONTEXT = 6, 4, 128, 60


def near(found, right):
    """Whether found [n, c] is right [n, c] as float16 with an exponent of each query."""
    peaks = np.abs(np.nan_to_num(right)).max(1, keepdims=True, initial=0)
    close = np.abs(found - right) <= 2.0**-11 * np.abs(right) + 2.0**-40 * peaks
    return found.shape == right.shape and (close | (np.isnan(found) & np.isnan(right))).all()


class Scored:
    """Recorded decode steps whose every position has a known score in every layer.

    The lists are the positions with the best scores, in context order or shuffled, so that what is
    read back can be checked slot by slot against the score table alone.
    """

    def __init__(self, path, rng, layers=2, requests=3, width=1, scale=1.0):
        self.rng, self.width, self.requests = rng, width, requests
        self.recorder = TraceRecorder(path, layers, WIDTH, SLOTS, {}, runner_ups=RUNNER_UPS)
        self.caches = [self.recorder.hot_cache(None, 100, SLOTS) for _ in range(layers)]
        slots = rng.permutation(SLOTS).astype(np.int32)
        self.table = np.stack([np.roll(slots, 17 * row)[:CONTEXT] for row in range(requests)])
        self.scale, self.lengths = scale, rng.integers(1, CONTEXT - 2 * width, requests)
        self.steps = []  # of each: (layer, lists, runner-ups, {query: {slot: score}})

    def step(self, shuffles=False, block=None, changes=None):
        rows = np.arange(self.requests).repeat(self.width)
        lengths = self.lengths.repeat(self.width) + 1 + np.tile(range(self.width), self.requests)
        self.recorder.begin_step(
            [f"{row}" for row in rows], rows, lengths.astype(np.int32), self.table, self.width
        )
        for layer, cache in enumerate(self.caches):
            topk, others, scores, known = self.lists(rows, lengths, shuffles)
            self.recorder.decode_scores(layer, *map(torch.from_numpy, (topk, others, scores)))
            if changes:
                topk = changes(topk)
            for first in range(0, len(topk), block or len(topk)):
                part = torch.from_numpy(topk[first : first + (block or len(topk))].copy())
                start = (0, 0)
                while start is not None:
                    start = cache.plan(part, start, first > 0).stop
                self.steps.append((layer, part.numpy(), others[first : first + len(part)], known))
        self.lengths = np.minimum(self.lengths + 1, CONTEXT - self.width)

    def lists(self, rows, lengths, shuffles):
        topk = np.full((len(rows), WIDTH), -1, np.int32)
        others = np.full((len(rows), RUNNER_UPS), -1, np.int32)
        scores = np.full((len(rows), WIDTH + RUNNER_UPS), np.nan, np.float32)
        known = []
        for query, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            of_all = self.rng.normal(size=length).astype(np.float32) * np.float32(self.scale)
            best = np.argsort(-of_all)
            for part, first, into in (
                (best[:WIDTH], 0, topk),
                (best[WIDTH:][:RUNNER_UPS], WIDTH, others),
            ):
                chosen = self.rng.permutation(part) if shuffles else np.sort(part)
                into[query, : len(chosen)] = self.table[row, chosen]
                scores[query, first : first + len(chosen)] = of_all[chosen]
            known.append(dict(zip(self.table[row, :length].tolist(), of_all.tolist(), strict=True)))
        return topk, others, scores, known

    def close(self):
        self.recorder.writer.close()
        return read_trace(self.recorder.writer.path)


def right_scores(made):
    """Of each plan [queries, k + m], from the score table alone."""
    firsts = {}
    for layer, topk, others, known in made.steps:
        first = firsts.get(id(known), 0)
        firsts[id(known)] = first + len(topk)
        right = np.full((len(topk), WIDTH + RUNNER_UPS), np.nan)
        for query, slots in enumerate(np.concatenate([topk, others], 1).tolist()):
            for column, slot in enumerate(slots):
                if slot >= 0:
                    right[query, column] = known[first + query][slot]
        yield layer, topk, others, right


def scored_plans(opened):
    return [event for event in opened.events() if event.kind == Kind.PLAN]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    width=st.integers(1, 3),
    block=st.sampled_from([None, 2, 5]),
    shuffles=st.booleans(),
    scale=st.sampled_from([1.0, 1e-20, 3e30]),
    frame_bytes=st.sampled_from([1, 3000, 1 << 20]),
)
def test_scores_are_those_of_their_entries(
    tmp_path_factory, seed, width, block, shuffles, scale, frame_bytes
):
    """Whatever the order of the lists, the blocks of a plan, the queries and the model's scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "FRAME_BYTES", frame_bytes)
        path = tmp_path_factory.mktemp("trace") / "t"
        made = Scored(path, np.random.default_rng(seed), width=width, scale=scale)
        for _ in range(5):
            made.step(shuffles, block)
        opened = made.close()
    assert opened.runner_ups == RUNNER_UPS
    found = scored_plans(opened)
    for event, (layer, topk, others, right) in zip(found, right_scores(made), strict=True):
        assert (event.layer, event.slots.tolist()) == (layer, topk.tolist())
        assert event.runner_ups.tolist() == others.tolist()
        assert event.scores.dtype == np.float32 and near(event.scores, right)
        for query in range(len(topk)):  # the order of ranks survives the rounding
            in_list = event.scores[query, :WIDTH][event.slots[query] >= 0]
            below = event.scores[query, WIDTH:][event.runner_ups[query] >= 0]
            assert in_list.min(initial=np.inf) >= below.max(initial=-np.inf)
    kinds = {Kind(kind) for frame in opened.frames() for kind in frame.kinds}
    assert (Kind.PLAN in kinds) or shuffles


def test_records_have_scores_too(tmp_path):
    made = Scored(tmp_path / "t", np.random.default_rng(3), width=2)
    for _ in range(4):
        made.step()
    opened = made.close()
    plans = [
        (topk[query], others[query], right[query])
        for _, topk, others, right in right_scores(made)
        for query in range(len(topk))
    ]
    for record, (topk, others, right) in zip(opened, plans, strict=True):
        table = made.table[int(record.request_id)]
        assert table[record.positions].tolist() == topk[topk >= 0].tolist()
        assert table[record.runner_ups].tolist() == others[others >= 0].tolist()
        assert near(record.scores[None], right[None, ~np.isnan(right)])


def test_a_swapped_pair_of_scores_is_seen(tmp_path):
    """The check of these tests can fail: two scores in each other's places are not `near`."""
    made = Scored(tmp_path / "t", np.random.default_rng(3))
    decode = made.recorder.decode_scores

    def swaps(group, topk, others, scores):
        scores[:, [0, 1]] = scores[:, [1, 0]]
        decode(group, topk, others, scores)

    made.recorder.decode_scores = swaps
    made.step()
    pairs = zip(scored_plans(made.close()), right_scores(made), strict=True)
    assert not any(near(event.scores, right) for event, (*_, right) in pairs)


def test_scores_of_other_lists_are_left_out(tmp_path):
    """What attention read is not what the indexer scored: no score stands beside a wrong slot."""
    made = Scored(tmp_path / "t", np.random.default_rng(3))
    made.step()
    made.step(changes=lambda topk: topk[:, ::-1].copy())
    made.recorder.end_step()
    made.caches[0].plan(torch.from_numpy(made.steps[0][1].copy()))  # outside any step
    opened = made.close()
    found = [event.scores is not None for event in scored_plans(opened)]
    assert found == [True, True, False, False, False]
    assert [record.scores is not None for record in opened] == [True] * 6


def test_a_replay_is_the_same_with_scores(tmp_path):
    made = Scored(tmp_path / "t", np.random.default_rng(5), width=2)
    for _ in range(10):
        made.step(block=4)
        made.recorder.accepted([1, 2, 1])
    opened = made.close()
    found = replay(opened)
    assert found.differences == [] and found.total("misses") > 0
    assert len(list(opened.kept())) == 10 * 2 * 4
    assert all(record.scores is not None for record in opened.kept())
    kinds = np.concatenate([frame.kinds for frame in opened.frames()])
    assert opened.trailer["events"] == (kinds != Kind.SCORES).sum() < len(kinds)


def test_a_trace_without_scores_costs_no_byte_more(tmp_path):
    """Version 3 as it was: the same events give the same bytes with and without this format."""
    for name, options in (("plain", {}), ("off", {"runner_ups": None})):
        writer = TraceWriter(tmp_path / name, 1, 2, 64, **options)
        writer.put(
            Entry(Kind.PLAN_SLOTS, 0, 4, np.zeros(7, np.int64), np.array([[3, 4]], np.int32))
        )
        writer.close()
    data = (tmp_path / "plain").read_bytes()
    assert data == (tmp_path / "off").read_bytes()
    _, version, size = PREFIX.unpack(data[: PREFIX.size])
    assert version == 3 and set(json.loads(data[16 : 16 + size])) == {
        "layers", "topk", "slots", "meta",
    }  # fmt: skip
    opened = read_trace(tmp_path / "plain")
    assert opened.runner_ups is None
    (event,) = opened.events()
    assert event.scores is None and event.runner_ups is None
    raw_bytes = struct.unpack_from("<4sIIII", data, 16 + size)[2]
    assert raw_bytes == 4 + 4 + 11 + 7 + 2  # no ids, one event, counters, two numbers


def test_the_documented_bytes(tmp_path):
    writer = TraceWriter(tmp_path / "t", 1, 2, 64, runner_ups=1)
    scored = PlanScores(np.array([[9]], np.int32), np.array([[3.0, -0.5, 0.25]], np.float32))
    topk, counters = np.array([[5, 7]], np.int32), np.zeros(7, np.int64)
    writer.put(Entry(Kind.PLAN_SLOTS, 0, 4, counters, topk, scored=scored))
    writer.close()
    data = (tmp_path / "t").read_bytes()
    _, version, size = PREFIX.unpack(data[: PREFIX.size])
    assert version == 4 and json.loads(data[16 : 16 + size])["runner_ups"] == 1
    tag, payload, _, records, _ = struct.unpack_from("<4sIIII", data, 16 + size)
    raw = zlib.decompress(data[16 + size + 20 :][:payload])
    columns = struct.pack("<II2B2H2I2I", 0, 2, 1, 10, 0, 0, 4, 1, 1, 1)
    # 3 = 24576 * 2**-13: the largest lies between 2**14 and 2**15.
    halves = np.array([24576, -4096, 2048], "<f2").tobytes()
    numbers = bytes(7) + bytes([10, 4]) + bytes([25, 18])  # 5, 7 | exponent -13, slot 9
    assert raw == columns + struct.pack("<I", 3) + halves[::2] + halves[1::2] + numbers
    (event,) = read_trace(tmp_path / "t").events()
    assert event.scores.tolist() == [[3.0, -0.5, 0.25]] and event.runner_ups.tolist() == [[9]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_halves(data):
    """Every float32 from subnormal to the largest, order kept, NaN where it was."""
    numbers = st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127) | st.just(np.nan)
    rows = data.draw(st.lists(st.lists(numbers, min_size=4, max_size=4), max_size=4))
    scores = np.array(rows, np.float32).reshape(-1, 4)
    exponents, halves = to_halves(scores)
    assert halves.dtype == np.float16 and near(from_halves(exponents, halves), scores)
    for before, after in zip(scores, from_halves(exponents, halves), strict=True):
        order = np.argsort(before)
        known = ~np.isnan(before[order])
        assert (np.diff(after[order][known].astype(np.float64)) >= 0).all()
    packed = np.frombuffer(pack_halves(halves.ravel()), np.uint8)
    assert unpack_halves(packed).tobytes() == halves.tobytes()


# --- what is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "others", "columns", "options", "message"),
    [
        (Kind.PLAN_SLOTS, [[1, 2]], [[3]], 2, {"runner_ups": 1}, "must have its queries"),
        (Kind.PLAN_SLOTS, [[1, 2]], [[3], [4]], 3, {"runner_ups": 1}, "must have its queries"),
        (Kind.WARM, [[1, 2]], [[3]], 3, {"runner_ups": 1}, "only a plan"),
        (Kind.PLAN_SLOTS, [[1, 2]], [[3]], 3, {}, "of a trace with scores"),
        (Kind.PLAN, [[-1, 2]], [[3]], 3, {"runner_ups": 1}, "before their pads"),
    ],
)
def test_what_are_no_scores_of_a_plan(
    tmp_path, caplog, kind, data, others, columns, options, message
):
    writer = TraceWriter(tmp_path / "t", 1, 2, 64, **options)
    scored = PlanScores(np.array(others, np.int32), np.zeros((1, columns), np.float32))
    queries = Queries(("a",), np.zeros(1, np.int64), np.array([9], np.int32))
    queries = queries if kind == Kind.PLAN else None
    counters, data = np.zeros(7, np.int64), np.array(data, np.int32)
    writer.put(Entry(kind, 0, 4, counters, data, queries, scored=scored))
    writer.close()
    assert message in caplog.text


def frame_of(tmp_path):
    """(raw bytes of the only frame, its records) of a trace with scores."""
    made = Scored(tmp_path / "t", np.random.default_rng(1), layers=1)
    for _ in range(3):
        made.step()
    data = made.close().path.read_bytes()
    at = 16 + PREFIX.unpack(data[: PREFIX.size])[2]
    _, payload, _, records, _ = struct.unpack_from("<4sIIII", data, at)
    return zlib.decompress(data[at + 20 :][:payload]), records


def test_a_corrupted_frame_is_refused_or_read_and_never_crashes(tmp_path):
    """Every byte changed once: scores may differ then, but no other exception than ValueError."""
    raw, records = frame_of(tmp_path)
    refused = 0
    for place in range(len(raw)):
        broken = bytearray(raw)
        broken[place] ^= 0x41
        payload, last = zlib.compress(bytes(broken)), np.zeros((1, 7), np.int64)
        try:
            frame = trace_format.unpack(payload, len(raw), records, last, True)
            list(trace.events_of(frame, {}, SLOTS))
            list(trace.queries_of(frame, 0, len(frame.ids)))
        except ValueError:
            refused += 1
    assert refused > len(raw) / 10


def test_a_frame_of_version_3_is_none_of_version_4(tmp_path):
    raw, records = frame_of(tmp_path)
    last = np.zeros((1, 7), np.int64)
    with pytest.raises(ValueError):
        trace_format.unpack(zlib.compress(raw), len(raw), records, last, False)


@pytest.mark.parametrize(
    ("version", "more"), [(4, ""), (4, ', "runner_ups": "3"'), (3, ', "runner_ups": 3')]
)
def test_a_header_must_say_how_many(tmp_path, version, more):
    header = f'{{"layers": 1, "topk": 2, "slots": 3, "meta": {{}}{more}}}'.encode()
    (tmp_path / "t").write_bytes(PREFIX.pack(trace.MAGIC, version, len(header)) + header)
    with pytest.raises(ValueError, match="runner_ups must be") as error:
        read_trace(tmp_path / "t")
    assert "\n" not in str(error.value)
