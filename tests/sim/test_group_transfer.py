"""The transfer of an index group, against a GPU and a link that run event by event.

The machine knows operations, a queue of fetches and which operation waits for which fetch. It has
none of the cost model's formulas.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim.inputs.specs import changed, load
from sglang_ess.sim.model import cost as cost_model
from sglang_ess.sim.model import overlap_time
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.overlap_time import CHOICES, MODES, Window, cheapest, exposed, grouped
from sglang_ess.tiers.index_groups import IndexGroups

PATTERNS = [(1, 4), (4, 4), (1, 1, 4, 4), (1, 4, 4, 1), (2, 3, 1), (6,), (1, 1, 1)]
GPU, LINK = load("gpu", "h200"), load("link", "pcie5")
GLM = load("model", "glm-5.2")
CONTEXT = 32768
CALIBRATION = replace(load("calibration", "ess-paper"), preattn_us=12.0, plan_us=17.0)


def machine(operations):
    """Run operations in order: (seconds, fetches to issue at its end, fetches to wait for first).

    A fetch is a pair of a name and its seconds on the link, which serves one after the other.
    Returns the seconds until the last operation is done.
    """
    now, link_free, done_at = 0.0, 0.0, {}
    for seconds, issues, needs in operations:
        now = max([now, *(done_at[name] for name in needs)]) + seconds
        for name, length in issues:
            link_free = max(link_free, now) + length
            done_at[name] = link_free
    return now


def operations(groups, fetch, missed, window, compute, mode, early=True, plan=0.0):
    """One step's operations. fetch, missed and compute are by layer, as for `grouped`.

    plan: of the group's first fetch, the seconds before its copies begin
    """
    found = []
    for group in range(len(groups)):
        first, *others = groups.members(group)
        issues, halves = [(first, fetch[first] + plan)], mode == "dba" and fetch[first] > 0
        if early:
            issues += [(layer, fetch[layer]) for layer in others]
        if halves:
            half = issues[0][1] / 2
            found.append((window.indexer / 2, [((first, "first half"), half)], []))
            issues[0] = (first, half)
        found.append((window.indexer / (2 if halves else 1), issues, []))
        for layer in (first, *others):
            on_its_way = early and layer != first
            if layer != first and not early:
                found.append((0.0, [(layer, fetch[layer])], []))
            if not fetch[layer] + (plan if layer == first else 0.0):
                found.append((window.preattn + window.attention, [], []))
            else:
                found += waiting(layer, missed[layer], window, mode, on_its_way)
            found.append((compute[layer] - window.preattn - window.attention, [], []))
    return found


def waiting(layer, missed, window, mode, on_its_way):
    """PreAttn and attention of a layer that fetches. Only a group's first layer splits it."""
    if mode == "off" or on_its_way:
        before = window.preattn if on_its_way else window.early
        return [(before, [], []), (window.preattn - before + window.attention, [], [layer])]
    split, misses = window.dba if mode == "dba" else window.da, window.attention * missed
    return [
        (window.preattn + window.attention - misses, [], []),
        (misses + split, [], [layer]),
    ]


def added(groups, fetch, missed, window, compute, mode, **options):
    """Seconds by which the fetches make a step longer, as the machine runs it."""
    nothing = np.zeros(len(fetch))
    arguments = (missed, window, compute, mode)
    longer = machine(operations(groups, fetch, *arguments, **options))
    return longer - machine(operations(groups, nothing, *arguments))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.sampled_from(PATTERNS), mode=st.sampled_from(MODES), seed=st.integers(0, 10**6),
    scale=st.sampled_from([1, 20, 100, 400]), early=st.sampled_from([0.0, 30.0]),
)  # fmt: skip
def test_a_groups_fetches_run_behind_the_layers_before(sizes, mode, seed, scale, early):
    groups, rng = IndexGroups(sizes), np.random.default_rng(seed)
    window = Window(40.0, 60.0, 90.0, da=7.0, dba=11.0, early=min(early, 40.0))
    fetch = scale * rng.integers(0, 12, groups.layers).astype(float)
    if mode == "dba":  # which splits for the misses of its first layer
        fetch[list(groups.firsts)] += 1.0
    missed = rng.random(groups.layers)
    compute = rng.uniform(100.0, 900.0, groups.layers)
    found = grouped(mode, groups, fetch, missed, window, compute)
    expected = added(groups, fetch, missed, window, compute, mode)
    assert found.sum() == pytest.approx(expected)
    assert (found >= 0).all()


def test_a_link_that_falls_behind_is_waited_for_by_each_layer():
    """Fetches of 500 in layers of 300: what compute does not cover adds up, layer by layer."""
    groups, window = IndexGroups((1, 4)), Window(0.0, 100.0, 50.0, da=0.0, dba=0.0)
    fetch, compute = np.full(5, 500.0), np.full(5, 300.0)
    found = grouped("off", groups, fetch, np.zeros(5), window, compute)
    assert found.tolist() == [500, 500, 200, 200, 200]
    quick = grouped("off", groups, np.full(5, 250.0), np.zeros(5), window, compute)
    assert quick.tolist() == [250, 250, 0, 0, 0]


def test_groups_of_one_layer_are_layers():
    fetch, missed = np.linspace(0, 900, 40), np.linspace(0, 0.9, 40)
    window = Window(50.0, 200.0, 300.0, da=10.0, dba=20.0)
    for choice in CHOICES:
        found = grouped(choice, IndexGroups.single(40), fetch, missed, window, np.full(40, 500.0))
        assert found.tolist() == cheapest(choice, fetch, missed, window).tolist()


# --- the whole cost model ---------------------------------------------------------------


def model_of(sizes):
    return replace(GLM, layers=sum(sizes), dense_layers=1, index_groups=sizes)


def decoder(sizes, mode, early=True, **deployment):
    found = changed(load("deployment", "node-8"), overlap=mode, early_fetch=early, **deployment)
    return CostModel(model_of(sizes), GPU, LINK, found, CALIBRATION)


def by_machine(cost, batch, misses, early=True):
    """Seconds that a step waits for fetches, of the cost model's parts run by the machine."""
    model, queries, mode = cost.model, cost.deployment.queries, cost.deployment.overlap
    compute = [
        sum(cost.compute(batch, queries, CONTEXT, layer < model.dense_layers, False).values())
        + cost.communication(batch * queries, layer < model.dense_layers)
        for layer in range(model.layers)
    ]
    split = CALIBRATION.da_us * 1e-6 + cost._merge_seconds(batch * queries)
    window = Window(
        CALIBRATION.preattn_us * 1e-6, cost.attention(batch * queries, CONTEXT),
        cost.indexer(batch, queries, CONTEXT), split, 0.0, 0.0,
    )  # fmt: skip
    copies = (
        batch * misses * model.row_bytes * CALIBRATION.transfer_ratio / (LINK.gather_gb_s * 1e9)
    )
    missed = np.full(model.layers, misses / (queries * model.topk))
    arguments = (model.groups, np.full(model.layers, copies), missed, window, np.array(compute))
    return added(*arguments, mode, early=early, plan=CALIBRATION.plan_us * 1e-6)


@pytest.mark.parametrize("sizes", PATTERNS, ids=str)
@pytest.mark.parametrize("mode", ["off", "da"])
@pytest.mark.parametrize("early", [True, False])
def test_a_step_waits_as_the_machine_does(sizes, mode, early):
    for batch, misses in ((8, 300), (60, 500), (60, 1500), (200, 2000)):
        cost = decoder(sizes, mode, early)
        step = cost.step(batch, CONTEXT, misses)
        expected = by_machine(cost, batch, misses, early)
        assert step.parts["transfer"] == pytest.approx(expected, rel=1e-9)
        assert step.in_turn == pytest.approx(decoder(sizes, mode, False).step(
            batch, CONTEXT, misses).parts["transfer"])  # fmt: skip


def broken_in_turn(monkeypatch):
    """No fetch is issued early."""
    monkeypatch.setattr(CostModel, "_issues_early", False)


def broken_indexer(monkeypatch):
    """A sharing layer's fetch hides behind an indexer that the layer does not have."""
    compute = CostModel.compute
    monkeypatch.setattr(
        CostModel, "compute", lambda self, *args: compute(self, *args[:4]) if len(args) > 4
        and not args[4] else compute(self, *args),
    )  # fmt: skip


def broken_groups(monkeypatch):
    """The groups begin a layer late."""
    whole = overlap_time.grouped

    def late(choice, groups, *arguments):
        sizes = groups.sizes
        return whole(choice, IndexGroups((*sizes[:-1], sizes[-1] - 1, 1)), *arguments)

    monkeypatch.setattr(cost_model, "grouped", late)


def broken_link(monkeypatch):
    """The link forgets what was queued before a layer's own fetch."""

    def forgets(choice, groups, fetch, missed, window, compute):
        firsts = np.array([groups.firsts[group] for group, _ in groups.places])
        place = np.arange(groups.layers) - firsts
        return exposed(
            choice, np.where(place, np.maximum(0, fetch - compute), fetch), missed, window
        )

    monkeypatch.setattr(cost_model, "grouped", forgets)


@pytest.mark.parametrize("fault", [broken_in_turn, broken_indexer, broken_groups, broken_link])
def test_a_fault_is_noticed(monkeypatch, fault):
    sizes, batch, misses = (1, 4, 4), 120, 1200
    cost = decoder(sizes, "da")
    expected = by_machine(cost, batch, misses)
    assert cost.step(batch, CONTEXT, misses).parts["transfer"] == pytest.approx(expected, rel=1e-9)
    fault(monkeypatch)
    found = decoder(sizes, "da").step(batch, CONTEXT, misses).parts["transfer"]
    assert abs(found / expected - 1) > 0.02  # and without a fault 1e-9


def test_early_fetches_never_take_longer():
    for mode in CHOICES:
        for misses in (0, 20, 300, 1000, 3000):
            early, late = (decoder((1, 1, 4, 4), mode, on) for on in (True, False))
            one, other = (cost.step(64, CONTEXT, misses) for cost in (early, late))
            assert one.parts["transfer"] <= other.parts["transfer"] * (1 + 1e-12)
            assert one.in_turn == pytest.approx(other.parts["transfer"])
            assert other.in_turn == other.parts["transfer"]


def test_two_batch_overlap_shares_link_and_time():
    """Two halves of a batch wait as one half does that is alone in half the time."""
    both = decoder((1, 4), "off", two_batch_overlap=True, network_us=0, network_gb_s=1e9)
    alone = decoder((1, 4), "off", network_us=0, network_gb_s=1e9)
    waits = both.step(120, CONTEXT, 1500).parts["transfer"]
    assert waits == pytest.approx(2 * alone.step(60, CONTEXT, 1500).parts["transfer"], rel=1e-3)
    assert both.step(1, CONTEXT, 1500) == alone.step(1, CONTEXT, 1500)
    halves = decoder((1, 4), "halves", two_batch_overlap=True)
    found = halves.step(120, CONTEXT, 1500)
    assert found.in_turn == found.parts["transfer"]  # not modelled there


# --- what counts once a group -----------------------------------------------------------


def test_only_selecting_layers_have_an_indexer_and_a_plan():
    plain, shared = (CostModel(replace(GLM, index_groups=groups), GPU, LINK, load(
        "deployment", "node-8"), CALIBRATION) for groups in (None, GLM.index_groups))  # fmt: skip
    one, other = (cost.step(16, CONTEXT).parts for cost in (plain, shared))
    assert other["indexer"] == pytest.approx(one["indexer"] * 21 / 78)
    for name in ("attention", "experts", "projections"):
        assert other[name] == pytest.approx(one[name])
    indexer = GLM.indexer_weights
    assert plain.prefill_seconds(4096) > shared.prefill_seconds(4096)
    assert indexer > 0 and plain.hand_off_seconds(1000) - shared.hand_off_seconds(1000) == (
        pytest.approx(1000 * 57 * 132 / 50e9)
    )
    plans = [cost._fetches(16, CONTEXT, 0.0)[0] for cost in (plain, shared)]
    assert [int((found > 0).sum()) for found in plans] == [78, 21]
