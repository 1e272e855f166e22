"""Evict the row that is worth least: LRU, and the rules that know more than the last use.

What a slot's uses are worth halves every h steps (`half_lives`). A slot's key is the time in steps
of the one use that is worth as much as all of them: a use at time x turns key k into
x + h log2(1 + 2^((k - x) / h)). Keys change with uses only, since all of them lose worth at one
rate. h = 0 gives the greater of k and x: the last use, which is LRU. With several half-lives a slot
has a key for each, and its worth is the weighted sum. Two that are far apart stand for a power of
the time since each use, as use and need fall off in text.
Sources: Lee et al., LRFU, IEEE Transactions on Computers 50 (2001); Anderson and Schooler,
Psychological Science 2 (1991), for the power of time.

Everything else that a rule knows is a use that is worth less, as one some steps ago:
    hints        slots that are likely soon: the indexer's runners-up, or another layer's list
    misses       a row that was not hot has yet to show that it is used again (a probation)
    weak places  of a list's slots, those whose score was low

A rule may also fetch hinted slots ahead, into rows that are worth less.
"""

from typing import NamedTuple

import numpy as np

from sglang_ess.sim.policies.base import Policy, assign, jit

NEVER = -1e18  # key of a slot without a use
DROPPED = -60.0  # 2^this is not added


class Worth(NamedTuple):
    """What counts as a use, and for how much. Times in steps.

    half_lives  the worth of a use halves in these times; (0,): only the last use counts
    shares      of each half-life in the worth, as many
    remember    an evicted slot keeps its keys (numbers for each slot, not only for each row)
    hint_age    a hint counts as a use so long ago; None: not at all
    hints       of a step's hinted slots, the first so many of each list count
    miss_age    a use that missed counts as one so long ago
    weak_age    the use with the least score of its list counts as one so long ago, those between
                in proportion to their score
    ahead       most hinted slots of a list that are fetched ahead, from the best on
    margin      fetch ahead only into a row that is worth what the slot was so long ago, or less
    """

    half_lives: tuple[float, ...] = (0.0,)
    shares: tuple[float, ...] = (1.0,)
    remember: bool = False
    hint_age: float | None = None
    hints: int = 0
    miss_age: float = 0.0
    weak_age: float = 0.0
    ahead: int = 0
    margin: float = 0.0

    def state_bytes(self, rows: int, num_slots: int) -> int:
        """Bytes that the rule keeps and LRU does not: a byte for each key of a row or slot.

        A byte has the age of a key in eighths of its half-life. The lab itself does not round.
        """
        keys = len(self.half_lives) if any(self.half_lives) else 0
        return keys * (num_slots if self.remember else rows)


class Keyed(Policy):
    """slot_keys [slots, half-lives] float64; row_use [rows] int64: the number of its last use.

    Of rows that are worth the same, the one that was used first goes first. A row that the last
    step used is never evicted, neither by its misses nor by what its hints fetch.
    strengths: set it before a step: [queries, K] float32 in [0, 1], of its lookups' scores
    """

    def __init__(self, rows: int, num_slots: int, rule: Worth):
        super().__init__(rows, num_slots)
        self.rule = rule
        self.half_lives, self.shares = np.array(rule.half_lives), np.array(rule.shares)
        self.slot_keys = np.full((num_slots, len(self.half_lives)), NEVER)
        self.row_use = np.zeros(rows, np.int64)
        self.strengths: np.ndarray | None = None
        self._uses = np.zeros(1, np.int64)

    def _place(
        self, topk: np.ndarray, used: np.ndarray, missed: np.ndarray, free: np.ndarray
    ) -> None:
        ages = np.zeros(len(used) + len(missed))
        slots = np.concatenate([self.row_slot[used], missed])
        if self.rule.weak_age and self.strengths is not None:
            least = use_ages(topk, self.strengths, self.rule.weak_age, self.num_slots)
            ages += least[slots]
        ages[len(used) :] += self.rule.miss_age
        use(slots, self.steps - ages, self.half_lives, self.slot_keys)
        more = len(missed) - len(free)
        if more > 0:
            free = np.concatenate([free, self._victims(more, self.steps)])
        fill(
            used, missed, free, self.steps, self.rule.remember, self.slot_row, self.row_slot,
            self.row_step, self.row_use, self._uses, self.slot_keys,
        )  # fmt: skip

    def _victims(self, count: int, step: int) -> np.ndarray:
        """The rows to evict after a step, the first to go first."""
        rows: np.ndarray = victims(
            count, step, self.half_lives, self.shares, self.slot_keys, self.row_slot, self.row_step,
            self.row_use,
        )  # fmt: skip
        return rows

    def hint(self, hints: np.ndarray) -> int:
        """Take hints [lists, m] int32 after a step, best first; -1 pads.

        Returns the number of rows fetched ahead.
        """
        rule, step = self.rule, self.steps - 1
        if rule.hint_age is None or step < 0:
            return 0
        first = hints[:, : rule.hints]
        slots = first[first >= 0]
        if not rule.remember:
            slots = slots[self.slot_row[slots] >= 0]
        at = step - rule.hint_age
        use(slots, np.full(len(slots), at), self.half_lives, self.slot_keys)
        wanted = first[:, : rule.ahead].T.reshape(-1)
        cold = np.unique(wanted[(wanted >= 0) & (self.slot_row[wanted] < 0)])
        if not len(cold):
            return 0
        if not rule.remember:
            self.slot_keys[cold] = at
        value = worth(cold, step, self.half_lives, self.shares, self.slot_keys)
        best = np.argsort(-value, kind="stable")
        return self._fetch_ahead(cold[best], value[best], step)

    def _fetch_ahead(self, slots: np.ndarray, value: np.ndarray, step: int) -> int:
        """Fetch the slots, best first, as long as rows are free or worth less."""
        spare = min(self.rows - self.occupied, len(slots))
        rows = np.arange(self.occupied, self.occupied + spare, dtype=np.int32)
        if len(slots) > spare:
            rows = np.concatenate([rows, self._victims(len(slots) - spare, step)])
        count = 0
        for slot, row in zip(slots, rows, strict=False):
            old = self.row_slot[row : row + 1]
            if old >= 0:
                least = worth(old, step, self.half_lives, self.shares, self.slot_keys)[0]
                if least + self.rule.margin >= value[count]:
                    break
                if not self.rule.remember:
                    self.slot_keys[old] = NEVER
            assign(row, slot, -1, self.slot_row, self.row_slot, self.row_step)
            self._uses += 1
            self.row_use[row] = self._uses[0]
            count += 1
        self.occupied += min(count, spare)
        if not self.rule.remember:
            self.slot_keys[slots[count:]] = NEVER
        return count


@jit
def added(key: float, time: float, half_life: float) -> float:
    """The key after a use at `time`."""
    if half_life <= 0 or key == NEVER:
        return max(key, time)
    gap = -abs(key - time) / half_life
    return max(key, time) + (half_life * np.log2(1 + 2.0**gap) if gap > DROPPED else 0.0)


@jit
def worth(
    slots: np.ndarray,
    step: int,
    half_lives: np.ndarray,
    shares: np.ndarray,
    slot_keys: np.ndarray,
) -> np.ndarray:
    """[n] float64: what slots are worth, as the time of one use by the first half-life."""
    found: np.ndarray = slot_keys[slots, 0]
    if half_lives.shape[0] == 1:
        return found
    for i in range(slots.shape[0]):
        total = 0.0
        for j in range(half_lives.shape[0]):
            total += shares[j] * 2.0 ** ((slot_keys[slots[i], j] - step) / half_lives[j])
        found[i] = step + half_lives[0] * np.log2(total) if total > 0 else NEVER
    return found


@jit
def use_ages(
    topk: np.ndarray, strengths: np.ndarray, weak_age: float, num_slots: int
) -> np.ndarray:
    """[slots] float64 ages of a step's uses: of a slot's places the strongest counts."""
    ages = np.full(num_slots, weak_age)
    for query in range(topk.shape[0]):
        for column in range(topk.shape[1]):
            slot = topk[query, column]
            if slot >= 0:
                ages[slot] = min(ages[slot], weak_age * (1 - strengths[query, column]))
    return ages


@jit
def use(
    slots: np.ndarray, times: np.ndarray, half_lives: np.ndarray, slot_keys: np.ndarray
) -> None:
    """Count a use of each slot [n] int32 at its time [n] float64."""
    for i in range(slots.shape[0]):
        for j in range(half_lives.shape[0]):
            slot_keys[slots[i], j] = added(slot_keys[slots[i], j], times[i], half_lives[j])


def victims(
    count: int,
    step: int,
    half_lives: np.ndarray,
    shares: np.ndarray,
    slot_keys: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    row_use: np.ndarray,
) -> np.ndarray:
    """The rows [count or fewer] int32 to evict, the first to go first; none that `step` used.

    NumPy's own sorts, which are no slower: numba would compile its copies of them for seconds.
    """
    rows = np.flatnonzero((row_slot >= 0) & (row_step != step)).astype(np.int32)
    value = worth(row_slot[rows], step, half_lives, shares, slot_keys)
    if count < len(rows):
        limit = np.partition(value, count - 1)[count - 1]
        rows, value = rows[value <= limit], value[value <= limit]
    first: np.ndarray = rows[np.lexsort((row_use[rows], value))][:count]
    return first


@jit
def fill(
    used: np.ndarray,
    missed: np.ndarray,
    rows: np.ndarray,
    step: int,
    remember: bool,
    slot_row: np.ndarray,
    row_slot: np.ndarray,
    row_step: np.ndarray,
    row_use: np.ndarray,
    uses: np.ndarray,
    slot_keys: np.ndarray,
) -> None:
    """Number the uses of this step, hits first, and give the missed slots these rows."""
    for row in used:
        uses[0] += 1
        row_use[row] = uses[0]
    for i in range(missed.shape[0]):
        row = rows[i]
        if row_slot[row] >= 0 and not remember:
            slot_keys[row_slot[row]] = NEVER
        assign(row, missed[i], step, slot_row, row_slot, row_step)
        uses[0] += 1
        row_use[row] = uses[0]
