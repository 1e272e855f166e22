"""DeviceTier while rows move between its layers: every lookup finds its own layer's row."""

import numpy as np
import pytest
import torch

from ess_kernels import hot_state
from sglang_ess.tiers import hot_cache_cuda as device_hot_cache
from tests.support.served_tier import DEVICE
from tests.support.served_tier import CudaServed as Served

SLOTS, TOPK, QUERIES = 64, 6, 3


def built(rows=30, seed=0, layers=3):
    served = Served(SLOTS, rows, TOPK, QUERIES, seed, layers, moves=True)
    served.save(torch.arange(SLOTS))
    return served


def move(served):
    """Sizes at random that any step can be planned with. Returns how many rows moved."""
    tier, before = served.tier, served.tier.sizes
    least, layers = max(map(tier.demand, range(1, QUERIES + 1))), len(before)
    shares = served.random.dirichlet(np.full(layers, 0.5))
    sizes = least + np.floor(shares * (sum(before) - least * layers)).astype(int)
    sizes = np.minimum(sizes, tier.max_rows)
    while (left := sum(before) - sizes.sum()) > 0:
        sizes[sizes.argmin()] += left
    tier.resize(sizes.tolist())
    return int(np.maximum(sizes - before, 0).sum())


def run(served, steps, moves=True):
    """Decode, prompts, warm-ups and reused slots in any order. Returns how many rows moved."""
    random, moved = served.random, 0
    for _ in range(steps):
        layer, kind = int(random.integers(len(served.host))), random.random()
        slots = random.permutation(SLOTS)[: random.integers(1, 20)]
        if kind < 0.55:
            queries = int(random.integers(1, QUERIES + 1))
            written = slots[:queries].tolist() if len(slots) >= queries and kind < 0.35 else ()
            served.decode(layer, served.draw(queries, TOPK, SLOTS), written)
        elif kind < 0.65:
            values = served.save(torch.from_numpy(slots))
            for i, cache in enumerate(served.tier.caches):
                if i == layer:
                    cache.install(torch.from_numpy(slots), values[i], int(random.integers(4)))
                else:
                    cache.invalidate(torch.from_numpy(slots))
        elif kind < 0.75:
            served.save(torch.from_numpy(slots))
            served.tier.invalidate(torch.from_numpy(slots))
        elif kind < 0.8:
            served.tier.caches[layer].warm(served.draw(4, TOPK, SLOTS))
        elif moves:
            moved += move(served)
        served.check_states()
        for cache in served.tier.caches:
            cache.check_rows(np.arange(cache.num_rows), "any layer")
    return moved


@pytest.mark.parametrize(
    ("rows", "steps", "seed"),
    [
        pytest.param(30, 30, 1, id="rows to spare"),
        pytest.param(22, 120, 2, id="hardly more than a step", marks=pytest.mark.slow),
        pytest.param(11, 120, 3, id="several passes a step", marks=pytest.mark.slow),
        pytest.param(64, 120, 4, id="as many rows as slots", marks=pytest.mark.slow),
    ],
)
def test_any_order_of_operations(rows, steps, seed):
    served = built(rows, seed)
    moved = run(served, steps)
    tier = served.tier
    assert moved > 5
    assert sum(tier.sizes) == 3 * rows == int(tier.state.words[:, hot_state.ROWS].sum())
    assert all(cache.counters["short"] == 0 for cache in tier.caches)


def test_each_row_is_one_layers():
    served = built()
    move(served)
    served.decode(1, served.draw(QUERIES, TOPK, SLOTS))
    move(served)
    rows, tier = served.tier.owned.rows.cpu(), served.tier
    assert torch.equal(rows.sort().values, torch.arange(90, dtype=torch.int32))
    assert all(cache.rows is tier.rows[0] for cache in tier.caches) and len(tier.rows[0]) == 3 * 64


def test_a_row_that_moved_never_hits_its_former_slot(monkeypatch):
    """And who keeps the map's entry for it is noticed: another layer's row is read."""
    served = built(seed=5)
    topk = torch.arange(18, dtype=torch.int32).view(3, 6)
    served.decode(2, topk)
    served.decode(2, topk + 18)
    served.tier.resize([21, 21, 48])
    served.decode(2, topk + 40)
    served.decode(0, topk)

    original = device_hot_cache.resize_layers

    def keeps_the_map(state, *args):
        kept = state.slot_row.clone()
        original(state, *args)
        state.slot_row.copy_(kept)

    monkeypatch.setattr(device_hot_cache, "resize_layers", keeps_the_map)
    monkeypatch.setattr(served, "check_states", lambda: None)
    served.tier.resize([48, 21, 21])
    served.decode(0, topk + 30)
    with pytest.raises(AssertionError):
        served.decode(2, topk)
        served.decode(2, topk + 18)


def test_batches_are_cut_by_what_a_layer_has_when_rows_do_not_move():
    served = built()
    cache, tier = served.tier.caches[0], served.tier
    before = cache.passes(3, 6), cache.has_room_for_writes(3, 6), tier.demand(3)
    tier.resize([24, 24, 42])
    assert (cache.passes(3, 6), cache.has_room_for_writes(3, 6), tier.demand(3)) == before
    assert before[1:] == (True, 21) and cache.num_rows == 24
    assert built(8).tier.demand(2) == 8 > built(8).tier.demand(3)  # whose writes find no room
    assert built(19).tier.demand(3) == 18  # its new rows are invalidated and fetched
    assert built(9).tier.demand(3) == 6 + 3  # a pass is one query
    assert built(4).tier.demand(3) == 4


def test_figures_and_ages_follow_the_rows():
    served = built()
    tier = served.tier
    tier.mirror()
    assert tier.age_snapshot() is None  # nothing planned yet
    topk = torch.arange(18, dtype=torch.int32).view(3, 6)
    for layer in range(3):
        served.decode(layer, topk)
        served.decode(layer, topk + 6)
    tier.mirror()
    snapshot = tier.age_snapshot()
    ages = snapshot.ages
    assert snapshot.evictions.tolist() == [0] * 3 and snapshot.steps.tolist() == [3] * 3
    assert (ages[:, 0] == 18).all() and (ages[:, 1] == 6).all() and ages.sum() == 3 * 24
    assert tier.age_snapshot() is None  # given before
    tier.resize([40, 20, 30])
    tier.mirror()
    assert [layer["occupied"] for layer in tier.figures()] == [24, 20, 24]
    assert [cache.num_rows for cache in tier.caches] == [40, 20, 30]
    assert [cache.occupied for cache in tier.caches] == [24, 20, 24]
    assert tier.totals() == (72, 0, 0)


def test_sizes_beyond_what_there_is_are_refused():
    served = built()
    with pytest.raises(ValueError, match="got 90 rows of 3 layers to 91 of 3"):
        served.tier.resize([30, 30, 31])
    assert served.tier.max_rows == SLOTS and served.tier.sizes == (30, 30, 30)


@pytest.mark.skipif(DEVICE == "cpu", reason="a graph needs a CUDA device")
@pytest.mark.gpu
def test_a_graph_captured_before_rows_move_is_replayed_after():
    served = built()
    cache, topk = served.tier.caches[0], torch.zeros(3, 6, dtype=torch.int32, device=DEVICE)

    def step():
        planned = cache.plan(topk)
        cache.fetch(planned)
        cache.rebuild_order()
        return planned

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned = step()
    for _ in range(20):
        topk.copy_(served.draw(3, 6, SLOTS))
        graph.replay()
        served.check_read(0, topk.cpu(), planned.rows.cpu())
        served.check_states()
        move(served)
    assert cache.counters["short"] == 0
