"""Every request of a simulation, as columns: where it is, what it has, and when things happened."""

from __future__ import annotations

import enum

import numpy as np

from sglang_ess.sim.inputs.arrivals import Workload


class State(enum.IntEnum):
    """Where a request is; each has one place that holds its requests."""

    AWAITED = 0  # its client has not sent it yet
    QUEUED = 1  # for a prefill rank
    PREFILL = 2
    INBOX = 3  # of a decode rank: wants slots there
    HAND_OFF = 4  # its rows are on their way into the host tier
    WAITING = 5  # has its rows there, waits to join
    RUNNING = 6
    FINISHED = 7
    REFUSED = 8  # longer than all the slots of a rank


class Requests:
    """Columns [n], by request number.

    input_tokens, output_tokens, prefix, prefix_tokens  as in Workload
    context_tokens  prompt and what was generated: the slots it has while it holds any
    generated, retractions, rank (-1 before it has one), state
    Seconds, nan until they happen: arrived, queued_s (sum of all waiting in queues, as it
    ends), joined, first_token, last_token; since: when the present wait began
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
