"""The policy lab's organisations, streams and curves."""

import json

import numpy as np
import pytest

from benchmarks.sim import policy_lab
from sglang_ess.sim import policies
from sglang_ess.sim.model.locality import Layers, Locality
from sglang_ess.sim.planning import lab
from sglang_ess.sim.policies.keyed import Worth
from sglang_ess.sim.policies.verified_lru import RULES
from sglang_ess.tiers.balance.budgets import BudgetError
from tests.sim.oracles import stack_stream

CONTEXT, ROWS, STEPS, WARMUP = 64, 24, 40, 8
LOCALITY = Locality(
    topk=16,
    reference_tokens=256,
    context_exponent=0.2,
    layers=Layers(churn=0.3, uniform=(0.1, 0.1), reach=(40.0, 200.0)),
)
ONLINE = sorted(set(policies.POLICIES) - {"belady"})


def stream(requests=3, seed=0, shared_slots=False) -> lab.Stream:
    """Requests of CONTEXT slots each; shared_slots: all select the same of the same ones."""
    parts = [
        stack_stream(STEPS, num_slots=CONTEXT, seed=seed if shared_slots else seed + request)
        for request in range(requests)
    ]
    if not shared_slots:
        parts = [np.where(p >= 0, p + CONTEXT * i, -1) for i, p in enumerate(parts)]
    steps = np.concatenate(parts, axis=1).astype(np.int32)
    return lab.Stream(steps, np.full(requests, CONTEXT), CONTEXT * requests)


class TestOrganisations:
    @pytest.mark.parametrize("policy", policies.POLICIES)
    def test_one_request_is_the_same_in_all(self, policy):
        one = [stream(requests=1)]
        found = [lab.run(one, name, policy, ROWS, seed=3).misses for name in lab.ORGANISATIONS]
        assert found[0].shape == (1, STEPS, 1) and found[0].sum() > 0
        assert all(np.array_equal(found[0], other) for other in found[1:])

    def test_own_rows_have_own_hints(self):
        """Each request's next list as its hint: only what is fetched ahead is fetched."""
        whole, rule = stream(), Worth(hint_age=0.5, hints=8, ahead=8)
        following = np.concatenate([whole.steps[1:], whole.steps[-1:]])
        told = lab.Stream(whole.steps, whole.contexts, whole.num_slots,
                          clues=policies.Clues(following))  # fmt: skip
        for name in lab.ORGANISATIONS:
            found = lab.run([told], name, rule, 3 * ROWS)
            blind = lab.run([whole], name, "lru", 3 * ROWS)
            assert found.misses[0, 1:].sum() < 0.1 * blind.misses[0, 1:].sum()
            assert found.ahead.shape == (1, STEPS) and found.ahead.sum() > 0
            assert blind.ahead.sum() == 0

    @pytest.mark.parametrize("name", ["fixed", "ratio"])
    def test_own_rows_are_runs_of_their_own(self, name):
        """Requests of one context: what each misses, it misses alone."""
        whole = stream()
        found = lab.run([whole], name, "lru", 3 * ROWS).misses[0]
        for request in range(3):
            alone = policies.misses("lru", whole.of(request), ROWS, whole.num_slots)
            assert np.array_equal(found[:, request], alone.sum(axis=1))

    def test_shared_is_one_tier(self):
        whole = stream()
        found = lab.run([whole], "shared", "lru", 3 * ROWS).misses[0]
        alone = policies.misses("lru", whole.steps, 3 * ROWS, whole.num_slots)
        assert np.array_equal(found.sum(axis=1), alone.sum(axis=1))
        assert np.array_equal(found[:, 1], alone[:, 2:4].sum(axis=1))

    def test_division(self):
        contexts = np.array([100, 300, 600])
        assert lab.fixed(600, contexts).tolist() == [200, 200, 200]
        assert lab.ratio(500, contexts).tolist() == [50, 150, 300]

    def test_a_shared_prefix_is_fetched_once(self):
        whole = stream(shared_slots=True)
        rows = 3 * ROWS
        own = lab.run([whole], "fixed", "lru", rows).misses.sum(axis=(0, 1))
        shared = lab.run([whole], "shared", "lru", rows).misses.sum(axis=(0, 1))
        assert own[0] == own[1] == own[2] > shared[0]
        assert shared[1:].tolist() == [0, 0]

    def test_shared_moves_rows_to_the_request_that_needs_them(self):
        """One request that stays on few slots, one that goes round many."""
        steps = np.zeros((60, 2, 2), np.int32)
        steps[:, 0] = [0, 1]
        steps[:, 1] = 10 + np.arange(120).reshape(60, 2) % 20
        whole = lab.Stream(steps, np.array([10, 22]), 32)
        shared = lab.run([whole], "shared", "lru", 22, warmup=10)
        assert shared.counted.sum() == 0
        fixed = lab.run([whole], "fixed", "lru", 22, warmup=10)
        assert fixed.by_request.tolist() == [0, 2]

    @pytest.mark.parametrize("name", lab.ORGANISATIONS)
    @pytest.mark.parametrize("policy", ONLINE)
    def test_belady_bounds_every_policy(self, name, policy):
        best = lab.run([stream()], name, "belady", 3 * ROWS).misses.sum()
        assert lab.run([stream()], name, policy, 3 * ROWS).misses.sum() >= best

    @pytest.mark.parametrize("name", lab.ORGANISATIONS)
    def test_all_resident_misses_only_what_is_new(self, name):
        whole = stream()
        found = lab.run([whole], name, "lru", 3 * whole.num_slots).misses[0].sum(axis=0)
        new = [len(np.unique(part[part >= 0])) for part in map(whole.of, range(3))]
        assert found.tolist() == new


class TestRun:
    def test_layers_have_rows_of_their_own(self):
        layers, seen = [stream(seed=1), stream(seed=9)], []
        found = lab.run(
            iter(layers), "shared", "lru", [60, 90], warmup=WARMUP, progress=lambda: seen.append(1)
        )
        assert found.misses.shape == (2, STEPS, 3) and len(seen) == 2
        assert found.rows.tolist() == [60, 90]
        for layer, rows in enumerate((60, 90)):
            alone = lab.run([layers[layer]], "shared", "lru", rows)
            assert np.array_equal(found.misses[layer], alone.misses[0])

    def test_figures(self):
        misses = np.arange(12).reshape(2, 3, 2)
        ahead = np.array([[9, 1, 2], [9, 3, 4]])
        found = lab.Outcome(misses, ahead, 1, 0, 20, np.array([4, 4]))
        assert found.counted.tolist() == [[[2, 3], [4, 5]], [[8, 9], [10, 11]]]
        assert found.mean == 6.5 and found.by_layer.tolist() == [3.5, 9.5]
        assert found.by_request.tolist() == [6, 7] and found.ratio == 0.65
        assert found.link_rows == 6.5 + 2.5 / 2
        shorter = lab.Outcome(misses, ahead, 1, 1, 20, np.array([4, 4]))
        assert shorter.mean == 5.5 and shorter.link_rows == 5.5 + 2 / 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"organisation": "pooled"}, "organisation must be one of fixed, ratio, shared"),
            ({"policy": "mru"}, "policy must be one of"),
            ({"rows": [60, 60]}, "rows must be one for each layer: got 2 for 1"),
            ({"rows": []}, "rows must be one for each layer: got 0"),
            ({"rows": 20}, "must fit the hot rows"),
            ({"warmup": 30, "tail": 10}, f"leave some of {STEPS} steps: got 30 and 10"),
            ({"tail": -1}, "got 0 and -1"),
        ],
    )
    def test_refusals(self, changes, message):
        arguments = {"organisation": "shared", "policy": "lru", "rows": 60, "warmup": 0}
        with pytest.raises(ValueError, match=message):
            lab.run([stream()], **arguments | changes)

    def test_streams_of_other_shapes_are_refused(self):
        steps = np.zeros((4, 3, 2), np.int32)
        with pytest.raises(ValueError, match=r"of 2 requests: got \[4, 3, 2\]"):
            lab.Stream(steps, np.array([8, 8]), 16)
        with pytest.raises(ValueError, match="slots must be below 16.*got 16"):
            lab.Stream(steps + 16, np.array([8]), 16)


class TestGenerate:
    CONTEXTS = (256, 90, 200)

    def test_warmup_looks_every_slot_up_once(self):
        found, warmup = lab.generate(LOCALITY, 0, self.CONTEXTS, 5, queries=2)
        assert found.num_slots == sum(self.CONTEXTS) and found.queries == 2
        assert len(found.steps) == warmup + 5
        seen = found.steps[:warmup]
        assert np.sort(seen[seen >= 0]).tolist() == list(range(found.num_slots))
        # All are warm at the end: a tier that holds a request's last rows hits most of its next.
        assert (found.steps[warmup - 1].reshape(3, -1) >= 0).any(axis=1).all()

    def test_steps_stay_in_their_request(self):
        found, warmup = lab.generate(LOCALITY, 0, self.CONTEXTS, 5, queries=2)
        first = 0
        for request, tokens in enumerate(self.CONTEXTS):
            topk = found.of(request)[warmup:].reshape(-1, LOCALITY.topk)
            assert ((first <= topk) & (topk < first + tokens)).all()
            assert all(len(set(row)) == LOCALITY.topk for row in topk.tolist())
            first += tokens

    def test_a_prefix_is_the_same_slots(self):
        found, warmup = lab.generate(LOCALITY, 0, self.CONTEXTS, 5, prefix=80)
        assert found.num_slots == 80 + 176 + 10 + 120
        first = 80
        for request, tokens in enumerate(self.CONTEXTS):
            slots = np.unique(found.of(request)[:warmup])
            own = np.arange(first, first + tokens - 80)
            assert slots[slots >= 0].tolist() == [*range(80), *own]
            first += len(own)
        with pytest.raises(ValueError, match="prefix must be 0 to 90 tokens: got 91"):
            lab.generate(LOCALITY, 0, self.CONTEXTS, 5, prefix=91)

    def test_seeds_and_layers(self):
        def make(layer, seed):
            return lab.generate(LOCALITY, layer, [256], 5, seed=seed)[0].steps

        assert np.array_equal(make(0, 1), make(0, 1))
        assert not np.array_equal(make(0, 1), make(0, 2))
        assert not np.array_equal(make(0, 1), make(1, 1))


class TestCurves:
    SIZES = (96, 128, 192, 256, 384)

    def test_exact_falls_and_is_what_runs_miss(self):
        found, warmup = lab.generate(LOCALITY, 1, [256, 256], 100, queries=2)
        exact = lab.exact_curve(found, self.SIZES, warmup)
        assert (np.diff(exact) < 0).all()
        run = lab.run([found], "shared", "lru", 128, warmup=warmup)
        assert exact[1] == pytest.approx(run.mean * 2)

    def test_ghost_at_rate_1_is_close_to_exact(self):
        found, warmup = lab.generate(LOCALITY, 1, [256, 256], 100, queries=2)
        exact = lab.exact_curve(found, self.SIZES, warmup)
        ghost = lab.ghost_curve(found, self.SIZES, 1.0, warmup)
        assert ghost.steps == 100 and ghost.lookups == 2 * 2 * LOCALITY.topk
        assert [ghost.at(rows) for rows in self.SIZES] == pytest.approx(exact, rel=0.02)


class TestBudgets:
    def test_rows_go_to_the_layer_that_misses(self):
        """Of a layer that returns soon and one that goes round more slots than are hot."""
        pair = [lab.generate(LOCALITY, layer, [256, 256], 200, queries=2) for layer in (0, 1)]
        layers, warmup = [found for found, _ in pair], pair[0][1]
        found = lab.budgets(layers, 130, warmup=warmup, steps=100)
        assert sum(found.rows) == 260 and found.rows[0] < 100 and found.rows[1] > 160
        same, later = (
            lab.run(layers, "shared", "lru", rows, warmup=warmup + 100).mean
            for rows in (130, found.rows)
        )
        assert later < 0.9 * same
        seen = lab.run(layers, "shared", "lru", found.rows, warmup=warmup, tail=100).mean
        assert found.misses / 4 == pytest.approx(seen, rel=0.05)  # of 2 layers and 2 requests

    def test_layers_that_are_alike_get_the_same(self):
        one, warmup = lab.generate(LOCALITY, 0, [256, 256], 40)
        assert lab.budgets([one, one], 100, warmup=warmup, steps=40).rows == (100, 100)

    def test_a_step_fits_or_it_is_refused(self):
        one, warmup = lab.generate(LOCALITY, 0, [256, 256], 40, queries=2)
        with pytest.raises(BudgetError):
            lab.budgets([one], 40, warmup=warmup, steps=40)


def test_benchmark_reports_every_point(capsys, monkeypatch, tmp_path):
    """A few steps of the real profiles: the numbers mean little, but all are there."""
    few = policy_lab.Effort(4, 6, 3, 1, policy_lab.SCENARIOS[:1])
    monkeypatch.setattr(policy_lab, "QUICK", few)
    monkeypatch.setattr(policy_lab, "SIZES", (2048, 4096, 8192))
    monkeypatch.setattr(policy_lab, "GHOST_RATIOS", (0.2, 0.6))
    monkeypatch.setattr(policy_lab, "RATES", (1.0, 0.1))
    monkeypatch.setattr(policy_lab, "CLOCK_STEPS", (4, 6, 3))
    monkeypatch.setattr(policy_lab, "CLOCK_RATIOS", (0.2,))
    monkeypatch.setattr(policy_lab, "AGES", policy_lab.AGES[:1])
    monkeypatch.setattr(policy_lab, "AGE_STEPS", (10, 20))
    policy_lab.main(["--quick", "--json", str(tmp_path / "lab.json")])
    found = json.loads((tmp_path / "lab.json").read_text())
    kinds = {(row["name"], row["kind"]) for row in found["rows"]}
    names = ("policy", "clock", "organisation", "ghost", "ages")
    assert kinds == {(name, "simulated") for name in names}
    clocks = 2 * len(policy_lab.CLOCKS) * len(policy_lab.CLOCK_CONTEXTS)
    ages = len(policy_lab.DRAFTS) * len(policy_lab.ALIKE) * len(RULES)
    others = len(policy_lab.RUNS) + 4
    assert len(found["rows"]) == 3 * len(policies.POLICIES) + clocks + ages + others
    assert all(row["median"] is not None for row in found["rows"])
    summary = found["summary"]
    assert summary["ghost_error_percent_at_1"] < 0.1
    assert summary["belady_vs_lru_32k"] <= 1 <= summary["clock_vs_lru_128k"]
    assert summary["aged_clock_most_rounds"] >= summary["aged_clock_rounds"] >= 1
    assert summary["ages_kept_alike_most"] == pytest.approx(1, abs=0.01)
    assert summary["ages_kept_other_least"] < 1 < summary["mtp4_over_mtp2_misses_alike"]
    assert summary["mtp4_over_mtp2_misses_alike"] < summary["mtp4_over_mtp2_misses_other"]
    assert summary["lru_2048_missed_percent"] == pytest.approx(30, abs=3)
    assert "shared + budgets" in capsys.readouterr().out
