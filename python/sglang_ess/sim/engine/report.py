"""What a simulation found: a log of its steps, and the frozen figures made of them."""

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
    """Of `count` samples; None where there are none."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None
    count: int

    @staticmethod
    def of(samples: np.ndarray) -> Percentiles:
        if not len(samples):
            return Percentiles(None, None, None, None, 0)
        values = np.percentile(samples, PERCENTS).tolist()
        return Percentiles(*values, float(np.mean(samples)), len(samples))


@dataclass(frozen=True)
class Series:
    """Every decode step of every rank, in order: columns [steps].

    seconds  at its end; rank; batch; waiting: with no place in the batch; misses: a request,
             layer and step; step_seconds: as long as it took, waiting for other ranks included
    """

    seconds: np.ndarray
    rank: np.ndarray
    batch: np.ndarray
    waiting: np.ndarray
    misses: np.ndarray
    step_seconds: np.ndarray


# Fields whose names in the JSON report differ.
JSON_NAMES = {"preempted": "shed", "deferred": "held"}


@dataclass(frozen=True)
class Results:
    """Figures of one system, over the measured part of a run.

    system          ess, one-tier or no-admission; seconds: measured, simulated time
    ttft, itl       seconds: arrival to the end of the first decode step; between two tokens of a
                    request, where the tokens of one step share the time since the one before
    queueing        seconds that a request waited in queues, retractions included
    tokens_per_second  output, of all simulated ranks; per_gpu and per_node: of decode GPUs
    batch_mean      weighted by time; misses: per request, layer and step
    hit_rate        of looked-up rows; link_utilisation: bytes over time and gather rate
    step_parts      mean seconds of a decode step by part; step_seconds is their sum
    prefill_share   of a decode rank's time that went into prompts (colocated)
    retractions     for want of slots; preempted: by the admission
    deferred        requests and rounds that the admission kept out, by reason
    slots, hot_rows of a rank; host_gib, peak_host_gib: its rows, pinned and in use at most
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
    series: Series = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the series as lists."""
        values = {JSON_NAMES.get(name, name): value for name, value in asdict(self).items()}
        values["series"] = {name: array.tolist() for name, array in vars(self.series).items()}
        return {"kind": "simulated", **values}


@dataclass(frozen=True)
class RankFacts:
    """What turns counts into rates: of one rank, whose GPUs share its rows alike.

    layers, row_bytes, topk  of the model; queries: of a request in a step
    link_bytes_per_second  gather rate of a rank
    slots, hot_rows  of a rank; offloads: whether latent rows are in host memory
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
    """Takes note of each round of each rank. begin() forgets what came before."""

    def __init__(self, requests: Requests, num_ranks: int, rank_facts: RankFacts):
        self._requests, self._num_ranks, self._rank = requests, num_ranks, rank_facts
        self._end = 0.0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """What is measured starts now."""
        self._begin = now
        self._steps: list[tuple[float, int, int, int, float, float]] = []
        self._gaps: list[np.ndarray] = []
        self._gap_counts: list[np.ndarray] = []
        self._parts: dict[str, float] = {}
        self._prefill_seconds = 0.0
        self.tokens = self.rows = self.lookups = 0

    def add(self, rank: int, now: float, done: Any, seconds: float, waiting: int) -> None:
        """A round of a rank has ended after so many seconds. Call before last_token is moved."""
        table, batch = self._requests, done.requests
        if not len(batch):
            self._prefill_seconds += seconds
            return
        waited = seconds - done.seconds  # for slower ranks of its group
        for name, part in (*done.parts.items(), *([("wait", waited)] if waited > 0 else [])):
            self._parts[name] = self._parts.get(name, 0.0) + part
        self._steps.append((now, rank, len(batch), waiting, done.misses, seconds))
        since = table.last_token[batch]
        later = np.isfinite(since)
        self._gaps.append((now - since[later]) / done.tokens[later])
        self._gap_counts.append(done.tokens[later])
        self.tokens += int(done.tokens.sum())
        self.rows += done.rows
        self.lookups += int(np.minimum(table.context_tokens[batch], self._rank.topk).sum())

    def end(self, now: float) -> None:
        self._end = now

    @property
    def itl(self) -> np.ndarray:
        """Raw samples [tokens]: seconds between a token and the one before."""
        if not self._gaps:
            return np.zeros(0)
        return np.repeat(np.concatenate(self._gaps), np.concatenate(self._gap_counts))

    @property
    def ttft(self) -> np.ndarray:
        """Raw samples of the requests whose first token is in the measured part."""
        table = self._requests
        there = table.first_token > self._begin
        return (table.first_token - table.arrived)[there]

    @property
    def queueing(self) -> np.ndarray:
        """Raw samples of the requests that joined in the measured part."""
        return self._requests.queued_s[self._requests.joined >= self._begin]

    def results(self, system: str, ranks: Any, deferred: Mapping[str, int]) -> Results:
        """The figures; ranks: DecodeRanks, for their counts; deferred: of their admissions."""
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
            series=series,
        )
