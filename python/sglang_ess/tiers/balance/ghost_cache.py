"""A sampled ghost cache: estimates one layer's LRU miss curve while it serves.

Fixed-rate SHARDS (Waldspurger et al., FAST '15): slots are sampled by a hash at rate R, and an LRU
of R x C sampled slots misses R times what an LRU of C slots misses. A ghost keeps no rows. It keeps
when each sampled slot was last used, and how far down the queue each size of a grid reaches:

    queue:   [ - | 3 | - | 8 | 1 | - | 7 | 2 | - | 9 | ... )  tail      -: moved since
                   ^ bound of size 6       ^ bound of size 3

A slot at or past a size's bound is hot at that size. A lookup searches among the bounds, and a step
moves each bound past as many entries as came in. No tree is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
import torch

jit = numba.njit(cache=True, nogil=True)

BLOCK = 8  # lookups tested together for a sample
PART = 1024  # lookups whose samples are deduplicated together
WORD = 64  # queue entries of one word of the bitmap
GOLDEN = 0.6180339887498949  # its multiples are spread evenly, also those of neighbours
# Indices into `state` (int64).
TAIL, STEPS, LOOKUPS, UNION = 0, 1, 2, 3
STATE_SIZE = 4
COLD = -1  # in `place`: not in the queue
PICKED = -2  # in `place`: already counted in the step in progress


@dataclass(frozen=True)
class MissCurve:
    """One layer's misses at each size of a grid.

    rows     [sizes] hot rows, ascending; a ghost's begin with 0
    misses   [sizes] expected rows fetched per step, never rising
    lookups  per step, repeats included
    union    distinct slots of the largest step; with fewer rows a step takes several passes, which
             the curve does not model
    steps    number of measured steps
    """

    rows: tuple[int, ...]
    misses: tuple[float, ...]
    lookups: float
    union: int
    steps: int

    @property
    def misses_per_lookup(self) -> tuple[float, ...]:
        """[sizes] misses relative to lookups; zeros without a lookup."""
        return tuple(misses / self.lookups if self.lookups else 0.0 for misses in self.misses)

    def at(self, rows: float) -> float:
        """Return the misses per step with `rows` hot rows, interpolated linearly."""
        return float(np.interp(rows, self.rows, self.misses))


class GhostCache:
    """Estimates the misses of HotCaches of several sizes with the same lookups and writes.

    It counts as HotCache.plan does: a slot that a step looks up twice misses once, all lookups of
    a step are answered before any of them evicts, and free rows are taken first. Two details that
    depend on a cache's size are the same for all sizes here: a step's slots enter in their order
    (HotCache uses hits before misses), and an install with a min_age leaves the slot cold. At rate
    1 the counts equal HotCache's when each step is one lookup, and are within 1 % from 1.5 unions
    of a step on (tests).

    num_slots  slots of the host tier
    rate       share of slots sampled, above 0 and at most 1
    sizes      hot rows to estimate misses at, ascending
    rows       [sizes] the sizes as estimated: a whole number of sampled rows each, at least one
    Raises: ValueError for a rate or sizes outside their limits.
    """

    def __init__(self, num_slots: int, rate: float, sizes: Sequence[int]):
        if not 0 < rate <= 1:
            raise ValueError(f"ghost rate must be more than 0 and at most 1: got {rate:g}.")
        if not len(sizes) or min(sizes) < 1 or num_slots < 1:
            raise ValueError(
                f"ghost sizes and slots must be at least 1: got {list(sizes)} and {num_slots}."
            )
        # Multiplying by an odd number permutes [0, domain). A slot whose product is below `limit`
        # is sampled, and the product is its index into `place`.
        domain = 1 << (num_slots - 1).bit_length()
        limit = max(1, round(rate * domain))
        self.rate, self.num_slots = limit / domain, num_slots
        self._sizes = np.array([max(1, round(size * self.rate)) for size in sizes], np.int64)
        self.rows = tuple(round(size / self.rate) for size in self._sizes.tolist())
        self._hash = np.array([int(domain * GOLDEN) | 1, domain - 1, limit], np.uint32)
        length = -(-2 * limit // WORD) * WORD
        self._place = np.empty(limit, np.int32)
        self._queue = np.empty(length, np.int32)
        self._words = np.empty(length // WORD, np.uint64)
        self._bounds = np.empty(len(self._sizes), np.int64)
        self._inside = np.empty(len(self._sizes), np.int64)
        self._counts = np.empty(len(self._sizes) + 1, np.float64)
        self._state = np.zeros(STATE_SIZE, np.int64)
        self._arrays = (
            self._place, self._queue, self._words, self._sizes, self._bounds, self._inside,
            self._counts, self._state,
        )  # fmt: skip
        self.clear()

    @staticmethod
    def bytes_for(num_slots: int, rate: float, num_sizes: int) -> int:
        """Return the nbytes of such a ghost."""
        limit = max(1, round(rate * (1 << (num_slots - 1).bit_length())))
        length = -(-2 * limit // WORD) * WORD
        return 4 * limit + 4 * length + length // 8 + 32 * num_sizes + 8 + 8 * STATE_SIZE + 12

    @property
    def nbytes(self) -> int:
        return self._hash.nbytes + sum(array.nbytes for array in self._arrays)

    @property
    def steps(self) -> int:
        """Steps counted since the start or the last forget(0)."""
        return int(self._state[STEPS])

    # --- contract.LookupObserver -------------------------------------------------------

    def access(self, topk: torch.Tensor) -> None:
        """Observe HotCache.plan of a step's topk [queries, K] int32 slots, -1 pads."""
        self._use(topk.reshape(-1).numpy(), counted=True)

    def warm(self, topk: torch.Tensor) -> None:
        """Observe HotCache.warm of topk [queries, K] int32: each query is a step, uncounted."""
        for query in topk.contiguous():
            self._use(query.numpy(), counted=False)

    def seed(self, slots: np.ndarray) -> None:
        """Take over a HotCache's hot slots [n], least recently used first.

        The ghost then knows all sizes up to that cache's from its first step on.
        """
        self.clear()
        self._use(slots, counted=False)

    def install(self, slots: torch.Tensor, min_age: int = 0) -> None:
        """Observe HotCache.install of slots [n] int64; with a min_age they become cold."""
        if min_age > 0:
            self.invalidate(slots)
        else:
            self._use(slots.numpy(), counted=False)

    def invalidate(self, slots: torch.Tensor) -> None:
        """Observe HotCache.invalidate of slots [n] int64; it frees their row at each size."""
        _drop(slots.numpy(), self._hash, *self._arrays)

    def clear(self) -> None:
        """Make every slot cold at every size, and reset the counts."""
        self._place.fill(COLD)
        self._words.fill(0)
        self._bounds.fill(0)
        self._inside.fill(0)
        self._state.fill(0)
        self._counts.fill(0)

    def _use(self, slots: np.ndarray, counted: bool) -> None:
        _use(slots, self._hash, counted, *self._arrays)

    # --- the curve ---------------------------------------------------------------------

    def curve(self) -> MissCurve:
        """Return the curve of the counted steps, weighted as forget has decided."""
        steps = max(1, self.steps)
        hits = np.concatenate([[0.0], np.cumsum(self._counts)])
        misses = (hits[-1] - hits[:-1]) / (self.rate * steps)
        points = dict(zip((0, *self.rows), misses.tolist(), strict=True))  # each size once
        lookups = float(self._state[LOOKUPS]) / (self.rate * steps)
        union = round(int(self._state[UNION]) / self.rate)
        return MissCurve(tuple(points), tuple(points.values()), lookups, union, self.steps)

    def forget(self, keep: float = 0.0) -> None:
        """Weight all counts so far by `keep` (0 to 1). The order of use stays."""
        self._counts *= keep
        for figure in (STEPS, LOOKUPS):
            self._state[figure] = round(self._state[figure] * keep)
        self._state[UNION] = 0


# --- kernels ----------------------------------------------------------------------------


@jit
def _pick(slots, begin, end, hashing, picked, count):
    """Append the hashes of the sampled ones of slots[begin:end] to picked[:count].

    Returns the new count. Block by block: whether one holds a sample at all takes vector
    instructions, and mostly none does. Which of its slots it is takes no branch: that would be
    a coin toss. So one entry past the last is written too.
    """
    multiplier, mask, limit = hashing[0], hashing[1], hashing[2]
    whole = begin + (end - begin) // BLOCK * BLOCK
    for first in range(begin, whole, BLOCK):
        some = np.uint32(0)
        for i in range(first, first + BLOCK):
            some |= np.uint32((np.uint32(np.uint32(slots[i]) * multiplier) & mask) < limit)
        if some:
            count = _pick_each(slots, first, first + BLOCK, hashing, picked, count)
    return _pick_each(slots, whole, end, hashing, picked, count)


@jit
def _pick_each(slots, first, last, hashing, picked, count):
    multiplier, mask, limit = hashing[0], hashing[1], hashing[2]
    for i in range(first, last):
        hashed = np.uint32(np.uint32(slots[i]) * multiplier) & mask
        picked[count] = hashed
        count += (hashed < limit) & (slots[i] >= 0)
    return count


@jit
def _bucket(place, bounds):
    """Return the first size whose bound is at or before place, or the number of sizes."""
    low, high = 0, bounds.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if bounds[middle] <= place:
            high = middle
        else:
            low = middle + 1
    return low


@jit
def _remove(at, words):
    words[at >> 6] &= ~(np.uint64(1) << np.uint64(at & 63))


@jit
def _use(slots, hashing, counted, place, queue, words, sizes, bounds, inside, counts, state):
    """Look up the sampled slots of one step, then make them the most recently used ones."""
    num_sizes, num_slots = sizes.shape[0], slots.shape[0]
    picked = np.empty(min(place.shape[0], num_slots) + PART + 1, np.int32)
    places = np.empty(picked.shape[0], np.int32)
    distinct, lookups = 0, 0
    for begin in range(0, num_slots, PART):
        count = _pick(slots, begin, min(begin + PART, num_slots), hashing, picked, distinct)
        lookups += count - distinct
        for i in range(distinct, count):
            slot = picked[i]
            at = place[np.uint32(slot)]
            place[np.uint32(slot)] = PICKED
            picked[distinct], places[distinct] = slot, at
            distinct += at != PICKED
    left = np.zeros(num_sizes + 1, np.int64)  # slots that leave a place of that bucket
    for i in range(distinct):
        at = places[i]
        bucket = num_sizes
        if at >= 0:
            bucket = _bucket(at, bounds)
            left[bucket] += 1
            _remove(at, words)
        counts[bucket] += counted
    if counted:
        state[STEPS] += 1
        state[LOOKUPS] += lookups
        state[UNION] = max(state[UNION], distinct)
    gone = 0
    for size in range(num_sizes):
        gone += left[size]
        inside[size] -= gone
    if state[TAIL] + distinct > queue.shape[0]:
        _compact(place, queue, words, bounds, inside, state)
    tail = state[TAIL]
    for i in range(distinct):
        at = tail + i
        place[picked[i]] = at
        queue[at] = picked[i]
        words[at >> 6] |= np.uint64(1) << np.uint64(at & 63)
    state[TAIL] = tail + distinct
    for size in range(num_sizes):
        inside[size] += distinct
        if inside[size] > sizes[size]:
            bounds[size] = _advance(bounds[size], inside[size] - sizes[size], words)
            inside[size] = sizes[size]


@jit
def _advance(bound, entries, words):
    """Return the place of a bound after moving past `entries` live entries."""
    word = bound >> 6
    bits = words[word] & ~((np.uint64(1) << np.uint64(bound & 63)) - np.uint64(1))
    ones = _ones(bits)
    while ones < entries:
        entries -= ones
        word += 1
        bits = words[word]
        ones = _ones(bits)
    for _ in range(entries - 1):
        bits &= bits - np.uint64(1)
    return (word << 6) + _ones((bits & (~bits + np.uint64(1))) - np.uint64(1)) + 1


@jit
def _ones(bits):
    """Count the ones of a uint64: sum pairs, fours, bytes, then all bytes."""
    pairs = bits - ((bits >> np.uint64(1)) & np.uint64(0x5555555555555555))
    fours = (pairs & np.uint64(0x3333333333333333)) + (
        (pairs >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    eights = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((eights * np.uint64(0x0101010101010101)) >> np.uint64(56))


@jit
def _compact(place, queue, words, bounds, inside, state):
    """Drop stale entries; each bound keeps as many live entries after it as before."""
    kept = 0
    for at in range(state[TAIL]):
        slot = queue[at]
        if place[slot] == at:
            place[slot] = kept
            queue[kept] = slot
            kept += 1
    words[:] = np.uint64(0)
    full = kept >> 6
    words[:full] = ~np.uint64(0)
    if kept & 63:
        words[full] = (np.uint64(1) << np.uint64(kept & 63)) - np.uint64(1)
    for size in range(bounds.shape[0]):
        bounds[size] = kept - inside[size]
    state[TAIL] = kept


@jit
def _drop(slots, hashing, place, queue, words, sizes, bounds, inside, counts, state):
    """Make the sampled slots cold. Slots evicted at a size do not come back in their place."""
    picked = np.empty(PART + 1, np.int32)
    for begin in range(0, slots.shape[0], PART):
        end = min(begin + PART, slots.shape[0])
        for i in range(_pick(slots, begin, end, hashing, picked, 0)):
            at = place[picked[i]]
            if at < 0:
                continue
            for size in range(_bucket(at, bounds), bounds.shape[0]):
                inside[size] -= 1
            _remove(at, words)
            place[picked[i]] = COLD
