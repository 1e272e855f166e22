"""The production admission in simulated serving: fed as the server feeds it, and what it does."""

import ast
from pathlib import Path

import numpy as np
import pytest

from sglang_ess.admission.feed import OBSERVED_STEPS, AdmissionFeed, LastStep, Totals
from sglang_ess.admission.policy import Admission, Step
from sglang_ess.layout import KIB
from sglang_ess.sim.engine.admission_gate import AdmissionGate
from sglang_ess.tiers.topk_sample import SAMPLES
from tests.sim.serving_system import TOPK, System, load, poisson

PACKAGE = Path(__file__).parents[2] / "python" / "sglang_ess"

# --- admission --------------------------------------------------------------------------


class Stub:
    """A gate that lets all join, and sheds once."""

    layer_index = 0

    def __init__(self, at, keep):
        self.at, self.kept, self.rounds, self.seen = at, keep, 0, []

    def keep(self, running, last):
        self.rounds += 1
        self.seen.append(last)
        return self.kept if self.rounds == self.at else running

    def admit(self, running, waiting, within):
        self.candidates = list(waiting)
        return len(self.candidates)


@pytest.mark.parametrize("mode", ["decode", "colocated"])
def test_who_is_shed_keeps_its_slots_and_is_the_first_to_rejoin(mode):
    system = System(load((0, 64, 9), (0, 128, 9), (0, 70, 9)), mode=mode, misses=None)
    rank = system.serving.ranks[0]
    rank.gate = gate = Stub(at=4, keep=1)
    joins = []
    join = rank.fetches.join
    rank.fetches.join = lambda *args: (joins.append(args), join(*args))
    held = []
    system.run(lambda system: held.append([rank.slots.held(r) for r in range(3)]))
    assert rank.preempted == 2 and rank.retractions == 0
    assert system.requests.retractions.tolist() == [0, 1, 1], "the longest prompts go"
    assert held[4][1:] == held[3][1:] != [0, 0]
    # Their rows are in place, but nobody knows any more which are wanted (in a radix tree a
    # short pass over the prompt's end does).
    cold = mode == "decode"
    assert [args[0] for args in joins] == [0, 1, 2, 1, 2]
    assert [args[2] for args in joins] == [False] * 3 + [cold] * 2
    assert [c.cold for c in gate.candidates] == [cold] * 2
    if mode == "colocated":
        assert all(prefix > 0 for _, prefix in system.cost.prefills[3:])


def test_the_gate_is_told_of_every_decode_step():
    system = System(load((0, 64, 3), (0, 40, 2)), mode="decode", misses=2.0)
    rank = system.serving.ranks[0]
    rank.gate = gate = Stub(at=99, keep=1)
    system.run()
    first, *steps = gate.seen
    assert first is None
    assert [last.requests for last in steps] == [(0, 1), (0, 1), (0,)]
    assert [last.seconds for last in steps] == pytest.approx(
        [0.012 + 1.6e-5, 0.012 + 1.6e-5, 0.011 + 8e-6]
    )
    assert [last.totals().misses for last in steps] == [16, 32, 40]
    assert [last.tokens for last in steps] == [[65, 41], [66, 42], [67]]
    assert {last.accepted for last in steps} == {1.0}


def thrashing(**changes):
    """Hot rows for half of what 16 requests want hot, behind a slow link."""
    rows = load(*[(0.001 * i, 200, 120) for i in range(16)])
    options = dict(mode="decode", misses=None, hot_rows=16 * 24, link=2e5, accepted=1.0)
    return System(rows, **(options | changes))


def test_admission_serves_a_hot_tier_that_is_too_small_better_and_starves_nobody():
    without, gated = thrashing(), thrashing(admission=True)
    before, after = without.run(), gated.run()
    assert after.finished == before.finished == 16
    assert after.batch_max < before.batch_max == 16
    assert after.misses < 0.5 * before.misses
    assert after.tokens_per_second > 1.2 * before.tokens_per_second
    joined = gated.requests.joined
    assert (np.diff(joined) >= 0).all(), "first come, first served"
    assert gated.serving.ranks[0].gate.admission.deferred["hot tier"] > 0


def test_a_hot_tier_that_thrashes_sheds_requests_and_all_are_served(monkeypatch):
    """The working sets are left out of it: the ages of what is evicted tell."""
    monkeypatch.setattr(Admission, "_hot_tier_holds", lambda *args: True)
    before, system = thrashing().run(), thrashing(admission=True)
    results = system.run()
    assert results.preempted > 0 and results.finished == 16
    assert results.misses < 0.8 * before.misses
    assert system.requests.retractions.sum() == results.preempted
    totals = system.serving.ranks[0].fetches.totals
    assert totals.misses < totals.evictions, "new rows and warm-ups evict, too"
    assert totals.evictions <= totals.evicted_age < 16 * totals.evictions


def test_the_policy_is_told_of_four_steps_at_once_and_of_a_batch_that_changes():
    gate = told_gate()
    for step in range(1, 8):
        batch = (0, 1) if step < 6 else (0, 1, 2)
        totals = Totals(10 * step, step, 5 * step)
        last = LastStep(batch, 0.5, lambda totals=totals: totals, None, (), 1 + step % 2)
        gate.keep(len(batch), last)
    gate.keep(3, None)
    # The step that is the first of a new batch ends what came before: it is in those totals.
    assert gate.admission.calls == [
        ("observe", Step(4, 2, 0.5, 40, 4, 20, tokens=1.5)),
        ("keep", 2),
        ("observe", Step(1, 2, 0.5, 20, 2, 10, tokens=2)),
    ]


def test_the_policy_is_not_told_of_steps_that_the_device_has_not_counted():
    gate = told_gate()
    counts = [None, Totals(90, 9, 9), Totals(10, 1, 1), Totals(30, 2, 2)]
    for totals in counts:
        for _ in range(OBSERVED_STEPS):
            gate.keep(2, LastStep((0, 1), 0.5, lambda totals=totals: totals, None, ()))
    observed = [args for name, *args in gate.admission.calls if name == "observe"]
    # Not the first; nor the third, in which the counters began again.
    assert observed == [[Step(4, 2, 0.5, 90, 9, 9)], [Step(4, 2, 0.5, 20, 1, 1)]]


def test_seeds():
    """Rows, arrivals and accepted tokens: one seed is one run, another is another."""

    def run(seed):
        system = System(
            poisson(12, rate=30.0, seed=seed), misses=None, queries=2, accepted=1.5, seed=seed,
            admission=True, hot_rows=320, link=1e6,
        )  # fmt: skip
        results = system.run()
        return results, results.series

    first, again, other = run(5), run(5), run(6)
    assert first[0] == again[0]
    for name, column in vars(first[1]).items():
        assert np.array_equal(column, getattr(again[1], name)), name
    assert other[0].itl != first[0].itl and other[0].misses != first[0].misses


# --- as the server does it --------------------------------------------------------------


def constants(path):
    tree = ast.parse((PACKAGE / path).read_text())
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }


def test_as_many_requests_are_sampled_as_in_the_server():
    assert constants("tiers/topk_sample.py")["SAMPLES"] == SAMPLES


class Told:
    """An Admission that writes down what it is told."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            return args[0]

        return call


def told_gate(queries=1):
    """The simulator's gate, over an Admission that writes down what it is told."""
    return AdmissionGate(Told(), 500, queries * TOPK, 2)


def some_steps(rng, queries, steps=60):
    """(requests, seconds, totals, top-k, tokens) of decode steps; batches change now and then."""
    batch, totals = [0, 1, 2], np.zeros(3, int)
    for step in range(steps):
        if rng.random() < 0.15:
            batch = sorted({*batch, int(rng.integers(20))} - {int(rng.integers(20))}) or [7]
        totals = totals + rng.integers(0, 50, 3)
        shape = min(SAMPLES, len(batch)), queries * TOPK
        topk = rng.integers(-1, 500, shape).astype(np.int32)
        yield batch, 0.01 + 0.001 * step, totals, topk, [100 + r + step for r in batch]


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 3])
def test_the_policy_is_told_what_the_server_tells_it(monkeypatch, queries):
    """The server's own SchedulerGate and the simulator's, over the same steps: the same calls."""
    from types import SimpleNamespace

    import torch

    from sglang_ess import scheduler_gate
    from sglang_ess.admission.working_set import WINDOW, WorkingSetWindow
    from sglang_ess.metrics import SpeculationCounts

    clock = iter(())
    monkeypatch.setattr(scheduler_gate.time, "perf_counter", lambda: next(clock))
    rows = torch.zeros(2, SAMPLES, queries * TOPK, dtype=torch.int32)
    pool = SimpleNamespace(sample=SimpleNamespace(layers=(0, 1), rows=rows))
    alone = SimpleNamespace(size=lambda: 1)
    scheduler = SimpleNamespace(last_batch=None, attn_tp_cpu_group=alone)
    counts_of_sglang = SimpleNamespace(
        spec_num_accept_tokens=0, spec_num_forward_ct=0,
        spec_total_num_accept_tokens=0, spec_total_num_forward_ct=0,
    )  # fmt: skip
    real = object.__new__(scheduler_gate.SchedulerGate)
    told = Told()
    state = dict(
        _scheduler=scheduler, _pool=pool, admission=told, _round_began=0.0, _link_measured=1e9,
        _link=1e9,
        _preemption_logged=0.0, _accepted=1.0, _speculation=SpeculationCounts(counts_of_sglang),
        _feed=AdmissionFeed(told, WorkingSetWindow(500, SAMPLES, queries * TOPK), 2),
    )  # fmt: skip
    vars(real).update(state)
    ours = told_gate(queries)
    now, accepted = 0.0, 1.0
    rng = np.random.default_rng(0)
    for batch, seconds, totals, topk, tokens in some_steps(rng, queries):
        if queries > 1 and rng.random() < 0.9:  # else its result is not there yet
            drafts = int(rng.integers(0, len(batch) * (queries - 1) + 1))
            accepted = 1 + drafts / len(batch)
            counts_of_sglang.spec_num_accept_tokens += len(batch) + drafts
            counts_of_sglang.spec_num_forward_ct += len(batch)
        reqs = [SimpleNamespace(rid=r, seqlen=t) for r, t in zip(batch, tokens, strict=True)]
        scheduler.last_batch = SimpleNamespace(
            reqs=reqs, forward_mode=SimpleNamespace(is_decode=lambda: True)
        )
        rows[real._feed.layer, : len(topk)] = torch.from_numpy(topk)
        counts = tuple(totals.tolist())
        pool.totals = lambda counts=counts: counts
        now += seconds
        clock = iter([now, now])
        real.keep(SimpleNamespace(reqs=reqs))
        last = LastStep(
            tuple(batch), seconds, lambda counts=counts: Totals(*counts), topk, tokens[:SAMPLES],
            accepted,
        )  # fmt: skip
        ours.keep(len(batch), last)
    told, expected = ours.admission.calls, real.admission.calls
    links = {call for call in expected if call[0] == "link"}
    assert links == {("link", 10**9 // KIB * KIB)}  # a simulated link does not change
    expected = [call for call in expected if call[0] != "link"]
    assert len(expected) > 20 and {name for name, *_ in expected} == {
        "observe", "observe_working_sets", "keep",
    }  # fmt: skip
    assert len(told) == len(expected)
    for (name, *args), (other, *others) in zip(told, expected, strict=True):
        assert name == other
        if name == "observe":
            mine, theirs = vars(args[0]).copy(), vars(others[0]).copy()
            for name in ("seconds", "tokens"):
                assert mine.pop(name) == pytest.approx(theirs.pop(name))
            assert mine == theirs
            assert queries > 1 or others[0].tokens == 1
        else:
            assert args == others
            assert name == "keep" or len(args[2]) == WINDOW and min(args[2]) > 0
