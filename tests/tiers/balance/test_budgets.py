"""Budgets against every way there is to share out a few rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.tiers.balance import budgets as layer_budgets
from sglang_ess.tiers.balance.budgets import (
    BudgetError,
    allot,
    expected_misses,
    rebalanced,
    uniform,
)
from sglang_ess.tiers.balance.ghost_cache import MissCurve


def curve(rows, misses):
    return MissCurve(tuple(rows), tuple(map(float, misses)), 100.0, 1, 10)


def convex(savings):
    """A curve over 0, 1, 2, ... rows of which each saves no more than the one before it."""
    savings = sorted(savings, reverse=True)
    return curve(range(len(savings) + 1), sum(savings) - np.cumsum([0, *savings]))


def ways(layers, total, floor, cap, step=1):
    choices = range(floor, cap + 1, step)
    return [rows for rows in itertools.product(choices, repeat=layers) if sum(rows) == total]


savings = st.lists(st.integers(0, 30), min_size=3, max_size=7)


class TestAllot:
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(savings, min_size=1, max_size=4), st.integers(1, 3), st.data())
    def test_convex_curves_against_every_way(self, layers, floor, data):
        curves, cap = [convex(values) for values in layers], floor + 4
        total = data.draw(st.integers(len(curves) * floor, len(curves) * cap))
        found = allot(curves, total, floor, cap)
        best = min(expected_misses(curves, rows) for rows in ways(len(curves), total, floor, cap))
        assert found.misses == expected_misses(curves, found.rows) == pytest.approx(best)
        assert sum(found.rows) == total
        assert min(found.rows) >= floor and max(found.rows) <= cap

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(savings, min_size=1, max_size=3), st.integers(2, 3), st.integers(0, 9))
    def test_portions(self, layers, step, portions):
        """Rows move in portions on top of the floor; a corner of a curve may lie within one."""
        curves, floor, cap = [convex(values) for values in layers], 1, 1 + 3 * step
        total = len(curves) * floor + min(portions, 3 * len(curves)) * step
        found = allot(curves, total, floor, cap, step)
        best = min(expected_misses(curves, r) for r in ways(len(curves), total, floor, cap, step))
        # Uniform wins a tie and stands if a portion is more than its share.
        if found.rows != uniform(len(curves), total):
            assert all((rows - floor) % step == 0 for rows in found.rows) or found.misses < best
        assert sum(found.rows) == total and found.misses <= best + 1e-9

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.lists(st.integers(0, 90), min_size=2, max_size=6), min_size=1, max_size=5),
           st.integers(0, 40))  # fmt: skip
    def test_never_worse_than_uniform_on_any_curves(self, layers, extra):
        """Cliffs and noise: curves that are not convex."""
        curves = [curve(range(2, 5 * len(m), 5), sorted(m, reverse=True)) for m in layers]
        total = min(2 * len(curves) + extra, 30 * len(curves))
        found = allot(curves, total, 1, 30)
        assert sum(found.rows) == total and 1 <= min(found.rows) <= max(found.rows) <= 30
        assert found.misses <= expected_misses(curves, uniform(len(curves), total)) + 1e-9

    def test_a_cliff_out_of_reach_leaves_uniform(self):
        """The hull of the first says that each row saves 10; up to the cliff none saves any."""
        cliff, gentle = curve([0, 99, 100], [1000, 1000, 0]), curve([0, 100], [500, 0])
        assert allot([cliff, gentle], 80, 1, 100).rows == (40, 40)

    def test_rows_that_save_nothing_go_where_there_are_fewest(self):
        curves = [convex([9, 9, 9]), convex([]), convex([5])]
        assert allot(curves, 13, 1, 100).rows == (5, 4, 4)
        assert allot(curves, 5, 1, 100).rows == (3, 1, 1)
        assert allot(curves, 13, 1, 5).rows == (5, 4, 4)

    def test_equal_layers_are_uniform(self):
        assert allot([convex([3, 2, 1])] * 3, 7, 1, 10).rows == (3, 2, 2)

    @pytest.mark.parametrize(
        "total, floor, cap, text",
        [(5, 3, 9, "6 to 18"), (19, 3, 9, "got 19"), (9, 0, 9, "1 <= floor"), (9, 5, 4, "5, 4")],
    )
    def test_refusals(self, total, floor, cap, text):
        with pytest.raises(BudgetError, match=text):
            allot([convex([1]), convex([1])], total, floor, cap)
        with pytest.raises(BudgetError, match="0 layers"):
            allot([], 0, 1, 1)


def test_lower_hull():
    rows, misses = layer_budgets.lower_hull([0, 1, 2, 3, 4, 6], [10, 9, 4, 5, 3, 3])
    assert rows.tolist() == [0, 2, 4, 6] and misses.tolist() == [10, 4, 3, 3]


class TestRebalanced:
    curves = [convex([8] * 50), convex([1] * 50)]

    def test_moves_what_is_worth_it(self):
        found = rebalanced(self.curves, (20, 20), 5, 50)
        assert found.rows == (35, 5) and found.misses == 8 * 15 + 45

    def test_stays_where_it_is_best(self):
        assert rebalanced(self.curves, (35, 5), 5, 50) is None

    def test_small_gains_and_moves_are_let_be(self):
        misses = expected_misses(self.curves, (34, 6))
        gain = 7 / misses
        options = {"floor": 5, "cap": 50, "min_moved": 0.0}
        assert rebalanced(self.curves, (34, 6), **options, min_gain=gain * 1.01) is None
        assert rebalanced(self.curves, (34, 6), **options, min_gain=gain * 0.99).rows == (35, 5)
        assert rebalanced(self.curves, (34, 6), 5, 50, min_gain=0, min_moved=0.03) is None
        assert rebalanced(self.curves, (34, 6), 5, 50, min_gain=0, min_moved=0.02) is not None

    def test_nothing_missed_nothing_moved(self):
        none = [curve([0, 10], [0, 0])] * 2
        assert rebalanced(none, (20, 10), 1, 30) is None
