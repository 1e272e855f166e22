"""Admission: how many requests may decode at once, given the hot tier and the host link.

A hot tier smaller than the running working sets misses more with each request, and past some
batch size one more request lowers the throughput (SparseServe, Figure 1: from batch 6 to 12 it
falls 1.73x). The head of the queue joins while both limits hold:

  hot tier  sharing x (sum of working sets) <= hot rows of a layer
  link      compute(n) + bytes(n) / bandwidth <= tokens per request and step x the
            inter-token-latency target, if one is set

The hot-tier limit does not bind while fetching everything that a step selects takes less than
MISS_SHARE of its compute time. It may also be exceeded when a larger batch is worth its misses:
the policy picks the smallest batch whose predicted n / (compute(n) + misses(n) / bandwidth) is
near the best. WorkingSets.missed predicts misses(n) from the growth of the working sets.

Every estimate has a feedback loop. Working sets are measured again in each window. compute(n) is
fitted to observed steps. When the hot tier thrashes all the same (rows are evicted a few steps
after their use, and a smaller batch is predicted to be faster), the policy preempts requests and
caps the batch until the tier has been healthy for a while.

Requests are admitted first come, first served. A request that runs alone always runs, so none
starves. The scheduler and the simulator drive the same object.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from sglang_ess.admission.step_fit import FloatArray, StepFit
from sglang_ess.admission.working_set import WorkingSets, blend

# Chosen by measurement (benchmarks/serving/pd_serving.py) unless a source is named.
REOPEN = 0.9  # share of a limit below which a refusal ends
MISS_DECAY = 0.9  # weight of older steps in the steady misses, per step
SLOW_START = 2  # compute(n) is not extrapolated beyond this multiple of the last batch
# Steps until a new request's misses are steady: see ESS, Figure 4.
JOIN_STEPS = 4
# Consecutive steps that may be ignored because of joins. Without pauses between joins, half of the
# steps still count.
JOIN_BUDGET = 32
THRASH_STEPS = 8  # settled steps before the tier is judged
# Mean eviction age in steps. It is a third of a window, whose union is less than two thirds of a
# working set: by the growth at PRIOR_TOPKS, 1.7 top-k's a request. HiSparse ships with 2 and 3.
THRASH_AGE = 4
THRASH_MISSES = 1 / 8  # of what a request selects in a step and layer; fewer misses cost nothing
COOLDOWN_STEPS = 24  # two windows, after which preempted requests no longer show in the means
MAX_PATIENCE = 32 * COOLDOWN_STEPS  # healthy steps before the cap rises
MISS_SHARE = 1 / 4  # fetching may add this share of a step's compute time before it counts
PREEMPT_FRACTION = 8  # 1/8 of the batch is preempted at once, one request at least
NEAR_BEST = 0.98  # take the smallest batch that reaches this share of the best tokens/s
# Exceed the working-set limit only if this share of the larger batch's predicted tokens/s still
# beats the largest batch that fits.
WORTH = 0.95
LOOK_AHEAD = 256  # queued requests considered: SGLang's largest batches

REASONS = HOT_TIER, LINK, THRASH = "hot tier", "link", "thrash"


@dataclass(frozen=True)
class AdmissionLimits:
    """The size of a decode server, and its latency target.

    hot_rows     hot rows per layer
    topk         slots that one query selects; queries: of a request in a decode step
    layers       layers with latent rows
    row_bytes    bytes of one row
    itl_seconds  inter-token-latency target; None: no limit on the link
    num_slots    slots of the host tier; with as many hot rows no row is ever evicted
    Raises: ValueError for a value that is not positive.
    """

    hot_rows: int
    topk: int
    layers: int
    row_bytes: int
    itl_seconds: float | None = None
    num_slots: int | None = None
    queries: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive: got {value}.")


@dataclass(frozen=True)
class Step:
    """Decode steps since the last observe, all of one batch size.

    steps        number of decode steps
    running      requests in each
    seconds      wall time of one step
    missed_rows  rows fetched, summed over steps and layers; evictions, evicted_age (in steps): too
    tokens       mean tokens per request and step; above 1 if drafts were accepted
    """

    steps: int
    running: int
    seconds: float
    missed_rows: int
    evictions: int
    evicted_age: int
    tokens: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A waiting request.

    tokens       context length
    working_set  lower bound of its working set in rows per layer, if known (warm-up ids)
    cold         whether none of its rows is hot
    """

    tokens: int
    working_set: int | None = None
    cold: bool = True


@dataclass(frozen=True)
class Decision:
    """The first `count` queued requests may join; `reason` names what stops the next, if any."""

    count: int
    reason: str | None


class Admission:
    """Decides how many requests join and how many go on; the caller runs a step in between.

    A refusal lasts until the load on the exhausted resource is below REOPEN of its limit.
    Preemption sets a cap on the batch. The cap rises by one after `patience` healthy steps;
    patience doubles with each preemption and halves when two rises follow each other, so that a
    correct cap is rarely exceeded.

    accept_length  tokens that a request gets in a step, mean of the last steps; 1 without drafts
    retractions  requests preempted since the start
    deferred     rounds in which a waiting request could not join, by reason
    """

    def __init__(self, limits: AdmissionLimits, link_bytes_per_second: float):
        self.limits = limits
        self.link(link_bytes_per_second)
        self._sets = WorkingSets(limits.topk, limits.queries)
        self._fit = StepFit()
        self._missed: float | None = None  # rows per request and step, all layers
        self.accept_length = 1.0  # tokens per request and step
        self._running = self._observed_running = 0
        self._unsettled = self._passed_over = 0  # steps
        self._recent: deque[Step] = deque()
        self._closed: str | None = None
        self._cap: int | None = None
        self._cooldown = self._healthy = 0  # steps
        self._patience, self._has_risen = COOLDOWN_STEPS // 2, False
        self.retractions = 0
        self.deferred = dict.fromkeys(REASONS, 0)

    # --- what is observed ---------------------------------------------------------------

    def link(self, bytes_per_second: float) -> None:
        """Set the measured host-to-device bandwidth. Raises: ValueError unless it is positive."""
        if not bytes_per_second > 0:
            raise ValueError(f"link bandwidth must be positive: got {bytes_per_second} B/s.")
        self.link_bytes_per_second = bytes_per_second

    def observe_working_sets(
        self,
        tokens_and_rows: Sequence[tuple[int, int]],
        sharing: float,
        growth: Sequence[int] = (),
    ) -> None:
        """Take a window of sampled requests.

        tokens_and_rows: of each, its context length and its distinct rows; sharing, growth: as
            in WindowCounts
        """
        self._sets.observe(tokens_and_rows, sharing, self._running, growth)

    def observe(self, step: Step) -> None:
        """Take the steps since the last call. Steps with cold new requests are ignored."""
        if step.steps < 1 or step.running < 1:
            return
        rose = step.running > self._observed_running
        self._running = self._observed_running = step.running
        self._cooldown = max(0, self._cooldown - step.steps)
        if rose and self._passed_over < JOIN_BUDGET:
            self._unsettled = JOIN_STEPS
        if self._unsettled > 0:
            self._unsettled -= step.steps
            self._passed_over += step.steps
            return
        self._passed_over = max(0, self._passed_over - step.steps)
        missed = step.missed_rows / step.steps
        seconds = max(0.0, step.seconds - self._copy_seconds(missed))
        self._fit.add(step.running, seconds, step.steps)
        news = np.array([missed / step.running, step.tokens])
        olds = news if self._missed is None else np.array([self._missed, self.accept_length])
        self._missed, self.accept_length = blend(olds, news, 1 - MISS_DECAY**step.steps).tolist()
        self._recent.append(step)
        while self._recent_steps - self._recent[0].steps >= THRASH_STEPS:
            self._recent.popleft()
        self._raise_cap(step.steps)

    def _raise_cap(self, steps: int) -> None:
        self._healthy = 0 if self.is_thrashing else self._healthy + steps
        if self._cap is None or self._healthy < self._patience:
            return
        self._cap, self._healthy = self._cap + 1, 0
        if self._has_risen:
            self._patience = max(COOLDOWN_STEPS, self._patience // 2)
        self._has_risen = True

    # --- decisions ----------------------------------------------------------------------

    def admit(
        self, running: int, waiting: Iterable[Candidate], within: int = LOOK_AHEAD
    ) -> Decision:
        """Decide how many requests at the head of the queue join in the next step.

        running: requests in decode, including admitted ones without a step yet (PD transfers)
        waiting: the head of the queue, as many requests as the batch has places for; iterated
            only as far as requests are admitted or a larger batch is considered
        within: queued requests that may find slots; no larger batch is considered
        """
        self._running = running
        waiting, ahead = itertools.tee(waiting)
        rows = first_rows = running * self._sets.mean
        count, cold, reason, best = 0, 0, None, None
        for candidate in waiting:
            batch, misses = running + count, 1.0
            more_rows, more_cold = rows + self._rows(candidate), cold + candidate.cold
            fits = batch == 0 or self._hot_tier_holds(batch, rows, more_rows)
            if not fits:
                if best is None:
                    more = itertools.islice(ahead, count, min(within, LOOK_AHEAD))
                    best = self.best_batch(batch, rows, more)
                fits = batch < best
                misses = self._misses_against(more_rows, batch + 1, first_rows, running)
            reason = self._refusal(batch, fits, more_cold, misses)
            if reason is not None:
                self.deferred[reason] += 1
                self._closed = self._closed if reason == THRASH else reason
                break
            rows, count, cold, self._closed = more_rows, count + 1, more_cold, None
        if count:
            # No window has measured the new requests yet.
            self._sets.mean = rows / (running + count)
        return Decision(count, reason)

    def _rows(self, candidate: Candidate) -> float:
        return self._sets.estimate(candidate.tokens, candidate.working_set)

    def _refusal(self, running: int, has_hot_rows: bool, cold: int, misses: float) -> str | None:
        """Return why a request may not join `running` others, or None.

        cold: of the joining requests, this one included, that have no hot row
        misses: rows that each request will miss, relative to those observed
        """
        if running == 0:
            return None
        if not has_hot_rows:
            return HOT_TIER
        if not self._link_carries(running, cold, misses):
            return LINK
        return THRASH if self._cap is not None and running >= self._cap else None

    # --- tokens a second ----------------------------------------------------------------

    def _rate(self, batch: FloatArray, rows: FloatArray, hot_rows: float) -> FloatArray:
        """Predict requests served per second, for batches whose working sets sum to `rows`."""
        missed = self.limits.layers * self._sets.missed(rows, hot_rows)
        seconds = self._fit.seconds(batch, is_hopeful=True) + self._copy_seconds(missed)
        rates: FloatArray = batch / np.maximum(seconds, 1e-9)
        return rates

    def _misses_against(self, rows: float, batch: int, old_rows: float, old_batch: int) -> float:
        """Return the misses of a request in a larger batch relative to a smaller one: >= 1."""
        hot_rows = self.limits.hot_rows
        if not old_batch:
            return 1.0
        of_one = float(self._sets.missed(rows, hot_rows)) / batch
        of_old = float(self._sets.missed(old_rows, hot_rows)) / old_batch
        return max(1.0, of_one / max(of_old, 1e-9))

    def best_batch(self, running: int, rows: float, waiting: Iterable[Candidate]) -> int:
        """Return the smallest of the fastest batches that the head of the queue can make.

        The present batch, if none is faster than the largest batch whose working sets fit.
        """
        if not self._fit.last:
            return running
        batch = running + np.arange(1 + len(more := [self._rows(c) for c in waiting]))
        rates = self._rate(batch, rows + np.cumsum([0.0, *more]), self.limits.hot_rows)
        fits = self.limits.hot_rows / self._demand(rows)  # of these requests
        fitting = self._rate(np.array(fits * running), np.array(fits * rows), self.limits.hot_rows)
        if WORTH * rates.max() <= fitting:
            return running
        best = running + int(np.argmax(rates >= NEAR_BEST * rates.max()))
        # While the slope is unknown, grow by one to measure it.
        return best if self._fit.has_varied else min(best, self._fit.last + 1)

    def best_to_keep(self, running: int) -> int:
        """Return the largest near-fastest batch, up to this one, at the present eviction age."""
        rows = self._sets.mean * np.arange(1, running + 1)
        hot_rows: float = self.limits.hot_rows
        if (age := self.eviction_age) is not None:
            hot_rows = min(hot_rows, self._sets.held_steps(age) * self._demand(rows[-1]))
        rates = self._rate(np.arange(1, running + 1), rows, hot_rows)
        missed = sum(step.missed_rows for step in self._recent) / max(1, self._recent_steps)
        seconds = self._fit.seconds(running) + self._copy_seconds(missed)
        rates[-1] = running / max(seconds, 1e-9)
        if rates[-1] >= REOPEN * rates.max():
            return running
        return 1 + int(np.flatnonzero(rates >= NEAR_BEST * rates.max())[-1])

    @overload
    def _copy_seconds(self, rows: float) -> float: ...

    @overload
    def _copy_seconds(self, rows: FloatArray) -> FloatArray: ...

    def _copy_seconds(self, rows: float | FloatArray) -> float | FloatArray:
        """Return the seconds that the link needs for `rows` rows."""
        return rows * self.limits.row_bytes / self.link_bytes_per_second

    def _misses_hurt(self, running: int) -> bool:
        """Return whether a batch whose every lookup misses would be slow."""
        worst = running * self.limits.layers * self._sets.step_rows
        return not self._fit.last or self._is_slow(running, worst)

    def _is_slow(self, running: int, missed: float) -> bool:
        """Return whether fetching `missed` rows takes a relevant share of a step's compute time."""
        return self._copy_seconds(missed) >= MISS_SHARE * self._fit.seconds(running)

    def _hot_tier_holds(self, running: int, rows: float, new_rows: float) -> bool:
        """Return whether one more request finds hot rows, or does not need them."""
        hot_rows, num_slots = self.limits.hot_rows, self.limits.num_slots
        if num_slots is not None and hot_rows >= num_slots:
            return True
        if not self._misses_hurt(running + 1):
            return True
        if self._closed == HOT_TIER and self._demand(rows) >= REOPEN * hot_rows:
            return False
        return self._demand(new_rows) <= hot_rows

    def _demand(self, rows: float) -> float:
        """Return the hot rows for working sets that sum to `rows`; shared rows count once."""
        return self._sets.sharing * rows

    def _link_carries(self, running: int, cold: int, misses: float) -> bool:
        """Return whether a step with one more request, `cold` of them new, meets the target."""
        if self.limits.itl_seconds is None:
            return True
        target = self.limits.itl_seconds * self.accept_length  # seconds of a step
        if self._closed == LINK and self._step_seconds(running) >= REOPEN * target:
            return False
        if running >= SLOW_START * self._fit.last:
            return False
        if self._step_seconds(running + 1, cold, misses) <= target:
            return True
        # With an assumed slope, a 30 ms step at n = 1 and a 50 ms target would stay at n = 1 for
        # ever. So admit one more if it fits with a slope of 0; that step measures the slope.
        fetch_seconds = self._fetch_seconds(running + 1, cold, misses)
        flat_seconds = self._fit.seconds(running) + fetch_seconds
        return not self._fit.has_varied and flat_seconds <= REOPEN * target

    def _fetch_seconds(self, running: int, cold: int, misses: float) -> float:
        rows = (
            running * misses * (self._missed or 0.0)
            + cold * self.limits.layers * self._sets.step_rows
        )
        return self._copy_seconds(rows)

    def _step_seconds(self, running: int, cold: int = 0, misses: float = 1.0) -> float:
        return self._fit.seconds(running) + self._fetch_seconds(running, cold, misses)

    def keep(self, running: int) -> int:
        """Return how many running requests should go on: all, unless the hot tier thrashes."""
        self._running = running
        if running <= 1 or self._cooldown > 0 or not self.is_thrashing:
            return running
        # The working sets say what fits. If all do, they are under-estimated.
        fitting = int(self.limits.hot_rows / max(1.0, self._demand(self._sets.mean)))
        fitting = max(fitting, self.best_to_keep(running))
        kept = max(1, min(running - max(1, running // PREEMPT_FRACTION), fitting))
        self._cap, self._cooldown, self._healthy = kept, COOLDOWN_STEPS, 0
        self._patience, self._has_risen = min(MAX_PATIENCE, 2 * self._patience), False
        self._recent.clear()
        self.retractions += running - kept
        return kept

    # --- figures ------------------------------------------------------------------------

    @property
    def _recent_steps(self) -> int:
        return sum(step.steps for step in self._recent)

    @property
    def working_set_rows(self) -> float:
        """Mean working set of a running request, in rows per layer."""
        return self._sets.mean

    @property
    def hot_tier_demand(self) -> float:
        """Hot rows per layer that the running requests need."""
        return self._demand(self._running * self._sets.mean)

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a step of the running requests."""
        return self._step_seconds(self._running)

    @property
    def eviction_age(self) -> float | None:
        """Mean age of the recent evictions in steps; None without any."""
        evictions = sum(step.evictions for step in self._recent)
        return sum(step.evicted_age for step in self._recent) / evictions if evictions else None

    @property
    def is_thrashing(self) -> bool:
        """Whether rows are evicted soon after their use and the misses slow decode down."""
        age = self.eviction_age
        if age is None or age >= THRASH_AGE or self._recent_steps < THRASH_STEPS:
            return False
        lookup_steps = sum(step.steps * step.running for step in self._recent)
        missed = sum(step.missed_rows for step in self._recent)
        running = self._recent[-1].running
        if running <= 1 or not self._is_slow(running, missed / self._recent_steps):
            return False
        selected = lookup_steps * self.limits.layers * self._sets.step_rows
        if missed <= THRASH_MISSES * selected:
            return False
        return self.best_to_keep(running) < running
