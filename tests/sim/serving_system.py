"""A small deployment for tests of sim/serving.py, and times that anyone can work out."""

from dataclasses import dataclass

import numpy as np

from sglang_ess.admission.policy import Admission, AdmissionLimits
from sglang_ess.sim.engine.admission_gate import AdmissionGate
from sglang_ess.sim.engine.decode_rank import DecodeRank, RankLimits
from sglang_ess.sim.engine.fetches import ConstantFetches, TierFetches
from sglang_ess.sim.engine.report import RankFacts, StepLog
from sglang_ess.sim.engine.requests import Requests
from sglang_ess.sim.engine.serving import Flow, Serving, Until
from sglang_ess.sim.inputs.arrivals import Arrivals, Lengths, Workload, draw
from sglang_ess.sim.model.cost import StepTime
from sglang_ess.sim.model.decode_tiers import DecodeTiers, TierSizes
from sglang_ess.sim.model.locality import Layers, Locality

LAYERS, TOPK, ROW_BYTES = 4, 16, 1000
LOCALITY = Locality(TOPK, 128, 0.0, Layers(0.4, (0.1,) * LAYERS, (40.0,) * LAYERS))


class Cost:
    """Seconds anyone can work out: a step is 10 ms + 1 ms a request + 1 ms for 1,000 rows."""

    def __init__(self, link=1e9):
        self.prefills, self.hand_offs, self.link = [], [], link

    def step(self, batch, context_tokens, misses):
        fetch = batch * float(np.sum(misses)) * ROW_BYTES / self.link
        parts = {"compute": 0.010 + 0.001 * batch, "transfer": fetch}
        return StepTime(sum(parts.values()), parts)

    def prefill_seconds(self, tokens, prefix_tokens=0):
        self.prefills.append((tokens, prefix_tokens))
        return 0.001 * tokens

    def hand_off_seconds(self, tokens):
        self.hand_offs.append(tokens)
        return 0.0001 * tokens


@dataclass
class System:
    """A small deployment, with what a test changes in it."""

    workload: Workload
    slots: int = 6400
    hot_rows: int = 640
    ranks: int = 1
    mode: str = "pd"
    prefill_ranks: int = 1
    misses: float | None = 0.0
    admission: bool = False
    link: float = 1e9
    accepted: float = 1.0
    queries: int = 1
    reserved: int = 64
    max_running: int = 64
    closed: bool = False
    lockstep: bool = True
    until: Until = Until()
    seed: int = 0

    def __post_init__(self):
        self.cost, self.requests = Cost(self.link), Requests(self.workload)
        rank_facts = RankFacts(
            LAYERS, ROW_BYTES, TOPK, self.queries, self.link, 1, 8, self.slots, self.hot_rows, True
        )
        self.log = StepLog(self.requests, self.ranks, rank_facts)
        colocated = self.mode == "colocated"
        flow = Flow(
            0 if self.mode != "pd" else self.prefill_ranks, colocated, self.closed, self.lockstep
        )
        self.serving = Serving(
            self.workload, self.requests, self.cost, [self._rank(i) for i in range(self.ranks)],
            self.log, flow, self.until,
        )  # fmt: skip

    def _rank(self, number):
        limits = RankLimits(
            self.slots, self.max_running, self.reserved, self.queries, self.accepted,
            self.mode == "colocated", self.mode == "pd",
        )  # fmt: skip
        fetches, gate = ConstantFetches(LAYERS, self.misses or 0.0), None
        if self.misses is None:
            tiers = DecodeTiers(
                LOCALITY, self.hot_rows, TierSizes(self.slots + 64 * 256, 64, 1024),
                layers=(0, 1), queries=self.queries, seed=self.seed,
            )  # fmt: skip
            fetches = TierFetches(tiers, LAYERS, self.accepted)
        if self.admission:
            limit = AdmissionLimits(self.hot_rows, TOPK, LAYERS, ROW_BYTES, None, self.slots)
            width = TOPK * self.queries
            gate = AdmissionGate(
                Admission(limit, self.link), self.slots + 64 * 256, width, fetches.sample_layers
            )
        rng = np.random.default_rng([self.seed, number])
        return DecodeRank(limits, self.requests, self.cost, fetches, gate, rng)

    def run(self, watch=lambda system: None):
        def progress(done):
            self.serving.check()
            for rank in self.serving.ranks:
                if isinstance(rank.fetches, TierFetches):
                    assert [*rank.fetches.requests] == rank.running, "sampled in this order"
            watch(self)

        self.serving.run(progress)
        self.serving.check()
        return self.log.results("ess", self.serving.ranks, {})


def load(*rows):
    """A Workload of (seconds, input, output) or (seconds, input, output, prefix, its tokens)."""
    rows = [(*row, -1, 0)[:5] if len(row) == 3 else row for row in rows]
    seconds, *others = (np.array(column) for column in zip(*rows, strict=True))
    return Workload(seconds.astype(float), *(column.astype(np.int64) for column in others))


def poisson(requests=40, rate=8.0, seed=0, low=20, high=300):
    lengths = Lengths("uniform", low=low, high=high), Lengths("uniform", low=1, high=40)
    return draw(Arrivals("poisson", requests=requests, rate=rate), *lengths, seed)
