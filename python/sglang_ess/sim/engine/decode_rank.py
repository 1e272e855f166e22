"""One decode rank: its queues, its batch and its slots, round by round, as SGLang runs it.

A round preempts, admits, makes room and steps, in the order of SGLang's scheduler.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sglang_ess.admission.feed import LastStep
from sglang_ess.admission.policy import Candidate
from sglang_ess.sim.engine.admission_gate import AdmissionGate
from sglang_ess.sim.engine.fetches import Fetches
from sglang_ess.sim.engine.requests import Requests, State
from sglang_ess.sim.model.slots import Slots, whole_pages
from sglang_ess.tiers.topk_sample import SAMPLES

PREFILL = "prefill"  # name of a round's part that computes prompts


@dataclass(frozen=True)
class RankLimits:
    """Limits and options of a rank.

    num_slots        host rows of a layer; max_running: most requests of a batch
    reserved_tokens  free tokens needed for each decoding request and for the new one before the
                     new one gets its slots
    queries          verified tokens of a request in a step; accepted: mean tokens that it keeps
    colocated        the rank computes prompts between decode steps
    hands_off        rows travel over the network; False: they are there on arrival
    warmup           a joining request brings the rows that its prompt's end selected
    """

    num_slots: int
    max_running: int
    reserved_tokens: int
    queries: int = 1
    accepted: float = 1.0
    colocated: bool = False
    hands_off: bool = True
    warmup: bool = True


@dataclass(frozen=True)
class Round:
    """One round of a rank: a decode step, or the computation of prompts (colocated).

    requests [n] int64: the batch, empty for prompts; tokens [n] int64: that each request gains
    seconds  of this rank alone, the sum of parts
    rows     fetched rows; misses: mean per request and layer
    in_turn  the part `transfer` without early fetches, as in StepTime
    """

    requests: np.ndarray
    tokens: np.ndarray
    seconds: float
    parts: dict[str, float]
    rows: int = 0
    misses: float = 0.0
    in_turn: float = 0.0


def acceptance_probability(queries: int, accepted: float) -> float:
    """Return the probability p that a draft token is kept if those before it are.

    It solves 1 + p + p^2 + ... + p^(queries - 1) = accepted. The first token is always kept.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(middle**i for i in range(queries))
        low, high = (middle, high) if mean < accepted else (low, middle)
    return (low + high) / 2


def draw_kept(
    rng: np.random.Generator, requests: int, queries: int, probability: float
) -> np.ndarray:
    """Draw the tokens [requests] int64 that a verify step keeps. A rejected draft ends the row."""
    drawn = rng.random((requests, queries - 1)) < probability
    kept: np.ndarray = 1 + np.cumprod(drawn, axis=1).sum(1).astype(np.int64)
    return kept


class DecodeRank:
    """A rank's requests go inbox -> hand-off -> waiting -> running, and back when preempted.

    inbox    requests that need slots
    waiting  requests that have their slots (colocated: that need them, or still have some)
    running  the batch, oldest first
    """

    def __init__(
        self,
        limits: RankLimits,
        requests: Requests,
        cost: Any,
        fetches: Fetches,
        gate: AdmissionGate | None,
        rng: np.random.Generator,
    ):
        self.limits, self.requests, self.cost = limits, requests, cost
        self.fetches, self.gate, self._rng = fetches, gate, rng
        self._probability = acceptance_probability(limits.queries, limits.accepted)
        self.slots = Slots(limits.num_slots)
        self.inbox: deque[int] = deque()
        self.handing_off: int | None = None
        self.waiting: deque[int] = deque()
        self.running: list[int] = []
        self._returning: set[int] = set()  # requests that ran before and get no warm-up now
        self._prefixes: set[int] = set()  # shared prefixes that this rank has computed
        self._last: LastStep | None = None
        self.retractions = self.preempted = 0

    @property
    def load(self) -> int:
        """Number of requests that this rank serves or will serve."""
        handing_off = self.handing_off is not None
        return len(self.inbox) + handing_off + len(self.waiting) + len(self.running)

    # --- hand-off -----------------------------------------------------------------------

    def start_hand_off(self, now: float) -> float | None:
        """Give the inbox's head its slots. Returns the seconds until its rows arrive, or None.

        Hand-offs go one at a time, because they share the rank's network interface.
        """
        if self.handing_off is not None or not self.inbox:
            return None
        request = self.inbox[0]
        tokens = int(self.requests.context_tokens[request])
        if not self._has_room(self.slots.needs(request, tokens), self.slots.free):
            return None
        self.handing_off = self.inbox.popleft()
        self.requests.end_wait(request, State.HAND_OFF, now)
        self.slots.take(request, tokens)
        return self.cost.hand_off_seconds(tokens) if self.limits.hands_off else 0.0

    def finish_hand_off(self, now: float) -> None:
        """Move the request whose rows have arrived to the waiting ones."""
        request, self.handing_off = self.handing_off, None
        assert request is not None  # the event was made by start_hand_off
        self.requests.begin_wait(request, State.WAITING, now)
        self.waiting.append(request)

    def _has_room(self, need: int, free: int) -> bool:
        """Whether one more request may take `need` slots. A request alone always may."""
        active = len(self.running) + (0 if self.limits.colocated else len(self.waiting))
        return need + self.limits.reserved_tokens * (active + 1) <= free or not active

    # --- a round ------------------------------------------------------------------------

    def begin(self, now: float, last_seconds: float) -> Round | None:
        """Begin the next round; None if there is nothing to do. last_seconds: of the last round."""
        keep = self._keep(last_seconds)
        if keep < len(self.running):
            self.preempted += len(self.running) - keep
            self._retract(keep, now, parks=True)
        joined = self._join(now)
        if self.limits.colocated and joined:
            return self._prompts(joined)
        return self._step() if self._make_room(now) else None

    def _keep(self, last_seconds: float) -> int:
        last, self._last = self._last, None
        if self.gate is None:
            return len(self.running)
        if last is not None:
            last = replace(last, seconds=last_seconds)
        return self.gate.keep(len(self.running), last)

    def _retract(self, keep: int, now: float, parks: bool) -> None:
        """Take all but `keep` requests out of the batch, first those that have generated least.

        parks: they keep their slots and are the first to rejoin. A colocated rank always does
        that: the slots stay in the radix tree until others need them. A decode server that is
        out of slots copies the rows out; they return like a hand-off.
        """
        table = self.requests
        order = sorted(
            self.running, key=lambda r: (-table.generated[r], table.input_tokens[r])
        )  # SGLang's _get_decode_retraction_order
        kept = set(order[:keep])
        gone = [request for request in self.running if request not in kept]
        self.running = [request for request in self.running if request in kept]
        for request in reversed(gone):  # so that the oldest rejoins first
            self.fetches.leave(request)
            table.retractions[request] += 1
            self._returning.add(request)
            if parks or self.limits.colocated:
                table.begin_wait(request, State.WAITING, now)
                self.waiting.appendleft(request)
            else:
                self._send_back(request, now)

    def _send_back(self, request: int, now: float) -> None:
        self.requests.begin_wait(request, State.INBOX, now)
        self.slots.release(request)
        self.inbox.appendleft(request)

    # --- joining ------------------------------------------------------------------------

    def _join(self, now: float) -> list[tuple[int, int]]:
        """Let the queue's head join the batch. Returns [(request, its cached tokens)]."""
        most = min(self.limits.max_running - len(self.running), len(self.waiting))
        if self.gate is not None and self.waiting:
            head = map(self._candidate, itertools.islice(self.waiting, most))
            most = min(most, self.gate.admit(len(self.running), head, most))
        joined: list[tuple[int, int]] = []
        while len(joined) < most and self._fits(self.waiting[0]):
            request = self.waiting.popleft()
            tokens = int(self.requests.context_tokens[request])
            joined.append((request, self._cached(request)))
            self.slots.reclaim(self.slots.needs(request, tokens), self._reclaimable())
            self.slots.take(request, tokens)
            self.fetches.join(request, tokens, self._is_cold(request))
            self._returning.discard(request)
            self.running.append(request)
            self.requests.end_wait(request, State.RUNNING, now)
            if np.isnan(self.requests.joined[request]):
                self.requests.joined[request] = now
        return joined

    def _candidate(self, request: int) -> Candidate:
        return Candidate(int(self.requests.context_tokens[request]), cold=self._is_cold(request))

    def _is_cold(self, request: int) -> bool:
        """Whether the request joins without a warm-up.

        Colocated, the prompt's own pass warms the tier. Elsewhere the prefill server sends ids
        for it, once.
        """
        if self.limits.colocated:
            return not self.limits.warmup
        return not self.limits.warmup or request in self._returning

    def _reclaimable(self) -> Iterable[int]:
        """Waiting requests whose slots the radix tree can give up, in the order of eviction."""
        return reversed(self.waiting) if self.limits.colocated else ()

    def _fits(self, request: int) -> bool:
        """Whether the request's prompt gets slots. On a decode server it has them already."""
        if not self.limits.colocated:
            return True
        tokens = int(self.requests.context_tokens[request])
        # All other slots belong to waiting requests. A sum over the queue would take long.
        held = map(self.slots.held, [request, *self.running])
        reclaimable = self.slots.num_slots - self.slots.free - sum(held)
        return self._has_room(self.slots.needs(request, tokens), self.slots.free + reclaimable)

    def _cached(self, request: int) -> int:
        """Tokens of its context in the radix tree: its own, or a shared prefix."""
        table, prefix = self.requests, int(self.requests.prefix[request])
        shared = int(table.prefix_tokens[request]) if prefix in self._prefixes else 0
        own = min(self.slots.held(request), int(table.context_tokens[request]) - 1)
        return max(own, shared)

    def _prompts(self, joined: list[tuple[int, int]]) -> Round:
        """Compute the contexts of joining requests as far as they are not cached."""
        table = self.requests
        seconds = sum(
            self.cost.prefill_seconds(int(table.context_tokens[request]) - cached, cached)
            for request, cached in joined
        )
        self._prefixes.update(int(table.prefix[request]) for request, _ in joined)
        nobody = np.zeros(0, np.int64)
        return Round(nobody, nobody, seconds, {PREFILL: seconds})

    # --- the decode step ----------------------------------------------------------------

    def _make_room(self, now: float) -> bool:
        """Retract until the batch's next tokens have slots. Returns whether a batch is left."""
        while self.running:
            need = self._step_needs()
            self.slots.reclaim(need, self._reclaimable())
            if need <= self.slots.free:
                return True
            if len(self.running) > 1:
                self.retractions += 1
                self._retract(len(self.running) - 1, now, parks=False)
            elif self.waiting:
                request = self.waiting.pop()
                self.requests.end_wait(request, State.INBOX, now)
                self._send_back(request, now)
            else:
                return False  # the request in hand-off must come first and end
        return False

    def _step_needs(self) -> int:
        """Slots that the batch needs and does not hold yet, if every query's token is kept."""
        batch = np.array(self.running)
        table = self.requests
        most = np.minimum(self.limits.queries, table.remaining[batch])
        ends = table.context_tokens[batch] + most
        return sum(map(self.slots.needs, self.running, ends.tolist()))

    def _step(self) -> Round:
        table, batch = self.requests, np.array(self.running)
        count = len(batch)
        fetched = self.fetches.step(count)
        time = self.cost.step(count, float(table.context_tokens[batch].mean()), fetched.misses)
        kept = draw_kept(self._rng, count, self.limits.queries, self._probability)
        tokens = np.minimum(kept, table.remaining[batch])
        ends = (table.context_tokens[batch] + tokens).tolist()
        for request, end in zip(self.running, ends, strict=True):
            self.slots.take(request, end)
        if self.gate is not None:
            topk, totals = self.fetches.topk(self.gate.layer_index), self.fetches.totals
            self._last = LastStep(
                tuple(self.running), 0.0, lambda: totals, topk, ends[:SAMPLES],
                accepted=float(tokens.mean()),
            )  # fmt: skip
        misses = float(fetched.misses.mean())
        parts = dict(time.parts)
        return Round(batch, tokens, time.seconds, parts, fetched.rows, misses, time.in_turn)

    def finish(self, done: Round) -> list[int]:
        """End the round: deliver its tokens. Returns the requests that now have all of theirs."""
        table = self.requests
        table.context_tokens[done.requests] += done.tokens
        table.generated[done.requests] += done.tokens
        ended: list[int] = done.requests[table.remaining[done.requests] == 0].tolist()
        for request in ended:
            self.running.remove(request)
            self.fetches.leave(request)
            self.slots.release(request)
        return ended

    # --- checks -------------------------------------------------------------------------

    def check(self) -> None:
        """Check that slots are free or held, and that running requests hold what they need.

        Raises: RuntimeError.
        """
        self.slots.check()
        for request in self.running:
            tokens, held = int(self.requests.context_tokens[request]), self.slots.held(request)
            if not whole_pages(tokens) <= held <= whole_pages(tokens + self.limits.queries):
                raise RuntimeError(
                    f"a running request must hold the slots of its {tokens} tokens: request "
                    f"{request} holds {held}."
                )
