"""LRU of verify steps: which lists of a step make its rows young.

A verify step of speculative decoding looks up several lists of each request. The first `kept` ones
of a request had the right tokens, which is known when the step is over. The rules here differ in
what the other lists, and the misses that only they have, do to the order of use.
"""

from __future__ import annotations

import numpy as np

from sglang_ess.sim.policies.base import Policy, assign, does_not_fit, jit

# Rule -> whether it waits for the kept lengths; whether rows that only other lists fetched go next.
RULES = {
    "all": (False, False),  # every list makes its rows young: the production HotCache
    "kept": (True, True),  # the kept lists do, when they are known
    "kept, misses young": (True, False),  # as before, but a fetched row starts young in any case
    "first": (False, True),  # the first list of each request does; the others do not, kept or not
}


class VerifiedLru(Policy):
    """A shared LRU tier of requests with `queries` lists each in a step.

    rule: one of RULES. Call step, then accepted, in turns.
    Raises: ValueError for an unknown rule, and as Policy.
    """

    def __init__(self, rows: int, num_slots: int, queries: int, rule: str):
        super().__init__(rows, num_slots)
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}: got {rule!r}.")
        self.queries, self.rule = queries, rule
        self._waits, self._sinks = RULES[rule]
        # A ring of rows, least recently used first; its last entry is both ends.
        self._after = np.full(rows + 1, rows, np.int32)
        self._before = np.full(rows + 1, rows, np.int32)
        self._marks = np.full(rows, -1, np.int64)
        self._last = (np.zeros((0, 0), np.int32), self._used, self._missed)

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        state = self.slot_row, self.row_slot, self.row_step, self._after, self._before
        if not place(missed, free, self.steps, *state):
            raise ValueError(does_not_fit(self.rows))
        self._last = topk, used.copy(), missed.copy()
        if not self._waits:
            count = 1 if self.rule == "first" else self.queries
            self._stamp(np.full(len(topk) // self.queries, count, np.int64))

    def accepted(self, kept: np.ndarray) -> None:
        """Tell how many lists [requests] int64 of each request of the last step were right."""
        if self._waits:
            self._stamp(kept)

    def use(self, slots: np.ndarray) -> None:
        """Make the slots [n] int32 hot and young outside a verify step, as a write or a warm-up."""
        queries, self.queries, self._waits, self._sinks = self.queries, 1, True, False
        for first in range(0, len(slots), self.rows):
            self.step(slots[None, first : first + self.rows])
            self._stamp(np.ones(1, np.int64))
        self.queries, (self._waits, self._sinks) = queries, RULES[self.rule]

    def forget(self, slots: np.ndarray) -> None:
        """Drop the slots [n], which have other contents now. Their rows are taken first."""
        forget(slots, self.slot_row, self.row_slot, self._after, self._before)

    def _stamp(self, kept: np.ndarray) -> None:
        topk, used, missed = self._last
        stamp(
            topk, kept, self.queries, used, missed, self._sinks, self.steps, self.slot_row,
            self._marks, self._after, self._before,
        )  # fmt: skip


@jit
def unlink(row: int, after: np.ndarray, before: np.ndarray) -> None:
    """Take the row out of the ring."""
    after[before[row]], before[after[row]] = after[row], before[row]


@jit
def link(row: int, ahead: int, after: np.ndarray, before: np.ndarray) -> None:
    """Put the row into the ring behind the row `ahead`."""
    behind = after[ahead]
    after[ahead], before[row], after[row], before[behind] = row, ahead, behind, row


@jit
def forget(
    slots: np.ndarray,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    after: np.ndarray,
    before: np.ndarray,
) -> None:
    """Empty the rows of these slots and make them the oldest."""
    for slot in slots:
        row = slot_row[slot]
        if row >= 0:
            slot_row[slot] = row_slot[row] = -1
            unlink(row, after, before)
            link(row, after.shape[0] - 1, after, before)


@jit
def place(
    missed: np.ndarray,
    free: np.ndarray,
    step: int,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    after: np.ndarray,
    before: np.ndarray,
) -> bool:
    """Give the missed slots rows, as the youngest for now. Returns whether they fit."""
    end = after.shape[0] - 1
    victim = after[end]
    for i in range(missed.shape[0]):
        if i < free.shape[0]:
            row = free[i]
        else:
            while victim != end and row_step[victim] == step:  # this step uses it
                victim = after[victim]
            if victim == end:
                return False
            row = victim
            victim = after[victim]
            unlink(row, after, before)
        assign(row, missed[i], step, slot_row, row_slot, row_step)
        link(row, before[end], after, before)
    return True


@jit
def stamp(
    topk: np.ndarray,
    kept: np.ndarray,
    queries: int,
    used: np.ndarray,
    missed: np.ndarray,
    sinks: bool,
    step: int,
    slot_row: np.ndarray,
    marks: np.ndarray,
    after: np.ndarray,
    before: np.ndarray,
) -> None:
    """Make the rows of the kept lists the youngest: those that were hot, then those fetched.

    sinks: other fetched rows become the oldest, the first of them the very oldest
    """
    end = after.shape[0] - 1
    for request in range(kept.shape[0]):
        for query in range(request * queries, request * queries + kept[request]):
            for column in range(topk.shape[1]):
                if topk[query, column] >= 0:
                    marks[slot_row[topk[query, column]]] = step
    for row in used:
        if marks[row] == step:
            unlink(row, after, before)
            link(row, before[end], after, before)
    for i in range(missed.shape[0]):
        row = slot_row[missed[i]]
        if marks[row] == step:
            unlink(row, after, before)
            link(row, before[end], after, before)
    for i in range(missed.shape[0] - 1, -1, -1):
        row = slot_row[missed[i]]
        if sinks and marks[row] != step:
            unlink(row, after, before)
            link(row, end, after, before)
