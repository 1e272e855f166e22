"""The state of an index group's hot tier on the device: which slot has which row, used when.

Life of a row. A free row has the stamp FREE. `plan_fetch` and `install` give it to a slot and stamp
it with the *tick*, the number of the decode step under way, or of its pass where it takes several.
Each later hit stamps it again. `invalidate` makes it free. When a slot needs a row, a clock hand
finds one.

The hand. There is no list of rows in order of use: words[HAND] is a place among the rows, and who
needs rows reads the stamps from there on, in chunks, and moves the hand. A row is eligible if it is
free, or if its age in ticks is above words[AGE_LIMIT]. The limit is kept so high that about one
row in 16 is eligible, so a victim is among the least recently used 6 % or so, and costs about 16
stamps to find. At the end of a step that found more, the limit grows by an eighth; a block that
finds fewer than one row in 64 lowers it by an eighth at once, for all blocks. Free rows count as
eligible: while there are many, the limit grows and other rows stay. Against exact LRU this costs
at most 0.4 % more misses at 32K and 128K (aged_clock in results/policy_lab.json); the list that LRU
needs would be rebuilt every few steps.

A tier with a row for every slot has a free one for every miss, so there free rows alone are
eligible. A row that the same step uses is never eligible: its age is 0. A tier has at least as many
rows as a plan has lookups and its step has new slots, so the hand always finds a row.

Ticks and ages are numbers of 31 bits. The age of a row that nobody used for 2^31 steps starts
again at 0, which makes it young for a while.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

NOT_HOT = -1
FREE = -1  # the stamp of a free row
TICK_MASK = 2**31 - 1

# words [NUM_WORDS] int32
TICK = 0  # the tick of the next plan
HAND = 1  # the row at which the next scan starts
AGE_LIMIT = 2  # rows of a greater age are eligible
SCANNED = 3  # in a launch: rows that the hand has passed
SEEN = 4  # in a launch: eligible ones of these
CUT = 5  # in a launch: 1 if a block lowered the limit
OCCUPIED = 6  # rows that have a slot
SPLIT = 7  # set by the host: plans list hits and misses apart, for dual attention
NUM_WORDS = 8

MAX_AGE_LIMIT = 2**12  # kMaxAgeLimit of csrc/plan_fetch.cu. At first, free rows alone are eligible

# counters [NUM_COUNTERS] int64, since the start of the server. The first six: tiers/contract.py.
#   short     lookups and reserved slots that found no row, which must stay 0
#   steps     decode steps: ticks, but those of one step's passes are one
#   stall_ns  ns from when the main stream was ready for attention until the rows were there, over
#             layers and steps, from `times`. Without overlap the main stream waited as long; in DA
#             and DBA at most as long, because it attends to the hits meanwhile
#   scans     stamps that the hand read
COUNTERS = (
    "lookups", "misses", "evictions", "evicted_age", "installs", "skipped", "short", "steps",
    "stall_ns", "scans",
)  # fmt: skip
(
    LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED, SHORT, STEPS, STALL_NS, SCANS,
) = range(len(COUNTERS))  # fmt: skip
NUM_COUNTERS = len(COUNTERS)

# times [layers, NUM_TIMES] int64, ns of the device's clock in the step under way; 0: not yet
MAIN_READY = 0  # the main stream was ready for attention
FETCHED = 1  # the last missed row was there
NUM_TIMES = 2

HOT_ROW_STATE_BYTES = 8  # row_slot, row_stamp
SLOT_STATE_BYTES = 4  # slot_row
GROUP_STATE_BYTES = NUM_WORDS * 4 + NUM_COUNTERS * 8
LAYER_STATE_BYTES = NUM_TIMES * 8


@dataclass(frozen=True)
class HotState:
    """State of one index group, or of several with a leading dimension [groups].

    slot_row   [slots] int32  the slot's hot row, NOT_HOT if it has none; smaller values are claims
                              of a plan in progress
    row_slot   [rows] int32   the row's slot, -1 if the row is free
    row_stamp  [rows] int32   tick of the last use; FREE if the row is free
    words      [NUM_WORDS] int32
    counters   [NUM_COUNTERS] int64
    times      [layers, NUM_TIMES] int64
    """

    slot_row: torch.Tensor
    row_slot: torch.Tensor
    row_stamp: torch.Tensor
    words: torch.Tensor
    counters: torch.Tensor
    times: torch.Tensor

    @classmethod
    def new(
        cls, groups: int, num_slots: int, num_rows: int, device: torch.device | str, layers: int = 1
    ) -> HotState:
        """The states of `groups` groups of `layers` layers each, with num_rows free rows each.

        Raises: ValueError unless 1 <= num_rows <= num_slots.
        """
        if not 1 <= num_rows <= num_slots:
            raise ValueError(
                f"hot rows must be 1 to {num_slots}, the slots of the host tier: got {num_rows}."
            )

        def full(value: int, *size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full((groups, *size), value, dtype=dtype, device=device)

        words = full(0, NUM_WORDS)
        words[:, TICK] = words[:, SPLIT] = 1
        words[:, AGE_LIMIT] = MAX_AGE_LIMIT
        return cls(
            slot_row=full(NOT_HOT, num_slots),
            row_slot=full(-1, num_rows),
            row_stamp=full(FREE, num_rows),
            words=words,
            counters=full(0, NUM_COUNTERS, dtype=torch.int64),
            times=full(0, layers, NUM_TIMES, dtype=torch.int64),
        )

    def group(self, index: int) -> HotState:
        """Views of one group."""
        return HotState(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def cpu(self) -> HotState:
        """A copy on the host."""
        return HotState(**{f.name: getattr(self, f.name).cpu().clone() for f in fields(self)})

    @property
    def num_rows(self) -> int:
        """Hot rows of a group."""
        return int(self.row_slot.shape[-1])

    @property
    def num_slots(self) -> int:
        """Slots of the host tier."""
        return int(self.slot_row.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(sum(getattr(self, f.name).nbytes for f in fields(self)))
