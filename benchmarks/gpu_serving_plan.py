"""What gpu_serving measures: the engines, what each gets of memory, and its points in order.

Everything follows from device bytes for the KV pool, the same for all systems but "resident":
  one-tier   slots x (latent row + index key) in every layer; a batch takes its slots
  ess        slots x (index key + maps), hot rows and staging, as capacity.py counts and our pool
             allocates; the largest batch is the one that leaves each request hot_ratio x context
  hisparse   device rows for `buffer` + one page a request, and index keys for ratio times as many
             slots as device rows, ratio a whole number; its tables come on top, as SGLang
             counts them nowhere, and are reported
  resident   one-tier with all the slots of ESS's largest batches: what infinite HBM would give
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_ess.mem_cache.capacity import CPU_TIER, GPU_TIER, GPU_TIER_THAT_MOVES, Geometry

ONE_TIER, HISPARSE, RESIDENT, BUDGETS = "one-tier", "hisparse", "resident", "ess budgets"
# Modes of overlap that one engine with ESS runs in turns, each a system.
MODES = {"off": "ess off", "da": "ess da", "dba": "ess dba"}
AUTO_MODE = {"auto": "ess auto"}
ESS_SYSTEMS = (*MODES.values(), *AUTO_MODE.values(), BUDGETS)
SYSTEMS = (ONE_TIER, HISPARSE, *ESS_SYSTEMS, RESIDENT)
FIRST, THEN = "first", "then"
GIB = 2**30
PAGE = 64
ROW_BYTES, INDEX_KEY_BYTES = 656, 132  # of fp8 rows: 512 latents, 4 scales, 64 rope
BATCHES = (4, 16, 64)  # between 1 and the largest


@dataclass(frozen=True)
class Model:
    """What the plan has to know of a checkpoint."""

    path: str
    layers: int
    topk: int
    vocabulary: int

    @classmethod
    def read(cls, path: Path | str) -> Model:
        """Raises: OSError, KeyError or ValueError for what is no sparse model's directory."""
        config = json.loads((Path(path) / "config.json").read_text())
        names = ("num_hidden_layers", "index_topk", "vocab_size")
        return cls(str(path), *(int(config[name]) for name in names))


@dataclass(frozen=True)
class Plan:
    """One run's conditions.

    contexts    tokens of a prompt; lead: those whose largest batches come first
    ratio       hot rows of a request at the largest batch as a share of its context, at lead[0];
                less with the square root of a longer one: 0.2 at 32K and 0.1 at 128K are the
                ratios of ESS's largest batches (papers.md 1.8)
    new_tokens  decode steps of a fill, whole pages: dropped ones while tiers and caches warm up,
                then windows of `steps`, in turns of the modes
    labels      modes that an engine with ESS runs in turns
    buffer      HiSparse's device rows a request beside a page; its default is twice top-k
    on_cpu      the CPU platform's miniature
    """

    contexts: tuple[int, ...]
    lead: tuple[int, ...]
    ratio: float
    kv_gib_per_layer: float
    new_tokens: int
    dropped: int
    steps: int
    labels: dict[str, str]
    buffer: int
    on_cpu: bool = False
    batches: tuple[int, ...] = BATCHES

    @property
    def windows(self) -> int:
        return (self.new_tokens - self.dropped) // self.steps

    def request_tokens(self, context: int) -> int:
        """Slots of one request to its end."""
        return whole_pages(context) + self.new_tokens

    def hot_ratio(self, context: int) -> float:
        return min(self.ratio * (self.lead[0] / context) ** 0.5, 1.0)

    def hot_rows(self, context: int) -> int:
        """Of a request at the largest batch."""
        return round(self.hot_ratio(context) * context)


CUDA = Plan(
    contexts=(8192, 32768, 65536, 131072),
    lead=(32768, 131072),
    ratio=0.2,
    kv_gib_per_layer=1.28,  # one-tier: 52.3 requests of 32K, ESS's baseline; 13.2 of 128K
    new_tokens=576,
    dropped=192,
    steps=32,
    labels=MODES,
    buffer=4096,
)
CPU = Plan(
    contexts=(256, 512),
    lead=(512,),
    ratio=0.3,
    kv_gib_per_layer=4.4 * 576 * (ROW_BYTES + INDEX_KEY_BYTES) / GIB,  # 4.4 requests of 512
    new_tokens=64,
    dropped=16,
    steps=8,
    labels={"off": "ess off"},
    buffer=256,
    on_cpu=True,
    batches=(),
)


@dataclass(frozen=True)
class Point:
    context: int
    batch: int
    part: str = FIRST


@dataclass(frozen=True)
class EnginePlan:
    """One server, and what is measured on it in order.

    name      tells engines apart; reuses: of an engine that serves this one's points, if it runs
    systems   {label: system} of the modes that take turns
    slots     as --max-total-tokens counts them: HiSparse's are device rows
    hot_rows  of a layer; ratio: HiSparse's slots over device rows
    """

    name: str
    systems: dict[str, str]
    slots: int
    points: tuple[Point, ...]
    hot_rows: int | None = None
    ratio: int | None = None
    round: int = 0
    reuses: str | None = None

    @property
    def system(self) -> str:
        return next(iter(self.systems.values()))

    @property
    def is_ess(self) -> bool:
        return self.system in ESS_SYSTEMS

    @property
    def max_requests(self) -> int:
        return max(point.batch for point in self.points)

    @property
    def parts(self) -> set[str]:
        return {point.part for point in self.points}

    def context_tokens(self, plan: Plan) -> int:
        """--context-length."""
        return max(plan.request_tokens(point.context) for point in self.points) + PAGE

    def device_bytes(self, plan: Plan, model: Model) -> int:
        """Of the KV pool, as planned."""
        if self.is_ess:
            shape = geometry(plan, model, self.context_tokens(plan), self.system == BUDGETS)
            return shape.device_bytes(self.slots, self.hot_rows)
        if self.ratio is not None:
            return model.layers * hisparse_bytes(self.slots, self.ratio)
        return (self.slots + PAGE) * model.layers * (ROW_BYTES + INDEX_KEY_BYTES)

    def host_bytes(self, model: Model) -> int:
        if self.is_ess:
            return (self.slots + PAGE) * model.layers * ROW_BYTES
        return self.slots * (self.ratio or 0) * model.layers * ROW_BYTES


# --- sizes ------------------------------------------------------------------------------


def whole_pages(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE


def most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits; fits() is true up to it and false beyond; 0 if none is."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def budget_bytes(plan: Plan, model: Model) -> int:
    return int(plan.kv_gib_per_layer * GIB) * model.layers


def one_tier_slots(plan: Plan, model: Model) -> int:
    slots = budget_bytes(plan, model) // (model.layers * (ROW_BYTES + INDEX_KEY_BYTES))
    return slots // PAGE * PAGE - PAGE  # SGLang's page 0 takes the writes of padding


def one_tier_batch(plan: Plan, model: Model, context: int) -> int:
    return one_tier_slots(plan, model) // plan.request_tokens(context)


def geometry(plan: Plan, model: Model, context_tokens: int, moves: bool) -> Geometry:
    """What capacity.py will count; moves: whether hot rows move between layers."""
    moves = moves and model.layers > 1
    return Geometry(
        layers=model.layers,
        row_bytes=ROW_BYTES,
        index_bytes=model.layers * INDEX_KEY_BYTES,
        topk=model.topk,
        context_tokens=context_tokens,
        page_slots=PAGE,
        tier=CPU_TIER if plan.on_cpu else GPU_TIER_THAT_MOVES if moves else GPU_TIER,
        ghosts=plan.on_cpu and moves,
    )


def ess_size(plan: Plan, model: Model, context: int, moves: bool = False) -> tuple[int, int, int]:
    """(batch, slots, hot rows of a layer) of ESS's largest batch, the same where rows move."""
    request, limit = plan.request_tokens(context), budget_bytes(plan, model)
    shapes = [geometry(plan, model, request + PAGE, moving) for moving in (False, moves)]
    wanted = plan.hot_rows(context)
    batch = most(lambda n: shapes[0].device_bytes(n * request, n * wanted) <= limit)
    slots = batch * request
    rows = most(lambda n: shapes[1].device_bytes(slots, n) <= limit)
    return batch, slots, min(rows, slots)


def hisparse_bytes(device_rows: int, ratio: int) -> int:
    """Of one layer: device rows and index keys, each with a page of padding."""
    return (device_rows + PAGE) * ROW_BYTES + (device_rows * ratio + PAGE) * INDEX_KEY_BYTES


def hisparse_size(plan: Plan, model: Model, context: int) -> tuple[int, int, int]:
    """(batch, device rows, ratio) of HiSparse's largest batch."""
    request, limit = plan.request_tokens(context), budget_bytes(plan, model) // model.layers
    found = []
    for ratio in range(2, 2 * request // plan.buffer + 2):
        rows = PAGE * most(lambda n, ratio=ratio: hisparse_bytes(n * PAGE, ratio) <= limit)
        batch = min(rows // (plan.buffer + PAGE), rows * ratio // request)
        found.append((batch, rows, ratio))
    return max(found, key=lambda size: size[0])


# --- the engines ------------------------------------------------------------------------


@dataclass
class Planner:
    """Makes the engines of a run in the order of their weight.

    systems: those to measure; "one-tier" twice, to see the machine drift
    """

    plan: Plan
    model: Model
    systems: Sequence[str] = SYSTEMS
    contexts: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        self.contexts = self.plan.contexts
        self.lead = [c for c in self.plan.lead if c in self.contexts] or [self.contexts[0]]
        self.others = [c for c in reversed(self.contexts) if c not in self.lead]
        self.labels = {
            label: system for label, system in self.plan.labels.items() if system in self.systems
        }

    def engines(self) -> list[EnginePlan]:
        head, *tail = self.lead
        found: list[EnginePlan | None] = [self.one_tier(), self.hisparse(head), self.ess(head)]
        found += [make(context) for context in tail for make in (self.ess, self.hisparse)]
        found += [self.resident(), self.budgets(head), self.one_tier_again()]
        found += [self.budgets(context) for context in tail]
        found += [make(context) for context in self.others for make in (self.ess, self.hisparse)]
        return [engine for engine in found if engine is not None]

    def _batches(self, context: int, largest: int, equal: Iterable[int]) -> tuple[Point, ...]:
        """One request and the largest batch first, at the first lead; then what lies between,
        and other systems' batches."""
        leads, is_head = context in self.lead, context == self.lead[0]
        points = [Point(context, largest, FIRST if leads else THEN)]
        if is_head and largest > 1:
            points.insert(0, Point(context, 1))
        between = [*equal, *(self.plan.batches if is_head else ()), 1]
        points += [Point(context, batch, THEN) for batch in between if 0 < batch < largest]
        unique = {(point.context, point.batch): point for point in reversed(points)}
        return tuple(sorted(unique.values(), key=points.index))

    def one_tier(self) -> EnginePlan | None:
        if ONE_TIER not in self.systems:
            return None
        points: list[Point] = []
        for context in (*self.lead, *self.others):
            largest = one_tier_batch(self.plan, self.model, context)
            if largest:
                points += self._batches(context, largest, ())
        points.sort(key=lambda point: point.part == THEN)
        slots = one_tier_slots(self.plan, self.model)
        return EnginePlan(ONE_TIER, {"off": ONE_TIER}, slots, tuple(points)) if points else None

    def one_tier_again(self) -> EnginePlan | None:
        engine = self.one_tier()
        if engine is None:
            return None
        points = tuple(point for point in engine.points if point.part == FIRST)
        name = f"{ONE_TIER} again"
        return replace(engine, name=name, points=points, round=1, reuses=ONE_TIER)

    def hisparse(self, context: int) -> EnginePlan | None:
        batch, rows, ratio = hisparse_size(self.plan, self.model, context)
        if HISPARSE not in self.systems or self.plan.on_cpu or not batch:
            return None
        equal = [
            one_tier_batch(self.plan, self.model, context),
            ess_size(self.plan, self.model, context)[0],
        ]
        points = self._batches(context, batch, equal)
        name = f"{HISPARSE} {context}"
        return EnginePlan(name, {"off": HISPARSE}, rows, points, ratio=ratio)

    def ess(self, context: int) -> EnginePlan | None:
        batch, slots, rows = ess_size(self.plan, self.model, context)
        if not self.labels or not batch:
            return None
        equal = [one_tier_batch(self.plan, self.model, context)]
        points = self._batches(context, batch, equal)
        return EnginePlan(f"ess {context}", self.labels, slots, points, rows)

    def budgets(self, context: int) -> EnginePlan | None:
        batch, slots, rows = ess_size(self.plan, self.model, context, moves=True)
        if BUDGETS not in self.systems or not batch:
            return None
        points = self._batches(context, batch, [])
        points = tuple(point for point in points if point.batch in (1, batch))
        label = "off" if self.plan.on_cpu else "da"
        return EnginePlan(f"{BUDGETS} {context}", {label: BUDGETS}, slots, points, rows)

    def resident(self) -> EnginePlan | None:
        if RESIDENT not in self.systems:
            return None
        points: list[Point] = []
        slots = 0
        for context in (*self.lead, *self.others):
            largest = ess_size(self.plan, self.model, context)[0]
            if largest:
                equal = [one_tier_batch(self.plan, self.model, context)]
                points += self._batches(context, largest, equal)
                slots = max(slots, largest * self.plan.request_tokens(context))
        points.sort(key=lambda point: point.part == THEN)
        return EnginePlan(RESIDENT, {"off": RESIDENT}, slots, tuple(points)) if points else None


@dataclass(frozen=True)
class Room:
    """What engines that live side by side have to share.

    engines: at most so many; other_bytes: of an engine's device memory beside its KV pool
    """

    engines: int
    device_bytes: int
    host_bytes: int
    other_bytes: int


def waves(
    engines: Sequence[EnginePlan], plan: Plan, model: Model, room: Room
) -> list[list[EnginePlan]]:
    """Engines that start together, in their order. Every wave leaves room for the first engine,
    which a later one reuses; one that does not fit beside it has a wave of its own.
    """

    def need(engine: EnginePlan) -> tuple[int, int]:
        return engine.device_bytes(plan, model) + room.other_bytes, engine.host_bytes(model)

    found: list[list[EnginePlan]] = []
    kept = need(engines[0]) if engines else (0, 0)
    device = host = 0
    for engine in engines:
        mine = (0, 0) if engine.reuses else need(engine)
        fits = device + mine[0] <= room.device_bytes and host + mine[1] <= room.host_bytes
        if found and fits and len(found[-1]) < room.engines:
            found[-1].append(engine)
        else:
            device, host = kept if found else (0, 0)
            found.append([engine])
        device, host = device + mine[0], host + mine[1]
    return found


def server_args(engine: EnginePlan, plan: Plan, model: Model) -> dict[str, Any]:
    """Of sglang.Engine, without what DecodeEngine adds. One attention kernel for all systems."""
    args: dict[str, Any] = {
        "model_path": model.path,
        "kv_cache_dtype": "fp8_e4m3",
        "context_length": engine.context_tokens(plan),
        "max_total_tokens": engine.slots,
        "max_running_requests": engine.max_requests,
        "num_reserved_decode_tokens": plan.new_tokens,
        "disaggregation_decode_extra_slots": 0,
        "disable_radix_cache": True,  # as decode of PD has it anyway; HiSparse asks for the word
    }
    if plan.on_cpu:
        return args
    graphs = sorted({point.batch for point in engine.points})
    kernels = {"dsa_prefill_backend": "flashmla_kv", "dsa_decode_backend": "flashmla_kv"}
    args |= kernels | {"load_format": "dummy", "cuda_graph_bs_decode": graphs}
    args |= {"disable_prefill_cuda_graph": True}  # there is no prefill
    args |= {"mem_fraction_static": 0.9, "log_level": "info"}
    if engine.ratio is not None:
        config = {"top_k": model.topk, "device_buffer_size": plan.buffer}
        config |= {"host_to_device_ratio": engine.ratio}
        args |= {"enable_hisparse": True, "hisparse_config": json.dumps(config)}
    return args


def ess_options(engine: EnginePlan, plan: Plan, model: Model) -> dict[str, Any]:
    """Of EssConfig, without the top-k stream. Slots alone decide who joins: batches are planned."""
    if not engine.is_ess:
        return {"enabled": False}
    shape = geometry(plan, model, engine.context_tokens(plan), engine.system == BUDGETS)
    options: dict[str, Any] = {
        "hot_gib": (engine.hot_rows + 0.5) * shape.hot_row_bytes / GIB,
        "admission": "off",
        "layer_budgets": "auto" if engine.system == BUDGETS else "uniform",
    }
    if not plan.on_cpu and engine.system == BUDGETS:
        options["overlap"] = "da"
    return options
