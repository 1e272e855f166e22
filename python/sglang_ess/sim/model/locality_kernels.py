"""Numba kernels of the top-k generator in locality.py.

State of one request: selected [K] int32, the positions of the last query; log [R] int32 (R a
power of two), a ring of departed positions with `tail` entries so far; where [positions] int32,
the place in `selected`, or -2 - entry in the log, or NEVER; random [1] uint64.
The kernels take these arrays one by one: in a NamedTuple they make the generator twice as slow.
"""

from typing import Any

import numba
import numpy as np

jit = numba.njit(cache=True, nogil=True)

TRIES = 16  # draws before a kernel gives up looking for a position
NEVER = -1  # in `where`: never selected
GONE = -1  # in the log: the position has returned
INVERSE_2_32, INVERSE_2_52 = 1.0 / (1 << 32), 1.0 / (1 << 52)
# Quantiles of the exponential with mean 1 at i / 4096, so that a draw needs no log().
QUANTILES = -np.log1p(-np.arange(4096) / 4096)
QUANTILES = np.append(QUANTILES, QUANTILES[-1] + 1.0)


@jit
def _random(state: np.ndarray) -> Any:
    """Return 64 random bits (xorshift64*). state [1] uint64 must not be zero."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(0x2545F4914F6CDD1D)


@jit
def _below(limit: int, bits: Any) -> Any:
    """Return an integer in [0, limit) from the upper half of random bits."""
    return np.int64((bits >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32))


@jit
def _exponential(bits: Any) -> Any:
    """Draw from the exponential with mean 1, linear between two quantiles."""
    i = np.int64(bits >> np.uint64(52))
    share = (bits & np.uint64(0xFFFFFFFFFFFFF)) * INVERSE_2_52
    return QUANTILES[i] + share * (QUANTILES[i + 1] - QUANTILES[i])


@jit
def _take(
    selected: np.ndarray, where: np.ndarray, log: np.ndarray, place: int, position: int
) -> None:
    """Select the position at `place`, and strike it from the log of departures."""
    entry = -2 - where[position]
    if entry >= 0 and log[entry & (log.shape[0] - 1)] == position:
        log[entry & (log.shape[0] - 1)] = GONE
    selected[place] = position
    where[position] = place


@jit
def _drop(where: np.ndarray, log: np.ndarray, tail: int, position: int) -> None:
    """Append the position, which leaves the selection, to the log of departures."""
    log[tail & (log.shape[0] - 1)] = position
    where[position] = -2 - tail


@jit
def _departed(log: np.ndarray, tail: int, reach: float, random: np.ndarray) -> Any:
    """Draw a departed position, exponentially by departures since; -1 if none is found."""
    for _ in range(TRIES):
        back = np.int64(_exponential(_random(random)) * reach)
        entry = tail - 1 - back
        if entry < 0 or back >= log.shape[0]:
            continue
        position = log[entry & (log.shape[0] - 1)]
        if position != GONE:
            return np.int64(position)
    return np.int64(-1)


@jit
def _other(where: np.ndarray, length: int, random: np.ndarray) -> Any:
    """Draw any position that is not selected; -1 if none is found."""
    for _ in range(TRIES):
        position = _below(length, _random(random))
        if where[position] < 0:
            return position
    return np.int64(-1)


@jit
def begin(
    selected: np.ndarray, where: np.ndarray, log: np.ndarray, length: int, random: np.ndarray
) -> int:
    """Fill a request's state: a random selection, and a log of the others in random order.

    Returns the log's tail.
    """
    topk = min(selected.shape[0], length)
    where[:] = NEVER
    log[:] = GONE
    order = np.arange(length).astype(np.int32)
    for i in range(length - 1, 0, -1):
        j = _below(i + 1, _random(random))
        order[i], order[j] = order[j], order[i]
    for place in range(topk):
        _take(selected, where, log, place, order[place])
    selected[topk:] = -1
    tail = 0
    for i in range(max(topk, length - log.shape[0]), length):
        _drop(where, log, tail, order[i])
        tail += 1
    return tail


@jit
def by_recency(
    selected: np.ndarray, where: np.ndarray, log: np.ndarray, tail: int, length: int
) -> np.ndarray:
    """Return the positions [length] int32, least recently selected first."""
    order = np.empty(length, np.int32)
    oldest, count = max(0, tail - log.shape[0]), 0
    for position in range(length):
        if where[position] < 0 and -2 - where[position] < oldest:
            order[count] = position
            count += 1
    for entry in range(oldest, tail):
        position = log[entry & (log.shape[0] - 1)]
        if position != GONE:
            order[count] = position
            count += 1
    for place in range(min(length, selected.shape[0])):
        order[count] = selected[place]
        count += 1
    return order


@jit
def _take_in_place(
    selected: np.ndarray, where: np.ndarray, log: np.ndarray, tail: int, place: int, position: int
) -> None:
    """Put the position at `place`. The one that was there leaves."""
    old = selected[place]
    _take(selected, where, log, place, position)
    _drop(where, log, tail, old)


@jit
def advance(
    selected: np.ndarray,
    where: np.ndarray,
    log: np.ndarray,
    tail: int,
    length: int,
    churn: float,
    uniform: float,
    reach: float,
    random: np.ndarray,
) -> int:
    """Move on by one query: some positions leave the selection and as many others enter it.

    length: number of positions; churn: expected share of the K that leaves
    uniform: share of the entering ones that comes from anywhere in the context; the others have
    departed before, exponentially with mean `reach` departures
    Returns the log's new tail.
    """
    topk = selected.shape[0]
    if length <= topk:
        return tail
    # A random number of changes with this mean, so that a small churn is not rounded to zero.
    expected = churn * topk
    count = int(expected)
    count += (_random(random) >> np.uint64(32)) * INVERSE_2_32 < expected - count
    for _ in range(count):
        bits = _random(random)
        place = _below(topk, bits)
        position = np.int64(-1)
        if (bits & np.uint64(0xFFFFFFFF)) * INVERSE_2_32 >= uniform:
            position = _departed(log, tail, reach, random)
        if position < 0:
            position = _other(where, length, random)
            if position < 0:
                continue
        _take_in_place(selected, where, log, tail, place, position)
        tail += 1
    return tail


@jit
def advance_often(
    selected: np.ndarray,
    where: np.ndarray,
    log: np.ndarray,
    tail: int,
    length: int,
    churn: float,
    uniform: float,
    reach: float,
    random: np.ndarray,
    departures: float,
) -> int:
    """Advance until `departures` positions have left. Returns the log's new tail."""
    if churn <= 0 or length <= selected.shape[0]:
        return tail
    for _ in range(int(np.ceil(departures / (churn * selected.shape[0])))):
        tail = advance(selected, where, log, tail, length, churn, uniform, reach, random)
    return tail


@jit
def _grow(
    selected: np.ndarray,
    where: np.ndarray,
    log: np.ndarray,
    tail: int,
    length: int,
    random: np.ndarray,
) -> int:
    """Select the new position length - 1, in place of another one if all K are taken."""
    topk = selected.shape[0]
    if length <= topk:
        _take(selected, where, log, length - 1, length - 1)
        return tail
    _take_in_place(selected, where, log, tail, _below(topk, _random(random)), length - 1)
    return tail + 1


@jit
def step(
    rows: np.ndarray,
    selected: np.ndarray,
    where: np.ndarray,
    logs: np.ndarray,
    tails: np.ndarray,
    old_lengths: np.ndarray,
    lengths: np.ndarray,
    slots: np.ndarray,
    parameters: tuple[float, float],
    reaches: np.ndarray,
    randoms: np.ndarray,
    kept: np.ndarray,
    alike: np.ndarray,
    topk_slots: np.ndarray,
) -> None:
    """Write the next decode step of n requests into topk_slots [n * queries, K] int32.

    rows [n]: their rows in the state arrays; lengths [n] int64: positions now; old_lengths [n]:
    in the step before; slots [requests, positions] int32; parameters: (churn, uniform)
    reaches [n] float64
    kept [n] int64: after that many queries a request goes back to the state before the next one;
    alike [n] bool: so does its random number, so that the next step repeats the others' lists
    """
    churn, uniform = parameters
    queries = topk_slots.shape[0] // rows.shape[0]
    saved_selected, saved_where, saved_log = selected[0, :0], where[0, :0], logs[0, :0]
    saved_tail, saved_random = tails[0], randoms[0, 0]
    for i in range(rows.shape[0]):
        row = rows[i]
        tail = tails[row]
        for length in range(old_lengths[i] + 1, lengths[i] + 1):
            tail = _grow(selected[row], where[row], logs[row], tail, length, randoms[row])
        for query in range(queries):
            if query == kept[i]:
                saved_selected, saved_where = selected[row].copy(), where[row].copy()
                saved_log, saved_tail, saved_random = logs[row].copy(), tail, randoms[row, 0]
            tail = advance(
                selected[row], where[row], logs[row], tail, lengths[i], churn, uniform, reaches[i],
                randoms[row],
            )  # fmt: skip
            out = topk_slots[i * queries + query]
            for j in range(out.shape[0]):
                position = selected[row, j]
                out[j] = slots[row, position] if position >= 0 else -1
        if kept[i] < queries:
            selected[row], where[row], logs[row] = saved_selected, saved_where, saved_log
            tail = saved_tail
            if alike[i]:
                randoms[row, 0] = saved_random
        tails[row] = tail
