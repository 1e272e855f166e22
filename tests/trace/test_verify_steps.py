"""Verify steps of speculative decoding in a trace: several lists a request, and what it kept."""

import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim.cli import replay as command
from sglang_ess.sim.model.miss_table import MissTable
from sglang_ess.sim.model.trace_replay import replay
from sglang_ess.testing.topk_stream.from_trace import from_trace
from sglang_ess.trace import format as trace_format
from sglang_ess.trace import trace
from sglang_ess.trace.format import Entry
from sglang_ess.trace.trace import Kind, TraceWriter, read_trace
from sglang_ess.trace.trace_recorder import TraceRecorder
from tests.sim import oracles
from tests.support.recorded import Verifies


def recorded(path, seed=0, steps=12, **shape):
    """A closed trace of verify steps, and the Verifies that it is of."""
    made = Verifies(path, np.random.default_rng(seed), **shape)
    for _ in range(steps):
        made.step()
    return read_trace(made.close()), made


def plain(records):
    return [(*record[:4], record.positions.tolist()) for record in records]


def by_layer(records):
    return sorted(records, key=lambda record: record[:2])  # stable: the order within a step stays


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    queries=st.integers(1, 6),
    block=st.sampled_from([None, 5, 4]),  # plans that cut through a request's queries
    frame_bytes=st.sampled_from([1, 3000, 1 << 20]),
)
def test_every_list_is_recorded_and_the_kept_ones_are_known(
    tmp_path_factory, seed, queries, block, frame_bytes
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "FRAME_BYTES", frame_bytes)
        path = tmp_path_factory.mktemp("trace") / "t"
        opened, made = recorded(path, seed, 6, queries=queries, block=block)
    assert plain(opened) == [record[:5] for record in made.records]
    assert plain(by_layer(opened.kept())) == by_layer(r[:5] for r in made.records if r[5])
    told = [event for event in opened.events() if event.kind == Kind.ACCEPTED]
    assert [event.slots.tolist() for event in told] == made.kept
    assert {event.argument for event in told} == {queries}
    assert opened.trailer["dropped"] == 0
    plans = [event.slots for event in opened.events() if event.kind == Kind.PLAN]
    topk = [steps[i] for i in range(6) for steps in made.steps]  # the layers of each step
    assert np.array_equal(np.concatenate(plans), np.concatenate(topk))


def test_a_rejected_position_is_recorded_once_more_and_its_slot_is_not(tmp_path):
    """The same rows of the table serve the next step, so SLOTS has only what is new."""
    opened, made = recorded(tmp_path / "t", queries=4, steps=8)
    sizes = [
        (int(row), len(frame.slots(event)))
        for frame in opened.frames()
        for event, row in enumerate(frame.arguments)
        if frame.kinds[event] == Kind.SLOTS
    ]
    for row, length in enumerate(made.lengths):
        ended = length - made.kept[-1][row]  # where the last step began
        assert sum(count for place, count in sizes if place == row) == ended + 4
        assert sum(place == row for place, _ in sizes) <= 8
    asked = [record.length for record in opened if record.request_id == "request 0"]
    kept = [record.length for record in opened.kept() if record.request_id == "request 0"]
    assert len(set(asked)) < len(asked) == 8 * 4 * 2
    assert sorted(kept) == sorted([*range(21, made.lengths[0] + 1)] * 2)  # once in each layer


def lru_misses(made, rows):
    """Misses of a plain LRU [layers][steps] over the lists, each step's at once."""
    found = []
    for steps in made.steps:
        oracle = oracles.Lru(rows)
        found.append([sum(oracle.step(topk)) for topk in steps])
    return found


@pytest.mark.parametrize("queries", [1, 2, 4, 6])
def test_a_replay_misses_what_a_plain_lru_misses(tmp_path, queries):
    opened, made = recorded(tmp_path / "t", 3, 30, queries=queries, rows=110)
    found = replay(opened)
    assert found.differences == [] and found.missing == 0
    expected = [sum(steps) for steps in lru_misses(made, 110)]
    assert [layer.counters["misses"] for layer in found.layers] == expected
    assert found.queries == queries and found.verifies == 30 * Verifies.REQUESTS
    tokens = sum(map(sum, made.kept))
    assert found.tokens == tokens
    assert found.misses_per_verify == pytest.approx(sum(expected) / (30 * Verifies.REQUESTS))
    assert found.misses_per_token == pytest.approx(sum(expected) / tokens)
    # At another size too, and there it is another number.
    smaller = replay(opened, rows=100)
    assert [one.counters["misses"] for one in smaller.layers] == [
        sum(steps) for steps in lru_misses(made, 100)
    ]
    assert smaller.total("misses") > found.total("misses")


def test_without_speculation_a_verify_is_a_token(tmp_path):
    recorder = TraceRecorder(tmp_path / "t", 1, 2, 64, {})
    cache = recorder.hot_cache(None, 8, 64)
    for first in range(4):
        cache.plan(torch.tensor([[first, first + 1], [9, 10]], dtype=torch.int32))
    recorder.writer.close()
    found = replay(read_trace(tmp_path / "t"))
    assert (found.queries, found.verifies, found.tokens) == (1, 8, 8)
    assert found.misses_per_token == found.total("misses") / 8 == 7 / 8


def test_the_command_says_what_a_token_costs(tmp_path, capsys):
    opened, made = recorded(tmp_path / "t", 5, 20, queries=4)
    assert command.main([str(opened.path), "--json", str(tmp_path / "facts")]) == 0
    shown, tokens = capsys.readouterr().out, sum(map(sum, made.kept))
    misses = replay(opened).total("misses")
    assert "4 queries a verify step, 60 verifies of a request" in shown
    assert f"{tokens / 60:.2f} tokens kept" in shown
    assert f"{misses / 60:,.1f} misses a verify, {misses / tokens:,.1f} a kept token" in shown


# --- what is missing or wrong -----------------------------------------------------------


def test_a_step_of_unknown_acceptance_is_left_out(tmp_path):
    """Nobody knows which of its lists count, so none does; the steps around it are whole."""
    made = Verifies(tmp_path / "t", np.random.default_rng(1))
    for step in range(6):
        made.step(tells=step not in (2, 5))
    opened = read_trace(made.close())
    assert plain(opened) == [record[:5] for record in made.records]
    kept = plain(by_layer(opened.kept()))
    assert kept == by_layer(record[:5] for record in made.records if record[5])
    assert {step for _, step, *_ in kept} == {0, 1, 3, 4}


def test_a_trace_of_one_query_a_request_is_kept_whole(tmp_path):
    made = Verifies(tmp_path / "t", np.random.default_rng(1), queries=1)
    for _ in range(5):
        made.step(tells=False)
    opened = read_trace(made.close())
    assert plain(by_layer(opened.kept())) == by_layer(plain(opened)) != []


@pytest.mark.parametrize("lengths", [[1, 2], [1, 2, 5], [0, 1, 1], [1, 1, 1, 1]])
def test_lengths_that_do_not_fit_the_step(tmp_path, lengths):
    made = Verifies(tmp_path / "t", np.random.default_rng(1))
    made.step()
    with pytest.raises(ValueError, match="must be 1 to 1 for each of 0 requests"):
        made.recorder.accepted([1, 1, 1])  # the step's are known already
    made.recorder.begin_step([f"{i // 4}" for i in range(12)], np.arange(3).repeat(4),
                             np.arange(12, dtype=np.int32), made.table, 4)  # fmt: skip
    with pytest.raises(ValueError, match="must be 1 to 4 for each of 3 requests"):
        made.recorder.accepted(lengths)
    made.close()


@pytest.mark.parametrize("kept", [0, 4])
def test_a_file_of_impossible_lengths_is_refused(tmp_path, kept):
    writer = TraceWriter(tmp_path / "t", 1, 4, 64)
    writer.put(Entry(Kind.ACCEPTED, 0, 3, data=np.array([[1], [kept]], np.int32)))
    writer.close()
    with pytest.raises(ValueError, match="accepted lengths must be 1 to 3"):
        list(read_trace(tmp_path / "t").events())


def test_the_documented_bytes(tmp_path):
    """ACCEPTED has a number for each request and no counters."""
    writer = TraceWriter(tmp_path / "t", 1, 4, 64)
    writer.put(Entry(Kind.ACCEPTED, 0, 3, data=np.array([[1], [3]], np.int32)))
    writer.close()
    data = (tmp_path / "t").read_bytes()
    at = 16 + struct.unpack_from("<8sII", data)[2]
    tag, payload, _, _, _ = struct.unpack_from("<4sIIII", data, at)
    raw = zlib.decompress(data[at + 20 : at + 20 + payload])
    assert raw == struct.pack("<IIBHII", 0, 1, 9, 0, 3, 2) + bytes([1, 3])


def test_a_file_of_version_2_is_read(tmp_path):
    opened, _ = recorded(tmp_path / "t", queries=1, steps=4)
    data = bytearray(opened.path.read_bytes())
    data[8:12] = struct.pack("<I", 2)
    (tmp_path / "old").write_bytes(data)
    assert plain(read_trace(tmp_path / "old")) == plain(opened)
    assert trace_format.VERSION == 3


# --- readers that want one list a token -------------------------------------------------


def test_a_topk_stream_is_of_kept_lists(tmp_path):
    """The same table as from a trace in which each token had one list: the kept one."""
    opened, made = recorded(tmp_path / "t", 7, 20, queries=4)
    single = TraceRecorder(tmp_path / "single", 2, made.WIDTH, made.SLOTS, {})
    caches = [single.hot_cache(None, 80, made.SLOTS) for _ in range(2)]
    kept = {}
    for layer, _, name, length, positions, is_kept in made.records:
        if is_kept:
            kept[name, layer, length] = positions
    for name, row in zip(made.names, range(made.REQUESTS), strict=True):
        for length in sorted({at for who, _, at in kept if who == name}):
            rows, seen = np.array([row], np.int64), np.array([length], np.int32)
            single.begin_step([name], rows, seen, made.table)
            for layer, cache in enumerate(caches):
                topk = made.table[row, kept[name, layer, length]]
                cache.plan(torch.from_numpy(topk[None].copy()))
    single.writer.close()
    found = from_trace(opened, 2, 20)
    right = from_trace(read_trace(tmp_path / "single"), 2, 20)
    assert found.contexts == right.contexts
    assert np.array_equal(found.steps[0], right.steps[0])
    assert np.array_equal(found.seams[0], right.seams[0])


def test_a_miss_table_is_for_the_recorded_queries(tmp_path):
    opened, made = recorded(tmp_path / "t", 3, 30, queries=4, rows=110)
    table = MissTable.from_trace(opened, 2, 128, 4)
    misses = sum(lru_misses(made, 110)[0]) / 30 / Verifies.REQUESTS
    assert table.curves[0].at(110 / Verifies.REQUESTS) == pytest.approx(misses, rel=0.02)
    with pytest.raises(ValueError, match="with 2 queries a request: got 4. Plan with --mtp 4"):
        MissTable.from_trace(opened, 2, 128, 2)
