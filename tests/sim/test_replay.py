"""A replay counts what the server counted; at other sizes, what it would have counted."""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim.cli import replay as command
from sglang_ess.sim.model.trace_replay import (
    SCALES,
    ReplayError,
    best_budgets,
    curve,
    layer_curves,
    replay,
)
from sglang_ess.tiers.contract import COUNTERS
from sglang_ess.trace import trace
from sglang_ess.trace.format import PREFIX
from sglang_ess.trace.trace import Kind, Trace, read_trace
from sglang_ess.trace.trace_recorder import TraceRecorder
from tests.support import parity
from tests.support.drafts import eagle
from tests.support.engine import EngineProcess
from tests.support.recorded import Life

GOLDEN = Path(__file__).parent / "golden.ess"


def counters(caches):
    """Those that a trace keeps; it has no rows that were fetched early."""
    return [
        {name: cache.counters[name] for name in COUNTERS} | {"steps": cache.steps}
        for cache in caches
    ]


def recorded(path, sizes, steps, slots=256, width=8, **meta):
    """A trace of top-k steps, each with a top-k of each layer [layers, queries, width]."""
    recorder = TraceRecorder(path, len(sizes), width, slots, {"row_bytes": 1024} | meta)
    caches = [recorder.hot_cache(None, rows, slots) for rows in sizes]
    for step in steps:
        for cache, topk in zip(caches, step, strict=True):
            start = (0, 0)
            while start is not None:
                start = cache.plan(torch.tensor(topk, dtype=torch.int32), start).stop
    recorder.writer.close()
    return read_trace(path)


def cycle(distinct, width=8, steps=40):
    """A layer's steps of one query: `distinct` slots in turn."""
    return [np.arange(i * width, (i + 1) * width)[None] % distinct for i in range(steps)]


# --- at the recorded size ---------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_life_is_counted_again(tmp_path_factory, seed):
    """Plans of several passes, writes, warm-up, resizes and clears: all that HotCache can do."""
    life = Life(tmp_path_factory.mktemp("trace") / "t", np.random.default_rng(seed))
    life.run(30)
    found = replay(read_trace(life.recorder.writer.path))
    assert found.differences == [] and found.missing == 0
    assert [layer.counters for layer in found.layers] == counters(life.caches)
    assert [layer.server for layer in found.layers] == counters(life.caches)
    assert [layer.rows for layer in found.layers] == [cache.num_rows for cache in life.caches]
    assert found.num_events == len(life.expected)


def without(kind, number, **fields):
    """Trace.events that leaves out one event: the number-th of a kind."""
    events = Trace.events

    def fewer(*args):
        seen = -1
        for event in events(*args):
            matches = event.kind == kind and fields.items() <= event._asdict().items()
            seen += matches
            if not (matches and seen == number):
                yield event

    return fewer


@pytest.mark.parametrize("kind", [Kind.PLAN, Kind.INSTALL, Kind.INVALIDATE, Kind.WARM])
def test_a_lost_event_is_noticed(tmp_path, monkeypatch, kind):
    life = Life(tmp_path / "t", np.random.default_rng(3))
    life.run(60)
    monkeypatch.setattr(Trace, "events", without(kind, 2))
    found = replay(read_trace(tmp_path / "t"))
    (difference,) = found.differences  # of the layer that lost it
    assert difference.server != difference.replay
    assert f"layer {difference.layer}): " in str(difference)


def test_dropped_events_make_it_inexact_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "QUEUE_BYTES", 0)
    life = Life(tmp_path / "t", np.random.default_rng(5))  # whose sizes are the first dropped
    life.recorder.writer.close()
    with pytest.raises(ReplayError, match="events of every layer: got none of layer 0"):
        replay(read_trace(tmp_path / "t"))
    monkeypatch.undo()
    life = Life(tmp_path / "t", np.random.default_rng(5))
    put, count = life.recorder.writer.put, 0

    def full_for_a_while(entry):
        nonlocal count
        count += 1
        monkeypatch.setattr(trace, "QUEUE_BYTES", 0 if 50 < count <= 60 else 1 << 20)
        return put(entry)

    monkeypatch.setattr(life.recorder.writer, "put", full_for_a_while)
    life.run(60)
    found = replay(read_trace(tmp_path / "t"))
    assert found.missing == life.recorder.writer.dropped == 10
    assert found.differences == [] and found.total("lookups") > 0
    assert [layer.server for layer in found.layers] == counters(life.caches)


# --- at other sizes ---------------------------------------------------------------------


def test_closed_forms(tmp_path):
    """LRU over slots in turn: one row too few misses every time, enough rows once each."""
    steps = [[one] for one in cycle(64)]
    opened = recorded(tmp_path / "t", [56], steps)
    assert replay(opened).total("misses") == 40 * 8
    assert replay(opened, rows=64).total("misses") == 64
    assert replay(opened, rows=[8]).total("misses") == 40 * 8
    assert replay(opened, rows=3).total("misses") == 40 * 8  # several passes
    assert replay(opened, rows=10**9).layers[0].rows == opened.slots
    found = replay(opened, scale=64 / 56)
    assert (found.rows, found.total("misses"), found.total("lookups")) == (64, 64, 320)
    assert found.hit_ratio == 1 - 64 / 320 and found.misses_per_step == 64 / 40
    assert replay(opened).layers[0].union == 8 and found.layers[0].counters["evictions"] == 0
    assert found.layers[0].server["misses"] == 320


def test_more_rows_never_miss_more(tmp_path):
    """LRU's inclusion, for single queries and as many rows as they need."""
    rng = np.random.default_rng(0)
    steps = [[rng.zipf(1.3, (1, 8)) % 256] for _ in range(200)]
    opened = recorded(tmp_path / "t", [16], steps)
    misses = [replay(opened, rows=rows).total("misses") for rows in range(8, 256, 16)]
    assert misses == sorted(misses, reverse=True) and misses[0] > misses[-1]
    points = curve(opened, (4.0, 0.5, 1.0))
    assert list(points) == [0.5, 1.0, 4.0]
    assert [one.rows for one in points.values()] == [8, 16, 64]
    assert points[1.0].total("misses") == replay(opened).total("misses")


@pytest.fixture
def unequal(tmp_path):
    """Two layers of 64 rows: one that wants 24 of them, one that wants 96."""
    steps = list(zip(cycle(24, steps=96), cycle(96, steps=96), strict=True))
    return recorded(tmp_path / "t", [64, 64], steps)


def test_budgets_go_where_they_save(unequal):
    points = curve(unequal) | {1.0: replay(unequal)}
    first, second = layer_curves(points.values())
    assert first.rows == tuple(round(64 * scale) for scale in SCALES)
    assert (first.lookups, first.steps, first.union) == (8, 96, 8)
    assert first.misses[2] == 24 / 96 and second.misses[4] == 8  # 32 rows; 64 rows
    budgets = best_budgets(points.values(), 128)
    assert sum(budgets.rows) == 128 and budgets.rows[1] >= 96
    best = replay(unequal, rows=budgets.rows)
    assert best.total("misses") == 24 + 96
    assert replay(unequal).total("misses") == 24 + 96 * 8


def test_what_a_replay_cannot_be_asked(unequal):
    with pytest.raises(ValueError, match="rows or a scale: got both"):
        replay(unequal, rows=3, scale=2.0)
    with pytest.raises(ValueError, match="rows must be of 2 layers: got 3"):
        replay(unequal, rows=[1, 2, 3])


# --- the command ------------------------------------------------------------------------


def test_the_command(unequal, tmp_path, capsys):
    facts, plot = tmp_path / "facts.json", tmp_path / "plot.png"
    options = ["--rows", "32", "96", "--json", str(facts), "--plot", str(plot)]
    assert command.main([str(unequal.path), *options]) == 0
    shown = capsys.readouterr().out
    assert "server: 1,536 lookups, 792 misses; replay: the same after each of 194" in shown.lower()
    assert "2 layers, top-k 8, 256 slots, 96 decode steps (closed)" in shown
    assert "96 a layer" in shown and "best budgets" in shown and "…" not in shown
    found = json.loads(facts.read_text())
    points = {point["name"]: point for point in found["points"]}
    assert found["exact"] and found["events"] == 194 and found["end"] == "closed"
    assert points["x1"]["misses"] == 792 and points["x1"]["misses_ratio"] == 1
    assert points["x1"]["layers"][0]["misses"] == 24
    assert points["best budgets"]["misses"] == points["96 a layer"]["misses"] == 120
    assert points["x1"]["device_bytes"] == 128 * 1024
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_miss_of_an_index_group_is_a_row_for_each_of_its_layers(tmp_path, unequal, capsys):
    steps = list(zip(cycle(24, steps=96), cycle(96, steps=96), strict=True))
    grouped = recorded(tmp_path / "groups", [64, 64], steps, group_layers=(1, 3))
    plain, shared = ({p["name"]: p for p in command.Study(one).points()} for one in (
        unequal, grouped))  # fmt: skip
    assert shared["x1"]["misses"] == plain["x1"]["misses"] == 792
    assert shared["x1"]["device_bytes"] == 4 * 64 * 1024
    assert shared["x1"]["fetched_bytes_per_step"] == 1024 * (24 + 3 * 768) / 96
    # Rows of groups of another size are of no use to each other.
    assert "best budgets" in plain and "best budgets" not in shared
    assert command.main([str(grouped.path)]) == 0
    assert "2 index groups of 4 layers, top-k 8" in capsys.readouterr().out


def test_the_command_says_when_counts_differ(unequal, monkeypatch, capsys):
    monkeypatch.setattr(Trace, "events", without(Kind.PLAN, 0, layer=1))
    assert command.main([str(unequal.path)]) == 2
    assert "not the same, first at event 4 (PLAN, layer 1): steps 2 on" in capsys.readouterr().out


def refused(capsys, *argv):
    assert command.main(list(map(str, argv))) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and out == ""
    return err


def test_the_command_refuses_what_is_no_trace(tmp_path, capsys, unequal):
    data = unequal.path.read_bytes()
    file = tmp_path / "x"
    assert "No such file" in refused(capsys, file)
    for content, message in (
        (b"", "must begin with b'ESSTRACE'"),
        (b"a table of something else", "must begin with"),
        (PREFIX.pack(b"ESSTRACE", 1, 9) + data[16:], "version 2 to 4: got 1"),
        (data[:30], "a whole header"),
        (data[: data.index(b"\n") + 1], "events of every layer"),
    ):
        file.write_bytes(content)
        assert message in refused(capsys, file)
    assert "decode step" in refused(capsys, recorded(file, [8], []).path)
    assert "open to this command" in refused(capsys, tmp_path)
    with pytest.raises(SystemExit, match="2"):
        command.main([str(file), "--rows", "0"])
    assert "must be 1 or more: got 0" in capsys.readouterr().err


def test_a_trace_that_was_cut_off_is_replayed_as_far_as_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trace, "FRAME_BYTES", 1)  # a frame an event
    opened = recorded(tmp_path / "t", [16], [[one] for one in cycle(64)])
    data = opened.path.read_bytes()
    opened.path.write_bytes(data[: len(data) * 2 // 3])
    assert command.main([str(opened.path)]) == 0
    assert "(cut off)" in capsys.readouterr().out


# --- a server's -------------------------------------------------------------------------


def test_golden():
    """What a server recorded once: prefix hits, aborts, retraction, and 80 hot rows, below a
    plan's 92 slots. A change of policy changes these counts: record another, and say so.
    """
    opened = read_trace(GOLDEN)
    found = replay(opened)
    assert found.differences == [] and found.num_events == 232
    first = dict(steps=35, lookups=1601, misses=814, evictions=4051, evicted_age=1527,
                 installs=3378, skipped=873)  # fmt: skip
    second = dict(steps=35, lookups=1601, misses=833, evictions=4262, evicted_age=1535,
                  installs=3595, skipped=857)  # fmt: skip
    assert [layer.counters for layer in found.layers] == [first, second]
    assert [layer.union for layer in found.layers] == [92, 92]
    misses = {scale: replay(opened, scale=scale).total("misses") for scale in (0.5, 2, 4)}
    assert misses == {0.5: 2557, 2: 1079, 4: 243}
    assert opened.header["meta"] == {"row_bytes": 2304, "page_slots": 64, "plan_queries": 64}
    assert len(list(opened)) == 18 + 18 + 18 + 14 + 14 + 12 + 10  # queries of both layers


PATCHES = (
    "tests.support.gather:install", "tests.support.tiers:expose", "tests.support.retraction:force",
    "tests.support.recorded:move_rows",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape = dict(arch="v32", index_topk=128, layers=2, **parity.NARROW)
    return parity.write_model(tmp_path_factory.mktemp("models") / "v32", **shape)


def serve(model, path, ratio):
    """Counters of a server after batches, prefix hits, aborts and retractions; its trace."""
    ess = {"hot_ratio": ratio, "trace": str(path), "index_dtype": "float32", "admission": "off"}
    args = dict(dtype="float32", max_total_tokens=16384, chunked_prefill_size=512)
    with EngineProcess(model, ess=ess, patches=PATCHES, **args) as served:
        prompts = parity.prompts_of([20, 150, 900, 300])
        served.together("cold", prompts, 12)
        tails = [prompt + tail for prompt in prompts[2:] for tail in ([1, 2, 3], [4] * 70)]
        served.together("shared", tails, 8)
        served.together("samples", [prompts[3]], 8, n=3)
        served.abort(parity.prompts_of([300, 90], seed=3), 0.3, 4000)
        served.together("many", parity.prompts_of([40] * 70, seed=4), 5)  # two plans a step
        served.flush()
        served.together("reused", parity.prompts_of([700, 200], seed=5), 8)
        expected = served.call("_hot_counters")
        deadline = time.monotonic() + 20  # within FLUSH_SECONDS it is in the file
        for one in expected:
            del one["occupied"], one["steps"], one["early"], one["early_used"]
        while without_steps((found := replay(read_trace(path))).layers, "server") != expected:
            assert time.monotonic() < deadline, (found, expected)
            time.sleep(0.2)
    return expected, found


def without_steps(layers, name):
    """Counters of each layer as the server tells them."""
    return [{k: v for k, v in getattr(one, name).items() if k != "steps"} for one in layers]


@pytest.mark.parametrize(
    "ratio",
    [
        64 / 16384,  # half a query's top-k
        pytest.param(0.02, marks=pytest.mark.slow),
        pytest.param(0.1, marks=pytest.mark.slow),
    ],
)
def test_a_servers_counts_exactly(model, tmp_path, monkeypatch, ratio):
    expected, found = serve(model, tmp_path / "t", ratio)
    assert without_steps(found.layers, "counters") == expected
    assert found.differences == [] and found.missing == 0
    assert all(one["misses"] and one["evictions"] and one["installs"] for one in expected)
    opened = read_trace(tmp_path / "t")
    kinds = Counter(event.kind for event in opened.events())
    assert {Kind.PLAN, Kind.INSTALL, Kind.INVALIDATE, Kind.WARM, Kind.RESIZE} == set(kinds)
    assert kinds[Kind.RESIZE] > 2 + 4  # two layers', and trades of theirs
    assert any(event.kind == Kind.PLAN and event.argument for event in opened.events())
    assert all((frame.kinds != Kind.PLAN_SLOTS).all() for frame in opened.frames())
    # One decode write less, and it would be noticed.
    monkeypatch.setattr(Trace, "events", without(Kind.INSTALL, 20, argument=0))
    assert len(replay(opened).differences) == 1


def told(path):
    """What each verify step kept."""
    return [event for event in read_trace(path).events() if event.kind == Kind.ACCEPTED]


def test_a_servers_verify_steps_exactly(tmp_path):
    """Each position is kept once, in order, whatever was drafted for it; counts are the same."""
    shape = dict(arch="v32", index_topk=128, layers=2, mtp_layers=1, **parity.NARROW)
    model = parity.write_model(tmp_path / "model", **shape)
    ess = {"hot_ratio": 0.15, "trace": str(tmp_path / "t"), "index_dtype": "float32"}
    args = dict(dtype="float32", max_total_tokens=8192, chunked_prefill_size=512)
    args |= eagle(4)
    with EngineProcess(model, ess=ess | {"admission": "off"}, **args) as served:
        served.generate(parity.prompts_of([300, 150]), 12)
        deadline = time.monotonic() + 20  # within FLUSH_SECONDS it is in the file
        while sum(e.slots.sum() for e in told(tmp_path / "t")) < 2 * 11:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    opened = read_trace(tmp_path / "t")
    found = replay(opened)
    assert found.differences == [] and found.missing == 0 and found.queries == 4
    # The prompt gives the first token; the last step may keep more than are asked for.
    assert 2 * 11 <= found.tokens <= 2 * (11 + 3)
    places = {}
    for record in opened.kept():
        places.setdefault((record.request_id, record.layer), []).append(record.length)
    assert len(places) == 4
    for lengths in places.values():
        assert lengths == list(range(lengths[0], lengths[0] + len(lengths)))
        assert lengths[0] in (301, 151) and len(lengths) >= 11
