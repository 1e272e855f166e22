"""LRU over the rows of one hot tier: the numba kernels behind HotCache, and their state.

The order of use is a queue that is only appended to. Using a row appends it again, and `row_place`
says which of its entries is live. So a use costs two scattered accesses (the slot's row and the
row's place) and sequential writes; a linked list costs five scattered accesses.

    queue:   [ stale | stale | row 7 | stale | row 2 | row 9 | ... )  tail
              ^ head                 least recently used first

The plan or install in progress has used the places from `guard` on. It never evicts them and does
not append them again. So it appends each row at most once, `_begin` makes room for that, and no
entry moves until it ends.
"""

import numba
import numpy as np

jit = numba.njit(cache=True, nogil=True)

# Indices into `state` (int64).
HEAD, TAIL, FREE, STEP, ROWS = 0, 1, 2, 3, 4
LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED = 5, 6, 7, 8, 9, 10
STATE_SIZE = 11
# queue_step is int32 and has the low bits of STEP, which outgrows it (2^31 plans are two years of
# 30 a second). An age is a difference, so these bits suffice for rows unused for fewer than 2^32
# steps.
STEP_MASK = 0xFFFFFFFF
BLOCK = 512  # lookups of _use_hits whose slots and rows stay in the first-level cache


def queue_length(num_rows: int) -> int:
    """Return the entries of the queue: between compactions, as many new ones as live ones fit."""
    return 2 * num_rows


@jit
def _begin(row_place, queue, queue_step, state, num_uses):
    """Make room in the queue for a pass of up to num_uses uses. Returns its guard."""
    if state[TAIL] + min(num_uses, state[ROWS]) > queue.shape[0]:
        _compact(row_place, queue, queue_step, state)
    return state[TAIL]


@jit
def _compact(row_place, queue, queue_step, state):
    """Drop stale entries from the queue.

    There is no branch: whether an entry is live is unpredictable, and a misprediction costs more
    than writes that the next entry overwrites.
    """
    kept = 0
    for place in range(state[HEAD], state[TAIL]):
        row = queue[place]
        was = row_place[row]
        live = was == place
        queue[kept] = row
        queue_step[kept] = queue_step[place]
        row_place[row] = kept if live else was
        kept += live
    state[HEAD], state[TAIL] = 0, kept


@jit
def _take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, min_age):
    """Return a row to fill: a free one, else the least recently used one; -1 if there is none.

    Rows at or past guard, and rows used less than min_age steps ago, are not taken.
    """
    if state[FREE] > 0:
        state[FREE] -= 1
        return free[state[FREE]]
    for head in range(state[HEAD], guard):
        row = queue[head]
        if row_place[row] == head:
            age = (state[STEP] - queue_step[head]) & STEP_MASK
            if age < min_age:
                state[HEAD] = head
                return -1
            state[HEAD] = head + 1
            slot_row[row_slot[row]] = -1
            state[EVICTIONS] += 1
            state[EVICTED_AGE] += age
            return row
    state[HEAD] = guard
    return -1


@jit
def _resolve(
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
    misses,
    guard,
):
    """Give rows to topk[query, column:]. Returns (column, lookups, misses) where it stopped.

    misses: length of the miss list. column is the width if rows sufficed.
    """
    tail, step, lookups = state[TAIL], state[STEP], 0
    width = topk.shape[1]
    while column < width:
        slot = topk[query, column]
        if slot < 0:
            rows[query, column] = -1
            column += 1
            continue
        row = slot_row[slot]
        if row < 0:
            row = _take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, 0)
            if row < 0:
                break
            slot_row[slot] = row
            row_slot[row] = slot
            miss_slots[misses] = slot
            miss_rows[misses] = row
            misses += 1
        if row_place[row] < guard:
            queue[tail] = row
            queue_step[tail] = step
            row_place[row] = tail
            tail += 1
        rows[query, column] = row
        lookups += 1
        column += 1
    state[TAIL] = tail
    return column, lookups, misses


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
    """Resolve topk[query:, :], its first query from column on, as far as rows suffice.

    Returns (queries, stop_query, stop_column, misses): the queries with entries in rows, where the
    next pass begins, and the length of the miss list. Pads and lookups not resolved in this pass
    are -1 in rows.

    All hits are used before any miss takes a row, so that no miss evicts the row of a later hit.
    If the step does not fit that way, it is resolved in order until the rest certainly fits;
    otherwise each pass would read the whole rest.
    """
    num_queries, width = topk.shape
    for j in range(column if query < num_queries else 0):
        rows[query, j] = -1
    begin, end = query * width + column, num_queries * width
    if begin > 0 and end - begin > state[ROWS]:
        return _plan_in_order(
            topk, query, column, slot_row, row_slot, row_place, queue, queue_step, free, state,
            rows, miss_slots, miss_rows, query_misses,
        )  # fmt: skip
    guard = _begin(row_place, queue, queue_step, state, end - begin)
    flat_topk, flat_rows = topk.reshape(-1), rows.reshape(-1)
    hits, misses = _use_hits(
        flat_topk, begin, end, slot_row, row_place, queue, queue_step, state, flat_rows,
        miss_slots, guard,
    )  # fmt: skip
    room = state[ROWS] - (state[TAIL] - guard)
    if misses > room and _count_distinct(flat_topk, miss_slots, misses, slot_row) > room:
        return _plan_in_order(
            topk, query, column, slot_row, row_slot, row_place, queue, queue_step, free, state,
            rows, miss_slots, miss_rows, query_misses,
        )  # fmt: skip
    state[LOOKUPS] += hits + misses
    misses = _place_misses(
        flat_topk, width, misses, slot_row, row_slot, row_place, queue, queue_step, free, state,
        flat_rows, miss_slots, miss_rows, query_misses, guard,
    )  # fmt: skip
    return num_queries - query, num_queries, 0, misses


@jit
def _use_hits(
    topk, begin, end, slot_row, row_place, queue, queue_step, state, rows, miss_places, guard
):
    """Use the hot slots of flat topk [begin, end). Returns (hits, misses), counted as lookups.

    Fills rows with their rows, -1 elsewhere, and miss_places with the places of misses in topk.
    It works in blocks and two loops. The branch on hit or miss is often mispredicted; in the second
    loop it waits for rows, which is in cache, and not for slot_row. And the first loop has many
    reads of slot_row in flight. With a row for every slot, no order of use is kept.
    """
    tail, step, hits, misses = state[TAIL], state[STEP], 0, 0
    if state[ROWS] == slot_row.shape[0]:
        guard = 0
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        for i in range(first, last):
            slot = topk[i]
            rows[i] = slot_row[np.uint32(slot)] if slot >= 0 else -1
        for i in range(first, last):
            row = rows[i]
            if row >= 0:
                hits += 1
                if guard > 0 and row_place[np.uint32(row)] < guard:
                    row_place[np.uint32(row)] = tail
                    queue[tail], queue_step[tail] = row, step
                    tail += 1
            elif topk[i] >= 0:
                miss_places[misses] = i
                misses += 1
    state[TAIL] = tail
    return hits, misses


@jit
def _count_distinct(topk, places, count, slot_row):
    """Count the distinct slots of topk[places[:count]], none of which is hot."""
    distinct = 0
    for i in range(count):
        slot = topk[places[i]]
        distinct += slot_row[slot] == -1
        slot_row[slot] = -2  # seen
    for i in range(count):
        slot_row[topk[places[i]]] = -1
    return distinct


@jit
def _place_misses(
    topk,
    width,
    count,
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
    guard,
):
    """Give rows to the misses, which fit. miss_slots has their places in flat topk at first.

    Returns the length of the miss list, which overwrites the places already read.
    """
    tail, step, misses = state[TAIL], state[STEP], 0
    for i in range(count):
        place = miss_slots[i]
        slot = topk[place]
        row = slot_row[slot]
        if row < 0:  # else an earlier place has the same slot
            row = _take(slot_row, row_slot, row_place, queue, queue_step, free, state, guard, 0)
            slot_row[slot] = row
            row_slot[row] = slot
            row_place[row] = tail
            queue[tail], queue_step[tail] = row, step
            tail += 1
            miss_slots[misses], miss_rows[misses] = slot, row
            misses += 1
            query_misses[place // width] += 1
        rows[place] = row
    state[TAIL] = tail
    state[MISSES] += misses
    return misses


@jit
def _plan_in_order(
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
    """Plan more slots than rows: lookup by lookup until no row is left."""
    num_queries, width = topk.shape
    guard = _begin(row_place, queue, queue_step, state, (num_queries - query) * width)
    first, misses = query, 0
    while query < num_queries:
        before = misses
        column, lookups, misses = _resolve(
            topk, query, column, slot_row, row_slot, row_place, queue, queue_step, free, state,
            rows, miss_slots, miss_rows, misses, guard,
        )  # fmt: skip
        state[MISSES] += misses - before
        query_misses[query] += misses - before
        if column < width and query > first:
            # Attend a query in one pass if possible: then the result equals one tier's bit for bit.
            return query - first, query, 0, misses
        state[LOOKUPS] += lookups
        if column < width:
            for j in range(column, width):
                rows[query, j] = -1
            return 1, query, column, misses
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
    rows,
    miss_slots,
    miss_rows,
):
    """Use the slots of topk [queries, K] in order, as if each query were a step of its own.

    Returns the length of the list of rows to fill: each row once, with its last slot. A query with
    more slots than rows fills them all, and its other slots are skipped.
    """
    misses = 0
    for query in range(topk.shape[0]):
        guard = _begin(row_place, queue, queue_step, state, topk.shape[1])
        _, _, misses = _resolve(
            topk, query, 0, slot_row, row_slot, row_place, queue, queue_step, free, state,
            rows, miss_slots, miss_rows, misses, guard,
        )  # fmt: skip
    state[INSTALLS] += misses
    return _still_mapped(slot_row, miss_slots, miss_rows, misses)


@jit
def _still_mapped(slot_row, miss_slots, miss_rows, misses):
    """Drop repeated fills and fills that later ones replaced. Returns how many stay."""
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
    """Give the written slots hot rows: their own, a free one, or one at least min_age steps old.

    Returns the length of the list: rows[i] is to be filled with the value of slots[sources[i]]. A
    slot without a row is in the host tier only.
    """
    guard = _begin(row_place, queue, queue_step, state, slots.shape[0])
    count = 0
    for i in range(slots.shape[0]):
        slot = slots[i]
        row = slot_row[slot]
        if row < 0:
            row = _take(
                slot_row, row_slot, row_place, queue, queue_step, free, state, guard, min_age
            )
            if row < 0:
                state[SKIPPED] += 1
                continue
            slot_row[slot] = row
            row_slot[row] = slot
        if row_place[row] < guard:
            tail = state[TAIL]
            queue[tail], queue_step[tail] = row, state[STEP]
            row_place[row] = tail
            state[TAIL] = tail + 1
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
def release(slot_row, row_slot, row_place, queue, queue_step, free, state, released):
    """Fill `released` with rows to give up: free ones, then the least recently used.

    Effect: the queue is compacted.
    """
    for i in range(released.shape[0]):
        row = _take(slot_row, row_slot, row_place, queue, queue_step, free, state, state[TAIL], 0)
        row_slot[row] = -1
        row_place[row] = -1
        released[i] = row
    state[ROWS] -= released.shape[0]
    _compact(row_place, queue, queue_step, state)


@jit
def copy_rows(source, target, source_rows, target_rows, count):
    """Set target[target_rows[i]] = source[source_rows[i]] for i < count; rows of int64 words."""
    words = source.shape[1]
    for i in range(count):
        row, place = source_rows[i], target_rows[i]
        for w in range(words):
            target[place, w] = source[row, w]


@jit
def first_difference(host_rows, hot_rows, slot_row, row_slot, picks, first_slot):
    """Return the first picked row that differs from its slot's host row, or -1.

    Each pick is taken modulo the row count. Free rows, other layers' rows and slots below
    first_slot pass.
    """
    for i in range(picks.shape[0]):
        row = picks[i] % row_slot.shape[0]
        slot = row_slot[row]
        if slot < first_slot or slot >= slot_row.shape[0] or slot_row[slot] != row:
            continue
        for w in range(hot_rows.shape[1]):
            if hot_rows[row, w] != host_rows[slot, w]:
                return row
    return -1


def new_state(num_slots: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of an empty hot tier with these free rows, by the kernels' names."""
    state = np.zeros(STATE_SIZE, np.int64)
    state[FREE] = state[ROWS] = len(rows)
    return {
        "slot_row": np.full(num_slots, -1, np.int32),
        # full, not zeros: its memory pages exist from now on, and no plan waits for them.
        "queue": np.full(queue_length(len(rows)), 0, np.int32),
        "queue_step": np.full(queue_length(len(rows)), 0, np.int32),
        "free": rows[::-1].copy(),
        "state": state,
    }


# The kernels that HotCache calls. Start-up compiles them before the first request; Rebalancer
# compiles `release`.
ENTRY_POINTS = ("plan", "warm", "install", "invalidate", "copy_rows", "first_difference")
