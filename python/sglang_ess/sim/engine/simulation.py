"""Build the ranks of one system of a scenario, run them, and return the figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from sglang_ess.admission.policy import Admission, AdmissionLimits
from sglang_ess.layout import PAGE_SLOTS
from sglang_ess.sim.engine.admission_gate import AdmissionGate
from sglang_ess.sim.engine.decode_rank import DecodeRank, RankLimits
from sglang_ess.sim.engine.fetches import ConstantFetches, Fetches, TierFetches
from sglang_ess.sim.engine.report import RankFacts, Results, StepLog
from sglang_ess.sim.engine.requests import Requests
from sglang_ess.sim.engine.serving import Flow, Serving, Until
from sglang_ess.sim.inputs import arrivals
from sglang_ess.sim.inputs.arrivals import Workload
from sglang_ess.sim.inputs.scenario import COLOCATED, ESS, ONE_TIER, PAPER, PD, Scenario
from sglang_ess.sim.inputs.specs import Deployment, Link, Model, SpecError, changed, load
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.decode_tiers import DecodeTiers, TierSizes
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.memory import Charges, Memory
from sglang_ess.sim.model.slots import whole_pages

GROWTH_SLACK = 4 * PAGE_SLOTS  # tokens that a request's simulated rows may be ahead of it


def workload_of(scenario: Scenario, seed: int) -> Workload:
    """Draw the workload, the same for every system of the scenario. Raises: WorkloadError."""
    return arrivals.draw(scenario.arrivals, scenario.input_tokens, scenario.output_tokens, seed)


def deployment_of(scenario: Scenario) -> Deployment:
    """Return the deployment with the scenario's own values in it."""
    deployment: Deployment = load("deployment", scenario.deployment)
    own = {
        "kv_gib": scenario.memory.kv_gib,
        "host_gib": scenario.memory.host_gib,
        "overlap": scenario.server.overlap,
        "early_fetch": scenario.server.early_fetch,
    }
    given = {name: value for name, value in own.items() if value is not None}
    return changed(deployment, **given)


def link_of(scenario: Scenario) -> Link:
    """Return a rank's share of the link."""
    link: Link = load("link", scenario.link)
    rates = {f.name: scenario.memory.link_share * getattr(link, f.name) for f in fields(link)}
    return changed(link, **rates)


@dataclass(frozen=True)
class Room:
    """Slots of a rank, and hot rows of each of its layers."""

    slots: int
    hot_rows: int


def room_of(scenario: Scenario, system: str, model: Model, memory: Memory, longest: int) -> Room:
    """Return what fits on a decode rank. longest: tokens of the longest request.

    Raises: SpecError if the slots or a top-k of hot rows do not fit.
    """
    row_bytes, asked = model.all_row_bytes, scenario.memory
    longest = whole_pages(longest)
    if system == ONE_TIER:
        most = memory.device_bytes // memory.resident_bytes
        slots = int(most) // PAGE_SLOTS * PAGE_SLOTS
        return Room(slots, slots)
    on_host = memory.host_bytes // row_bytes
    charges, left = memory.charges, memory.device_bytes - memory.device_used(0, longest, 0)
    on_device = left // (charges.slot_bytes + asked.hot_ratio * charges.hot_row_bytes)
    slots = asked.slots if asked.slots is not None else int(min(on_host, on_device))
    slots = slots // PAGE_SLOTS * PAGE_SLOTS
    hot_rows = memory.hot_rows(slots / longest, longest)
    if asked.hot_rows is not None:
        hot_rows = min(asked.hot_rows, hot_rows)
    if slots > on_host or slots < PAGE_SLOTS or hot_rows < model.topk:
        raise SpecError(
            f"memory must hold slots and a top-k of hot rows a layer: got {slots} slots, "
            f"{hot_rows} hot rows, limit {int(on_host)} slots on the host, {model.topk} rows. "
            "Change memory.kv_gib, memory.host_gib or memory.slots."
        )
    return Room(slots, hot_rows)


class Simulation:
    """One system of a scenario, ready to run.

    workload: as workload_of draws it
    policy: class of the admission in the system `ess`
    Raises: SpecError, ValueError for specs that do not fit each other.
    """

    def __init__(
        self,
        scenario: Scenario,
        system: str,
        workload: Workload,
        seed: int,
        policy: type[Admission] = Admission,
    ):
        self.scenario, self.system, self._seed, self._policy = scenario, system, seed, policy
        self._workload = workload
        self._model = load("model", scenario.model)
        self._deployment = deployment_of(scenario)
        gpu = load("gpu", scenario.gpu)
        self._cost = CostModel(self._model, gpu, link_of(scenario), self._deployment)
        charges = Charges.paper(self._model) if scenario.memory.charges == PAPER else None
        memory = Memory.of(self._model, gpu, self._deployment, charges)
        tokens = workload.input_tokens + workload.output_tokens
        self._longest = int(tokens.max(initial=1))
        if self._longest > self._model.max_context:
            raise SpecError(
                f"input_tokens and output_tokens must be at most {scenario.model}'s "
                f"max_context of {self._model.max_context} together: got {self._longest}."
            )
        self._room = room_of(scenario, system, self._model, memory, self._longest)
        self._link_rate = self._model.row_bytes / float(self._cost.fetch_seconds(1))
        requests = Requests(workload)
        count = scenario.server.decode_ranks or self._deployment.decode_ranks
        self._log = StepLog(requests, count, self._rank_facts())
        self.serving = Serving(
            workload, requests, self._cost,
            [self._rank(requests, number) for number in range(count)],
            self._log, self._flow(count), self._until(),
        )  # fmt: skip

    def run(self, progress: Callable[[int], None] = lambda done: None) -> Results:
        """Run it and return the figures. Raises: RuntimeError if the bookkeeping is wrong."""
        self.serving.run(progress)
        self.serving.check()
        deferred: dict[str, int] = {}
        for rank in self.serving.ranks:
            for reason, times in (rank.gate.admission.deferred if rank.gate else {}).items():
                deferred[reason] = deferred.get(reason, 0) + times
        return self._log.results(self.system, self.serving.ranks, deferred)

    # --- parts --------------------------------------------------------------------------

    def _flow(self, count: int) -> Flow:
        server, deployment = self.scenario.server, self._deployment
        share = max(1, deployment.prefill_ranks * count // deployment.decode_ranks)
        return Flow(
            prefill_ranks=(server.prefill_ranks or share) if server.mode == PD else 0,
            colocated=server.mode == COLOCATED,
            closed=self.scenario.arrivals.kind == arrivals.CLOSED,
            lockstep=server.lockstep,
        )

    def _until(self) -> Until:
        run = self.scenario.run
        return Until(run.steps, run.seconds, run.settle_steps)

    def _rank_facts(self) -> RankFacts:
        model, deployment = self._model, self._deployment
        return RankFacts(
            layers=model.layers,
            row_bytes=model.row_bytes,
            topk=model.topk,
            queries=deployment.queries,
            link_bytes_per_second=self._link_rate,
            gpus_per_rank=deployment.tensor_parallel,
            gpus_per_node=deployment.gpus_per_node,
            slots=self._room.slots,
            hot_rows=self._room.hot_rows,
            offloads=self.system != ONE_TIER,
        )

    def _rank(self, requests: Requests, number: int) -> DecodeRank:
        server, deployment = self.scenario.server, self._deployment
        limits = RankLimits(
            num_slots=self._room.slots,
            max_running=server.max_running,
            reserved_tokens=server.reserved_tokens,
            queries=deployment.queries,
            accepted=deployment.accepted_tokens,
            colocated=server.mode == COLOCATED,
            hands_off=server.mode == PD,
            warmup=server.warmup,
        )
        seeds = np.random.SeedSequence([self._seed, number])
        fetches = self._fetches(int(seeds.generate_state(1)[0]))
        gate = self._gate(fetches) if self.system == ESS else None
        rng = np.random.default_rng(seeds)
        return DecodeRank(limits, requests, self._cost, fetches, gate, rng)

    def _fetches(self, seed: int) -> Fetches:
        run = self.scenario.run
        if self.system == ONE_TIER or run.misses is not None or not len(self._workload):
            layers = self._model.layers
            return ConstantFetches(layers, 0.0 if self.system == ONE_TIER else run.misses or 0.0)
        locality = Locality.load(self.scenario.locality)
        if locality.topk != self._model.topk:
            raise SpecError(
                f"locality must have the model's top-k: got {locality.topk}, {self._model.topk}."
            )
        most = min(self.scenario.server.max_running, len(self._workload))
        tiers = DecodeTiers(
            locality,
            self._room.hot_rows,
            TierSizes(self._room.slots + most * GROWTH_SLACK, most, self._longest + GROWTH_SLACK),
            layers=locality.spread(run.layers or locality.num_layers),
            queries=self._deployment.queries,
            seed=seed,
        )
        return TierFetches(tiers, self._model.groups, self._deployment.accepted_tokens)

    def _gate(self, fetches: Fetches) -> AdmissionGate:
        model, server = self._model, self.scenario.server
        limits = AdmissionLimits(
            hot_rows=self._room.hot_rows,
            topk=model.topk,
            layers=model.layers,
            row_bytes=model.row_bytes,
            itl_seconds=None if server.itl_ms is None else server.itl_ms / 1000,
            num_slots=self._room.slots,
            queries=self._deployment.queries,
        )
        width = model.topk * self._deployment.queries
        slots = self._room.slots + self.scenario.server.max_running * GROWTH_SLACK
        admission = self._policy(limits, self._link_rate)
        return AdmissionGate(admission, slots, width, fetches.sample_layers)
