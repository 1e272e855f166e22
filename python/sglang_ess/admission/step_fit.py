"""How long a decode step computes, as a function of its batch size, fitted to observed steps."""

from __future__ import annotations

from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[Any]

# Chosen: benchmarks/serving/pd_serving.py.
FIT_DECAY = 0.98  # weight of older observations, per step
FIT_SPREAD = 0.1  # standard deviation of n / mean n at which the fit is half proportional


class StepFit:
    """Exponentially weighted least squares for compute(n) = a + b n seconds, a and b >= 0.

    n counts requests. All have as many queries in a step, and drafting is part of a step.
    Steps of a single batch size n do not determine b. compute(n) = b n is then the cautious
    choice; a ridge pulls b towards it, and more so the less n has varied.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # weights, n, n^2, seconds, n x seconds
        self.last = 0  # n of the newest step

    def add(self, n: int, seconds: float, steps: int) -> None:
        """Add `steps` steps of n requests, `seconds` each."""
        self._sums *= FIT_DECAY**steps
        self._sums += steps * np.array([1, n, n * n, seconds, n * seconds])
        self.last = n

    def _moments(self) -> tuple[float, float, float, float]:
        """The means of n and seconds, the variance of n, and the covariance of both."""
        n, nn, seconds, n_seconds = self._sums[1:] / self._sums[0]
        return n, seconds, max(0.0, nn - n * n), n_seconds - n * seconds

    @property
    def has_varied(self) -> bool:
        """Whether n has varied enough for the slope to be measured."""
        if not self.last:
            return False
        mean, _, variance, _ = self._moments()
        return variance > (FIT_SPREAD * mean) ** 2

    @overload
    def seconds(self, n: float, is_hopeful: bool = False) -> float: ...

    @overload
    def seconds(self, n: FloatArray, is_hopeful: bool = False) -> FloatArray: ...

    def seconds(self, n: float | FloatArray, is_hopeful: bool = False) -> float | FloatArray:
        """Predict the seconds of a step of n requests, a number or an array; 0 without data.

        is_hopeful: assume a slope of 0 while none is measured
        """
        if not self.last:
            return 0.0 * n
        mean, seconds, variance, covariance = self._moments()
        if is_hopeful and not self.has_varied:
            return seconds + 0.0 * n
        proportional, ridge = seconds / mean, (FIT_SPREAD * mean) ** 2
        slope = (covariance + ridge * proportional) / (variance + ridge)
        return seconds + min(max(slope, 0.0), proportional) * (n - mean)
