"""What one layer's hot tier knows about its rows, on the device.

Order of use without moving anything: a row carries the *tick* (plan number) of its last use.
`order` lists the rows by that tick, oldest first, as they stood when the list was made. A row
used since then has a stamp above `words[BUILT]` and is passed over. The rest of the list is
therefore always in LRU order, and a victim is found by taking the next entry of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

NOT_HOT = -1
FREE_STAMP = 2**31 - 1  # of a free row: above every tick, so no list offers it

# words [NUM_WORDS] int32
TICK = 0  # of the plan that comes next
BUILT = 1  # the last tick that `order` has seen
NUM_FREE = 2  # entries of the stack `free`
VALID = 3  # entries of `order` still to come and not used since; never above their number
CURSOR = 4  # next entry of `order`
LENGTH = 5  # entries of `order`
POPS = 6  # rows asked for by the plan in progress
SPLIT = 7  # set by the host: list hits and misses apart, for dual attention
NUM_WORDS = 8

# counters [NUM_COUNTERS] int64, since the start
COUNTERS = ("lookups", "misses", "evictions", "evicted_age", "installs", "skipped", "short")
LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED, SHORT = range(len(COUNTERS))
NUM_COUNTERS = len(COUNTERS)

HOT_ROW_STATE_BYTES = 16  # row_slot, row_stamp, free, order
SLOT_STATE_BYTES = 4  # slot_row
LAYER_STATE_BYTES = NUM_WORDS * 4 + NUM_COUNTERS * 8


@dataclass(frozen=True)
class HotState:
    """State of one layer, or of all layers with a leading dimension [layers].

    slot_row   [slots] int32  the slot's hot row, NOT_HOT if it has none; negative values
                              below that are claims of a plan in progress
    row_slot   [rows] int32   the row's slot, -1 if the row is free
    row_stamp  [rows] int32   tick of the last use, FREE_STAMP if the row is free
    free       [rows] int32   stack of free rows
    order      [rows] int32   rows by last use, see above
    words      [NUM_WORDS] int32
    counters   [NUM_COUNTERS] int64
    """

    slot_row: torch.Tensor
    row_slot: torch.Tensor
    row_stamp: torch.Tensor
    free: torch.Tensor
    order: torch.Tensor
    words: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def new(cls, layers: int, num_slots: int, num_rows: int, device) -> HotState:
        """All layers' states, every row free.

        Raises: ValueError unless 1 <= num_rows <= num_slots.
        """
        if not 1 <= num_rows <= num_slots:
            raise ValueError(
                f"hot rows must be 1 to {num_slots}, the slots of the host tier: got {num_rows}."
            )

        def full(size, value, dtype=torch.int32):
            return torch.full((layers, size), value, dtype=dtype, device=device)

        # Popped from the end: row 0 first.
        stack = torch.arange(num_rows - 1, -1, -1, dtype=torch.int32, device=device)
        words = full(NUM_WORDS, 0)
        words[:, TICK] = 1
        words[:, NUM_FREE] = num_rows
        words[:, SPLIT] = 1
        return cls(
            slot_row=full(num_slots, NOT_HOT),
            row_slot=full(num_rows, -1),
            row_stamp=full(num_rows, FREE_STAMP),
            free=stack.repeat(layers, 1),
            order=full(num_rows, 0),
            words=words,
            counters=full(NUM_COUNTERS, 0, torch.int64),
        )

    def layer(self, index: int) -> HotState:
        """Views of one layer."""
        return HotState(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def cpu(self) -> HotState:
        """A copy on the host."""
        return HotState(**{f.name: getattr(self, f.name).cpu().clone() for f in fields(self)})

    @property
    def num_rows(self) -> int:
        return self.row_slot.shape[-1]

    @property
    def num_slots(self) -> int:
        return self.slot_row.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self))
