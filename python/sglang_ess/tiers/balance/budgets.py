"""Divides a total of hot rows between layers so that they miss least.

Layers differ by up to thirty times in their misses (ESS, Figure 4) and in what more rows save. On
the lower convex hull of a layer's miss curve, each row saves at most as much as the row before it.
So it is optimal to give each row to the layer whose hull it lowers most (Fox, "Discrete
optimization via marginal analysis", 1966). A curve that is not convex lies above its hull between
two corners, so the result is compared with equal shares on the curves themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from sglang_ess.tiers.balance.ghost_cache import MissCurve

Point: TypeAlias = tuple[float, float]  # rows, misses

# Curves of similar layers differ by noise, so smaller gains and moves are ignored.
MIN_GAIN = 0.02  # of all misses
MIN_MOVED = 0.01  # of all rows


class BudgetError(ValueError):
    """No budgets satisfy the limits."""


@dataclass(frozen=True)
class Budgets:
    """rows: hot rows of each layer, which sum to the total; misses: predicted per step."""

    rows: tuple[int, ...]
    misses: float


def expected_misses(curves: Sequence[MissCurve], rows: Sequence[int]) -> float:
    """Return the predicted misses per step of all layers with these rows."""
    return sum(curve.at(count) for curve, count in zip(curves, rows, strict=True))


def lower_hull(rows: Sequence[float], misses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of the points' lower convex hull, rows ascending.

    Uses Andrew's monotone chain. Misses that rise with rows, which is noise, are cut first.
    """
    corners: list[tuple[float, float]] = []
    for point in zip(rows, np.minimum.accumulate(misses).tolist(), strict=True):
        while len(corners) >= 2 and _is_above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    found = np.array(corners, float)
    return found[:, 0], found[:, 1]


def _is_above(left: Point, middle: Point, right: Point) -> bool:
    """Return whether middle lies on or above the line from left to right."""
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    return (y1 - y0) * (x2 - x0) >= (y2 - y0) * (x1 - x0)


def uniform(layers: int, total: int) -> tuple[int, ...]:
    """Divide `total` rows into shares that differ by at most one."""
    share, rest = divmod(total, layers)
    return tuple(share + (layer < rest) for layer in range(layers))


def allot(
    curves: Sequence[MissCurve], total: int, floor: int, cap: int, granularity: int = 1
) -> Budgets:
    """Return the rows of each layer with the fewest misses on the hulls of the curves.

    total        rows of all layers
    floor, cap   limits of one layer's rows
    granularity  portions in which rows are given out on top of the floor
    Rows that save nothing, and a rest below the granularity, go to the layers with the fewest rows.
    The result is `uniform` if that has no more misses on the curves.
    Raises: BudgetError for a total outside layers x floor to layers x cap.
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
    """Return (slope in misses per row, layer, rows) of every straight part of the hulls.

    The steepest comes first. Parts are whole portions of `granularity`; a portion with a corner
    inside is a part of its own.
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
    """Add `left` rows in place to the layers with the fewest rows, up to cap each."""
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
    """Return budgets worth moving to from the `current` rows, or None.

    min_gain   share of the present misses that the budgets must save
    min_moved  share of all rows that must change their layer
    Raises: BudgetError as allot.
    """
    total, before = sum(current), expected_misses(curves, current)
    budgets = allot(curves, total, floor, cap, granularity)
    moved = sum(max(0, new - old) for new, old in zip(budgets.rows, current, strict=True))
    if moved == 0 or moved < min_moved * total or before - budgets.misses < min_gain * before:
        return None
    return budgets if budgets.misses < before else None
