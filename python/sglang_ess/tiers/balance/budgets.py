"""How many hot rows each layer should have: the fewest misses that one total of rows can give.

Layers differ by up to thirty times in what they miss (papers.md 1.6), and in what more rows
would save them. On the lower convex hull of each layer's miss curve a row saves no more than
the one before it, so giving every row to the layer that it saves most there is optimal (Fox,
1966). A curve that is not convex has cliffs; between two corners of its hull the true misses
lie above it, which is why the result is compared on the curves themselves before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_ess.tiers.balance.ghost_cache import MissCurve

# Measured curves of layers that are alike differ by their noise: less is no reason to move.
MIN_GAIN = 0.02  # of all misses
MIN_MOVED = 0.01  # of all rows


class BudgetError(ValueError):
    """Limits that no budgets keep."""


@dataclass(frozen=True)
class Budgets:
    """rows [layers] hot rows, their sum the total; misses a step that the curves expect then."""

    rows: tuple[int, ...]
    misses: float


def expected_misses(curves: Sequence[MissCurve], rows: Sequence[int]) -> float:
    """Misses a step of all layers with so many rows each."""
    return sum(curve.at(count) for curve, count in zip(curves, rows, strict=True))


def lower_hull(rows: Sequence[float], misses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The corners of the largest convex function that is nowhere above the points, rows ascending.

    Andrew's monotone chain. Misses are made never to rise first: noise may make them.
    """
    corners: list[tuple[float, float]] = []
    for point in zip(rows, np.minimum.accumulate(misses).tolist(), strict=True):
        while len(corners) >= 2 and _is_above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    found = np.array(corners, float)
    return found[:, 0], found[:, 1]


def _is_above(left, middle, right) -> bool:
    """Whether middle lies on or above the line from left to right."""
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)


def uniform(layers: int, total: int) -> tuple[int, ...]:
    """total rows in shares that differ by at most one."""
    share, rest = divmod(total, layers)
    return tuple(share + (layer < rest) for layer in range(layers))


def allot(
    curves: Sequence[MissCurve], total: int, floor: int, cap: int, granularity: int = 1
) -> Budgets:
    """The rows of each layer with the fewest misses on the hulls of the curves.

    total        rows of all layers
    floor, cap   of one layer's rows
    granularity  rows are moved in such portions on top of the floor; what is left of total
        after that goes where there are fewest
    Rows that would save nothing go where there are fewest. Never worse on the curves than
    uniform: where a cliff makes the hulls' best so, uniform it is.
    Raises: BudgetError for a total outside layers x floor and layers x cap.
    """
    layers = len(curves)
    if not layers or not 1 <= floor <= cap or granularity < 1:
        raise BudgetError(
            "budgets must have a layer, 1 <= floor <= cap and a granularity of 1 or more: got "
            f"{layers} layers, {floor}, {cap} and {granularity}."
        )
    if not layers * floor <= total <= layers * cap:
        raise BudgetError(
            f"budgets must share out {layers * floor} to {layers * cap} rows ({layers} layers of "
            f"{floor} to {cap}): got {total}."
        )
    rows = np.full(layers, floor, np.int64)
    left = total - layers * floor
    for slope, layer, length in _segments(curves, floor, cap, granularity):
        if slope >= 0 or left < granularity:
            break
        taken = min(length, left // granularity * granularity)
        rows[layer] += taken
        left -= taken
    _level(rows, left, cap)
    best = tuple(rows.tolist())
    same = uniform(layers, total)
    if expected_misses(curves, same) <= expected_misses(curves, best):
        best = same
    return Budgets(best, expected_misses(curves, best))


def _segments(
    curves: Sequence[MissCurve], floor: int, cap: int, granularity: int
) -> list[tuple[float, int, int]]:
    """(misses saved a row, negative; layer; rows) of every straight part of the hulls, best first.

    In portions of `granularity`: a corner within one makes that portion a part of its own.
    """
    last = floor + (cap - floor) // granularity * granularity
    found = []
    for layer, curve in enumerate(curves):
        corners, misses = lower_hull(curve.rows, curve.misses)
        inner = corners[(corners > floor) & (corners < last)]
        portions = (inner - floor) / granularity
        ends = np.concatenate([[floor, last], *(
            floor + portion * granularity for portion in (np.floor(portions), np.ceil(portions))
        )])  # fmt: skip
        ends = np.unique(ends)
        slopes = np.diff(np.interp(ends, corners, misses)) / np.diff(ends)
        found += [
            (slope, layer, int(length))
            for slope, length in zip(slopes.tolist(), np.diff(ends).tolist(), strict=True)
        ]
    return sorted(found)


def _level(rows: np.ndarray, left: int, cap: int) -> None:
    """Add `left` rows where there are fewest, in place, up to cap each."""
    while left > 0:
        open_rows = rows[rows < cap]
        lowest = open_rows.min()
        among = np.flatnonzero(rows == lowest)
        higher = open_rows[open_rows > lowest]
        room = (int(higher.min()) if len(higher) else cap) - int(lowest)
        each = min(room, left // len(among))
        if each:
            rows[among] += each
            left -= each * len(among)
        else:
            rows[among[:left]] += 1
            left = 0


def rebalanced(
    curves: Sequence[MissCurve],
    current: Sequence[int],
    floor: int,
    cap: int,
    granularity: int = 1,
    min_gain: float = MIN_GAIN,
    min_moved: float = MIN_MOVED,
) -> Budgets | None:
    """Budgets worth moving to from `current` rows, or None.

    min_gain   of the misses expected with `current`: the share that has to be saved
    min_moved  of all rows: the share that has to change its layer
    Raises: BudgetError as allot does.
    """
    total, before = sum(current), expected_misses(curves, current)
    budgets = allot(curves, total, floor, cap, granularity)
    moved = sum(max(0, new - old) for new, old in zip(budgets.rows, current, strict=True))
    if moved == 0 or moved < min_moved * total or before - budgets.misses < min_gain * before:
        return None
    return budgets if budgets.misses < before else None
