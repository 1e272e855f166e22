"""Decode over two tiers: closed forms, conservation, and that the production HotCache runs."""

import numpy as np
import pytest

from sglang_ess.sim.engine.fetches import TierFetches
from sglang_ess.sim.model.decode_tiers import (
    PAGE_SLOTS,
    DecodeTiers,
    OutOfSlots,
    Sampling,
    TierSizes,
    measure,
    miss_curves,
)
from sglang_ess.sim.model.locality import Layers, Locality
from sglang_ess.tiers import HotCache
from sglang_ess.tiers.index_groups import IndexGroups

K, CONTEXT = 64, 640
SHAPE = Locality(K, CONTEXT, 0.0, Layers(0.25, (0.1, 0.1, 0.1), (60.0, 150.0, 400.0)))


def tiers(rows=200, num_slots=8 * 1024, requests=8, **changes):
    sizes = {"num_slots": num_slots, "max_requests": requests, "max_tokens": 1024}
    sizes |= {name: changes.pop(name) for name in sizes.keys() & changes}
    return DecodeTiers(SHAPE, rows, TierSizes(**sizes), **{"queries": 2} | changes)


def run(one, steps=10):
    return np.array([one.step() for _ in range(steps)])


def test_with_a_row_for_every_slot_only_first_uses_miss():
    one = tiers(rows=8 * 1024)
    one.join(1, CONTEXT, "settled")
    assert not run(one).any()
    one.join(2, CONTEXT, "cold")
    missed = run(one, 30).sum(0)
    assert (missed >= K).all() and (missed <= CONTEXT).all()  # each of its slots once, at most


def test_a_cold_request_misses_its_whole_first_selection():
    one = tiers(queries=1, rows=500)
    one.join(1, CONTEXT, "cold")
    assert (one.step() == K - 1).all()  # the new token's row is installed as it is written


def test_the_prompts_last_queries_make_the_first_step_warm():
    cold, warm = tiers(rows=500), tiers(rows=500)
    cold.join(1, CONTEXT, "cold")
    warm.join(1, CONTEXT, "recent")
    assert (warm.step() < 0.6 * cold.step()).all()


def test_one_request_has_a_shared_tier_to_itself():
    shared, own = tiers(requests=1), tiers(requests=1, shared=False)
    for one in (shared, own):
        one.join(7, CONTEXT, "settled")
    assert np.array_equal(run(shared), run(own))


def test_more_rows_never_miss_more():
    curves = miss_curves(SHAPE, CONTEXT, range(130, 600, 47), Sampling(30, 10), requests=2)
    assert (np.diff(curves, axis=1) <= 0).all() and (curves[:, 0] > curves[:, -1]).all()


def test_measure_agrees_with_the_curve():
    curve = miss_curves(SHAPE, CONTEXT, [105], Sampling(60, 10, 2), requests=12)[:, 0]
    found = measure(SHAPE, CONTEXT, 12, 105, Sampling(60, 40, 2, seed=5))
    # Its requests grow by a token a step, of which one in K is another selection.
    assert found.misses == pytest.approx(curve, rel=0.2)
    assert found.lookups == 3 * 100 * 12 * 2 * K


def test_every_lookup_reaches_the_production_cache():
    one = tiers(rows=500)
    for request in range(3):
        one.join(request, CONTEXT, "cold")
    missed = run(one, 5).sum(0)
    for layer, counters in enumerate(one.counters()):
        assert counters["lookups"] == 5 * 3 * 2 * K
        assert counters["misses"] == missed[layer]


def test_misses_by_request_add_up():
    one = tiers(rows=300)
    for request in range(4):
        one.join(request, CONTEXT)
    fetched = run(one, 3)[-1]
    assert sum(one.request_misses.values()) == fetched.sum() and set(one.request_misses) == {
        0,
        1,
        2,
        3,
    }


def test_a_group_is_planned_once_and_fetches_for_each_layer(monkeypatch):
    plans, plan = [], HotCache.plan
    monkeypatch.setattr(HotCache, "plan", lambda self, *a, **k: plans.append(self) or plan(
        self, *a, **k))  # fmt: skip
    sizes, each = (1, 3, 2), tiers(rows=150)
    fetches = TierFetches(tiers(rows=150), IndexGroups(sizes))
    for request in (1, 2):
        each.join(request, CONTEXT, "recent")
        fetches.join(request, CONTEXT, cold=False)
    for _ in range(4):
        plans.clear()
        found, own = fetches.step(2), list(plans)
        misses = each.step()
        assert (found.misses == np.repeat(misses, sizes) / 2).all()
        assert found.rows == (misses * sizes).sum() > 0
        assert len({id(cache) for cache in own}) == 3 and len(plans) == 2 * len(own)
    single = TierFetches(tiers(rows=150), 6)
    assert single.step(1).misses.shape == (6,)


def test_slots_come_back_and_their_rows_go():
    one = tiers(rows=600)
    before = one.free_slots
    for request in range(3):
        one.join(request, CONTEXT + request)
    run(one)
    assert one.free_slots < before
    for request in (1, 0, 2):
        one.leave(request)
    assert one.free_slots == before and one.requests == ()
    assert [layer.cache(0).occupied for layer in one._layers] == [0, 0, 0]


def test_rows_left_behind_are_noticed(monkeypatch):
    """The check above fails if a request that leaves keeps its rows."""
    monkeypatch.setattr(HotCache, "invalidate", lambda self, slots: None)
    with pytest.raises(AssertionError):
        test_slots_come_back_and_their_rows_go()


def test_out_of_slots_changes_nothing():
    one = tiers(num_slots=2 * CONTEXT, requests=3)
    one.join(1, CONTEXT)
    one.join(2, CONTEXT)
    with pytest.raises(OutOfSlots):
        one.join(3, CONTEXT)
    assert one.requests == (1, 2) and one.free_slots == 0
    with pytest.raises(OutOfSlots):
        one.step()  # the next token starts a page
    one.leave(1)
    assert one.free_slots == CONTEXT
    one.step()
    assert one.free_slots == CONTEXT - PAGE_SLOTS


def test_a_tier_below_a_steps_union_takes_passes_and_goes_on():
    one = tiers(rows=40, requests=2)
    one.join(1, CONTEXT)
    assert (run(one) >= K).all()


def test_seeds():
    def misses(seed):
        one = tiers(seed=seed)
        one.join(1, CONTEXT)
        return run(one).tolist()

    assert misses(3) == misses(3) != misses(4)


@pytest.mark.parametrize("name", ["queries", "requests", "rows", "num_slots", "max_tokens"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=r"must be positive: got 0\.$"):
        tiers(**{name: 0})


def test_rows_must_fit_the_layers():
    with pytest.raises(ValueError, match="one for each of 3 layers: got 2"):
        tiers(rows=[100, 100])


def test_the_last_steps_topk_is_what_the_oldest_requests_selected():
    one = tiers()
    for request in range(3):
        one.join(request, CONTEXT)
    one.step()
    sample = one.last_topk(1, 2)
    assert sample.shape == (2, 2 * K)
    slots = one._slots[[one._rows[0], one._rows[1]]]
    for selected, own in zip(sample, slots, strict=True):
        assert set(selected) <= set(own[: CONTEXT + 1])
