"""Kernels of the trace: slots to positions, positions to bytes and back. Used by trace.py.

The two that serving calls have declared types: they compile, or load from numba's cache, at
import and not in a decode step.
"""

import numba
import numpy as np

LEB_BYTES = 5  # of one int32, at most

_positions_type = "void(i4[:, ::1], i8[::1], i4[::1], i4[:, ::1], u1[::1], i4[:, ::1])"


@numba.njit(_positions_type, cache=True, nogil=True)
def _slots_to_positions(topk_slots, req_rows, lengths, req_to_token, scratch, positions):
    """Mark the query's slots, then walk the request's slots in order: ascending, no sort."""
    for query in range(topk_slots.shape[0]):
        marked = 0
        for j in range(topk_slots.shape[1]):
            slot = topk_slots[query, j]
            if slot >= 0 and scratch[slot] == 0:
                scratch[slot] = 1
                marked += 1
        slots = req_to_token[req_rows[query]]
        found, position, length = 0, 0, lengths[query]
        # Write first, count after: without a branch on the mark this is three times as fast.
        while position < length and found < marked:
            positions[query, found] = position
            found += scratch[slots[position]]
            position += 1
        positions[query, found:] = -1
        for j in range(topk_slots.shape[1]):
            slot = topk_slots[query, j]
            if slot >= 0:
                scratch[slot] = 0


@numba.njit("i8(i4[:, ::1], u4[::1], u1[::1], i8)", cache=True, nogil=True)
def encode(positions, counts, out, end):
    """Append the queries' gaps to out from end on. Returns the new end; -1: not ascending."""
    for query in range(positions.shape[0]):
        previous, count = -1, 0
        for j in range(positions.shape[1]):
            position = positions[query, j]
            if position < 0:
                continue
            gap = position - previous - 1
            if gap < 0:
                return -1
            while gap >= 128:
                out[end] = (gap & 127) | 128
                gap >>= 7
                end += 1
            out[end] = gap
            end += 1
            previous = position
            count += 1
        counts[query] = count
    return end


@numba.njit(cache=True, nogil=True)
def decode(data, counts, positions):
    """The inverse of encode: positions [sum of counts] int32. Returns the bytes used."""
    start, place = 0, 0
    for count in counts:
        previous = -1
        for _ in range(count):
            gap, shift = 0, 0
            while True:
                if start == data.shape[0]:
                    return -1
                byte = data[start]
                start += 1
                gap |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            previous += gap + 1
            positions[place] = previous
            place += 1
    return start


def slots_to_positions(
    topk_slots: np.ndarray,
    req_rows: np.ndarray,
    lengths: np.ndarray,
    req_to_token: np.ndarray,
    scratch: np.ndarray,
) -> np.ndarray:
    """Positions [T, K] int32 of the top-k slots: ascending, each once, -1 pads at the end.

    topk_slots [T, K] int32, -1 pads anywhere; req_rows [T] int64; lengths [T] int32
    req_to_token [requests, context] int32, whose row r holds request r's slots in order
    scratch [slots] uint8, all zero before and after (bytes: a request's marks stay in L2)
    A slot outside its request's first `length` positions has no position and is left out.
    Cost: O(length) a query, less where the last selected position comes early.
    """
    positions = np.empty(topk_slots.shape, np.int32)
    _slots_to_positions(topk_slots, req_rows, lengths, req_to_token, scratch, positions)
    return positions
