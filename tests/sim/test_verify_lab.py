"""Verify steps in the lab: generated and recorded lists, and what they miss by rule."""

import numpy as np
import pytest
import torch

from sglang_ess.sim.model.locality import Layers, Locality, similarity
from sglang_ess.sim.planning import lab
from sglang_ess.sim.planning.lab import Drafts
from sglang_ess.sim.planning.verify_lab import (
    Verifying,
    by_rule,
    kinship,
    traced_cost,
    verify_cost,
)
from sglang_ess.sim.policies.verified_lru import RULES, VerifiedLru
from sglang_ess.trace.trace import read_trace
from sglang_ess.trace.trace_recorder import TraceRecorder
from tests.sim import oracles
from tests.support.recorded import Verifies

LOCALITY = Locality(16, 256, 0.2, Layers(churn=0.3, uniform=(0.1,), reach=(60.0,)))
CONTEXTS, QUERIES, STEPS = (256, 200), 4, 30


def stream(alike, accepted=2.8, **changes):
    arguments = {"queries": QUERIES, "drafts": Drafts(accepted, alike)} | changes
    return lab.generate(LOCALITY, 0, CONTEXTS, STEPS, **arguments)


def kept_lists(made, warmup, request):
    """The lists of a request's tokens, one after the other."""
    steps, kept = made.of(request)[warmup:], made.kept[warmup:, request]
    return [topk for lists, count in zip(steps, kept, strict=True) for topk in lists[:count]]


@pytest.mark.parametrize("request_", [0, 1])
def test_alike_lists_are_windows_of_one_stream(request_):
    """What a request keeps is what it selects without drafts; the rest is what comes next."""
    made, warmup = stream(alike=1.0)
    plain, _ = lab.generate(LOCALITY, 0, CONTEXTS, STEPS * QUERIES)
    right, place = plain.of(request_)[warmup:, 0], 0
    for lists, count in zip(made.of(request_)[warmup:], made.kept[warmup:, request_], strict=True):
        assert np.array_equal(lists, right[place : place + QUERIES])
        place += count
    assert np.array_equal(kept_lists(made, warmup, request_), right[:place])


def test_other_lists_leave_no_mark():
    """Kept lists follow one another as without drafts, and a rejected one is another list."""
    made, warmup = stream(alike=0.0)
    for request in (0, 1):
        lists = kept_lists(made, warmup, request)
        assert 0.65 < similarity(lists) < 0.85
        steps, kept = made.of(request)[warmup:], made.kept[warmup:, request]
        rejected = [
            len(np.intersect1d(now[count], after[0])) / 16
            for now, after, count in zip(steps, steps[1:], kept, strict=False)
            if count < QUERIES
        ]
        assert rejected and 0.3 < np.mean(rejected) < similarity(lists)


def test_kept_lengths_have_the_mean_that_was_asked_for():
    made, warmup = lab.generate(
        LOCALITY, 0, [256] * 8, 200, queries=4, drafts=Drafts(2.8)
    )  # fmt: skip
    kept = made.kept[warmup:]
    assert kept.min() == 1 and kept.max() == 4 and kept.mean() == pytest.approx(2.8, abs=0.1)
    assert (made.kept[:warmup] == 1).all()
    assert lab.generate(LOCALITY, 0, [256], 3, queries=4)[0].kept is None


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_list_misses_the_same(rule):
    made, warmup = stream(alike=0.0)
    oracle, misses = oracles.VerifiedLru(150, QUERIES, rule), []
    for topk, kept in zip(made.steps, made.kept, strict=True):
        misses.append(sum(oracle.step(topk)))
        oracle.accepted(kept)
    found = verify_cost(made, rule, 150, warmup=warmup + 4, tail=3)
    counted = slice(warmup + 4, len(misses) - 3)
    assert found.misses == pytest.approx(np.mean(misses[counted]) / 2)
    assert found.tokens == pytest.approx(made.kept[counted].mean())
    assert found.per_token == found.misses / found.tokens > 0


def test_each_rule_sees_the_same_streams():
    locality = Locality(
        16, 256, 0.2, Layers(churn=0.3, uniform=(0.1,) * 3, reach=(20.0, 60.0, 90.0))
    )
    setting = Verifying(256, QUERIES, Drafts(2.8))
    found = by_rule(locality, setting, 0.4, (10, STEPS), 2, seed=3)
    assert list(found) == list(RULES) and all(len(costs) == 2 for costs in found.values())
    for place, layer in enumerate(locality.spread(2)):
        made, warmup = lab.generate(
            locality, layer, [256] * 2, 10 + STEPS, queries=QUERIES, drafts=Drafts(2.8), seed=3
        )
        for rule, costs in found.items():
            assert costs[place] == verify_cost(made, rule, int(0.4 * 512), warmup=warmup + 10)


def test_a_stream_without_kept_is_refused():
    made, _ = lab.generate(LOCALITY, 0, CONTEXTS, 3, queries=2)
    with pytest.raises(ValueError, match="must say what each kept"):
        verify_cost(made, "all", 150)


# --- traces -----------------------------------------------------------------------------


def recorded(path, **shape):
    made = Verifies(path, np.random.default_rng(4), **shape)
    for _ in range(30):
        made.step()
    return read_trace(made.close()), made


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [None, 5])
def test_a_trace_misses_what_a_plain_list_misses(tmp_path, rule, block):
    opened, made = recorded(tmp_path / "t", queries=4, rows=110, block=block)
    misses = 0
    for steps in made.steps:
        oracle = oracles.VerifiedLru(90, 4, rule)
        for topk, kept in zip(steps, made.kept, strict=True):
            misses += sum(oracle.step(topk))
            oracle.accepted(kept)
    found, verifies = traced_cost(opened, rule, 90), 30 * Verifies.REQUESTS
    assert found.misses == pytest.approx(misses / verifies / 2)
    assert found.tokens == pytest.approx(sum(map(sum, made.kept)) / verifies)


def test_kinship_is_that_of_the_lists(tmp_path):
    opened, made = recorded(tmp_path / "t", queries=4)
    right = {record[2:4] + (record[0],): set(record[4]) for record in made.records if record[5]}
    rejected, successive = [], []
    for layer, _, name, length, positions, is_kept in made.records:
        same = right.get((name, length, layer))
        if not is_kept and same is not None:
            rejected.append(len(same & set(positions)) / len(positions))
        before = right.get((name, length - 1, layer))
        if is_kept and before is not None:
            successive.append(len(before & set(positions)) / len(positions))
    found = kinship(opened)
    assert found.pairs == len(rejected) > 20
    assert found.rejected == pytest.approx(np.mean(rejected))
    assert found.successive == pytest.approx(np.mean(successive))


def test_traces_without_verify_steps_are_refused(tmp_path):
    opened, _ = recorded(tmp_path / "t", queries=1)
    with pytest.raises(ValueError, match="must have rejected lists"):
        kinship(opened)
    recorder = TraceRecorder(tmp_path / "plain", 1, 2, 64, {})
    recorder.hot_cache(None, 8, 64).plan(torch.tensor([[1, 2]], dtype=torch.int32))
    recorder.writer.close()
    with pytest.raises(ValueError, match="must have verify steps"):
        traced_cost(read_trace(tmp_path / "plain"), "all", 8)


@pytest.mark.parametrize("rule", RULES)
def test_writes_are_young_and_freed_slots_go_first(rule):
    tier = VerifiedLru(4, 16, 2, rule)

    def step(first, second, kept=2):
        misses = tier.step(np.array([first, second], np.int32)).tolist()
        tier.accepted(np.array([kept]))
        return misses

    assert step([1, 2], [3, 4]) == [2, 2]
    tier.use(np.array([7], np.int32))  # a write: no lookup, and the oldest goes
    order = (3, 4, 1) if rule == "first" else (1, 2, 3)
    assert step([7, -1], [-1, -1]) == [0, 0]
    assert step([order[0], 7], [-1, -1]) == [1, 0]  # it had gone, and the next oldest goes
    tier.forget(np.array([7, 9]))
    assert step([7, -1], [-1, -1]) == [1, 0]  # dropped, though it was the youngest
    assert step([order[0], order[2]], [-1, -1]) == [0, 0]  # whose row 7 took was its own
