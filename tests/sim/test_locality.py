"""The generator of top-k streams: what it selects, that it repeats, and the misses it gives."""

import numpy as np
import pytest

from benchmarks.sim.published import FIGURE5
from sglang_ess.sim.inputs.files import SpecError
from sglang_ess.sim.model.decode_tiers import Sampling, miss_curves
from sglang_ess.sim.model.locality import Layers, Locality, TopkStream, similarity

K, CONTEXT = 64, 1000


def locality(churn=0.25, uniform=0.1, reach=200.0, layers=1, exponent=0.0):
    return Locality(K, CONTEXT, exponent, Layers(churn, (uniform,) * layers, (reach,) * layers))


def start(shape, tokens=CONTEXT, layer=0, seed=0, row=0, room=CONTEXT + 8):
    stream = TopkStream(shape, layer, 4, room, seed)
    stream.begin(row, tokens)
    return stream


def step(stream, tokens=CONTEXT, queries=1, row=0, room=CONTEXT + 8):
    slots = np.tile(np.arange(room, dtype=np.int32), (4, 1))
    return stream.next(np.array([row]), np.array([tokens]), slots, queries)


def test_a_query_selects_topk_positions_of_the_context_each_once():
    stream = start(locality())
    for _ in range(50):
        for query in step(stream, queries=3):
            assert len(np.unique(query)) == K and 0 <= query.min() and query.max() < CONTEXT


def test_a_context_of_no_more_than_topk_is_selected_whole():
    query = step(start(locality(), tokens=40), tokens=40)[0]
    assert sorted(query[query >= 0]) == list(range(40)) and (query == -1).sum() == K - 40


def test_new_tokens_are_selected():
    stream = start(locality(churn=0.01), tokens=CONTEXT)
    chosen = step(stream, tokens=CONTEXT + 3)[0]
    assert np.isin([CONTEXT, CONTEXT + 1, CONTEXT + 2], chosen).sum() >= 2  # churn may drop one


def test_the_same_seed_gives_the_same_stream_and_others_differ():
    def stream(**changes):
        one = start(locality(layers=2), **changes)
        return np.concatenate([step(one, row=changes.get("row", 0)) for _ in range(3)])

    assert np.array_equal(stream(), stream())
    for change in ({"seed": 1}, {"layer": 1}, {"row": 2}):
        assert not np.array_equal(stream(), stream(**change)), change


def test_a_row_begun_again_is_another_request():
    stream = start(locality())
    first = step(stream)
    stream.begin(0, CONTEXT)
    assert not np.array_equal(first, step(stream))


@pytest.mark.parametrize("churn", [0.1, 0.5])
def test_churn_is_what_leaves_with_each_query(churn):
    stream = start(locality(churn=churn, uniform=1.0))
    topk = [step(stream)[0] for _ in range(200)]
    # A place may be drawn twice for one query, and a position that left may be drawn at once.
    assert 1 - churn <= similarity(topk) <= 1 - churn + churn * churn


def test_by_recency_ends_with_the_selection_and_has_every_position_once():
    stream = start(locality())
    seen = [step(stream)[0] for _ in range(5)]
    order = stream.by_recency(0)
    assert sorted(order) == list(range(CONTEXT))
    assert set(order[-K:]) == set(seen[-1])
    left = set(seen[-2]) - set(seen[-1])
    assert left <= set(order[-K - len(left) - K :])


def test_a_larger_reach_or_uniform_share_misses_more():
    def misses(**changes):
        return miss_curves(locality(**changes), CONTEXT, [150], Sampling(40, 10))[0, 0]

    assert misses(reach=50.0) < misses(reach=400.0)
    assert misses(uniform=0.05) < misses(uniform=0.5)


def test_reach_grows_with_the_context_by_its_exponent():
    shape = locality(exponent=0.5)
    assert shape.reach(0, 4 * CONTEXT) == pytest.approx(2 * shape.reach(0, CONTEXT))


def test_spread_takes_layers_from_all_over():
    reaches = (5.0, 1.0, 4.0, 2.0, 3.0, 6.0)
    shape = Locality(K, CONTEXT, 0.0, Layers(0.3, (0.1,) * 6, reaches))
    assert [reaches[i] for i in shape.spread(2)] == [2.0, 5.0] or shape.spread(2) == (0, 3)
    assert shape.spread(100) == tuple(range(6))


def test_the_fitted_layers_miss_as_published():
    """Layers of figure 5 from all over, and its peak, by the production LRU."""
    shape = Locality.load("deepseek-v3.2")
    layers = [1, 17, 24, 38, 50]
    found = miss_curves(shape, 32768, [6554], Sampling(40, 10, 2, layers))[:, 0]
    assert found == pytest.approx(FIGURE5[layers], rel=0.15)


@pytest.mark.parametrize(
    "old, new, line, field",
    [
        (
            "churn = 0.3",
            "churn = 1.5",
            6,
            "layers.churn must be more than 0 and at most 1: got 1.5",
        ),
        ("churn = 0.3\n", "", 5, "layers.churn must be given"),
        ("[layers]", "[layer]", 5, "layer must be a known field"),
        ("uniform = [0.1, 0.1]", "uniform = [0.1]", 5, "uniform and reach must have a number"),
        ("reach = [9, 8]", "reach = [9, 'far']", 8, "layers.reach[1] must be a number"),
        ("topk = 8", "topk = 8.5", 1, "topk must be a whole number: got 8.5"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_field(tmp_path, old, new, line, field):
    text = (
        "topk = 8\nreference_tokens = 100\ncontext_exponent = 0\n\n[layers]\nchurn = 0.3\n"
        "uniform = [0.1, 0.1]\nreach = [9, 8]\n"
    )
    path = tmp_path / "one.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(SpecError) as error:
        Locality.load(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and field in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(SpecError, match=r"deepseek-v3.2, glm-5.1, glm-5.2"):
        Locality.load("no-such-model")
