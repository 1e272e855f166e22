"""The state of one layer's hot tier on the device: which slot has which row, and when it was used.

Life of a row. A free row is in the stack `free` and has the stamp FREE_STAMP. `plan` and `install`
pop it for a slot and stamp it with the *tick*, which is the number of the current plan. Each later
hit stamps it again. `invalidate` pushes it back. When no row is free, `plan` and `install` take the
least recently used row from its slot.

Order of use. `order` lists the rows by stamp, oldest first, as of the tick words[BUILT], when
`rebuild_order` made the list. A row used since then has a stamp above words[BUILT], and plans skip
its entry. The other entries stay in LRU order, so the victim is always the next entry, and no row
moves in the list. Two rules hold between any two operations:

    words[VALID] <= entries from words[CURSOR] on whose stamp is at most words[BUILT]
    words[NUM_FREE] + words[VALID] >= lookups and installs until the next rebuild_order

Ticks are int32. They would reach FREE_STAMP after 2^31 plans of a layer: two years of 30 plans a
second, or a month if each step takes several passes. So when a layer has counted EPOCH_TICKS,
`rebuild_order` subtracts EPOCH_TICKS from its tick and from its rows' stamps (down to
OLDEST_STAMP) and adds one to words[EPOCH].
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch

Words = TypeVar("Words", torch.Tensor, "np.ndarray")

NOT_HOT = -1
FREE_STAMP = 2**31 - 1  # the stamp of a free row: above every tick, so no list contains it
EPOCH_TICKS = 2**30
OLDEST_STAMP = -EPOCH_TICKS  # OLDEST_STAMP - EPOCH_TICKS and every age still fit an int32

# words [NUM_WORDS] int32
TICK = 0  # the tick of the next plan, in this epoch
BUILT = 1  # the last tick before `order` was made
NUM_FREE = 2  # entries of the stack `free`
VALID = 3  # lower bound of the entries from CURSOR on that were not used since BUILT
CURSOR = 4  # the next entry of `order`
LENGTH = 5  # entries of `order`
POPS = 6  # rows requested by the plan in progress
SPLIT = 7  # set by the host: plans list hits and misses apart, for dual attention
START = 8  # first entry of the layer's part of `free` and of `order`
ROWS = 9  # rows of the layer
EPOCH = 10  # how often EPOCH_TICKS were subtracted
NUM_WORDS = 11

# counters [NUM_COUNTERS] int64, since the start of the server
COUNTERS = ("lookups", "misses", "evictions", "evicted_age", "installs", "skipped", "short")
LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED, SHORT = range(len(COUNTERS))
NUM_COUNTERS = len(COUNTERS)

HOT_ROW_STATE_BYTES = 16  # row_slot, row_stamp, free, order
SLOT_STATE_BYTES = 4  # slot_row
LAYER_STATE_BYTES = NUM_WORDS * 4 + NUM_COUNTERS * 8


def steps(words: Words) -> Words:
    """Ticks of each layer since the start: [...] from words [..., NUM_WORDS] int64 on the host."""
    ticks: Words = words[..., EPOCH] * EPOCH_TICKS + words[..., TICK]
    return ticks - 1


@dataclass(frozen=True)
class HotState:
    """State of one layer, or of all layers with a leading dimension [layers].

    Each layer has its own rows, numbered from 0; or all layers share the rows of one arena. In an
    arena, row_slot, row_stamp, free and order are the same tensors for every layer, and each row
    belongs to one layer at a time. That layer's part of `free` and of `order` has words[ROWS]
    entries from words[START] on.

    slot_row   [slots] int32  the slot's hot row, NOT_HOT if it has none; smaller values are claims
                              of a plan in progress
    row_slot   [rows] int32   the row's slot, -1 if the row is free
    row_stamp  [rows] int32   tick of the last use, negative if in an earlier epoch; FREE_STAMP if
                              the row is free
    free       [rows] int32   stack of the layer's free rows
    order      [rows] int32   rows by last use, oldest first
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
        cls,
        layers: int,
        num_slots: int,
        num_rows: int,
        device: torch.device | str,
        shared: bool = False,
    ) -> HotState:
        """The states of all layers, with num_rows free rows each.

        shared: the rows form one arena, of which layer i gets num_rows from i * num_rows on
        Raises: ValueError unless 1 <= num_rows <= num_slots.
        """
        if not 1 <= num_rows <= num_slots:
            raise ValueError(
                f"hot rows must be 1 to {num_slots}, the slots of the host tier: got {num_rows}."
            )

        def full(size: int, value: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full((layers, size), value, dtype=dtype, device=device)

        def per_row(value: int) -> torch.Tensor:
            if not shared:
                return full(num_rows, value)
            one = torch.full((1, layers * num_rows), value, dtype=torch.int32, device=device)
            return one.expand(layers, -1)

        # The stack's end is its top, so row 0 is popped first.
        stack = torch.arange(num_rows - 1, -1, -1, dtype=torch.int32, device=device)
        first = torch.arange(layers, dtype=torch.int32, device=device) * (num_rows * shared)
        free, words = per_row(0), full(NUM_WORDS, 0)
        stacks = first[:, None] + stack
        (free[0] if shared else free).copy_(stacks.flatten() if shared else stacks)
        words[:, TICK] = 1
        words[:, NUM_FREE] = words[:, ROWS] = num_rows
        words[:, SPLIT] = 1
        words[:, START] = first
        return cls(
            slot_row=full(num_slots, NOT_HOT),
            row_slot=per_row(-1),
            row_stamp=per_row(FREE_STAMP),
            free=free,
            order=per_row(0),
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
        """Rows of a layer, or of the whole arena."""
        return int(self.row_slot.shape[-1])

    @property
    def num_slots(self) -> int:
        """Slots of the host tier."""
        return int(self.slot_row.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes on the device. An arena's tensors, the same for every layer, count once."""
        tensors = [getattr(self, f.name) for f in fields(self)]
        return int(sum(t[:1].nbytes if t.stride(0) == 0 else t.nbytes for t in tensors))
