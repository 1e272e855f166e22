"""The table of --ess-topk-stream: where it is from, and what it plays."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from ess_kernels.replay_topk import replay_topk_reference
from sglang_ess.sim.model.locality import Locality, TopkStream
from sglang_ess.testing.topk_stream import __main__ as command
from sglang_ess.testing.topk_stream import playback, spec
from sglang_ess.testing.topk_stream.from_trace import from_trace
from sglang_ess.testing.topk_stream.table import (
    StreamTable,
    default_contexts,
    device_bytes,
    generate,
    scaled,
    seam,
)
from sglang_ess.tiers import HotCache
from sglang_ess.trace.trace import Record
from tests.testing.topk_stream import CONTEXTS, PAGE, PROFILE, STEPS, TOPK

# --- the table ----------------------------------------------------------------------------


def test_a_table_comes_back_from_its_file(small, tmp_path):
    small.save(tmp_path / "t.npz")
    again = StreamTable.load(tmp_path / "t.npz")
    assert (again.contexts, again.note) == (small.contexts, small.note)
    for one, other in ((again.steps, small.steps), (again.seams, small.seams)):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["t.npz"]


def test_device_bytes_are_those_of_the_tensors(small):
    table = small.on("cpu")
    assert small.device_bytes == table.nbytes == device_bytes(CONTEXTS, 3, TOPK, 2, STEPS)
    assert device_bytes((8192, 32768, 65536, 131072), 4) < 40 * 2**20
    assert device_bytes((32768,), 4) == pytest.approx(7.0 * 2**20, rel=0.001)


def test_the_same_seed_gives_the_same_table_and_another_does_not():
    locality = scaled(Locality.load(PROFILE), TOPK)
    one, same, other = (generate(locality, (160,), 2, steps=3, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one.steps[0], same.steps[0])
    assert not np.array_equal(one.steps[0], other.steps[0])


def test_layers_are_spread_over_the_localitys_and_repeat_past_them():
    locality = Locality.load("glm-5.1")  # which has one
    table = generate(scaled(locality, TOPK), (160,), 3, steps=2)
    assert table.layers == 3 and '"layers": [0, 0, 0]' in table.note
    many = generate(scaled(Locality.load(PROFILE), TOPK), (160,), 4, steps=2)
    assert str(list(Locality.load(PROFILE).spread(4))) in many.note


def test_scaling_keeps_contexts_alike():
    full, small = Locality.load(PROFILE), scaled(Locality.load(PROFILE), 128)
    assert default_contexts(2048) == (8192, 32768, 65536, 131072)
    assert default_contexts(128)[1] == 2048
    assert small.reach(5, 2048) == pytest.approx(full.reach(5, 32768) / 16)
    assert scaled(full, 2048) is full


def broken(small, **changes):
    fields = {name: getattr(small, name) for name in ("contexts", "steps", "seams", "note")}
    return StreamTable(**fields | changes)


def test_broken_tables_are_refused(small):
    steps, seams = [array.copy() for array in small.steps], [array.copy() for array in small.seams]
    steps[0][0, 0, 0, 0] = CONTEXTS[0] - 1
    with pytest.raises(ValueError, match="must select positions 0 to 158, each once"):
        broken(small, steps=tuple(steps))
    steps[0][0, 0, 0, 0] = steps[0][0, 0, 0, 1]
    with pytest.raises(ValueError, match="each once"):
        broken(small, steps=tuple(steps))
    seams[1][0, 0, 0] = seams[1][0, 0, 1]
    with pytest.raises(ValueError, match="a seam must have each of 511 positions once"):
        broken(small, seams=tuple(seams))
    with pytest.raises(ValueError, match="must ascend from top-k . 2, 34: got 512, 160"):
        broken(small, contexts=CONTEXTS[::-1])
    with pytest.raises(ValueError, match="must be int32 of shapes"):
        broken(small, steps=tuple(array.astype(np.int64) for array in small.steps))


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", None], ids=["empty", "no zip", "gone"])
def test_files_that_are_no_table_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "x.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz must be a table of top-k streams[^\n]*$"):
        StreamTable.load(file)


def test_a_seam_lays_the_last_order_over_the_first():
    random = np.random.default_rng(1)
    order = random.permutation(40)
    steps = np.stack([random.permutation(40)[:5] for _ in range(6)])
    found = seam(order, steps)
    stack = order.tolist()
    for selected in steps:  # of one step's, the order before all steps
        stack = [p for p in stack if p not in selected] + [p for p in order if p in selected]
    assert [found[position] for position in order[:-5]] == stack[:-5]
    assert set(found[order[-5:]]) == set(stack[-5:])
    both = np.intersect1d(order[-5:], stack[-5:])
    assert np.array_equal(found[both], both)


# --- what is played -----------------------------------------------------------------------


def misses(cache, topk):
    """Of one step of one request, topk [K] positions that are slots."""
    start = (0, 0)
    while start is not None:
        start = cache.plan(torch.from_numpy(topk[None].astype(np.int32)), start).stop
    return int(cache.query_misses[0])


@pytest.mark.parametrize(("ratio", "error"), [(0.2, 0.03), (0.5, 0.05)])
def test_the_hot_tier_misses_as_on_the_generators_own_stream(ratio, error):
    """32K, one layer, rounds past the table's end: each round, and all against the generator."""
    context, steps, rounds, locality = 32768, 128, 4, Locality.load(PROFILE)
    table = generate(locality, (context,), 1, steps=steps, seed=3)
    layer = locality.spread(1)[0]
    stream = TopkStream(locality, layer, 1, context + 1024, seed=3)
    begun = TopkStream(locality, layer, 1, context - 1, seed=3)  # as the table's
    rows, device_table = int(ratio * context), table.on("cpu")
    pages = torch.arange(600, dtype=torch.int32)[None]  # the first hashes to step 0
    caches = [HotCache(None, rows, context + 1024) for _ in range(2)]
    for cache, one in zip(caches, (stream, begun), strict=True):
        one.begin(0, context - 1)  # both begin where the generator has them settled
        cache.warm(torch.from_numpy(one.by_recency(0)[-rows:, None].copy()))
    slots = np.arange(context + 1024, dtype=np.int32)[None]
    counts = np.zeros((2, rounds * steps))
    for step in range(rounds * steps):
        length = torch.tensor([context + step], dtype=torch.int32)
        own = stream.next(np.array([0]), length.numpy().astype(np.int64), slots, 1)[0]
        topk = torch.empty(1, 2048, dtype=torch.int32)
        replay_topk_reference(topk, length, pages, device_table, 0, PAGE, True)
        for i, selected in enumerate((own, topk[0].numpy())):
            caches[i].install(length.long() - 1, torch.empty(0))
            counts[i, step] = misses(caches[i], selected)
    by_round = counts[1].reshape(rounds, steps).mean(1)
    assert by_round[1:] == pytest.approx(by_round[0], rel=0.01)
    assert counts[1].mean() == pytest.approx(counts[0].mean(), rel=error)


def test_a_deeper_model_plays_the_layers_again(small):
    one = playback.Playback(small, "cpu")
    lengths, pages = torch.tensor([600], dtype=torch.int32), torch.arange(10).int()[None]
    topk = torch.zeros(3, 1, TOPK, dtype=torch.int32)
    for out, layer in zip(topk, (1, 1 + small.layers, 2), strict=True):
        one.replace(out, lengths, pages, layer, as_slots=False)
    assert torch.equal(topk[0], topk[1]) and not torch.equal(topk[0], topk[2])


# --- recordings ---------------------------------------------------------------------------


@dataclass
class Recorded:
    """Of a tiers.trace.Trace, what from_trace reads."""

    layers: int
    topk: int
    records: list
    path: Path = Path("x.trace")

    def kept(self):
        return iter(self.records)


def recording(length=100, steps=9, layers=2, topk=8, requests=("a", "b")):
    """What a trace of so many decode steps looks like; the newest position always selected."""
    random = np.random.default_rng(2)
    records = []
    for step in range(steps):
        for name in requests:
            for layer in range(layers):
                seen = length + step + (7 if name == "b" else 0)
                chosen = random.choice(seen - 1, topk - 1, replace=False)
                positions = np.sort(np.append(chosen, seen - 1)).astype(np.int32)
                records.append(Record(layer, step, name, seen, positions))
    return Recorded(layers, topk, records), records


def test_a_recording_is_played_as_it_was_recorded():
    trace, records = recording()
    table = from_trace(trace, streams=2, steps=8)
    assert table.contexts == (100,) and (table.streams, table.layers) == (2, 2)
    for stream, name in enumerate(("b", "a")):  # the longest first
        for layer in range(2):
            taken = [r for r in records if (r.request_id, r.layer) == (name, layer)][1:]
            for record, row in zip(taken, table.steps[0][stream, layer], strict=True):
                kept = record.positions[record.positions < 99]
                assert set(kept) <= set(row) and len(set(row)) == 8 and row.max() < 99


def test_a_recording_with_too_few_steps_is_refused():
    with pytest.raises(ValueError, match="1 requests of more than 9 decode steps .* got 0"):
        from_trace(recording()[0], streams=1, steps=9)


# --- the command and the cache ------------------------------------------------------------


def test_the_command_writes_what_the_flag_takes(tmp_path, capsys, asked):
    file = tmp_path / "made.npz"
    argv = ["--out", str(file), "--contexts", "64,96", "--layers", "2", "--top-k", "16"]
    assert command.main([*argv, "--streams", "2", "--steps", "4", "--seed", "9"]) == 0
    assert "contexts 64, 96, 2 streams, 2 layers, 4 steps, top-k 16" in capsys.readouterr().out
    assert spec.table_for(str(file), 16, 61).contexts == (64, 96)
    with pytest.raises(ValueError, match=r"must have the model's top-k 32: got 16.*--top-k 32"):
        spec.table_for(str(file), 32, 61)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--locality", "llama"], "localities must hold llama"),
        (["--contexts", "96,64"], "must ascend"),
        (["--out", "x.txt"], "--out must end in .npz"),
        (["--from-trace", "/nowhere.trace"], "No such file"),
        (["--steps", "0"], "steps must be at least 1: got 0"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, capsys, flags, part):
    argv = ["--out", str(tmp_path / "x.npz"), "--top-k", "16", "--contexts", "64", *flags]
    assert command.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line and list(tmp_path.iterdir()) == []


def test_a_profile_is_generated_once(asked, tmp_path, monkeypatch):
    name = f"{PROFILE}@64,96"
    table = spec.table_for(name, 16, 61)
    assert table.contexts == (64, 96) and table.layers == spec.MAX_LAYERS
    (file,) = (tmp_path / "sglang_ess" / "topk_streams").iterdir()
    monkeypatch.setattr(spec, "generate", None)  # a second one would fail
    again = spec.table_for(name, 16, 61)
    assert np.array_equal(again.steps[1], table.steps[1])
    file.write_bytes(b"cut off")
    with pytest.raises(TypeError):
        spec.table_for(name, 16, 61)
