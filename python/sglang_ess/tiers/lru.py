"""LRU over the rows of one hot tier: the numba kernels behind HotCache, and their state.

Recency is a queue that is appended to and never edited: using a row appends it again, and
`row_place` says which of its entries counts. So a use costs two scattered accesses (the
slot's row, the row's place) and one sequential write, where a linked list costs five.

    queue:   [ stale | stale | row 7 | stale | row 2 | row 9 | ... )  tail
              ^ head                 least recently used first

Places from `guard` on were used by the plan or install in progress: never evicted by it.
"""

import numba
import numpy as np

jit = numba.njit(cache=True, nogil=True)

# Indices into `state` (int64).
HEAD, TAIL, FREE, STEP = 0, 1, 2, 3
LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED = 4, 5, 6, 7, 8, 9
STATE_SIZE = 10
COUNTERS = ("lookups", "misses", "evictions", "evicted_age", "installs", "skipped")


def queue_length(num_rows: int) -> int:
    """Entries of the queue: room for as many new ones as live ones between compactions."""
    return 2 * num_rows + 1


@jit
def _compact(row_place, queue, queue_step, state, guard):
    """Drop stale entries from the queue. Returns where guard is now."""
    kept = _keep_live(row_place, queue, queue_step, state[HEAD], guard, 0)
    state[TAIL] = _keep_live(row_place, queue, queue_step, guard, state[TAIL], kept)
    state[HEAD] = 0
    return kept


@jit
def _keep_live(row_place, queue, queue_step, begin, end, kept):
    """Move the live entries of [begin, end) to kept and on. Returns where they end.

    No branch: which entries are live is a coin toss, and mispredicting costs more than
    the writes that the next entry overwrites.
    """
    for place in range(begin, end):
        row = queue[place]
        was = row_place[row]
        live = was == place
        queue[kept] = row
        queue_step[kept] = queue_step[place]
        row_place[row] = kept if live else was
        kept += live
    return kept


@jit
def _use(row, row_place, queue, queue_step, state, guard):
    """Make row the most recently used. Returns guard, which a compaction moves."""
    if state[TAIL] == queue.shape[0]:
        guard = _compact(row_place, queue, queue_step, state, guard)
    tail = state[TAIL]
    queue[tail] = row
    queue_step[tail] = state[STEP]
    row_place[row] = tail
    state[TAIL] = tail + 1
    return guard


@jit
def _take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, min_age):
    """A row to fill: a free one, else the least recently used one; -1 if there is none.

    Not one at or past guard, and not one used less than min_age steps ago.
    """
    if state[FREE] > 0:
        state[FREE] -= 1
        return free[state[FREE]]
    while state[HEAD] < min(guard, state[TAIL]):
        head = state[HEAD]
        row = queue[head]
        if row_place[row] == head:
            age = state[STEP] - queue_step[head]
            if age < min_age:
                return -1
            state[HEAD] = head + 1
            slot_row[row_slot[row]] = -1
            state[EVICTIONS] += 1
            state[EVICTED_AGE] += age
            return row
        state[HEAD] = head + 1
    return -1


@jit
def plan(
    topk,
    query,
    column,
    slot_row,
    row_slot,
    row_place,
    queue,
    queue_step,
    free,
    state,
    rows,
    miss_slots,
    miss_rows,
    query_misses,
):
    """Resolve topk[query:, :] (its first query from column on) until no row is left.

    Returns (queries, stop_query, stop_column, misses): the queries with entries in rows,
    where the next pass begins, and the length of the miss list. Entries of rows that are
    not resolved in this pass, and pads, are -1.
    """
    guard = state[TAIL]
    first, misses = query, 0
    num_queries, width = topk.shape
    while query < num_queries:
        missed = 0
        lookups = 0
        for j in range(column):
            rows[query, j] = -1
        for j in range(column, width):
            slot = topk[query, j]
            if slot < 0:
                rows[query, j] = -1
                continue
            row = slot_row[slot]
            if row < 0:
                row = _take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, 0)
                if row < 0:
                    state[MISSES] += missed
                    query_misses[query] += missed
                    # A query is attended whole where it can be: bit for bit as one-tier.
                    whole = query > first
                    for k in range(0 if whole else j, width):
                        rows[query, k] = -1
                    if whole:
                        return query - first, query, 0, misses
                    state[LOOKUPS] += lookups
                    return 1, query, j, misses
                slot_row[slot] = row
                row_slot[row] = slot
                miss_slots[misses] = slot
                miss_rows[misses] = row
                misses += 1
                missed += 1
                guard = _use(row, row_place, queue, queue_step, state, guard)
            elif row_place[row] < guard:
                guard = _use(row, row_place, queue, queue_step, state, guard)
            rows[query, j] = row
            lookups += 1
        state[LOOKUPS] += lookups
        state[MISSES] += missed
        query_misses[query] += missed
        query += 1
        column = 0
    return query - first, query, 0, misses


@jit
def warm(
    topk,
    slot_row,
    row_slot,
    row_place,
    queue,
    queue_step,
    free,
    state,
    miss_slots,
    miss_rows,
):
    """Use the slots of topk [queries, K] in order, as if each query were a step of its own.

    Returns the length of the list of rows to fill: each row once, with its last slot.
    """
    misses = 0
    for query in range(topk.shape[0]):
        guard = state[TAIL]
        for j in range(topk.shape[1]):
            slot = topk[query, j]
            if slot < 0:
                continue
            row = slot_row[slot]
            if row < 0:
                row = _take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, 0)
                if row < 0:
                    break  # more slots than rows: what is in stays
                slot_row[slot] = row
                row_slot[row] = slot
                miss_slots[misses] = slot
                miss_rows[misses] = row
                misses += 1
                state[INSTALLS] += 1
                guard = _use(row, row_place, queue, queue_step, state, guard)
            elif row_place[row] < guard:
                guard = _use(row, row_place, queue, queue_step, state, guard)
    return _still_mapped(slot_row, miss_slots, miss_rows, misses)


@jit
def _still_mapped(slot_row, miss_slots, miss_rows, misses):
    """Drop the fills that later ones replaced, and repeats. Returns how many stay."""
    kept = 0
    for i in range(misses):
        slot, row = miss_slots[i], miss_rows[i]
        if slot_row[slot] == row:
            slot_row[slot] = -2 - row  # seen
            miss_slots[kept], miss_rows[kept] = slot, row
            kept += 1
    for i in range(kept):
        slot_row[miss_slots[i]] = miss_rows[i]
    return kept


@jit
def install(
    slots,
    min_age,
    slot_row,
    row_slot,
    row_place,
    queue,
    queue_step,
    free,
    state,
    sources,
    rows,
):
    """Give the written slots hot rows: the one they have, a free one, or one min_age old.

    Returns the length of the list: row rows[i] is to hold the value of slots[sources[i]].
    A slot that gets no row is in the host tier only.
    """
    guard, count = state[TAIL], 0
    for i in range(slots.shape[0]):
        slot = slots[i]
        row = slot_row[slot]
        if row < 0:
            row = _take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, min_age)
            if row < 0:
                state[SKIPPED] += 1
                continue
            slot_row[slot] = row
            row_slot[row] = slot
        if row_place[row] < guard:
            guard = _use(row, row_place, queue, queue_step, state, guard)
        sources[count], rows[count] = i, row
        count += 1
    state[INSTALLS] += count
    return count


@jit
def invalidate(slots, slot_row, row_slot, row_place, free, state):
    """Free the rows of these slots."""
    for i in range(slots.shape[0]):
        row = slot_row[slots[i]]
        if row >= 0:
            slot_row[slots[i]] = -1
            row_slot[row] = -1
            row_place[row] = -1
            free[state[FREE]] = row
            state[FREE] += 1


@jit
def copy_rows(source, target, source_rows, target_rows, count):
    """target[target_rows[i]] = source[source_rows[i]] for i < count; rows of int64 words."""
    words = source.shape[1]
    for i in range(count):
        row, place = source_rows[i], target_rows[i]
        for w in range(words):
            target[place, w] = source[row, w]


@jit
def first_difference(host_rows, hot_rows, row_slot, row_place, state, picks):
    """The first picked row that differs from its slot's host row, or -1; free rows pass.

    picks are places: each is taken modulo the row count.
    """
    for i in range(picks.shape[0]):
        row = picks[i] % row_slot.shape[0]
        slot = row_slot[row]
        if slot < 0:
            continue
        for w in range(hot_rows.shape[1]):
            if hot_rows[row, w] != host_rows[slot, w]:
                return row
    return -1


def new_state(num_slots: int, num_rows: int) -> dict[str, np.ndarray]:
    """All arrays of an empty hot tier, by the names the kernels use."""
    state = np.zeros(STATE_SIZE, np.int64)
    state[FREE] = num_rows
    return {
        "slot_row": np.full(num_slots, -1, np.int32),
        "row_slot": np.full(num_rows, -1, np.int32),
        "row_place": np.full(num_rows, -1, np.int32),
        "queue": np.zeros(queue_length(num_rows), np.int32),
        "queue_step": np.zeros(queue_length(num_rows), np.int32),
        "free": np.arange(num_rows, dtype=np.int32)[::-1].copy(),
        "state": state,
    }
