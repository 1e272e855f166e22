"""The aged clock: a hand goes round the rows and takes those that were not used for long.

The state is what many blocks of GPU threads can share without a list: a stamp for each row (the
step that used it last), a hand, and an age. A row is eligible if it is free, or if this step does
not use it and more steps than the age have passed since it was used. Each query with misses is a
block. In every round each block that still needs rows scans the next rows from the hand, as many
as should have enough eligible ones, and takes the first of them. Those that it leaves stay
eligible.

The age follows the tier. A block that needs more rows and found next to none lowers it at once,
by little: rows of one age lie together, so a scan may find none by chance. The age grows after a
step that did not lower it and found enough eligible rows, by 2 at least, because rows that nobody
uses grow older by 1. While rows are free it grows until they are taken, so they need no list.

Each round takes a row or lowers the age, down to 0. At 0 every row that this step does not use is
eligible, and there is one, because the step's slots fit the rows. So the rounds end.
"""

from typing import NamedTuple

import numpy as np

from sglang_ess.sim.policies.base import Policy, assign, jit

HAND, AGE, SCANNED, ROUNDS = range(4)  # places in `words`


class Rule(NamedTuple):
    """The constants. Sizes in rows; density, barren, lower and grow are powers of 1/2.

    chunk     a scan is a multiple of it, if the tier has as many rows
    span      most rows of a scan
    density   wanted share of eligible rows among the scanned ones
    barren    a smaller share than this of a scan lowers the age
    lower     share of the age that it falls by in a round, at least 1
    grow      share of the age that it grows by after a step, at least 2
    max_age   steps; the age of a new tier
    """

    chunk: int = 512
    span: int = 2048
    density: int = 4
    barren: int = 6
    lower: int = 3
    grow: int = 3
    max_age: int = 1 << 12


RULE = Rule()


class AgedClock(Policy):
    """words [4] int64: the hand's row, the age in steps; rows scanned and rounds of the last step.

    Blocks run one after another here, and all read the age at the start of their round.
    """

    def __init__(self, rows: int, num_slots: int, rule: Rule = RULE):
        super().__init__(rows, num_slots)
        self.rule = rule
        self.words = np.array([0, rule.max_age, 0, 0], np.int64)

    @property
    def cost(self) -> tuple[int, int]:
        """Rows scanned and rounds of the last step."""
        return int(self.words[SCANNED]), int(self.words[ROUNDS])

    def invalidate(self, slots: np.ndarray) -> None:
        """Free the rows of slots [n] int64, as HotCache.invalidate does."""
        rows = self.slot_row[slots]
        self.row_slot[rows[rows >= 0]] = self.slot_row[slots] = -1

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        place(
            missed, self.query_misses, self.steps, self.slot_row, self.row_slot, self.row_step,
            self.words, self.rule,
        )  # fmt: skip


@jit
def place(
    missed: np.ndarray,
    query_misses: np.ndarray,
    step: int,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    words: np.ndarray,
    rule: Rule,
) -> None:
    """Give the missed slots [n] int32, query by query, rows. query_misses [queries] int64"""
    ends = np.cumsum(query_misses)
    taken = ends - query_misses  # of `missed`, by query: the first slot without a row
    eligible, before = 0, words[AGE]
    words[SCANNED] = words[ROUNDS] = 0
    while (taken < ends).any():
        age = words[AGE]
        words[ROUNDS] += 1
        for query in range(len(ends)):
            if taken[query] == ends[query]:
                continue
            slots = missed[taken[query] : ends[query]]
            count = scan_size(len(slots), len(row_step), rule)
            found = scan(slots, words[HAND], count, age, step, slot_row, row_slot, row_step)
            taken[query] += min(found, len(slots))
            eligible += found
            words[HAND] = (words[HAND] + count) % len(row_step)
            words[SCANNED] += count
            if taken[query] < ends[query] and found << rule.barren < count:
                words[AGE] = max(0, min(words[AGE], age - max(1, age >> rule.lower)))
    if words[AGE] == before and eligible << rule.density > words[SCANNED]:
        words[AGE] = min(rule.max_age, before + max(2, before >> rule.grow))


@jit
def scan_size(need: int, rows: int, rule: Rule) -> int:
    """Rows to scan for `need` eligible ones at the wanted density, in whole chunks."""
    chunks = ((need << rule.density) + rule.chunk - 1) // rule.chunk
    return min(chunks * rule.chunk, rule.span, rows)


@jit
def scan(
    slots: np.ndarray,
    first: int,
    count: int,
    age: int,
    step: int,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
) -> int:
    """Give slots the eligible rows among `count` rows from `first` on. Returns how many there are.

    There may be more or fewer than slots.
    """
    found = 0
    for i in range(first, first + count):
        row = i % len(row_step)
        if row_slot[row] < 0 or step - row_step[row] > age:
            if found < len(slots):
                assign(row, slots[found], step, slot_row, row_slot, row_step)
            found += 1
    return found
