"""Kernels of the trace: slots to positions, events to bytes and back.

Kernels used in serving declare their types, so that numba compiles or loads them at import and not
in a decode step.
"""

import numba
import numpy as np

LEB_BYTES = 5  # at most, for one number of an event's data
COUNTER_BYTES = 10  # at most, for one int64

_positions_type = "void(i4[:, ::1], i8[::1], i4[::1], i4[:, ::1], u1[::1], i4[:, ::1])"
_matches_type = "b1(i4[:, ::1], i8[::1], i4[:, ::1], i4[:, ::1])"
_changes_type = "void(i4[:, ::1], i4[:, ::1], i8[::1], i8[::1], i4[::1], i8[::1])"


@numba.njit(_positions_type, cache=True, nogil=True)
def _slots_to_positions(topk_slots, req_rows, lengths, req_to_token, scratch, positions):
    """Mark the query's slots, then walk the request's slots in order, so that nothing is sorted."""
    for query in range(topk_slots.shape[0]):
        marked = 0
        for j in range(topk_slots.shape[1]):
            slot = topk_slots[query, j]
            if slot >= 0 and scratch[slot] == 0:
                scratch[slot] = 1
                marked += 1
        slots = req_to_token[req_rows[query]]
        found, position, length = 0, 0, lengths[query]
        # Writing before counting needs no branch on the mark and is three times as fast.
        while position < length and found < marked:
            positions[query, found] = position
            found += scratch[slots[position]]
            position += 1
        positions[query, found:] = -1
        for j in range(topk_slots.shape[1]):
            slot = topk_slots[query, j]
            if slot >= 0:
                scratch[slot] = 0


@numba.njit(_matches_type, cache=True, nogil=True)
def positions_give(topk_slots, req_rows, req_to_token, positions):
    """Return whether the positions give topk_slots entry by entry, including order and pads."""
    for query in range(topk_slots.shape[0]):
        row = req_rows[query]
        for j in range(topk_slots.shape[1]):
            position = positions[query, j]
            slot = req_to_token[row, position] if position >= 0 else -1
            if slot != topk_slots[query, j]:
                return False
    return True


@numba.njit(_changes_type, cache=True, nogil=True)
def first_changes(table, known, known_lengths, req_rows, lengths, firsts):
    """Set firsts[i] to where table[req_rows[i], : lengths[i]] first differs from `known`."""
    for i in range(req_rows.shape[0]):
        row, place = req_rows[i], 0
        end = min(known_lengths[row], lengths[i])
        while place < end and table[row, place] == known[row, place]:
            place += 1
        firsts[i] = place


@numba.njit("i8(i8[::1], i4[:, ::1])", cache=True, nogil=True)
def _runs(slots, runs):
    count = 0
    for i in range(slots.shape[0]):
        if i > 0 and slots[i] == slots[i - 1] + 1:
            runs[count - 1, 1] += 1
        else:
            runs[count, 0], runs[count, 1] = slots[i], 1
            count += 1
    return count


@numba.njit("i8(i8, u1[::1], i8)", cache=True, nogil=True)
def encode_number(number, out, end):
    """Append a number as LEB128: 7 bits a byte, lowest first, all but the last byte >= 128.

    Returns the new end.
    """
    while number >= 128:
        out[end] = (number & 127) | 128
        number >>= 7
        end += 1
    out[end] = number
    return end + 1


@numba.njit("i8(i8, u1[::1], i8)", cache=True, nogil=True)
def _put_signed(number, out, end):
    """Append a signed number: 0, -1, 1, -2, ... as 0, 1, 2, 3, ... Returns the new end."""
    return encode_number((number << 1) ^ (number >> 63), out, end)


@numba.njit("i8(i4[:, ::1], u4[::1], u1[::1], i8)", cache=True, nogil=True)
def encode_positions(positions, counts, out, end):
    """Append the gaps between each query's positions. Returns the new end; -1 if not ascending."""
    for query in range(positions.shape[0]):
        previous, count = -1, 0
        for j in range(positions.shape[1]):
            position = positions[query, j]
            if position < 0:
                continue
            if position <= previous:
                return -1
            end = encode_number(position - previous - 1, out, end)
            previous = position
            count += 1
        counts[query] = count
    return end


@numba.njit("i8(i8[::1], u1[::1], i8)", cache=True, nogil=True)
def encode_signed(numbers, out, end):
    """Append signed numbers. Returns the new end."""
    for number in numbers:
        end = _put_signed(number, out, end)
    return end


@numba.njit("i8(i4[:, ::1], u1[::1], i8)", cache=True, nogil=True)
def encode_slots(slots, out, end):
    """Append a top-k's slots, including pads, as differences. Returns the new end."""
    previous = np.int64(0)
    for query in range(slots.shape[0]):
        for j in range(slots.shape[1]):
            end = _put_signed(slots[query, j] - previous, out, end)
            previous = np.int64(slots[query, j])
    return end


@numba.njit("i8(i4[:, ::1], u1[::1], i8)", cache=True, nogil=True)
def encode_runs(runs, out, end):
    """Append runs (first, count) as the gap before each and its count - 1. Returns the new end."""
    previous = np.int64(0)
    for i in range(runs.shape[0]):
        end = _put_signed(runs[i, 0] - previous, out, end)
        end = encode_number(runs[i, 1] - 1, out, end)
        previous = np.int64(runs[i, 0]) + runs[i, 1]
    return end


@numba.njit(cache=True, nogil=True)
def decode(data, numbers):
    """Decode LEB128 numbers into `numbers`, one per byte below 128. Returns False if malformed."""
    place, shift, number = 0, 0, np.int64(0)
    for byte in data:
        if shift > 63:
            return False
        number |= np.int64(byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers[place] = number
            place, shift, number = place + 1, 0, np.int64(0)
    return shift == 0


@numba.njit(cache=True, nogil=True)
def decode_positions(numbers, places, counts, positions):
    """Invert encode_positions into positions [sum of counts] int32. Returns False on overflow.

    places, counts: [n] where in numbers each query's gaps begin, and how many there are
    """
    end = 0
    for query in range(counts.shape[0]):
        previous = np.int64(-1)
        for place in range(places[query], places[query] + counts[query]):
            previous += numbers[place] + 1
            if not 0 <= previous < 2**31 or numbers[place] < 0:
                return False
            positions[end] = previous
            end += 1
    return True


@numba.njit(cache=True, nogil=True)
def decode_runs(firsts, counts, slots):
    """Write the slots of the runs to slots [sum of counts] int64."""
    place = 0
    for i in range(firsts.shape[0]):
        for j in range(counts[i]):
            slots[place] = firsts[i] + j
            place += 1


@numba.njit(cache=True, nogil=True)
def accumulate(counters, of_layer, layers, last):
    """Turn counters [events, n] from increments of the event's layer into totals, in place.

    last: [layers, n] each layer's totals before the first event; updated
    """
    for event in range(counters.shape[0]):
        if of_layer[event]:
            of = last[layers[event]]
            for i in range(counters.shape[1]):
                of[i] += counters[event, i]
                counters[event, i] = of[i]


def runs_of(slots: np.ndarray) -> np.ndarray:
    """Return slots [n] int64, all within int32, as runs [m, 2] int32 of (first, count)."""
    runs = np.empty((len(slots), 2), np.int32)
    return runs[: _runs(np.ascontiguousarray(slots), runs)].copy()


def slots_to_positions(
    topk_slots: np.ndarray,
    req_rows: np.ndarray,
    lengths: np.ndarray,
    req_to_token: np.ndarray,
    scratch: np.ndarray,
) -> np.ndarray:
    """Return the positions [T, K] int32 of top-k slots: ascending, each once, -1 pads at the end.

    topk_slots    [T, K] int32, -1 pads anywhere
    req_rows      [T] int64 row of each query's request
    lengths       [T] int32 positions that each query sees
    req_to_token  [requests, context] int32, the slots of each request in order
    scratch       [slots] uint8, zeros before and after (bytes, so that they stay in L2)
    Slots outside the request's first `length` positions are left out. Cost: O(length) per query.
    """
    positions = np.empty(topk_slots.shape, np.int32)
    _slots_to_positions(topk_slots, req_rows, lengths, req_to_token, scratch, positions)
    return positions
