"""What one layer's hot tier knows about its rows, on the device.

Order of use without moving anything: a row carries the *tick* (plan number) of its last use.
Ticks are int32 and would run into FREE_STAMP (after 2^31 plans of a layer: two years of 30 a
second, a month where a step takes passes). So when a layer has counted EPOCH_TICKS, `rebuild_order`
takes as many off its tick and off its rows' stamps, down to OLDEST_STAMP, and words[EPOCH]
counts that.
`order` lists the rows by that tick, oldest first, as they stood when the list was made. A row
used since then has a stamp above `words[BUILT]` and is passed over. The rest of the list is
therefore always in LRU order, and a victim is found by taking the next entry of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

NOT_HOT = -1
FREE_STAMP = 2**31 - 1  # of a free row: above every tick, so no list offers it
EPOCH_TICKS = 2**30
OLDEST_STAMP = -EPOCH_TICKS  # less EPOCH_TICKS it is an int32 still, and so is any age

# words [NUM_WORDS] int32
TICK = 0  # of the plan that comes next, in this epoch
BUILT = 1  # the last tick that `order` has seen
NUM_FREE = 2  # entries of the stack `free`
VALID = 3  # entries of `order` still to come and not used since; never above their number
CURSOR = 4  # next entry of `order`
LENGTH = 5  # entries of `order`
POPS = 6  # rows asked for by the plan in progress
SPLIT = 7  # set by the host: list hits and misses apart, for dual attention
START = 8  # where the layer's part of `free` and of `order` begins
ROWS = 9  # rows of the layer
EPOCH = 10  # times that EPOCH_TICKS have been taken off
NUM_WORDS = 11

# counters [NUM_COUNTERS] int64, since the start
COUNTERS = ("lookups", "misses", "evictions", "evicted_age", "installs", "skipped", "short")
LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED, SHORT = range(len(COUNTERS))
NUM_COUNTERS = len(COUNTERS)

HOT_ROW_STATE_BYTES = 16  # row_slot, row_stamp, free, order
SLOT_STATE_BYTES = 4  # slot_row
LAYER_STATE_BYTES = NUM_WORDS * 4 + NUM_COUNTERS * 8


def steps(words):
    """Ticks since the start of layers' words [..., NUM_WORDS] int64 on the host: numpy or torch."""
    return words[..., EPOCH] * EPOCH_TICKS + words[..., TICK] - 1


@dataclass(frozen=True)
class HotState:
    """State of one layer, or of all layers with a leading dimension [layers].

    Either each layer has its own rows, numbered from 0, or all have rows of one arena: then
    row_slot to order are the arena's, the same for every layer, and each row is one layer's at a
    time. That layer's parts of `free` and `order` are words[ROWS] entries from words[START] on.

    slot_row   [slots] int32  the slot's hot row, NOT_HOT if it has none; negative values
                              below that are claims of a plan in progress
    row_slot   [rows] int32   the row's slot, -1 if the row is free
    row_stamp  [rows] int32   tick of the last use, negative if in an epoch before; FREE_STAMP if
                              the row is free
    free       [rows] int32   stack of the layer's free rows
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
    def new(
        cls, layers: int, num_slots: int, num_rows: int, device, shared: bool = False
    ) -> HotState:
        """All layers' states, num_rows each, every row free.

        shared: of one arena, in which layer i begins with rows i * num_rows on
        Raises: ValueError unless 1 <= num_rows <= num_slots.
        """
        if not 1 <= num_rows <= num_slots:
            raise ValueError(
                f"hot rows must be 1 to {num_slots}, the slots of the host tier: got {num_rows}."
            )

        def full(size, value, dtype=torch.int32):
            return torch.full((layers, size), value, dtype=dtype, device=device)

        def of_rows(value):
            if not shared:
                return full(num_rows, value)
            one = torch.full((1, layers * num_rows), value, dtype=torch.int32, device=device)
            return one.expand(layers, -1)

        # Popped from the end: row 0 first.
        stack = torch.arange(num_rows - 1, -1, -1, dtype=torch.int32, device=device)
        first = torch.arange(layers, dtype=torch.int32, device=device) * (num_rows * shared)
        free, words = of_rows(0), full(NUM_WORDS, 0)
        stacks = first[:, None] + stack
        (free[0] if shared else free).copy_(stacks.flatten() if shared else stacks)
        words[:, TICK] = 1
        words[:, NUM_FREE] = words[:, ROWS] = num_rows
        words[:, SPLIT] = 1
        words[:, START] = first
        return cls(
            slot_row=full(num_slots, NOT_HOT),
            row_slot=of_rows(-1),
            row_stamp=of_rows(FREE_STAMP),
            free=free,
            order=of_rows(0),
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
        """Rows that row_slot has: of a layer, or of the arena."""
        return self.row_slot.shape[-1]

    @property
    def num_slots(self) -> int:
        return self.slot_row.shape[-1]

    @property
    def nbytes(self) -> int:
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t[:1].nbytes if t.stride(0) == 0 else t.nbytes for t in tensors)
