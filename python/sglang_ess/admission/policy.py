"""Admission: how many requests the hot tier and the host link carry at once. Policy only.

A hot tier smaller than the working sets of what runs misses more with each request, and past
some batch one more lowers the throughput (papers.md 2.1: batch 6 -> 12, down 1.73x).
So the head of the queue joins while
  hot tier  sharing x (sum of working sets) <= hot rows of a layer, and
  link      compute(n) + bytes(n) / bandwidth <= tokens of a request in a step
            x the inter-token-latency target, if one is set.
The first does not bind where fetching all that a step selects would take less than MISS_SHARE
of its computing, nor where a larger batch is worth its misses: of all batches that the queue
makes, the least that brings nearly the most  n / (compute(n) + misses(n) / bandwidth). What n
requests miss follows from how their working sets grew step by step (WorkingSets.missed).
No figure is exact, so each has its feedback: sizes are measured again in every window,
compute(n) is fitted to observed steps, and a hot tier that thrashes all the same (rows evicted
a few steps after their use, and fewer requests would bring more) sheds requests and caps the
batch until it has been healthy.
First come, first served, with no overtaking; alone, a request always runs: so none starves.

Nothing here knows of SGLang: the scheduler and the simulator drive the same object.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_ess.admission.working_set import WorkingSets, blend

# Without a source of their own: chosen, see benchmarks/serving/pd_serving.py.
REOPEN = 0.9  # of a limit, below which a refusal ends
FIT_DECAY = 0.98  # per step, of older steps in compute(n)
FIT_SPREAD = 0.1  # standard deviation of n / mean n, at which the fit is half proportional
MISS_DECAY = 0.9  # per step, of older steps in the steady misses
SLOW_START = 2  # times the batch last observed: compute(n) is not extrapolated beyond
# ESS, papers.md 1.5: a joiner's misses decay to steady state "within a handful of steps".
JOIN_STEPS = 4
JOIN_BUDGET = 32  # steps in a row so passed over: where joins never pause, half still count
THRASH_STEPS = 8  # settled steps that a verdict takes
# Steps, mean eviction age: a third of a window, whose union is under two thirds of a working
# set. By the curve at PRIOR_TOPKS that is 1.7 top-k's a request; HiSparse ships with 2 and 3.
THRASH_AGE = 4
THRASH_MISSES = 1 / 8  # of a top-k, per request, step and layer: fewer cost nothing
COOLDOWN_STEPS = 24  # two windows of working sets: what was preempted shows in their means
MAX_PATIENCE = 32 * COOLDOWN_STEPS  # healthy steps before the cap rises, at most
MISS_SHARE = 1 / 4  # of a step's computing: what fetching may add before it counts
PREEMPT_FRACTION = 8  # 1 / of the batch is preempted at once, one request at least
NEAR_BEST = 0.98  # of the most tokens a second: beyond, the least batch that comes so near
WORTH = 0.95  # of its tokens a second is more than those of a batch that fits
LOOK_AHEAD = 256  # of the queue: SGLang's largest batches

REASONS = HOT_TIER, LINK, THRASH = "hot tier", "link", "thrash"


@dataclass(frozen=True)
class AdmissionLimits:
    """What a decode server has.

    hot_rows     per layer; num_slots: of the host tier: with no fewer hot rows, none is evicted
    topk         slots of one query; layers: with rows; row_bytes: of one row
    itl_seconds  inter-token-latency target, or None for no limit on the link
    Raises: ValueError for one that is not positive.
    """

    hot_rows: int
    topk: int
    layers: int
    row_bytes: int
    itl_seconds: float | None = None
    num_slots: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive: got {value}.")


@dataclass(frozen=True)
class Step:
    """What happened since the last observe.

    steps        decode steps; running: requests in them; seconds: wall time of one
    missed_rows  fetched, evictions and evicted_age (in steps): sums over steps and layers
    tokens       that a request got in a step, on average: more than one if drafts were accepted
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

    working_set: rows a layer that it has at least, if known (warm-up ids); cold: none hot
    """

    tokens: int
    working_set: int | None = None
    cold: bool = True


@dataclass(frozen=True)
class Decision:
    """count: of the head of the queue may join now; reason: why the next may not, or None."""

    count: int
    reason: str | None


class StepFit:
    """compute(n) = a + b n seconds, a and b >= 0: exponentially weighted least squares.

    Steps of one n alone say nothing of b. compute(n) = b n then is the cautious end of what
    they allow; the ridge draws b there, the more the less n varied.
    """

    def __init__(self):
        self._sums = np.zeros(5)
        self.last = 0  # n of the newest step

    def add(self, n: int, seconds: float, steps: int) -> None:
        self._sums *= FIT_DECAY**steps
        self._sums += steps * np.array([1, n, n * n, seconds, n * seconds])
        self.last = n

    def _moments(self) -> tuple[float, float, float, float]:
        """Mean of n and of seconds, variance of n, and their covariance."""
        n, nn, seconds, n_seconds = self._sums[1:] / self._sums[0]
        return n, seconds, max(0.0, nn - n * n), n_seconds - n * seconds

    @property
    def has_varied(self) -> bool:
        """Whether the slope is measured rather than assumed."""
        if not self.last:
            return False
        mean, _, variance, _ = self._moments()
        return variance > (FIT_SPREAD * mean) ** 2

    def seconds(self, n, is_hopeful: bool = False):
        """Of a step of n requests, a number or an array; 0 before the first observed.

        is_hopeful: a slope that is not measured is taken as none
        """
        if not self.last:
            return 0.0 * n
        mean, seconds, variance, covariance = self._moments()
        if is_hopeful and not self.has_varied:
            return seconds + 0.0 * n
        proportional, ridge = seconds / mean, (FIT_SPREAD * mean) ** 2
        slope = (covariance + ridge * proportional) / (variance + ridge)
        return seconds + min(max(slope, 0.0), proportional) * (n - mean)


class Admission:
    """The decisions, and what they rest on. The caller runs one step between two of them.

    A refusal lasts until the load of what ran out is below REOPEN of its limit. Preempting sets
    `cap`; it rises by one after `patience` healthy steps, which doubles each time and
    halves when two rises follow each other: so a cap that is right is seldom tried.
    """

    def __init__(self, limits: AdmissionLimits, link_bytes_per_second: float):
        self.limits = limits
        self.link(link_bytes_per_second)
        self._sets = WorkingSets(limits.topk)
        self._fit = StepFit()
        self._missed: float | None = None  # rows per request and step, all layers
        self._tokens = 1.0  # per request and step
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
        """The host-to-device bandwidth, measured anew. Raises: ValueError if not positive."""
        if not bytes_per_second > 0:
            raise ValueError(f"link bandwidth must be positive: got {bytes_per_second} B/s.")
        self.link_bytes_per_second = bytes_per_second

    def observe_working_sets(
        self,
        tokens_and_rows: Sequence[tuple[int, int]],
        sharing: float,
        growth: Sequence[int] = (),
    ) -> None:
        """A window of sampled requests: (tokens, distinct rows) of each; WindowCounts' others."""
        self._sets.observe(tokens_and_rows, sharing, self._running, growth)

    def observe(self, step: Step) -> None:
        """The steps since the last call. Those in which joiners are cold count for nothing."""
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
        olds = news if self._missed is None else (self._missed, self._tokens)
        self._missed, self._tokens = blend(olds, news, 1 - MISS_DECAY**step.steps).tolist()
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
        """How many of the head of the queue may join the running requests in the next step.

        running counts those admitted before that have not had a step yet (PD transfers).
        waiting: of the queue's head as many as have a place in the batch: while they are admitted
        they are walked, and those that could not join would only blur what is known of the batch
        within: as many of the queue as may find slots; only so many make a larger batch
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
            # The joiners are in no window yet.
            self._sets.mean = rows / (running + count)
        return Decision(count, reason)

    def _rows(self, candidate: Candidate) -> float:
        return self._sets.estimate(candidate.tokens, candidate.working_set)

    def _refusal(self, running: int, has_hot_rows: bool, cold: int, misses: float) -> str | None:
        """Why a request may not join `running` others: `cold` of the joiners have no hot row, and
        then each misses so many times what was observed.
        """
        if running == 0:
            return None
        if not has_hot_rows:
            return HOT_TIER
        if not self._link_carries(running, cold, misses):
            return LINK
        return THRASH if self._cap is not None and running >= self._cap else None

    # --- tokens a second ----------------------------------------------------------------

    def _rate(self, batch: np.ndarray, rows: np.ndarray, hot_rows: float) -> np.ndarray:
        """Requests that a step serves per second, in batches whose working sets sum to rows."""
        missed = self.limits.layers * self._sets.missed(rows, hot_rows)
        seconds = self._fit.seconds(batch, is_hopeful=True) + self._copy_seconds(missed)
        return batch / np.maximum(seconds, 1e-9)

    def _misses_against(self, rows: float, batch: int, old_rows: float, old_batch: int) -> float:
        """What a request of a larger batch misses, in misses of a smaller one's: 1 or more."""
        hot_rows = self.limits.hot_rows
        if not old_batch:
            return 1.0
        of_one = float(self._sets.missed(rows, hot_rows)) / batch
        of_old = float(self._sets.missed(old_rows, hot_rows)) / old_batch
        return max(1.0, of_one / max(of_old, 1e-9))

    def best_batch(self, running: int, rows: float, waiting: Iterable[Candidate]) -> int:
        """The least batch among the fastest of those that the queue's head makes, for all its
        misses; this one, if they are not faster than one whose working sets fit.
        """
        if not self._fit.last:
            return running
        batch = running + np.arange(1 + len(more := [self._rows(c) for c in waiting]))
        rates = self._rate(batch, rows + np.cumsum([0.0, *more]), self.limits.hot_rows)
        fits = self.limits.hot_rows / self._demand(rows)  # of these requests
        fitting = self._rate(fits * running, fits * rows, self.limits.hot_rows)
        if WORTH * rates.max() <= fitting:
            return running
        best = running + int(np.argmax(rates >= NEAR_BEST * rates.max()))
        # One more shows the slope, where it is not known.
        return best if self._fit.has_varied else min(best, self._fit.last + 1)

    def best_to_keep(self, running: int) -> int:
        """The largest batch, up to this one, that is among the fastest as rows are evicted now."""
        rows = self._sets.mean * np.arange(1, running + 1)
        hot_rows = self.limits.hot_rows
        if (age := self.eviction_age) is not None:
            hot_rows = min(hot_rows, self._sets.held_steps(age) * self._demand(rows[-1]))
        rates = self._rate(np.arange(1, running + 1), rows, hot_rows)
        missed = sum(step.missed_rows for step in self._recent) / max(1, self._recent_steps)
        seconds = self._fit.seconds(running) + self._copy_seconds(missed)
        rates[-1] = running / max(seconds, 1e-9)
        if rates[-1] >= REOPEN * rates.max():
            return running
        return 1 + int(np.flatnonzero(rates >= NEAR_BEST * rates.max())[-1])

    def _copy_seconds(self, rows):
        return rows * self.limits.row_bytes / self.link_bytes_per_second

    def _misses_hurt(self, running: int) -> bool:
        """Whether a hot tier that holds none of what it should would slow this batch down."""
        worst = running * self.limits.layers * self.limits.topk
        return not self._fit.last or self._is_slow(running, worst)

    def _is_slow(self, running: int, missed: float) -> bool:
        """Whether so many missed rows a step count beside its computing."""
        return self._copy_seconds(missed) >= MISS_SHARE * self._fit.seconds(running)

    def _hot_tier_holds(self, running: int, rows: float, new_rows: float) -> bool:
        """Whether one more has its rows hot too, or can do without."""
        hot_rows, num_slots = self.limits.hot_rows, self.limits.num_slots
        if num_slots is not None and hot_rows >= num_slots:
            return True
        if not self._misses_hurt(running + 1):
            return True
        if self._closed == HOT_TIER and self._demand(rows) >= REOPEN * hot_rows:
            return False
        return self._demand(new_rows) <= hot_rows

    def _demand(self, rows: float) -> float:
        """Hot rows that working sets of this sum take: what requests share counts once."""
        return self._sets.sharing * rows

    def _link_carries(self, running: int, cold: int, misses: float) -> bool:
        """Whether a step of one more keeps the latency target, `cold` of them joining now."""
        if self.limits.itl_seconds is None:
            return True
        target = self.limits.itl_seconds * self._tokens  # of a step, whose tokens share it
        if self._closed == LINK and self._step_seconds(running) >= REOPEN * target:
            return False
        if running >= SLOW_START * self._fit.last:
            return False
        if self._step_seconds(running + 1, cold, misses) <= target:
            return True
        # Assumed proportional, a step of 30 ms at n = 1 would keep a target of 50 ms at n = 1
        # for ever: one more shows the slope, if it fits should the slope be none. One, for
        # with it the assumed step is past REOPEN.
        fetch_seconds = self._fetch_seconds(running + 1, cold, misses)
        flat_seconds = self._fit.seconds(running) + fetch_seconds
        return not self._fit.has_varied and flat_seconds <= REOPEN * target

    def _fetch_seconds(self, running: int, cold: int, misses: float) -> float:
        rows = (
            running * misses * (self._missed or 0.0) + cold * self.limits.layers * self.limits.topk
        )
        return self._copy_seconds(rows)

    def _step_seconds(self, running: int, cold: int = 0, misses: float = 1.0) -> float:
        return self._fit.seconds(running) + self._fetch_seconds(running, cold, misses)

    def keep(self, running: int) -> int:
        """How many of the running requests should go on: all, unless the hot tier thrashes."""
        self._running = running
        if running <= 1 or self._cooldown > 0 or not self.is_thrashing:
            return running
        # What fits by the working sets; if that is all of them, they are under-estimated.
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
        """Rows a layer, mean per running request."""
        return self._sets.mean

    @property
    def hot_tier_demand(self) -> float:
        """Rows a layer that the running requests want hot."""
        return self._demand(self._running * self._sets.mean)

    @property
    def step_seconds(self) -> float:
        """Predicted for the requests that run now."""
        return self._step_seconds(self._running)

    @property
    def eviction_age(self) -> float | None:
        """Steps, mean of the recent evictions; None without any."""
        evictions = sum(step.evictions for step in self._recent)
        return sum(step.evicted_age for step in self._recent) / evictions if evictions else None

    @property
    def is_thrashing(self) -> bool:
        """Whether recent rows were evicted when just used, at a rate of misses that hurts."""
        age = self.eviction_age
        if age is None or age >= THRASH_AGE or self._recent_steps < THRASH_STEPS:
            return False
        lookup_steps = sum(step.steps * step.running for step in self._recent)
        missed = sum(step.missed_rows for step in self._recent)
        running = self._recent[-1].running
        if running <= 1 or not self._is_slow(running, missed / self._recent_steps):
            return False
        if missed <= THRASH_MISSES * self.limits.topk * self.limits.layers * lookup_steps:
            return False
        return self.best_to_keep(running) < running
