"""Discrete-event serving: closed forms, conservation, slots, and what a bug would look like."""

import numpy as np
import pytest

from sglang_ess.sim.engine.decode_rank import acceptance_probability
from sglang_ess.sim.engine.fetches import TierFetches
from sglang_ess.sim.engine.requests import State
from sglang_ess.sim.engine.serving import Until
from sglang_ess.sim.inputs.arrivals import Arrivals, Lengths, draw
from tests.sim.serving_system import LAYERS, ROW_BYTES, TOPK, System, load, poisson

# --- closed forms -----------------------------------------------------------------------


def test_one_request_alone_waits_for_its_prefill_its_hand_off_and_a_step():
    system = System(load((1.0, 200, 5)))
    results = system.run()
    assert (results.ttft.p50, results.ttft.p99) == pytest.approx((0.2 + 0.02 + 0.011,) * 2)
    assert (results.itl.mean, results.itl.p99) == pytest.approx((0.011, 0.011))
    assert results.itl.count == 4 and results.queueing.p99 == 0
    assert (results.output_tokens, results.steps, results.batch_max) == (5, 5, 1)
    assert results.seconds == pytest.approx(1 + 0.22 + 5 * 0.011)
    assert results.tokens_per_second == pytest.approx(5 / 1.275)
    assert results.tokens_per_second_per_node == pytest.approx(8 * 5 / 1.275)


def test_colocated_there_is_no_hand_off():
    results = System(load((0, 200, 3)), mode="colocated").run()
    assert results.ttft.p50 == pytest.approx(0.2 + 0.011)
    assert results.prefill_share == pytest.approx(0.2 / (0.2 + 3 * 0.011))


def test_in_decode_mode_all_begin_at_once_and_all_resident_nothing_is_fetched():
    results = System(load(*[(0, 64, 10)] * 8), mode="decode").run()
    assert (results.itl.p50, results.itl.p99) == pytest.approx((0.018, 0.018))
    assert results.misses == results.fetched_bytes == results.link_utilisation == 0
    assert results.hit_rate == 1 and results.batch_max == 8
    assert results.batch_mean == pytest.approx(8)
    assert results.step_parts == pytest.approx({"compute": 0.018, "transfer": 0})


def test_a_constant_number_of_misses_takes_its_time_and_bytes():
    results = System(load(*[(0, 64, 10)] * 8), mode="decode", misses=4.0, link=1e6).run()
    rows = 4 * LAYERS * 8
    assert results.fetched_bytes == 10 * rows * ROW_BYTES and results.misses == 4
    assert results.step_seconds == pytest.approx(0.018 + rows * ROW_BYTES / 1e6)
    assert results.link_utilisation == pytest.approx(rows * 1e-3 / results.step_seconds)
    assert results.hit_rate == 1 - 4 / TOPK


def test_a_hot_tier_with_room_for_all_fetches_each_row_at_most_once():
    load_of_8 = load(*[(0, 64, 40)] * 8)
    results = System(load_of_8, mode="decode", misses=None, hot_rows=6400).run()
    rows = results.fetched_bytes / ROW_BYTES / LAYERS
    assert 0 < rows <= 8 * 64
    assert (results.series.misses[-10:] < 0.5).all()


@pytest.mark.parametrize("mode", ["pd", "colocated", "decode"])
def test_nobody_arrives(mode):
    nobody = draw(Arrivals("burst", requests=0), *[Lengths("constant", tokens=1)] * 2, 0)
    results = System(nobody, mode=mode).run()
    assert results.requests == results.steps == results.output_tokens == 0
    assert results.ttft.p50 is None and results.tokens_per_second == results.seconds == 0


def test_prompts_queue_for_the_prefill_ranks():
    system = System(load((0, 100, 1), (0, 100, 1), (0, 100, 1)), prefill_ranks=2)
    system.run()
    # The third prompt begins when the first two end. The second's hand-off waits for the first's,
    # and then for the step that runs.
    assert system.requests.queued_s == pytest.approx([0.0, 0.011, 0.1])
    assert system.log.ttft == pytest.approx([0.121, 0.132, 0.221])


def test_a_prefix_is_computed_once_it_was_computed_for_another():
    system = System(load((0, 200, 1, 7, 150), (0.05, 200, 1, 7, 150), (1, 200, 1, 7, 150)))
    system.run()
    assert system.cost.prefills == [(200, 0), (50, 150), (50, 150)]
    alone = System(load((0, 200, 1, 7, 150), (0.05, 200, 1, 7, 150)), prefill_ranks=2)
    alone.run()
    assert alone.cost.prefills == [(200, 0), (200, 0)], "nothing is there before it is computed"


def test_who_is_too_long_is_refused_and_holds_nobody_up():
    system = System(load((0, 700, 10), (0, 64, 10)), slots=640)
    results = system.run()
    assert (results.refused, results.finished) == (1, 1)
    assert system.requests.state.tolist() == [State.REFUSED, State.FINISHED]


# --- conservation -----------------------------------------------------------------------

CASES = [
    {},
    {"misses": None, "admission": True, "link": 1e6},
    {"misses": None, "admission": True, "link": 1e6, "mode": "colocated", "hot_rows": 64},
    {"misses": 3.0, "mode": "decode", "slots": 1280},
    {"ranks": 3, "accepted": 1.7, "queries": 2, "prefill_ranks": 4},
    {"ranks": 2, "lockstep": False, "slots": 640, "reserved": 0},
    {"slots": 640, "mode": "colocated", "reserved": 0, "queries": 4, "accepted": 2.8},
    {"slots": 384, "mode": "decode", "reserved": 0, "misses": None, "queries": 2, "accepted": 1.5},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_what_goes_in_comes_out(case):
    workload = poisson(30, rate=30.0)
    system = System(workload, **case)
    results = system.run()  # which checks every round
    assert results.finished == results.requests == 30 and results.unfinished == 0
    assert results.output_tokens == workload.output_tokens.sum()
    firsts = results.output_tokens - results.itl.count  # the tokens of first steps
    assert 30 <= firsts <= 30 * system.queries
    assert results.ttft.count == 30
    for rank in system.serving.ranks:
        assert rank.slots.free == rank.slots.num_slots and not rank.load
        if isinstance(rank.fetches, TierFetches):
            assert not rank.fetches.requests
    fetched = sum(rank.fetches.totals.misses for rank in system.serving.ranks)
    assert results.fetched_bytes == fetched * ROW_BYTES
    series = results.series
    assert sum(results.step_parts.values()) == pytest.approx(results.step_seconds)
    assert series.step_seconds.sum() == pytest.approx(results.step_seconds * results.steps)
    if system.lockstep:
        one = series.rank == 0
        assert series.step_seconds[one].sum() <= results.seconds * (1 + 1e-9)
    assert series.batch.max() == results.batch_max <= 30


def test_percentiles_are_those_of_the_raw_samples():
    system = System(poisson(25, rate=20.0), misses=2.0, queries=2, accepted=1.6, link=1e6)
    table, seen, gaps, firsts = system.requests, {}, [], []

    def watch(system):
        now = system.serving.now
        for request, tokens in enumerate(table.generated.tolist()):
            before, at = seen.get(request, (0, None))
            new = tokens - before
            if not new:
                continue
            if at is None:
                firsts.append(now - system.workload.seconds[request])
            else:
                gaps.extend([(now - at) / new] * new)
            seen[request] = (tokens, now)

    results = system.run(watch)
    assert len(firsts) == 25
    for found, samples in ((results.itl, gaps), (results.ttft, firsts)):
        expected = np.percentile(samples, (50, 90, 99))
        assert (found.p50, found.p90, found.p99) == pytest.approx(tuple(expected))
        assert found.mean == pytest.approx(np.mean(samples)) and found.count == len(samples)


def test_the_start_is_not_measured():
    load_of_4 = load(*[(0, 64, 20)] * 4)
    results = System(load_of_4, mode="decode", until=Until(steps=12, settle_steps=5)).run()
    assert (results.steps, results.output_tokens) == (7, 28)
    assert results.seconds == pytest.approx(7 * 0.014)
    assert results.ttft.count == 0 and results.itl.count == 28
    assert results.unfinished == 4
    until = Until(seconds=0.05)
    assert System(load_of_4, mode="decode", until=until).run().seconds == pytest.approx(0.05)


# --- a bug, as the checks see it --------------------------------------------------------


@pytest.mark.parametrize(
    ("corrupt", "rule"),
    [
        (lambda rank: rank.waiting.clear(), "requests in state WAITING must be those in its place"),
        (lambda rank: rank.running.pop(), "requests in state RUNNING"),
        (lambda rank: rank.inbox.append(rank.running[0]), "requests in state INBOX"),
        (lambda rank: setattr(rank.slots, "free", rank.slots.free - 64), "slots must be free or"),
        (lambda rank: rank.slots.release(rank.running[0]), "must hold the slots of its"),
        (lambda rank: rank.requests.generated.__setitem__(0, 99), "a context must be a prompt and"),
    ],
)
def test_what_goes_missing_is_noticed(corrupt, rule):
    system = System(load(*[(0, 64, 20)] * 6), mode="decode", max_running=3)

    def watch(system):
        if system.serving.ranks[0].running:
            corrupt(system.serving.ranks[0])
            with pytest.raises(RuntimeError, match=rule):
                system.serving.check()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        system.run(watch)


# --- ranks ------------------------------------------------------------------------------


def test_a_request_goes_to_the_rank_with_the_fewest():
    system = System(load(*[(0, 64, 30)] * 7, (0.1, 64, 1)), mode="decode", ranks=3)
    system.run()
    assert np.bincount(system.requests.rank).tolist() == [3, 3, 2]


def test_in_lockstep_all_ranks_wait_for_the_slowest():
    rows = load(*[(0, 64, 5)] * 3)
    both = System(rows, mode="decode", ranks=2).run()
    assert both.step_parts["wait"] == pytest.approx(0.001 / 2)
    assert set(both.series.step_seconds.round(6)) == {0.012}
    alone = System(rows, mode="decode", ranks=2, lockstep=False).run()
    assert set(alone.series.step_seconds.round(6)) == {0.011, 0.012}
    assert "wait" not in alone.step_parts


def test_a_closed_loop_has_so_many_requests_and_no_more():
    arrivals = Arrivals("closed", requests=20, clients=3)
    lengths = Lengths("uniform", low=20, high=90), Lengths("uniform", low=1, high=9)
    system = System(draw(arrivals, *lengths, 0), closed=True, mode="decode")
    results = system.run()
    assert results.finished == 20 and results.batch_max == 3
    assert (results.series.batch[:-10] == 3).all(), "who ends is replaced before the next step"


# --- tokens of a step -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "accepted"), [(1, 1.0), (2, 1.7), (4, 2.8), (4, 4.0), (3, 1.0)]
)
def test_a_step_keeps_as_many_tokens_as_are_accepted_on_average(queries, accepted):
    p = acceptance_probability(queries, accepted)
    assert sum(p**i for i in range(queries)) == pytest.approx(accepted)
    rows = load(*[(0, 64, 400)] * 8)
    results = System(rows, mode="decode", queries=queries, accepted=accepted).run()
    assert results.output_tokens == 3200, "the last step does not overshoot"
    per_step = results.output_tokens / results.series.batch.sum()
    assert per_step == pytest.approx(accepted, rel=0.04)
    assert per_step <= accepted or 1 < accepted < queries


# --- out of slots -----------------------------------------------------------------------


def test_colocated_a_retracted_request_resumes_as_a_prefix_hit():
    system = System(load((0, 100, 60), (0, 90, 60)), mode="colocated", slots=320, reserved=20)
    results = system.run()
    assert results.retractions == 1 and results.finished == 2
    assert system.requests.retractions.tolist() == [1, 0], "the longer prompt goes"
    *first, (computed, cached) = system.cost.prefills
    assert first == [(100, 0), (90, 0)]
    # Both had 38 tokens. The other took a page of the tail; what the tree still has is a hit.
    assert (computed, cached) == (10, 128)


def test_on_a_decode_server_the_rows_come_back_as_a_hand_off_does():
    system = System(load((0, 100, 60), (0, 90, 60)), slots=256, reserved=0)
    results = system.run()
    assert results.retractions == 1 and results.finished == 2
    assert system.cost.hand_offs[:2] == [100, 90] and system.cost.hand_offs[2] > 100
    assert len(system.cost.prefills) == 2


def test_alone_a_request_gets_the_slots_of_those_that_wait():
    """Two prompts fit, their outputs do not, and one of them may not run."""
    system = System(load((0, 100, 100), (0, 100, 100)), slots=256, reserved=0, max_running=1)
    results = system.run()
    assert results.finished == 2 and results.retractions == 0
    assert len(system.cost.hand_offs) == 3
