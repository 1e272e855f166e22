"""The log of a simulation's steps, and the figures made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sglang_ess.layout import GIB
from sglang_ess.sim.engine.requests import Requests, State

PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class Percentiles:
    """Percentiles and mean of `count` samples; None if there are none."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None
    count: int

    @staticmethod
    def of(samples: np.ndarray) -> Percentiles:
        if not len(samples):
            return Percentiles(None, None, None, None, 0)
        p50, p90, p99 = np.percentile(samples, PERCENTS).tolist()
        return Percentiles(p50, p90, p99, float(np.mean(samples)), len(samples))


@dataclass(frozen=True)
class Series:
    """Every decode step of every rank, in order, as columns [steps].

    seconds       at the end of the step
    rank, batch   number of the rank, requests of the step
    waiting       requests without a place in the batch
    misses        per request, layer and step
    step_seconds  duration, waiting for other ranks included
    """

    seconds: np.ndarray
    rank: np.ndarray
    batch: np.ndarray
    waiting: np.ndarray
    misses: np.ndarray
    step_seconds: np.ndarray


# Fields that have other names in the JSON report.
JSON_NAMES = {"preempted": "shed", "deferred": "held"}


@dataclass(frozen=True)
class Results:
    """Figures of one system, over the measured part of a run.

    system          ess, one-tier or no-admission; seconds: measured, in simulated time
    ttft            seconds from arrival to the end of the first decode step
    itl             seconds between two tokens of a request; the tokens of one step share the time
                    since the step before
    queueing        seconds that a request waited in queues, also after retractions
    tokens_per_second  output of all simulated ranks; per_gpu, per_node: of decode GPUs
    batch_mean      weighted by time; misses: per request, layer and step
    hit_rate        hits / looked-up rows; link_utilisation: fetched bytes / (time x gather rate)
    step_seconds    mean of a decode step; step_parts: its parts by name
    in_turn_seconds the part `transfer`, if no fetch were issued before its layer's turn
    prefill_share   share of a decode rank's time that went into prompts (colocated)
    retractions     for lack of slots; preempted: by the admission
    deferred        rounds in which the admission kept the queue's head out, by reason
    slots, hot_rows of a rank; host_gib, peak_host_gib: its pinned rows, and most rows in use
    """

    system: str
    seconds: float
    requests: int
    finished: int
    unfinished: int
    refused: int
    ttft: Percentiles
    itl: Percentiles
    queueing: Percentiles
    output_tokens: int
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tokens_per_second_per_node: float
    steps: int
    batch_mean: float
    batch_max: int
    misses: float
    hit_rate: float
    fetched_bytes: int
    link_utilisation: float
    step_seconds: float
    step_parts: dict[str, float]
    prefill_share: float
    retractions: int
    preempted: int
    deferred: dict[str, int]
    slots: int
    hot_rows: int
    host_gib: float
    peak_host_gib: float
    in_turn_seconds: float
    series: Series = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, with the series as lists."""
        values = {JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}
        values["series"] = {name: array.tolist() for name, array in vars(self.series).items()}
        return {"kind": "simulated", **values}


@dataclass(frozen=True)
class RankFacts:
    """Facts of one rank that turn counts into rates. Its GPUs share its rows evenly.

    layers, row_bytes, topk  of the model; queries: of a request in a step
    link_bytes_per_second    gather rate of a rank
    slots, hot_rows          of a rank; offloads: whether latent rows are in host memory
    """

    layers: int
    row_bytes: int
    topk: int
    queries: int
    link_bytes_per_second: float
    gpus_per_rank: int
    gpus_per_node: int
    slots: int
    hot_rows: int
    offloads: bool


class StepLog:
    """Records each round of each rank. begin() discards the rounds before it."""

    def __init__(self, requests: Requests, num_ranks: int, rank_facts: RankFacts):
        self._requests, self._num_ranks, self._rank = requests, num_ranks, rank_facts
        self._end = 0.0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Start to measure at `now`."""
        self._begin = now
        self._steps: list[tuple[float, int, int, int, float, float]] = []
        self._gaps: list[np.ndarray] = []
        self._gap_counts: list[np.ndarray] = []
        self._parts: dict[str, float] = {}
        self._prefill_seconds = self._in_turn = 0.0
        self.tokens = self.rows = self.lookups = 0

    def add(self, rank: int, now: float, done: Any, seconds: float, waiting: int) -> None:
        """Record that a rank's round `done` took `seconds`. Call it before last_token changes.

        waiting: requests without a place in the batch
        """
        table, batch = self._requests, done.requests
        if not len(batch):
            self._prefill_seconds += seconds
            return
        waited = seconds - done.seconds  # for slower ranks of its group
        for name, part in (*done.parts.items(), *([("wait", waited)] if waited > 0 else [])):
            self._parts[name] = self._parts.get(name, 0.0) + part
        self._in_turn += done.in_turn
        self._steps.append((now, rank, len(batch), waiting, done.misses, seconds))
        since = table.last_token[batch]
        later = np.isfinite(since)
        self._gaps.append((now - since[later]) / done.tokens[later])
        self._gap_counts.append(done.tokens[later])
        self.tokens += int(done.tokens.sum())
        self.rows += done.rows
        self.lookups += int(np.minimum(table.context_tokens[batch], self._rank.topk).sum())

    def end(self, now: float) -> None:
        """Stop to measure at `now`."""
        self._end = now

    @property
    def itl(self) -> np.ndarray:
        """Samples [tokens]: seconds between a token and the one before."""
        if not self._gaps:
            return np.zeros(0)
        return np.repeat(np.concatenate(self._gaps), np.concatenate(self._gap_counts))

    @property
    def ttft(self) -> np.ndarray:
        """Samples of the requests whose first token is in the measured part."""
        table = self._requests
        there = table.first_token > self._begin
        seconds: np.ndarray = (table.first_token - table.arrived)[there]
        return seconds

    @property
    def queueing(self) -> np.ndarray:
        """Samples of the requests that joined in the measured part."""
        waits: np.ndarray = self._requests.queued_s[self._requests.joined >= self._begin]
        return waits

    def results(self, system: str, ranks: Any, deferred: Mapping[str, int]) -> Results:
        """Return the figures. ranks: the DecodeRanks; deferred: counts of their admissions."""
        columns = np.array(self._steps).reshape(-1, 6).T
        series = Series(
            columns[0], columns[1].astype(int), columns[2].astype(int), columns[3].astype(int),
            columns[4], columns[5],
        )  # fmt: skip
        table, rank_facts = self._requests, self._rank
        seconds = max(self._end - self._begin, 0.0)
        steps, busy = len(series.batch), float(series.step_seconds.sum())
        rate = self.tokens / seconds if seconds else 0.0
        per_gpu = rate / (self._num_ranks * rank_facts.gpus_per_rank)
        num_bytes = self.rows * rank_facts.row_bytes
        capacity = seconds * self._num_ranks * rank_facts.link_bytes_per_second
        request_steps = int(series.batch.sum())
        lookups = self.lookups * rank_facts.layers * rank_facts.queries
        row_gib = rank_facts.layers * rank_facts.row_bytes / GIB if rank_facts.offloads else 0.0
        finished, refused = (
            int((table.state == state).sum()) for state in (State.FINISHED, State.REFUSED)
        )
        arrived = int(np.isfinite(table.arrived).sum())
        return Results(
            system=system,
            seconds=seconds,
            requests=arrived,
            finished=finished,
            unfinished=arrived - finished - refused,
            refused=refused,
            ttft=Percentiles.of(self.ttft),
            itl=Percentiles.of(self.itl),
            queueing=Percentiles.of(self.queueing),
            output_tokens=self.tokens,
            tokens_per_second=rate,
            tokens_per_second_per_gpu=per_gpu,
            tokens_per_second_per_node=per_gpu * rank_facts.gpus_per_node,
            steps=steps,
            batch_mean=float(series.batch @ series.step_seconds) / busy if busy else 0.0,
            batch_max=int(series.batch.max(initial=0)),
            misses=self.rows / (request_steps * rank_facts.layers) if request_steps else 0.0,
            hit_rate=1 - self.rows / lookups if lookups else 1.0,
            fetched_bytes=num_bytes,
            link_utilisation=num_bytes / capacity if capacity else 0.0,
            step_seconds=busy / steps if steps else 0.0,
            step_parts={name: part / steps for name, part in sorted(self._parts.items())},
            prefill_share=self._prefill_seconds / (seconds * self._num_ranks) if seconds else 0.0,
            retractions=sum(rank.retractions for rank in ranks),
            preempted=sum(rank.preempted for rank in ranks),
            deferred=dict(deferred),
            slots=rank_facts.slots,
            hot_rows=rank_facts.hot_rows,
            host_gib=rank_facts.slots * row_gib,
            peak_host_gib=max((rank.slots.peak for rank in ranks), default=0) * row_gib,
            in_turn_seconds=self._in_turn / steps if steps else 0.0,
            series=series,
        )
