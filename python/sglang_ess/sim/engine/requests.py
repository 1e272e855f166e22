"""All requests of a simulation as columns: place, tokens, and times of events."""

from __future__ import annotations

import enum

import numpy as np

from sglang_ess.sim.inputs.arrivals import Workload


class State(enum.IntEnum):
    """Where a request is. Each state has one place that holds its requests."""

    AWAITED = 0  # its client has not sent it yet
    QUEUED = 1  # waits for a prefill rank
    PREFILL = 2
    INBOX = 3  # waits for slots of a decode rank
    HAND_OFF = 4  # its rows are on their way into the host tier
    WAITING = 5  # has its rows in the host tier and waits to join the batch
    RUNNING = 6
    FINISHED = 7
    REFUSED = 8  # has more tokens than a rank has slots


class Requests:
    """Columns [n] by request number.

    input_tokens, output_tokens, prefix, prefix_tokens  as in Workload
    context_tokens  prompt and generated tokens
    generated, retractions: counts; rank: -1 before it has one; state: see State
    arrived, joined, first_token, last_token  seconds of these events, nan before them
    queued_s  seconds in queues so far, added when a wait ends; since: begin of the current wait
    """

    def __init__(self, workload: Workload):
        count = len(workload)
        self.input_tokens = workload.input_tokens
        self.output_tokens = workload.output_tokens
        self.prefix, self.prefix_tokens = workload.prefix, workload.prefix_tokens
        self.context_tokens = workload.input_tokens.copy()
        self.generated, self.retractions = np.zeros((2, count), np.int64)
        self.rank = np.full(count, -1, np.int64)
        self.state = np.full(count, State.AWAITED, np.int8)
        self.arrived, self.joined, self.first_token, self.last_token = np.full((4, count), np.nan)
        self.since, self.queued_s = np.zeros((2, count))

    def __len__(self) -> int:
        return len(self.state)

    def begin_wait(self, request: int, state: State, now: float) -> None:
        self.state[request], self.since[request] = state, now

    def end_wait(self, request: int, state: State, now: float) -> None:
        self.queued_s[request] += now - self.since[request]
        self.state[request] = state

    @property
    def remaining(self) -> np.ndarray:
        return self.output_tokens - self.generated
