"""Refuses a stop_regex whose search could stop the scheduler for minutes or longer.

At every decode step the scheduler searches the end of a request's output with Python's `re`. That
module backtracks: `(a+)+b` tries 2^n ways to divide n letters "a", and meanwhile every request of
the server waits. A time limit is no remedy, because all ranks of a server must decide alike. So
this module bounds the number of steps from the text of the pattern alone.
"""

from __future__ import annotations

import functools
import math
import re
from re import _compiler, _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

LENGTH = 1000  # the bound is for an output of this many characters
# This allows two nested loops over the output (`.*x` from each start), but not three.
MAX_STEPS = 5e7
SAMPLES = "".join(map(chr, range(128))) + "é中€\u2003\u0663"  # ASCII, and one of each other kind

_SINGLE = {_parser.LITERAL, _parser.NOT_LITERAL, _parser.IN, _parser.ANY}
_LOOPS = {_parser.MAX_REPEAT, _parser.MIN_REPEAT, _parser.POSSESSIVE_REPEAT}
_LOOKS = {_parser.ASSERT, _parser.ASSERT_NOT}


class _Bound(NamedTuple):
    """ways: number of ways in which a part can match at one position; steps: to try them all."""

    ways: float
    steps: float


@functools.lru_cache(maxsize=256)
def problem(pattern: str) -> str | None:
    """Why a stop_regex is refused, in one line; None if it is served."""
    try:
        steps = LENGTH * _Search(pattern).steps()
    except (re.error, RecursionError) as error:
        return f"stop_regex must be a regular expression: got {pattern!r} ({error}). Correct it."
    if steps <= MAX_STEPS:
        return None
    return (
        f"stop_regex must be a pattern that is found in few steps: got {pattern!r}, which can take "
        f"more than {MAX_STEPS:.0g} on {LENGTH} characters. Avoid a repeat inside a repeat, and a "
        "repeat that can also match the characters after it."
    )


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return math.inf


class _Search:
    """The bound of one pattern. A set of characters is a bit mask over sample characters."""

    def __init__(self, pattern: str):
        self._parsed = _parser.parse(pattern)
        self._alphabet = sorted({*SAMPLES, *pattern, *pattern.swapcase()})
        self._all = (1 << len(self._alphabet)) - 1
        self._masks: dict[str, int] = {}

    def steps(self) -> float:
        return self._sequence(list(self._parsed), None).steps

    def _sequence(self, nodes: list[Any], follow: int | None) -> _Bound:
        """follow: characters that may come after the nodes; None if the search ends there."""
        ways, steps = 1.0, 1.0
        for i in reversed(range(len(nodes))):
            first, can_be_empty = self._first(nodes[i + 1 :])
            after: int | None = first
            if can_be_empty:
                after = None if follow is None else first | follow
            part = self._node(nodes[i], after)
            ways, steps = part.ways * ways, part.steps + part.ways * steps
        return _Bound(ways, steps)

    def _node(self, node: Any, follow: int | None) -> _Bound:
        kind, value = node
        if kind in _LOOPS:
            return self._loop(kind, value, follow)
        if kind is _parser.SUBPATTERN:
            return self._sequence(list(value[3]), follow)
        if kind is _parser.BRANCH:
            return self._branch([list(branch) for branch in value[1]], follow)
        if kind is _parser.GROUPREF_EXISTS:
            return self._branch([list(branch or ()) for branch in value[1:]], follow)
        if kind in _LOOKS:
            return _Bound(1, self._sequence(list(value[1]), None).steps)
        if kind is _parser.ATOMIC_GROUP:
            return _Bound(1, self._sequence(list(value), None).steps)
        if kind is _parser.GROUPREF:
            width = self._parsed.state.groupwidths[value]
            return _Bound(1, min(width[1], LENGTH) if width else LENGTH)
        return _Bound(1, 1)

    def _loop(self, kind: Any, value: Any, follow: int | None) -> _Bound:
        least, most, nodes = value[0], min(int(value[1]), LENGTH), list(value[2])
        first, can_be_empty = self._first(nodes)
        overlaps = follow is not None and bool(first & follow)
        one = self._sequence(nodes, follow if most <= 1 else first | (follow or 0))
        if most <= 1:
            ways = one.ways + (overlaps and least == 0)
        elif one.ways > 1 or can_be_empty:
            ways = _power(max(one.ways, 2.0), most)
        elif overlaps:
            ways = max(1.0, most - min(least, most) + 1.0)
        else:  # the next character decides whether the loop goes on
            ways = 1.0
        steps = max(ways, most) * one.steps
        return _Bound(1.0 if kind is _parser.POSSESSIVE_REPEAT else ways, steps)

    def _branch(self, branches: list[list[Any]], follow: int | None) -> _Bound:
        bounds = [self._sequence(branch, follow) for branch in branches]
        steps, seen, alone = sum(bound.steps for bound in bounds), 0, True
        for branch in branches:
            first, can_be_empty = self._first(branch)
            if can_be_empty:
                first |= self._all if follow is None else follow
            alone, seen = alone and not seen & first, seen | first
        every = [bound.ways for bound in bounds]
        return _Bound(max(every) if alone else sum(every), steps)

    def _first(self, nodes: list[Any]) -> tuple[int, bool]:
        """(characters with which a match can begin, whether a match can be empty)."""
        mask = 0
        for kind, value in nodes:
            if kind in _SINGLE:
                return mask | self._mask(kind, value), False
            if kind in _LOOPS:
                first, can_be_empty = self._first(list(value[2]))
                can_be_empty |= value[0] == 0
            elif kind is _parser.SUBPATTERN:
                first, can_be_empty = self._first(list(value[3]))
            elif kind is _parser.ATOMIC_GROUP:
                first, can_be_empty = self._first(list(value))
            elif kind is _parser.BRANCH:
                parts = [self._first(list(branch)) for branch in value[1]]
                first = functools.reduce(int.__or__, (part for part, _ in parts), 0)
                can_be_empty = any(empty for _, empty in parts)
            else:  # an assertion or a back reference can fail before any character
                return self._all, False
            mask |= first
            if not can_be_empty:
                return mask, False
        return mask, True

    def _mask(self, kind: Any, value: Any) -> int:
        key = repr((kind, value))
        if key not in self._masks:
            one = _parser.SubPattern(self._parsed.state, [(kind, value)])
            match = _compiler.compile(one, self._parsed.state.flags).fullmatch
            self._masks[key] = sum(1 << i for i, c in enumerate(self._alphabet) if match(c))
        return self._masks[key]
