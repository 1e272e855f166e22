"""Top-k lists and scores of a layer that another system has saved: read, checked and ordered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sglang_ess.trace.array_files import ArrayRows
from sglang_ess.trace.scores import PlanScores

LAST = np.iinfo(np.int64).max


class Sizes(NamedTuple):
    """What all layers have alike.

    queries, topk  shape of the lists
    first_query    position of the first row's query
    columns        of the scores: topk, or one for each position; 0: no scores
    runner_ups     positions below each list that are kept
    """

    queries: int
    topk: int
    first_query: int
    columns: int
    runner_ups: int

    @property
    def context(self) -> int:
        """Positions in all: each query is one, and sees itself and those before."""
        return self.first_query + self.queries

    @property
    def by_position(self) -> bool:
        return self.columns > self.topk


def sizes_of(
    lists: Mapping[int, ArrayRows],
    scores: Mapping[int, ArrayRows],
    first_query: int,
    runner_ups: int | None,
) -> Sizes:
    """Return the layers' sizes. runner_ups: None for a quarter of k.

    Raises: ValueError, one line, for arrays that are not of one shape or do not fit each other.
    """
    queries, topk = _shape(lists, "lists", "i", "integers [queries, k]")
    context, columns = first_query + queries, 0
    if scores:
        if lists.keys() != scores.keys():
            raise ValueError(
                "lists and scores must be of the same layers: got only one of them of "
                f"{sorted(lists.keys() ^ scores.keys())}."
            )
        rows, columns = _shape(scores, "scores", "f", "floats [queries, k or positions]")
        if rows != queries or (columns != topk and columns < context):
            where = next(iter(scores.values())).where
            raise ValueError(
                f"scores must be [{queries}, {topk}], of the lists' entries, or [{queries}, "
                f"{context} or more], by position: got {[rows, columns]} in {where}."
            )
        if columns == topk >= context:
            raise ValueError(
                "scores must be clearly of entries or by position: got as many columns as k and "
                f"positions, {columns}. Save a narrower list."
            )
    if columns <= topk:
        runner_ups = 0
    elif runner_ups is None:
        runner_ups = topk // 4
    return Sizes(queries, topk, first_query, columns, runner_ups)


def _shape(arrays: Mapping[int, ArrayRows], what: str, kind: str, rule: str) -> tuple[int, int]:
    """Return the one shape of the arrays. rule: what they must be, in words."""
    first = next(iter(arrays.values()))
    for rows in arrays.values():
        if rows.kind != kind or len(rows.shape) != 2 or 0 in rows.shape:
            names = {"i": "integers", "f": "floats"}
            got = f"{names.get(rows.kind, 'another type')} {list(rows.shape)}"
            raise ValueError(f"{what} must be {rule}: got {got} in {rows.where}.")
        if rows.shape != first.shape:
            raise ValueError(
                f"{what} must be of one shape: got {list(first.shape)} in {first.where} and "
                f"{list(rows.shape)} in {rows.where}."
            )
    queries, columns = first.shape
    return queries, columns


class LayerLists:
    """One layer's lists and scores, read from the first query to the last.

    ranked, agreeing: lists of more positions than k that had scores by position, and how many of
        those leave out no better score than their lowest
    """

    def __init__(self, sizes: Sizes, lists: ArrayRows, scores: ArrayRows | None):
        self._sizes, self._lists, self._scores = sizes, lists, scores
        self._row = 0  # of the next query
        self.ranked = self.agreeing = 0

    def skip(self, count: int) -> None:
        """Leave out the next queries."""
        self._lists.read(count)
        if self._scores is not None:
            self._scores.read(count)
        self._row += count

    def read(self, count: int) -> tuple[np.ndarray, PlanScores | None]:
        """Return the next lists [n, k] int32 in context order, -1 pads last, and their scores.

        Raises: ValueError, one line, for positions that a query does not see, a position twice in
        a list, selected positions without a finite score, and a file that ends too early.
        """
        rows = self._lists.read(count).astype(np.int64)
        lengths = self._sizes.first_query + 1 + np.arange(self._row, self._row + len(rows))
        self._check_positions(rows, lengths)
        order = np.argsort(np.where(rows < 0, LAST, rows), axis=1, kind="stable")
        topk = np.take_along_axis(rows, order, 1)
        self._check(
            (topk[:, 1:] == topk[:, :-1]) & (topk[:, 1:] >= 0), topk,
            "a list must hold a position once: got {value} twice",
        )  # fmt: skip
        scored = self._read_scores(count, topk, order, lengths)
        self._row += count
        return topk.astype(np.int32), scored

    def _read_scores(
        self, count: int, topk: np.ndarray, order: np.ndarray, lengths: np.ndarray
    ) -> PlanScores | None:
        if self._scores is None:
            return None
        found, selected = self._scores.read(count).astype(np.float32), topk >= 0
        places = np.where(selected, topk, 0) if self._sizes.by_position else order
        in_list = np.take_along_axis(found, places, 1)
        self._check(
            selected & ~np.isfinite(in_list), topk,
            "a selected position must have a finite score: got none of position {value}",
        )  # fmt: skip
        in_list[~selected] = np.nan
        if not self._sizes.by_position:
            return PlanScores(np.empty((count, 0), np.int32), in_list)
        left = _left_out(found, topk, lengths)
        full = lengths > self._sizes.topk
        lowest = np.where(selected, in_list, np.inf).min(axis=1)
        self.ranked += int(full.sum())
        self.agreeing += int((full & (left.max(axis=1) <= lowest)).sum())
        others, of_others = _best(left, self._sizes.runner_ups)
        return PlanScores(others, np.concatenate([in_list, of_others], 1))

    def _check_positions(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._check(
            (rows < -1) | (rows >= lengths[:, None]), rows,
            "a list must hold -1 or positions up to its query's own, {own}: got {value}",
            " Is --first-query right?",
        )  # fmt: skip

    def _check(self, wrong: np.ndarray, values: np.ndarray, rule: str, advice: str = "") -> None:
        """Raise ValueError for the first entry of `wrong` that is true, if any is.

        rule: in words, with {value}, the entry of values, and {own}, its query's position
        """
        if wrong.any():
            query, column = np.argwhere(wrong)[0]
            row = self._row + int(query)
            told = rule.format(value=values[query, column], own=self._sizes.first_query + row)
            raise ValueError(f"{told} in row {row} of {self._lists.where}.{advice}")


def _left_out(scores: np.ndarray, topk: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return scores [n, positions] of what the lists leave out; -inf for all else and for NaN."""
    left = np.where(np.isnan(scores), -np.inf, scores)[:, : lengths[-1]]
    left[np.arange(left.shape[1]) >= lengths[:, None]] = -np.inf
    queries, columns = np.nonzero(topk >= 0)
    left[queries, topk[queries, columns]] = -np.inf
    return left


def _best(scores: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions [n, count] int32 of each row's best scores, ascending, and the scores.

    Where fewer are above -inf, -1 and NaN take their places, at the end.
    """
    found = np.full((len(scores), count), -1, np.int32)
    of_found = np.full((len(scores), count), np.nan, np.float32)
    kept = min(count, scores.shape[1])
    if kept:
        best = np.argpartition(-scores, kept - 1, axis=1)[:, :kept]
        missing = np.take_along_axis(scores, best, 1) == -np.inf
        best = np.sort(np.where(missing, LAST, best), axis=1)
        there = best < LAST
        found[:, :kept] = np.where(there, best, -1)
        of_best = np.take_along_axis(scores, np.where(there, best, 0), 1)
        of_found[:, :kept] = np.where(there, of_best, np.nan)
    return found, of_found
