"""Estimates a layer's miss curve from the ages of its hot rows, without observing lookups.

Denning and Schwartz ("Properties of the working-set model", CACM 1972): let N(T) be the mean
number of rows last used T steps ago, and W(T) the sum of N below T. A cache that keeps a row for T
steps holds W(T) rows and loses N(T) rows a step, which equals what it fetches. So one histogram of
ages covers every size up to the present one. Beyond that size, N is extrapolated as a power of T
fitted to the older rows, but only as far as a layer may grow in one round.
"""

from __future__ import annotations

import numpy as np

from sglang_ess.tiers.balance.ghost_cache import MissCurve

# The curve is fitted to this part of a layer's rows, by age. The youngest rows are a step's own
# top-k, and of the oldest some are already evicted.
FIT_FROM, FIT_TO = 0.4, 0.9
GROWTH = 1.5  # a layer grows by this factor in one round at most; curves end there
AGE_STEP = 1.1  # between two points of a curve
MAX_DECAY = 4.0  # limit of the fitted power; a tier that turns over in a few steps shows no more


def age_curve(counts: np.ndarray, rows: int, steps: int = 1) -> MissCurve:
    """Return the misses of a layer with `rows` hot rows at other sizes, up to GROWTH x rows.

    counts: [ages] rows last used 0, 1, ... steps ago, the mean of several snapshots; the last
        entry counts all older rows
    steps: number of those snapshots
    """
    counts = np.asarray(counts, float)
    used, limit = counts[:-1], rows * GROWTH
    below = np.concatenate([[0.0], np.cumsum(used)])  # W(T)
    ages = _points(max(2, int(np.searchsorted(below, FIT_TO * rows))))
    ages = ages[ages < len(below)]
    middle = (ages[1:] + ages[:-1] - 1) / 2
    sizes = (below[ages[1:]] + below[ages[:-1]]) / 2
    lost = np.diff(below[ages]) / np.diff(ages)
    sizes, misses, last = [0.0, *sizes], [used[0], *np.minimum.accumulate(lost)], middle[-1]
    decay = _decay(middle, lost, sizes[1:], rows)
    while sizes[-1] < limit and misses[-1] > 0:
        following = max(last * AGE_STEP, last + 1)
        after = misses[-1] * (last / following) ** decay
        grown = (following - last) * (misses[-1] + after) / 2
        if grown < rows / 1000:  # so flat that the limit is never reached
            break
        sizes.append(sizes[-1] + grown)
        misses.append(after)
        last = following
    points = dict(zip((round(size) for size in sizes), misses, strict=True))
    return MissCurve(tuple(points), tuple(points.values()), float(used[0]), round(used[0]), steps)


def _points(end: int) -> np.ndarray:
    """Return ages from 0 to end: each at first, then in steps of AGE_STEP."""
    found = [0, 1]
    while found[-1] < end:
        found.append(min(end, max(found[-1] + 1, round(found[-1] * AGE_STEP))))
    return np.array(found)


def _decay(ages: np.ndarray, lost: np.ndarray, sizes: list[float], rows: int) -> float:
    """Fit b of N(T) = c / T^b to the older rows: 0 to MAX_DECAY, 1 with too few ages."""
    old = (np.array(sizes) >= FIT_FROM * rows) & (lost > 0) & (ages > 0)
    if old.sum() < 3:
        old = (lost > 0) & (ages > 0)
    if old.sum() < 2:
        return 1.0
    weights = np.sqrt(lost[old])
    slope = np.polyfit(np.log(ages[old]), np.log(lost[old]), 1, w=weights)[0]
    return float(np.clip(-slope, 0.0, MAX_DECAY))
