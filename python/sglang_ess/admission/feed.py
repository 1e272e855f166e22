"""What the admission policy is told of decode steps, and when: by the server and the simulator.

scheduling.py and sim/gate.py feed this one piece, so what is simulated is what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_ess.admission.policy import Admission, Step
from sglang_ess.admission.working_set import WorkingSetWindow

OBSERVED_STEPS = 4  # of one batch size, that are told to the policy at once


@dataclass(frozen=True)
class Totals:
    """Since the start, over all layers: missed rows, evictions, and their ages in steps."""

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
    """What is known of a decode step when the next round begins.

    requests  of the batch, in its order
    seconds   since the round before; accepted: tokens that each request got, on average
    totals    gives those after the step, None where the device has not reported; asked for only
              when the policy is told
    topk      [sampled requests, K] int32 of the layer that was asked for; None: no sample
    tokens    [sampled requests] their contexts
    """

    requests: Sequence[int]
    seconds: float
    totals: Callable[[], Totals | None]
    topk: np.ndarray | None
    tokens: Sequence[int]
    accepted: float = 1.0


class AdmissionFeed:
    """Counts one rank's decode steps, and tells the policy of several of one batch size at once.

    window   for the sampled top-k; sample_layers: that the sample goes round
    before   totals now
    layer    of the sample, numbered from 0, whose window is under way
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
        """One decode step. Returns whether the policy was told of it."""
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
            self._sample(last)
        return policy_updated

    def _sample(self, last: LastStep) -> None:
        """Count what the step's first requests selected, when a window of steps is full."""
        owners = list(last.requests[: len(last.topk)])
        counts = self._window.add(last.topk, owners)
        if counts is None:
            return
        self.layer = (self.layer + 1) % self._sample_layers
        tokens = dict(zip(owners, last.tokens, strict=True))
        sizes = [(int(tokens[owner]), rows) for owner, rows in counts.rows.items()]
        self._admission.observe_working_sets(sizes, counts.sharing, counts.growth)

    def _flush(self, totals: Callable[[], Totals | None]) -> None:
        """Tell the policy of the steps since the last time."""
        steps, seconds, accepted = self._steps, self._seconds, self._accepted
        self._begin()
        now = totals() if steps else None
        if now is None:
            return  # the device has not reported: not these steps
        since, self._before = now - self._before, now
        if since.is_negative:
            return  # the counters began again
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
