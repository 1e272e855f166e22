"""Feeds decode steps to the admission policy.

The server (scheduler_gate.py) and the simulator (sim/engine/admission_gate.py) share it, so the
simulator gives the policy the same observations as the server.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_ess.admission.policy import Admission, Step
from sglang_ess.admission.working_set import WorkingSetWindow

OBSERVED_STEPS = 4  # consecutive steps of one batch size that make one observation


@dataclass(frozen=True)
class Totals:
    """Missed rows, evictions and evicted ages (sum, in steps) of all layers since the start."""

    misses: int = 0
    evictions: int = 0
    evicted_age: int = 0

    def __sub__(self, other: Totals) -> Totals:
        return Totals(
            self.misses - other.misses,
            self.evictions - other.evictions,
            self.evicted_age - other.evicted_age,
        )

    @property
    def is_negative(self) -> bool:
        return min(self.misses, self.evictions, self.evicted_age) < 0


@dataclass(frozen=True)
class LastStep:
    """A decode step as known when the next scheduling round begins.

    requests  the batch's requests, in its order
    seconds   since the last round
    totals    returns the Totals after the step, None where the device has not reported; called
              only when the policy is updated
    topk      [sampled requests, K] int32 of layer AdmissionFeed.layer, all lists of a request in
              one row; None: no sample
    tokens    [sampled requests] context lengths
    accepted  mean tokens per request: 1, or the accept length of a speculative step
    """

    requests: Sequence[Hashable]
    seconds: float
    totals: Callable[[], Totals | None]
    topk: np.ndarray | None
    tokens: Sequence[int]
    accepted: float = 1.0


class AdmissionFeed:
    """Counts one rank's decode steps, and gives several of one batch size to the policy at once.

    window         counts the sampled top-k
    sample_layers  number of sampled layers, which take turns
    before         the Totals now; None: zeros
    layer          index of the sampled layer whose window is under way
    """

    def __init__(
        self,
        admission: Admission,
        window: WorkingSetWindow,
        sample_layers: int,
        before: Totals | None = None,
    ):
        self._admission, self._window = admission, window
        self._sample_layers, self.layer = sample_layers, 0
        self._before = before or Totals()
        self._requests = 0
        self._begin()

    def _begin(self) -> None:
        self._steps, self._seconds, self._accepted = 0, 0.0, 0.0

    def decoded(self, last: LastStep) -> bool:
        """Take a decode step. Returns whether it completed an observation of the policy."""
        if len(last.requests) != self._requests:
            self._flush(last.totals)
            self._requests = len(last.requests)
        self._steps += 1
        self._seconds += last.seconds
        self._accepted += last.accepted
        policy_updated = self._steps == OBSERVED_STEPS
        if policy_updated:
            self._flush(last.totals)
        if last.topk is not None:
            self._sample(last, last.topk)
        return policy_updated

    def _sample(self, last: LastStep, topk: np.ndarray) -> None:
        """Add the step's sample to the window. Give the counts of a full window to the policy."""
        owners = list(last.requests[: len(topk)])
        counts = self._window.add(topk, owners)
        if counts is None:
            return
        self.layer = (self.layer + 1) % self._sample_layers
        tokens = dict(zip(owners, last.tokens, strict=True))
        sizes = [(int(tokens[owner]), rows) for owner, rows in counts.rows.items()]
        self._admission.observe_working_sets(sizes, counts.sharing, counts.growth)

    def _flush(self, totals: Callable[[], Totals | None]) -> None:
        """Give the steps since the last call to the policy."""
        steps, seconds, accepted = self._steps, self._seconds, self._accepted
        self._begin()
        now = totals() if steps else None
        if now is None:
            return  # the device has not reported, so these steps are left out
        since, self._before = now - self._before, now
        if since.is_negative:
            return  # the counters have been reset
        self._admission.observe(
            Step(
                steps=steps,
                running=self._requests,
                seconds=seconds / steps,
                missed_rows=since.misses,
                evictions=since.evictions,
                evicted_age=since.evicted_age,
                tokens=accepted / steps,
            )
        )
