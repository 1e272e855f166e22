"""A layer's miss curve from how old its hot rows are: what a device's hot tier shows for nothing.

Denning and Schwartz ("Properties of the working-set model", CACM 1972): let N(T) be the mean
number of rows that were last used T steps ago, W(T) the sum of N below T. A cache that keeps a
row for T steps holds W(T) rows and loses N(T) a step, which is what it fetches. So one histogram
of ages has every size up to the present one, each look at it some hundreds of misses, and no
lookup has to be watched. Beyond the present size nothing is seen: N is continued as the power of
T that it was among the older rows, and only so far as the next round can look again.
"""

from __future__ import annotations

import numpy as np

from sglang_ess.tiers.balance.ghost_cache import MissCurve

# Rows of a layer by which its curve is fitted: the youngest are a step's own top-k, and at the
# old end rows are missing that have been evicted at an age which varies from step to step.
FIT_FROM, FIT_TO = 0.4, 0.9
GROWTH = 1.5  # of a layer's rows in one round: as far as a curve is continued
AGE_STEP = 1.1  # between two points of a curve
MAX_DECAY = 4.0  # of the fitted power: a tier that has turned over in a few steps shows no more


def age_curve(counts: np.ndarray, rows: int, steps: int = 1) -> MissCurve:
    """What a layer of so many hot rows would miss at other sizes, up to GROWTH times as many.

    counts [ages] rows that were last used 0, 1, ... steps ago, mean of several looks; the last
        age stands for all older ones
    steps: looks that the counts are the mean of
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
        if grown < rows / 1000:  # so flat that no size is ever reached
            break
        sizes.append(sizes[-1] + grown)
        misses.append(after)
        last = following
    points = dict(zip((round(size) for size in sizes), misses, strict=True))
    return MissCurve(tuple(points), tuple(points.values()), float(used[0]), round(used[0]), steps)


def _points(end: int) -> np.ndarray:
    """Ages from 0 to end, each at first, then in steps of AGE_STEP."""
    found = [0, 1]
    while found[-1] < end:
        found.append(min(end, max(found[-1] + 1, round(found[-1] * AGE_STEP))))
    return np.array(found)


def _decay(ages: np.ndarray, lost: np.ndarray, sizes: list[float], rows: int) -> float:
    """b of N(T) = c / T^b over the older rows, 0 to MAX_DECAY; 1 where too few ages show it."""
    old = (np.array(sizes) >= FIT_FROM * rows) & (lost > 0) & (ages > 0)
    if old.sum() < 3:
        old = (lost > 0) & (ages > 0)
    if old.sum() < 2:
        return 1.0
    weights = np.sqrt(lost[old])
    slope = np.polyfit(np.log(ages[old]), np.log(lost[old]), 1, w=weights)[0]
    return float(np.clip(-slope, 0.0, MAX_DECAY))
