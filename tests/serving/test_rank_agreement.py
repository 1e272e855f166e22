"""Two ranks that measure different things decide alike, at every round.

Their sizes: tests/mem_cache/test_host_share.py. Their overlap mode: tests/platforms/test_ranks.py.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_ess.tiers.topk_sample import SAMPLES
from tests.support import scheduling
from tests.support.ranks import on_two_ranks

ROUNDS = 400
TP = {}
DP = {"enable_dp_attention": True, "dp_size": 2}
TOPK, HOT_ROWS, SLOTS, LAYERS, PLACES = 64, 600, 4096, 4, 16


class Measured:
    """What one rank measures. No two ranks have the same clock, link, misses or sampled lists."""

    def __init__(self, rank):
        self.random = np.random.default_rng(rank)
        self.now, self.running, self.counts = 0.0, 0, np.zeros(3, np.int64)
        self.slowness = 1 + 2 * rank
        self.lists = torch.zeros(1, SAMPLES, TOPK, dtype=torch.int32)

    def clock(self) -> float:
        """Half a second a step, so that the link is measured at other rounds on each rank."""
        self.now += self.slowness * self.random.uniform(0.1, 0.4)
        return self.now

    def sample(self) -> None:
        lists = self.random.integers(-1, SLOTS, self.lists.shape, np.int32)
        self.lists.copy_(torch.from_numpy(lists))

    def link(self) -> float:
        return self.random.uniform(1e4, 1e6) / self.slowness

    def totals(self) -> tuple[int, int, int] | None:
        """Young rows are evicted now and then, and a device does not always report in time."""
        missed = self.running * LAYERS * TOPK * self.random.uniform(0.2, 1)
        self.counts += np.array([missed, missed, missed * self.random.integers(1, 7)], np.int64)
        return None if self.random.random() < 0.2 else tuple(self.counts.tolist())


def gate_of(measured, group):
    """SGLang's scheduler of one rank and the production gate, over what the rank measures."""
    from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

    from benchmarks.sim import admission_rounds
    from sglang_ess import scheduler_gate
    from sglang_ess.config import EssConfig

    scheduler = admission_rounds.scheduler_of(0, running=0, places=PLACES)
    scheduler.attn_tp_cpu_group, scheduler.last_batch = group, None
    scheduler.metrics_reporter = SimpleNamespace()
    SchedulerMetricsReporter.reset_metrics(scheduler.metrics_reporter)
    geometry = SimpleNamespace(topk=TOPK, layers=LAYERS, row_bytes=656, queries=1)
    pool = SimpleNamespace(
        capacity=SimpleNamespace(hot_rows=HOT_ROWS, slots=SLOTS, geometry=geometry),
        sample=SimpleNamespace(groups=[0], rows=measured.lists),
        host_tier=SimpleNamespace(num_slots=SLOTS),
        measure_link=measured.link, totals=measured.totals,
    )  # fmt: skip
    return scheduler, scheduler_gate.SchedulerGate(scheduler, pool, EssConfig(admission="on"))


def admit(rank, rounds, agreed):
    """A scheduler's loop. Requests arrive and end alike on all ranks.

    rounds: of each rank; agreed: whether ranks agree
    Returns [(requests kept, requests that joined)] and [the policy's link] of each round, and how
    often the policy preempted and deferred a request.
    """
    from sglang.srt.runtime_context import get_parallel

    from benchmarks.sim.admission_rounds import fill_places
    from sglang_ess import scheduler_gate
    from sglang_ess.mem_cache import agreement

    scheduling.blind()  # so that a batch becomes too large, and is preempted
    measured, shared = Measured(rank), np.random.default_rng(7)
    batch, decisions, links = SimpleNamespace(reqs=[], forward_mode=DECODE), [], []
    with pytest.MonkeyPatch.context() as patch:
        if not agreed:
            patch.setattr(agreement, "leads", lambda group: True)
            patch.setattr(agreement, "least", lambda values, group: list(values))
        patch.setattr(scheduler_gate.time, "perf_counter", measured.clock)
        scheduler, gate = gate_of(measured, get_parallel().attn_tp_group.cpu_group)
        for number in range(rounds[rank]):
            if shared.random() < 0.3:
                tokens = int(shared.integers(200, 2000))
                scheduler.waiting_queue.append(SimpleNamespace(rid=f"{number}", seqlen=tokens))
            measured.running = len(batch.reqs)
            measured.sample()
            scheduler.last_batch = batch
            keep = gate.keep(batch)
            if keep is not None:
                batch.reqs, scheduler.waiting_queue[:0] = batch.reqs[:keep], batch.reqs[keep:]
            joined = gate.round(fill_places, batch)
            decisions.append((keep, [req.rid for req in joined]))
            links.append(gate.admission.link_bytes_per_second)
            batch.reqs = batch.reqs + joined
            batch.reqs = [req for req in batch.reqs if shared.random() > 0.02]
    return decisions, links, gate.admission.retractions, sum(gate.admission.deferred.values())


DECODE = SimpleNamespace(is_decode=lambda: True)


def test_ranks_admit_and_preempt_alike_at_every_round(tmp_path):
    leader, follower = on_two_ranks(admit, tmp_path, [ROUNDS] * 2, True, **TP)
    assert leader[0] == follower[0]
    assert min(leader[2:]) > 0, "requests must have been preempted and deferred"
    assert follower[2:] == (0, 0), "only one policy decides, so that it knows what was decided"
    observed = ROUNDS // 4  # before the first observation each rank has its own link
    assert leader[1][observed:] == follower[1][observed:]
    assert len({*leader[1]}) > 3, "the slowest link must have been measured anew"


def test_without_the_agreement_they_would_not(tmp_path):
    (first, *_), (second, *_) = on_two_ranks(admit, tmp_path, [ROUNDS] * 2, False, **TP)
    assert first != second


def test_data_parallel_ranks_admit_apart(tmp_path):
    """Of one TP group, but each with a batch of its own: nobody waits for the other's rounds."""
    (first, *_), (second, *_) = on_two_ranks(admit, tmp_path, [ROUNDS, ROUNDS // 2], True, **DP)
    assert first[: len(second)] != second


def rows_of_layers(rank, agreed):
    """The hot rows of two layers at each step. The ranks' layers miss in opposite ways."""
    from sglang_ess.mem_cache import agreement
    from tests.tiers.balance.test_rebalance import ROUND, Stage

    options = {"agree": agreement.of_attention_leader} if agreed else {}
    stage, found = Stage([60, 240][:: 1 - 2 * rank], **options), []
    for _ in range(3 * ROUND):
        stage.run(1)
        found.append(stage.rows)
    stage.layers.check_integrity()
    return found


@pytest.mark.parametrize("agreed", [True, False])
def test_layers_have_as_many_hot_rows_on_every_rank(tmp_path, agreed):
    first, second = on_two_ranks(rows_of_layers, tmp_path, agreed, **TP)
    assert (first == second) == agreed
    assert first[-1][1] >= 230, "rank 0 needs them in its second layer"
