"""Streams from files, and the benchmark of the policies on them."""

import json

import numpy as np
import pytest

from benchmarks.sim import policies as benchmark
from sglang_ess.sim.planning import lab, selections
from tests.sim.oracles import stack_stream
from tests.trace.test_scores import Scored

K, M, FIRST, STEPS = 8, 4, 56, 40


def arrays(layers=2, seed=0):
    """{name: array} of an .npz: lists of a stack stream, runner-ups and scores at random."""
    random, found = np.random.default_rng(seed), {"first": np.array(FIRST)}
    for layer in range(layers):
        topk = stack_stream(STEPS, queries=1, width=K, num_slots=FIRST, seed=seed + layer)[:, 0]
        others = np.stack([
            random.permutation(np.setdiff1d(np.arange(FIRST), row))[:M] for row in topk
        ])  # fmt: skip
        scores = random.random((STEPS, K + M))
        scores[:, K:] -= 1
        found[f"topk_layer_{layer}"] = topk
        found[f"runner_layer_{layer}"] = others.astype(np.int32)
        found[f"scores_layer_{layer}"] = scores.astype(np.float32)
    return found


def test_arrays_become_streams(tmp_path):
    found = arrays()
    np.savez(tmp_path / "a.npz", **found)
    streams = selections.load(tmp_path / "a.npz")
    assert len(streams) == 2
    for layer, stream in enumerate(streams):
        assert np.array_equal(stream.steps[:, 0], found[f"topk_layer_{layer}"])
        assert stream.contexts.tolist() == [FIRST] and stream.num_slots == FIRST + STEPS
        hints, strengths = stream.clues
        for step, (hint, strength) in enumerate(zip(hints[:, 0], strengths[:, 0], strict=True)):
            others = found[f"runner_layer_{layer}"][step].tolist()
            own, below = np.split(found[f"scores_layer_{layer}"][step], [K])
            best = sorted(others, key=lambda slot: -below[others.index(slot)])
            assert hint.tolist() == best
            known = found[f"topk_layer_{layer}"][step] >= 0
            assert strength[known].min() == 0 and strength[known].max() == 1
            assert np.array_equal(np.argsort(strength[known]), np.argsort(own[known]))


def test_a_trace_becomes_streams(tmp_path):
    """Of the request with the most queries, as positions; hints and strengths as scored."""
    made = Scored(tmp_path / "trace", np.random.default_rng(2), requests=2)
    for step in range(9):
        made.requests = 2 if step < 5 else 1
        made.lengths = made.lengths[: made.requests]
        made.step()
    made.close()
    positions = {slot: place for place, slot in enumerate(made.table[0].tolist())}
    streams = selections.load(tmp_path / "trace")
    assert [stream.steps.shape for stream in streams] == [(9, 1, 6)] * 2
    for step, (layer, topk, others, known) in enumerate(made.steps):
        stream, scores = streams[layer], known[0]
        selected = [slot for slot in topk[0].tolist() if slot >= 0]
        found = stream.steps[step // 2, 0]
        assert sorted(found[found >= 0]) == sorted(positions[slot] for slot in selected)
        below = sorted((slot for slot in others[0].tolist() if slot >= 0), key=lambda s: -scores[s])
        hint = stream.clues.hints[step // 2, 0]
        assert hint[hint >= 0].tolist() == [positions[slot] for slot in below]
        best = stream.clues.strengths[step // 2, 0].argmax()
        assert found[best] == positions[max(selected, key=lambda slot: scores[slot])]


def test_a_file_without_lists_is_refused(tmp_path):
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match="must have the top-k lists of a layer: got none"):
        selections.load(tmp_path / "none.npz")


def test_lists_alone_have_no_clues():
    topk = arrays()["topk_layer_0"]
    stream = selections.of_layer(topk, None, None, FIRST)
    assert stream.clues.hints is None and stream.clues.strengths is None


def test_first_uses_are_what_lru_misses_with_a_row_for_each_slot(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    layers = selections.load(tmp_path / "a.npz")
    source = benchmark.Source("trace", "a", FIRST, layers, 3, 5)
    found = lab.run(layers, "shared", "lru", FIRST + STEPS, warmup=3, tail=5)
    assert benchmark.first_uses(source) == pytest.approx(found.mean)


def test_benchmark_reports_every_rival(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "a.npz", **arrays())
    monkeypatch.setattr(benchmark, "RATIOS", (0.4, 0.5))
    monkeypatch.setattr(benchmark, "LONG", 1)
    monkeypatch.setattr(benchmark, "generated", lambda quick, seed: [])
    out = tmp_path / "out.json"
    benchmark.main(["--traces", str(tmp_path / "a.npz"), "--json", str(out)])
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 2 * len(benchmark.RIVALS)
    by_name = {(r["config"]["policy"], r["config"]["ratio"]): r for r in found["rows"]}
    for (rival, ratio), row in by_name.items():
        assert row["link_rows"] >= row["mean"] - 1e-9
        assert row["link_rows"] >= by_name["belady", ratio]["mean"] - 1e-9
        # A row is 656 bytes: the state of so few slots takes one row at most.
        assert int(ratio * FIRST) - 1 <= row["rows"] <= int(ratio * FIRST), rival
    assert found["summary"]["belady_vs_lru"] < 1
    assert found["summary"]["link_bytes_vs_lru"] <= 1 + 1e-9
    assert "the best policy is" in capsys.readouterr().out
