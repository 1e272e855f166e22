"""Lists and scores of other systems: what a trace has of them is what their files had."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sglang_ess.sim.cli import convert as command
from sglang_ess.sim.cli import replay as replay_command
from sglang_ess.sim.model.trace_replay import replay
from sglang_ess.trace import from_arrays
from sglang_ess.trace.from_arrays import Layout, convert
from sglang_ess.trace.trace import read_trace
from tests.sim import oracles

QUERIES, TOPK, LAYERS, RUNNER_UPS = 40, 8, (3, 4, 11), 3
LISTS, SCORES = Layout.lists, Layout.scores
LAYOUT = Layout(runner_ups=RUNNER_UPS)


class Saved:
    """Lists of random scores in another system's shape: best first, -1 where there are fewer.

    scores  [layer] of [queries, positions] float32, NaN after a query's own
    """

    def __init__(self, seed=0, first_query=0, queries=QUERIES, layers=LAYERS, topk=TOPK):
        rng = np.random.default_rng(seed)
        self.first_query, self.context = first_query, first_query + queries
        self.lengths = first_query + 1 + np.arange(queries)
        self.lists, self.scores = {}, {}
        for layer in layers:
            scores = rng.normal(size=(queries, self.context)).astype(np.float32)
            scores[np.arange(self.context) >= self.lengths[:, None]] = np.nan
            best = np.argsort(np.where(np.isnan(scores), np.inf, -scores), axis=1)[:, :topk]
            best = np.pad(best, ((0, 0), (0, max(0, topk - self.context))))
            best[np.arange(topk) >= self.lengths[:, None]] = -1
            self.lists[layer], self.scores[layer] = best.astype(np.int32), scores

    def arrays(self, by_position=True, kind=np.float32):
        for layer, lists in self.lists.items():
            scores = self.scores[layer]
            if not by_position:
                scores = np.take_along_axis(scores, np.maximum(lists, 0), 1)
            yield LISTS.format(layer=layer), lists
            yield SCORES.format(layer=layer), scores.astype(kind)

    def npy(self, folder, **options):
        folder.mkdir(exist_ok=True)
        for name, array in self.arrays(**options):
            np.save(folder / f"{name}.npy", array)
        return folder

    def npz(self, folder, **options):
        np.savez_compressed(folder / "saved.npz", **dict(self.arrays(**options)))
        return folder / "saved.npz"

    def safetensors(self, folder, dtype=None, **options):
        """A file for each layer; names with a folder before them."""
        (folder / "parts").mkdir()
        for name, array in self.arrays(**options):
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            tensor = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
            save_file({f"dsa/{name}": tensor}, folder / "parts" / f"{name}.safetensors")
        return folder / "parts"


def check(path, saved, skip=0, by_position=True, slack=2.0**-11, runner_ups=RUNNER_UPS):
    """Every record of the trace against the arrays, query by query, layer by layer."""
    records = list(read_trace(path))
    places = [(row, i) for row in range(skip, len(saved.lengths)) for i in range(len(saved.lists))]
    assert len(records) == len(places)
    for record, (row, layer_index) in zip(records, places, strict=True):
        layer, length = list(saved.lists)[layer_index], saved.lengths[row]
        assert (record.layer, record.step, record.length) == (layer_index, row - skip, length)
        listed = saved.lists[layer][row]
        assert record.positions.tolist() == sorted(listed[listed >= 0].tolist())
        right, topk = saved.scores[layer][row, :length], len(record.positions)
        best = np.argsort(-right)[topk:][: runner_ups if by_position else 0]
        assert record.runner_ups.tolist() == sorted(best.tolist())
        chosen = np.concatenate([record.positions, record.runner_ups])
        assert np.abs(record.scores - right[chosen]).max() <= slack * np.abs(right).max()


FORMATS = ["npy", "npz", "safetensors"]


@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(tmp_path, kind, by_position):
    saved = Saved(seed=1, first_query=5)
    source = getattr(saved, kind)(tmp_path, by_position=by_position)
    layout = replace(LAYOUT, first_query=5)
    found = convert(source, tmp_path / "t", layout)
    assert found.layers == list(LAYERS) and found.sizes.context == 45 and found.hot_rows == 16
    check(tmp_path / "t", saved, by_position=by_position)
    opened = read_trace(tmp_path / "t")
    assert (opened.layers, opened.topk, opened.slots) == (3, TOPK, 45)
    assert opened.runner_ups == (RUNNER_UPS if by_position else 0)
    assert opened.header["meta"]["source_layers"] == list(LAYERS)
    full = int((saved.lengths > TOPK).sum()) * len(LAYERS)
    assert (found.ranked, found.agreeing) == ((full, full) if by_position else (0, 0))
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, "safetensors"), (np.float16, "npy"), (np.float64, "npz")]
)
def test_other_floats(tmp_path, dtype, kind):
    saved = Saved(seed=2)
    options = {"dtype": dtype} if kind == "safetensors" else {"kind": dtype}
    source = getattr(saved, kind)(tmp_path, **options)
    for layer, scores in saved.scores.items():  # what rounding has made of them
        if kind == "safetensors":
            scores = torch.from_numpy(scores).to(dtype).float().numpy()
        saved.scores[layer] = scores.astype(dtype if kind == "npy" else np.float32)
    convert(source, tmp_path / "t", LAYOUT)
    records = list(read_trace(tmp_path / "t"))
    for record, row in zip(records, np.repeat(np.arange(QUERIES), len(LAYERS)), strict=True):
        right = saved.scores[LAYERS[record.layer]][row].astype(np.float32)
        chosen = np.concatenate([record.positions, record.runner_ups])
        assert np.allclose(record.scores, right[chosen], rtol=2**-10)


def test_blocks_and_skipped_queries(tmp_path, monkeypatch):
    """However few rows are read at a time, and with the first ones left out."""
    saved = Saved(seed=3)
    for kind in FORMATS:
        (tmp_path / kind).mkdir()
        source = getattr(saved, kind)(tmp_path / kind)
        for size, skip in ((1, 13), (5000, 13), (12_000, 0), (1 << 30, 39)):
            monkeypatch.setattr(from_arrays, "BLOCK_BYTES", size)
            seen = {}
            convert(source, tmp_path / "t", LAYOUT, skip, None, seen.setdefault)
            check(tmp_path / "t", saved, skip)
            assert seen[QUERIES] == QUERIES and (size > 1 or len(seen) == QUERIES - skip)


def test_a_replay_misses_what_a_plain_lru_misses(tmp_path):
    saved = Saved(seed=4, queries=60)
    convert(saved.npy(tmp_path / "a"), tmp_path / "t", LAYOUT, hot_rows=12)
    found = replay(read_trace(tmp_path / "t"))
    assert found.differences == [] and found.rows == 36
    smaller = replay(read_trace(tmp_path / "t"), rows=9)
    for rows, one in ((12, found), (9, smaller)):
        for layer, lists in zip(one.layers, saved.lists.values(), strict=True):
            lru = oracles.Lru(rows)
            misses = sum(sum(lru.step(np.sort(row[row >= 0])[None])) for row in lists)
            assert layer.counters["misses"] == misses


def test_lists_alone(tmp_path, capsys):
    saved = Saved(seed=5)
    saved.npy(tmp_path / "a")
    for file in (tmp_path / "a").glob("indexer*"):
        file.unlink()
    assert command.main([str(tmp_path / "a"), str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert "3 layers (3 to 11 of the source), 40 queries, top-k 8, no scores" in out
    opened = read_trace(tmp_path / "t")
    assert opened.runner_ups is None and all(record.scores is None for record in opened)
    assert replay_command.main([str(tmp_path / "t")]) == 0
    assert "the same after each of 123 events" in capsys.readouterr().out


def test_the_command(tmp_path, capsys):
    saved = Saved(seed=6, first_query=2)
    source = tmp_path / "a"
    source.mkdir()
    for name, array in saved.arrays():
        np.save(source / f"{name.replace('dsa_topk_indices', 'top')}.npy", array)
    flags = ["--lists", "top_layer_{layer}", "--first-query", "2", "--skip", "10"]
    flags += ["--runner-ups", "4", "--hot-rows", "20"]
    assert command.main([str(source), str(tmp_path / "t"), *flags]) == 0
    out = capsys.readouterr().out
    size = (tmp_path / "t").stat().st_size
    assert f"30 queries, top-k 8, scores of 8 + 4; {size:,} bytes, counted with 20 hot" in out
    assert "Lists and scores agree in 100.00% of 90 lists" in out and "same model" not in out
    check(tmp_path / "t", saved, 10, runner_ups=4)
    assert replay_command.main([str(tmp_path / "t")]) == 0
    assert "t: 3 layers, top-k 8 + 4 with scores, 42 slots, 30" in capsys.readouterr().out


def test_scores_of_other_lists_are_told(tmp_path, capsys):
    """Layers mixed up give a trace, but the command says that they do not fit."""
    saved = Saved(seed=7)
    saved.scores[3], saved.scores[4] = saved.scores[4], saved.scores[3]
    assert command.main([str(saved.npz(tmp_path)), str(tmp_path / "t")]) == 0
    assert "agree in 33.33% of 96 lists" in (out := capsys.readouterr().out)
    assert "Are they of the same model, layers and queries?" in out


# --- what is wrong ----------------------------------------------------------------------


def put(layer, row, column, value, of="lists"):
    def changes(saved):
        getattr(saved, of)[layer][row, column] = value

    return changes


def replaced(of, layer, array):
    return lambda saved: getattr(saved, of).__setitem__(layer, array(getattr(saved, of)[layer]))


def without(of, layer):
    return lambda saved: getattr(saved, of).pop(layer)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        (put(4, 20, 5, 21), (), "up to its query's own, 20: got 21 in row 20 of"),
        (put(4, 20, 5, -2), (), "up to its query's own, 20: got -2 in row 20 of"),
        (put(11, 2, 3, 1 << 20), (), "got 1048576 in row 2 of"),
        (lambda saved: None, ("--first-query", "3"), "scores must be [40, 8]"),
        (
            lambda saved: saved.lists[3].__setitem__((30, 1), saved.lists[3][30, 6]),
            (),
            "a position once: got ",
        ),
        (lambda saved: saved.scores[3][30].fill(np.nan), (), "a finite score: got none of pos"),
        (replaced("lists", 4, lambda a: a[:, :-1]), (), "lists must be of one shape: got [40, 8]"),
        (replaced("lists", 3, lambda a: a[:-1]), (), "lists must be of one shape: got [39, 8]"),
        (replaced("lists", 4, np.ravel), (), "integers [queries, k]: got integers [320]"),
        (replaced("lists", 4, lambda a: a.astype(np.float32)), (), "integers [queries, k]: got fl"),
        (replaced("scores", 4, lambda a: a[:, :20]), (), "of one shape: got [40, 40]"),
        (
            lambda saved: [replaced("scores", n, lambda a: a[:, :20])(saved) for n in LAYERS],
            (),
            "scores must be [40, 8], of the lists' entries, or [40, 40 or more], by position: got",
        ),
        (
            lambda saved: [replaced("scores", n, lambda a: a[:-1])(saved) for n in LAYERS],
            (),
            "by position: got [39, 40]",
        ),
        (lambda saved: None, ("--lists", "rows_{layer}"), "must have arrays named 'rows_{layer}'"),
        (lambda saved: None, ("--scores", "rows_{layer}"), "Give --scores their name"),
        (lambda saved: None, ("--lists", "rows"), "must have {layer} once: got 'rows'"),
        (lambda saved: None, ("--skip", "40"), "--skip must leave out 0 to 39 queries: got 40"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path, capsys, kind, changes, flags, message):
    saved = Saved(seed=8)
    changes(saved)
    source = getattr(saved, kind)(tmp_path)
    before = set(tmp_path.rglob("*"))
    assert command.main([str(source), str(tmp_path / "t"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sglang_ess.convert: ") and message in line
    assert set(tmp_path.rglob("*")) == before  # neither a trace nor a part of one


def test_layers_with_lists_alone(tmp_path):
    source = Saved(seed=9).npy(tmp_path / "a")
    (source / f"{SCORES.format(layer=4)}.npy").unlink()
    with pytest.raises(ValueError, match=r"the same layers: got only one of them of \[4\]"):
        convert(source, tmp_path / "t", LAYOUT)


def test_integers_as_scores(tmp_path):
    source = Saved(seed=9).npy(tmp_path / "a", kind=np.float32)
    np.save(source / f"{SCORES.format(layer=4)}.npy", np.zeros((40, 40), np.int32))
    with pytest.raises(ValueError, match="scores must be floats"):
        convert(source, tmp_path / "t", LAYOUT)


def test_scores_that_could_be_of_either_kind(tmp_path):
    saved = Saved(seed=9, queries=TOPK)
    with pytest.raises(ValueError, match="as many columns as k and positions, 8"):
        convert(saved.npy(tmp_path / "a"), tmp_path / "t", LAYOUT)


def test_a_layer_twice(tmp_path):
    source = Saved(seed=9).npy(tmp_path / "a")
    Saved(seed=9).npz(source)
    with pytest.raises(ValueError, match="a layer must have one array"):
        convert(source, tmp_path / "t", LAYOUT)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
def test_a_truncated_file(tmp_path, capsys, kind, share):
    source = getattr(Saved(seed=10), kind)(tmp_path)
    file = source if source.is_file() else sorted(source.iterdir())[0]
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    assert command.main([str(source), str(tmp_path / "t")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line and ("must be whole" in line or "must be a whole" in line)
    assert not (tmp_path / "t").exists()


def test_a_member_that_was_changed(tmp_path, capsys):
    """The zip's checksum is wrong only after its last row."""
    source = Saved(seed=10).npz(tmp_path)
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 1
    source.write_bytes(data)
    status = command.main([str(source), str(tmp_path / "t")])
    assert status == 2 and "must be whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda path: None, "a file must be open to this command"),
        (lambda path: path.write_bytes(b"x"), "must be in .npy, .npz, .safetensors files"),
        (lambda path: path.mkdir(), "must have arrays named"),
    ],
)
def test_no_arrays(tmp_path, capsys, made, message):
    made(tmp_path / "a")
    assert command.main([str(tmp_path / "a"), str(tmp_path / "t")]) == 2
    assert message in capsys.readouterr().err


def test_objects_are_not_unpickled(tmp_path):
    source = Saved(seed=10).npy(tmp_path / "a")
    name = source / f"{LISTS.format(layer=4)}.npy"
    np.save(name, np.array([[print]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="must be a whole .npy file.*Python objects"):
        convert(source, tmp_path / "t", LAYOUT)


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    from sglang_ess.trace.trace import TraceWriter

    write = TraceWriter._write

    def full(writer, data):
        if data.startswith(b"FRAM"):
            raise OSError(28, "No space left on device")
        write(writer, data)

    monkeypatch.setattr(TraceWriter, "_write", full)
    assert command.main([str(Saved().npy(tmp_path / "a")), str(tmp_path / "t")]) == 2
    err = capsys.readouterr().err
    assert "must be writable to its end" in err and "No space left" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_few_bytes_of_a_large_source_are_in_memory(tmp_path, monkeypatch):
    """17 MiB of arrays through blocks of 2 MiB; the writer waits instead of dropping."""
    from sglang_ess.trace import trace

    monkeypatch.setattr(from_arrays, "BLOCK_BYTES", 2 << 20)
    monkeypatch.setattr(trace, "QUEUE_BYTES", 1 << 20)
    monkeypatch.setattr(trace, "FRAME_BYTES", 1 << 19)
    saved = Saved(seed=11, queries=1200, layers=(0, 1, 2), topk=64)
    for kind in ("npy", "npz"):
        source = getattr(saved, kind)(tmp_path / "a" if kind == "npy" else tmp_path)
        size = sum(array.nbytes for _, array in saved.arrays())
        tracemalloc.start()
        convert(source, tmp_path / "t", LAYOUT, skip=1150)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert size > 16 << 20 and peak < 7 << 20, (kind, peak)
        check(tmp_path / "t", saved, 1150)
    assert read_trace(tmp_path / "t").trailer is None  # not read yet
