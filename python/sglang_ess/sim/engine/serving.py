"""Discrete events of one deployment: arrivals, prefill ranks, hand-off, decode ranks.

The times come from the cost model, the misses from fetches.py. decode_rank.py decides which
requests run; it asks the production admission.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_ess.sim.engine.decode_rank import DecodeRank, Round
from sglang_ess.sim.engine.report import StepLog
from sglang_ess.sim.engine.requests import Requests, State
from sglang_ess.sim.inputs.arrivals import Workload
from sglang_ess.sim.model.slots import whole_pages

# Order of events at one instant. A request that arrives as a round ends may join the next round.
ROUND_DONE, PREFILL_DONE, ARRIVAL, HAND_OFF_DONE, ROUND_BEGINS = range(5)


@dataclass(frozen=True)
class Flow:
    """How requests move.

    prefill_ranks  0: requests arrive with their rows, or the decode ranks compute the prompts
    colocated      the decode ranks compute the prompts
    closed         each request that ends lets a client send the next one
    lockstep       all decode ranks step together, as they do when they share experts
    """

    prefill_ranks: int = 0
    colocated: bool = False
    closed: bool = False
    lockstep: bool = True


@dataclass(frozen=True)
class Until:
    """When a run ends. With both None it ends with the last request.

    steps         decode steps of a rank; seconds: of simulated time
    settle_steps  first steps of a rank that are not measured
    """

    steps: int | None = None
    seconds: float | None = None
    settle_steps: int = 0


class _Group:
    """Decode ranks that step together."""

    def __init__(self, ranks: Sequence[int]):
        self.ranks = ranks
        self.rounds: dict[int, Round] = {}
        self.busy, self.steps, self.seconds = False, 0, 0.0


class Serving:
    """One deployment under one workload. run() runs it to the end and fills the log.

    cost: CostModel of the prefill ranks; ranks: decode ranks, which share `requests` with the log
    """

    def __init__(
        self,
        workload: Workload,
        requests: Requests,
        cost: Any,
        ranks: Sequence[DecodeRank],
        log: StepLog,
        flow: Flow | None = None,
        until: Until | None = None,
    ):
        self.requests, self.ranks, self.log = requests, list(ranks), log
        self._cost, self._until = cost, until or Until()
        self._flow = flow = flow or Flow()
        parts = [list(range(len(ranks)))] if flow.lockstep else [[i] for i in range(len(ranks))]
        self._groups = [_Group(part) for part in parts]
        self._group_of = {rank: group for group in self._groups for rank in group.ranks}
        self.now = 0.0
        self._events: list[tuple[float, int, int, Any]] = []
        self._count = 0
        self._queue: deque[int] = deque()
        self._prefilling: set[int] = set()
        self._prefixes: set[int] = set()  # computed by the prefill ranks
        self._ended = {State.FINISHED: 0, State.REFUSED: 0}
        self._is_settled = not self._until.settle_steps
        known = np.isfinite(workload.seconds)
        self._awaited = deque(np.flatnonzero(~known).tolist())
        for request in np.flatnonzero(known).tolist():
            self._at(float(workload.seconds[request]), ARRIVAL, request)

    # --- the loop -----------------------------------------------------------------------

    def run(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Run to the end. progress: called with `done` after every round."""
        handlers: dict[int, Callable[[Any], None]] = {
            ARRIVAL: self._arrive,
            PREFILL_DONE: self._prefilled,
            HAND_OFF_DONE: self._handed_off,
            ROUND_DONE: self._round_done,
            ROUND_BEGINS: self._begin_round,
        }
        limit = self._until.seconds or np.inf
        while self._events and not self._is_over():
            if self._events[0][0] > limit:
                self.now = limit
                break
            self.now, kind, _, argument = heapq.heappop(self._events)
            handlers[kind](argument)
            if kind == ROUND_DONE:
                progress(self.done)
        self.log.end(self.now)

    @property
    def total(self) -> int:
        """Final value of `done`: steps if they end the run, else requests."""
        return self._until.steps or len(self.requests)

    @property
    def done(self) -> int:
        """Steps or requests so far, see `total`."""
        if self._until.steps:
            return max(group.steps for group in self._groups)
        return sum(self._ended.values())

    def _is_over(self) -> bool:
        return self._until.steps is not None and self.done >= self._until.steps

    def _at(self, seconds: float, kind: int, argument: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (seconds, kind, self._count, argument))

    # --- before decode ------------------------------------------------------------------

    def _arrive(self, request: int) -> None:
        table = self.requests
        table.arrived[request] = self.now
        tokens = table.input_tokens[request] + table.output_tokens[request]
        if whole_pages(tokens) > self.ranks[0].limits.num_slots:
            table.state[request] = State.REFUSED
            self._end(State.REFUSED)
        elif self._flow.prefill_ranks:
            table.begin_wait(request, State.QUEUED, self.now)
            self._queue.append(request)
            self._prefill()
        else:
            self._route(request)

    def _prefill(self) -> None:
        """Let idle prefill ranks take one prompt each from the queue's head."""
        table = self.requests
        while self._queue and len(self._prefilling) < self._flow.prefill_ranks:
            request = self._queue.popleft()
            self._prefilling.add(request)
            table.end_wait(request, State.PREFILL, self.now)
            cached = 0
            if int(table.prefix[request]) in self._prefixes:
                cached = int(table.prefix_tokens[request])
            tokens = int(table.input_tokens[request])
            seconds = self._cost.prefill_seconds(tokens - cached, cached)
            self._at(self.now + seconds, PREFILL_DONE, request)

    def _prefilled(self, request: int) -> None:
        self._prefilling.discard(request)
        if self.requests.prefix[request] >= 0:
            self._prefixes.add(int(self.requests.prefix[request]))
        self._route(request)
        self._prefill()

    def _route(self, request: int) -> None:
        """Send the request to the decode rank with the fewest requests."""
        loads = [rank.load for rank in self.ranks]
        number = int(np.argmin(loads))
        rank = self.ranks[number]
        self.requests.rank[request] = number
        if self._flow.colocated:
            self.requests.begin_wait(request, State.WAITING, self.now)
            rank.waiting.append(request)
            self._wake(number)
        else:
            self.requests.begin_wait(request, State.INBOX, self.now)
            rank.inbox.append(request)
            self._hand_off(number)

    def _hand_off(self, number: int) -> None:
        seconds = self.ranks[number].start_hand_off(self.now)
        if seconds is not None:
            self._at(self.now + seconds, HAND_OFF_DONE, number)

    def _handed_off(self, number: int) -> None:
        self.ranks[number].finish_hand_off(self.now)
        self._hand_off(number)
        self._wake(number)

    # --- decode -------------------------------------------------------------------------

    def _wake(self, number: int) -> None:
        """Let an idle group begin a round after the other events of this instant."""
        group = self._group_of[number]
        if not group.busy:
            group.busy, group.seconds = True, 0.0
            self._at(self.now, ROUND_BEGINS, group)

    def _round_done(self, group: _Group) -> None:
        stepped = False
        for number, done in group.rounds.items():
            stepped |= len(done.requests) > 0
            self._take_in(number, done, group.seconds)
        group.steps += stepped
        if not self._is_settled and group.steps >= self._until.settle_steps:
            self._is_settled = True
            self.log.begin(self.now)
        for number in group.ranks:
            self._hand_off(number)
        self._at(self.now, ROUND_BEGINS, group)

    def _begin_round(self, group: _Group) -> None:
        rounds = {
            number: begun
            for number in group.ranks
            if (begun := self.ranks[number].begin(self.now, group.seconds)) is not None
        }
        group.rounds, group.busy = rounds, bool(rounds)
        if rounds:
            group.seconds = max(begun.seconds for begun in rounds.values())
            self._at(self.now + group.seconds, ROUND_DONE, group)
        for number in group.ranks:  # a request that was sent back may have made room
            self._hand_off(number)

    def _take_in(self, number: int, done: Round, seconds: float) -> None:
        """End a rank's round, which took `seconds`: deliver its tokens, end finished requests."""
        table, rank = self.requests, self.ranks[number]
        self.log.add(number, self.now, done, seconds, len(rank.waiting) + len(rank.inbox))
        table.last_token[done.requests] = self.now
        first = done.requests[np.isnan(table.first_token[done.requests])]
        table.first_token[first] = self.now
        for request in rank.finish(done):
            table.state[request] = State.FINISHED
            self._end(State.FINISHED)

    def _end(self, state: State) -> None:
        self._ended[state] += 1
        if self._flow.closed and self._awaited:
            self._at(self.now, ARRIVAL, self._awaited.popleft())

    # --- checks -------------------------------------------------------------------------

    def check(self) -> None:
        """Check that each request is in the place of its state, and that tokens and slots add up.

        Raises: RuntimeError, one line with every broken rule.
        """
        table = self.requests
        arriving = [event[3] for event in self._events if event[1] == ARRIVAL]
        places = {
            State.AWAITED: [*self._awaited, *arriving],
            State.QUEUED: list(self._queue),
            State.PREFILL: list(self._prefilling),
            State.INBOX: [r for rank in self.ranks for r in rank.inbox],
            State.HAND_OFF: [r.handing_off for r in self.ranks if r.handing_off is not None],
            State.WAITING: [r for rank in self.ranks for r in rank.waiting],
            State.RUNNING: [r for rank in self.ranks for r in rank.running],
        }
        problems = [
            f"requests in state {state.name} must be those in its place: got "
            f"{np.flatnonzero(table.state == state).tolist()[:8]} and {sorted(found)[:8]}"
            for state, found in places.items()
            if np.flatnonzero(table.state == state).tolist() != sorted(found)
        ]
        for state, count in self._ended.items():
            if (have := int((table.state == state).sum())) != count:
                problems.append(f"requests in state {state.name} must be {count}: got {have}")
        finished = table.state == State.FINISHED
        if (table.remaining[finished] != 0).any() or (table.remaining[~finished] < 1).any():
            problems.append("a request must be finished with its last token, and not before")
        if (table.context_tokens != table.input_tokens + table.generated).any():
            problems.append("a context must be a prompt and what was generated")
        for rank in self.ranks:
            rank.check()
        if problems:
            raise RuntimeError("; ".join(problems) + ".")
