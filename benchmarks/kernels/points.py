"""Inputs of benchmarks/kernels: a host tier, and hot tiers in the middle of decoding.

A steady point is (batch, misses a request): every request has `buffer` rows hot, the most
recently used `topk` of them from its last step. Its next top-k takes exactly `misses` slots that
are not hot and the rest from the hot ones, LAST_SHARE of them from the last step. No row is shared.
Several input sets, each with a state of its own, take turns as layers do.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch

from benchmarks.kernels.timing import Bench, require
from ess_kernels import hot_state
from ess_kernels.hot_state import HotState
from ess_kernels.plan_fetch import PlanBuffers
from sglang_ess.layout import FP8_ROW_BYTES, LATENT_DIM, ROPE_DIM, SCALE_GROUP

# How alike the lists of two successive steps are, the mean over layers: ESS figure 2.
LAST_SHARE = 0.6
AGES = 64  # steps over which a hot tier turned over
AGE_LIMIT = AGES - AGES // 16  # one row in 16 is older, as hot_state.py keeps it
POISON = 0xEE
CHUNK_ROWS = 1 << 18
FEW_REQUESTS = 16
PAGE = 64


@dataclass(frozen=True)
class Sizes:
    """The grid.

    context, buffer: slots and hot rows of a request; heads: V3.2's, and those of a rank of tensor
        parallelism 8; peak_bytes: of the large copy
    sets: input sets that take turns; few_sets: the same for up to FEW_REQUESTS requests
    groups: index groups that one install serves
    """

    batches: tuple[int, ...]
    misses: tuple[int, ...]
    topk: int = 2048
    context: int = 32 << 10
    buffer: int = 4096  # HiSparse's default, twice top-k
    heads: tuple[int, ...] = (128, 16)
    peak_bytes: int = 1 << 30
    sets: int = 4
    few_sets: int = 16
    groups: int = 61

    def sets_of(self, batch: int) -> int:
        return self.few_sets if batch <= FEW_REQUESTS else self.sets


FULL = Sizes((1, 16, 64, 160), (2, 8, 32, 64, 128, 256, 512, 1024, 2048))
QUICK = Sizes((1, 16, 160), (2, 64, 256, 2048), sets=2)
MINIATURE = Sizes((1, 2), (2, 16), topk=16, context=64, buffer=32, heads=(3,),
                  peak_bytes=1 << 16, sets=2, few_sets=2, groups=3)  # fmt: skip


def make_rows(num_rows: int, device, generator) -> torch.Tensor:
    """[num_rows, 656] uint8 valid random latent rows (fp8) on the device."""

    def normal(columns):
        return torch.randn(num_rows, columns, generator=generator, device=device)

    latents = normal(LATENT_DIM).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = normal(LATENT_DIM // SCALE_GROUP).abs().view(torch.uint8)
    return torch.cat([latents, scales, normal(ROPE_DIM).bfloat16().view(torch.uint8)], 1)


def host_tier(num_slots: int, device, generator) -> torch.Tensor:
    """[num_slots, 656] uint8 pinned fp8 rows, valid random latents."""
    pinned = torch.device(device).type == "cuda"
    rows = torch.empty(num_slots, FP8_ROW_BYTES, dtype=torch.uint8, pin_memory=pinned)
    for first in range(0, num_slots, CHUNK_ROWS):
        part = rows[first : first + CHUNK_ROWS]
        part.copy_(make_rows(len(part), device, generator))
    return rows


class Run:
    """What the sections share.

    us: microseconds of the stand-ins (indexer, preattn) at the largest batch
    host: [slots, 656] uint8 pinned rows of the host tier
    """

    def __init__(self, bench: Bench, sizes: Sizes, us: tuple[float, float], seed: int):
        self.bench, self.sizes, self.us, self.seed = bench, sizes, us, seed
        bench.progress("filling the host tier")
        generator = torch.Generator(bench.device).manual_seed(seed)
        self.host = host_tier(max(sizes.batches) * sizes.context, bench.device, generator)

    @property
    def points(self) -> list[tuple[int, int]]:
        """(batch, misses a request)."""
        return [(batch, misses) for batch in self.sizes.batches for misses in self.sizes.misses]

    @property
    def step_points(self) -> list[tuple[int, int]]:
        """`points`, and each batch without a miss."""
        return [(b, misses) for b in self.sizes.batches for misses in (0, *self.sizes.misses)]

    def steady(self, batch: int, misses: int) -> Steady:
        sets = self.sizes.sets_of(batch)
        return Steady(self.sizes, batch, misses, sets, self.bench.device, self.seed)


def begin_step(state: HotState, stamps: torch.Tensor) -> None:
    """Fill the words of full tiers whose rows were used at these ticks, 1 to AGES."""
    state.words[:, hot_state.TICK], state.words[:, hot_state.AGE_LIMIT] = AGES + 1, AGE_LIMIT
    state.words[:, hot_state.OCCUPIED] = stamps.shape[1]


def overwrite(state: HotState, source: HotState) -> None:
    for f in fields(HotState):
        getattr(state, f.name).copy_(getattr(source, f.name))


def _shuffled(rows: int, columns: int, device, generator) -> torch.Tensor:
    """[rows, columns] int64: a permutation of the columns in each row."""
    return torch.rand(rows, columns, generator=generator, device=device).argsort(1)


class Steady:
    """`sets` hot tiers at a steady point.

    topk: [sets, batch, topk] int32 slots; positions: the same within the request
    resident: [sets, batch, buffer] int32 positions, the most recently used first
    hot_row: [sets, batch, buffer] int64 the rows they have
    state, before: HotState of all sets, and what a step finds; buffers: PlanBuffers of all sets
    """

    def __init__(self, sizes: Sizes, batch: int, misses: int, sets: int, device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.sizes, self.batch, self.misses, self.sets = sizes, batch, misses, sets
        self.device, self.num_rows = device, batch * sizes.buffer
        self.num_misses = batch * misses
        places = _shuffled(sets * batch, sizes.context, device, generator)
        places = places.view(sets, batch, sizes.context)
        self.resident = places[:, :, : sizes.buffer].int()
        chosen = self._choose(generator)
        wanted = places[:, :, chosen.to(device)]
        order = _shuffled(sets * batch, sizes.topk, device, generator).view_as(wanted)
        self.positions = wanted.gather(2, order).int().contiguous()
        self._first = torch.arange(batch, device=device, dtype=torch.int32)[:, None] * sizes.context
        self.topk = self.positions + self._first
        self.expected = self.slots_of(places[:, :, sizes.buffer : sizes.buffer + misses].int())
        rows = _shuffled(sets, self.num_rows, device, generator)
        self.hot_row = rows.view(sets, batch, sizes.buffer)
        self.state = self._state()
        self.before = copy.deepcopy(self.state)
        self.buffers = PlanBuffers.new(batch, sizes.topk, device)

    def _choose(self, generator) -> torch.Tensor:
        """Ranks that a top-k takes: of hot rows by recency, and from `buffer` on of cold ones."""
        s, hits = self.sizes, self.sizes.topk - self.misses
        last = min(s.topk, max(round(LAST_SHARE * hits), hits - (s.buffer - s.topk)))
        shuffle = torch.Generator().manual_seed(generator.initial_seed())
        recent = torch.randperm(s.topk, generator=shuffle)[:last]
        older = s.topk + torch.randperm(s.buffer - s.topk, generator=shuffle)[: hits - last]
        return torch.cat([recent, older, s.buffer + torch.arange(self.misses)])

    def slots_of(self, positions: torch.Tensor) -> torch.Tensor:
        return positions + self._first

    def _state(self) -> HotState:
        state = HotState.new(self.sets, self.batch * self.sizes.context, self.num_rows, self.device)
        slots = self.slots_of(self.resident).view(self.sets, -1)
        rows = self.hot_row.reshape(self.sets, -1)
        rank = torch.arange(self.sizes.buffer, device=self.device)
        stamps = (AGES - rank * AGES // self.sizes.buffer).int()
        stamps = stamps.expand(self.sets, self.batch, -1).reshape(self.sets, -1)
        state.slot_row.scatter_(1, slots.long(), rows.int())
        state.row_slot.scatter_(1, rows, slots)
        begin_step(state, state.row_stamp.scatter_(1, rows, stamps))
        return state

    def restore(self) -> None:
        """Restore the state of every set, and poison what a plan returns."""
        overwrite(self.state, self.before)
        for f in fields(PlanBuffers):
            getattr(self.buffers, f.name).fill_(-7)

    def check_plan(self, index: int = 0) -> None:
        """Check rows, misses and victims of the last plan. Raises: WrongResult."""
        state, before, b = self.state.group(index), self.before.group(index), self.buffers
        require(int(b.num_misses) == self.num_misses,
                f"plan must miss {self.num_misses}: got {int(b.num_misses)}")  # fmt: skip
        require((b.rows >= 0).all(), "plan left a lookup without a row")
        require(torch.equal(state.row_slot[b.rows.long()], self.topk[index]),
                "plan gave a slot another slot's row")  # fmt: skip
        slots, rows = b.miss_slots[: self.num_misses], b.miss_rows[: self.num_misses].long()
        require(torch.equal(slots.sort().values, self.expected[index].flatten().sort().values),
                "plan listed other misses")  # fmt: skip
        require(torch.equal(state.row_slot[rows], slots), "plan listed other rows")
        require((state.slot_row[before.row_slot[rows].long()] < 0).all(),
                "plan left an evicted slot hot")  # fmt: skip
        limit, ages = torch.minimum(state.words, before.words), AGES + 1 - before.row_stamp[rows]
        require((ages > limit[hot_state.AGE_LIMIT]).all(), "plan evicted a young row")
        require(int(state.counters[hot_state.SHORT]) == 0, "plan ran short of rows")
