"""What gpu_serving measures: the engines, the memory of each, and their points in order.

Everything follows from device bytes for the KV pool, the same for all systems but "resident":
  one-tier   slots x (latent row + index key) in every layer; a batch takes its slots
  ess        slots x (index key + maps), hot rows and staging, as capacity.py counts them; the
             largest batch is the one that leaves each request hot_ratio x context
  hisparse   device rows for `buffer` + one page a request, and index keys for ratio times as many
             slots as device rows, ratio a whole number; SGLang does not count its tables, so they
             come on top and are reported
  resident   one-tier with all the slots of ESS's largest batches: what infinite HBM would give
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_ess.layout import FP8_ROW_BYTES, GIB, INDEX_KEY_BYTES
from sglang_ess.layout import PAGE_SLOTS as PAGE
from sglang_ess.mem_cache.capacity import CPU_TIER, GPU_TIER, Geometry

ONE_TIER, HISPARSE, RESIDENT = "one-tier", "hisparse", "resident"
# Modes of overlap that one engine with ESS runs in turns, each a system.
MODES = {"off": "ess off", "da": "ess da", "dba": "ess dba"}
AUTO_MODE = {"auto": "ess auto"}
ESS_SYSTEMS = (*MODES.values(), *AUTO_MODE.values())
SYSTEMS = (ONE_TIER, HISPARSE, *ESS_SYSTEMS, RESIDENT)
CELL_BYTES = FP8_ROW_BYTES + INDEX_KEY_BYTES  # of one token and layer, one-tier


@dataclass(frozen=True)
class Model:
    """What the grid needs of a checkpoint."""

    path: str
    layers: int
    topk: int
    vocabulary: int

    @classmethod
    def read(cls, path: Path | str) -> Model:
        """Raises: OSError, KeyError or ValueError if path has no sparse model."""
        config = json.loads((Path(path) / "config.json").read_text())
        names = ("num_hidden_layers", "index_topk", "vocab_size")
        return cls(str(path), *(int(config[name]) for name in names))


@dataclass(frozen=True)
class Grid:
    """One run's conditions.

    contexts: tokens of a prompt; a single request is measured at the first one
    ratio: hot rows of a request at the largest batch as a share of its context, at ratio_at
        tokens; it falls with the square root of a longer one: 0.2 at 32K and 0.1 at 128K are the
        ratios of ESS's largest batches (ESS Table 2)
    new_tokens: decode steps of a fill, whole pages: `dropped` ones while tiers and caches warm up,
        then windows of `steps`, in turns of the modes
    labels: modes that an engine with ESS runs in turns; batches: more than 1 and the largest
    buffer: HiSparse's device rows a request besides a page; its default is twice top-k
    on_cpu: the CPU platform's miniature
    """

    contexts: tuple[int, ...]
    ratio: float
    ratio_at: int
    kv_gib_per_layer: float
    new_tokens: int
    dropped: int
    steps: int
    labels: dict[str, str]
    buffer: int
    on_cpu: bool = False
    batches: tuple[int, ...] = ()

    @property
    def windows(self) -> int:
        return (self.new_tokens - self.dropped) // self.steps

    def request_tokens(self, context: int) -> int:
        """Slots of one request to its end."""
        return -(-context // PAGE) * PAGE + self.new_tokens

    def hot_rows(self, context: int) -> int:
        """Hot rows of a request at the largest batch."""
        return round(min(self.ratio * (self.ratio_at / context) ** 0.5, 1.0) * context)


CUDA = Grid(
    contexts=(32768, 131072), ratio=0.2, ratio_at=32768,
    kv_gib_per_layer=1.28,  # one-tier: 52.3 requests of 32K, ESS's baseline; 13.2 of 128K
    new_tokens=576, dropped=192, steps=32, labels=MODES, buffer=4096,
    batches=(16, 64),  # predict_gpu fits its terms on half of the points without misses
)  # fmt: skip
CPU = Grid(
    contexts=(512,), ratio=0.3, ratio_at=512,
    kv_gib_per_layer=4.4 * 576 * CELL_BYTES / GIB,  # 4.4 requests of 512
    new_tokens=64, dropped=16, steps=8, labels={"off": "ess off"}, buffer=256, on_cpu=True,
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    context: int
    batch: int


@dataclass(frozen=True)
class Engine:
    """One server, and what is measured on it in order.

    systems: {label: system} of the modes that take turns; hot_rows: of a layer
    slots: as --max-total-tokens counts them: HiSparse's are device rows
    ratio: HiSparse's slots over device rows; round: 1 for a system that is measured again
    """

    name: str
    systems: dict[str, str]
    slots: int
    points: tuple[Point, ...]
    hot_rows: int | None = None
    ratio: int | None = None
    round: int = 0

    @property
    def system(self) -> str:
        return next(iter(self.systems.values()))

    @property
    def is_ess(self) -> bool:
        return self.system in ESS_SYSTEMS

    def context_tokens(self, grid: Grid) -> int:
        """--context-length."""
        return max(grid.request_tokens(point.context) for point in self.points) + PAGE

    def geometry(self, grid: Grid, model: Model) -> Geometry:
        return geometry(grid, model, self.context_tokens(grid))

    def device_bytes(self, grid: Grid, model: Model) -> int:
        """Planned bytes of the KV pool."""
        if self.is_ess:
            return self.geometry(grid, model).device_bytes(self.slots, self.hot_rows)
        if self.ratio is not None:
            return model.layers * hisparse_bytes(self.slots, self.ratio)
        return (self.slots + PAGE) * model.layers * CELL_BYTES


# --- sizes ------------------------------------------------------------------------------


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


def budget_bytes(grid: Grid, model: Model) -> int:
    return int(grid.kv_gib_per_layer * GIB) * model.layers


def one_tier_slots(grid: Grid, model: Model) -> int:
    slots = budget_bytes(grid, model) // (model.layers * CELL_BYTES)
    return slots // PAGE * PAGE - PAGE  # SGLang's page 0 takes the writes of padding


def one_tier_batch(grid: Grid, model: Model, context: int) -> int:
    return one_tier_slots(grid, model) // grid.request_tokens(context)


def geometry(grid: Grid, model: Model, context_tokens: int) -> Geometry:
    """What capacity.py will count."""
    return Geometry(
        layers=model.layers, row_bytes=FP8_ROW_BYTES, index_bytes=model.layers * INDEX_KEY_BYTES,
        topk=model.topk, context_tokens=context_tokens, page_slots=PAGE,
        tier=CPU_TIER if grid.on_cpu else GPU_TIER,
    )  # fmt: skip


def ess_size(grid: Grid, model: Model, context: int) -> tuple[int, int, int]:
    """(batch, slots, hot rows of a layer) of ESS's largest batch."""
    request, limit = grid.request_tokens(context), budget_bytes(grid, model)
    shape, wanted = geometry(grid, model, request + PAGE), grid.hot_rows(context)
    batch = most(lambda n: shape.device_bytes(n * request, n * wanted) <= limit)
    slots = batch * request
    rows = most(lambda n: shape.device_bytes(slots, n) <= limit)
    return batch, slots, min(rows, slots)


def hisparse_bytes(device_rows: int, ratio: int) -> int:
    """Bytes of one layer: device rows and index keys, each with a page of padding."""
    return (device_rows + PAGE) * FP8_ROW_BYTES + (device_rows * ratio + PAGE) * INDEX_KEY_BYTES


def hisparse_size(grid: Grid, model: Model, context: int) -> tuple[int, int, int]:
    """(batch, device rows, ratio) of HiSparse's largest batch."""
    request, limit = grid.request_tokens(context), budget_bytes(grid, model) // model.layers
    found = []
    for ratio in range(2, 2 * request // grid.buffer + 2):
        rows = PAGE * most(lambda n, ratio=ratio: hisparse_bytes(n * PAGE, ratio) <= limit)
        batch = min(rows // (grid.buffer + PAGE), rows * ratio // request)
        found.append((batch, rows, ratio))
    return max(found, key=lambda size: size[0])


# --- the engines ------------------------------------------------------------------------


class Selection:
    """Makes the engines of a run, the most important first. systems: those to measure"""

    def __init__(self, grid: Grid, model: Model, systems: Sequence[str] = SYSTEMS):
        self.grid, self.model, self.systems = grid, model, systems

    def engines(self) -> list[Engine]:
        """One-tier comes first, and again at the end, to show the machine's drift."""
        head, *tail = self.grid.contexts
        found = [self.one_tier(), self.hisparse(head), self.ess(head)]
        found += [make(context) for context in tail for make in (self.ess, self.hisparse)]
        found += [self.resident(), self.one_tier(again=True)]
        return [engine for engine in found if engine is not None]

    def _points(self, context: int, largest: int) -> list[Point]:
        """A single request at the first context, grid.batches that fit, the largest batch."""
        batches = {1} if context == self.grid.contexts[0] else set()
        batches |= {batch for batch in self.grid.batches if batch < largest} | {largest}
        return [Point(context, batch) for batch in sorted(batches)]

    def _engine(self, name: str, systems: dict[str, str], slots: int, points, **more):
        """None if there is nothing to measure."""
        if not points or not all(point.batch for point in points):
            return None
        return Engine(name, systems, slots, tuple(points), **more)

    def _all_contexts(self, system: str, slots: int, largest: Callable[[int], int]):
        """An engine with every row on the device, for the contexts that fit."""
        contexts = [context for context in self.grid.contexts if largest(context)]
        points = [p for context in contexts for p in self._points(context, largest(context))]
        points = points if system in self.systems else []
        return self._engine(system, {"off": system}, slots, points)

    def one_tier(self, again: bool = False) -> Engine | None:
        engine = self._all_contexts(
            ONE_TIER, one_tier_slots(self.grid, self.model),
            lambda context: one_tier_batch(self.grid, self.model, context),
        )  # fmt: skip
        if not again or engine is None:
            return engine
        return replace(engine, name=f"{ONE_TIER} again", round=1)

    def resident(self) -> Engine | None:
        sizes = {c: ess_size(self.grid, self.model, c) for c in self.grid.contexts}
        slots = max(slots for _, slots, _ in sizes.values())
        return self._all_contexts(RESIDENT, slots, lambda context: sizes[context][0])

    def hisparse(self, context: int) -> Engine | None:
        if HISPARSE not in self.systems or self.grid.on_cpu:
            return None
        batch, rows, ratio = hisparse_size(self.grid, self.model, context)
        points = self._points(context, batch)
        return self._engine(f"{HISPARSE} {context}", {"off": HISPARSE}, rows, points, ratio=ratio)

    def ess(self, context: int) -> Engine | None:
        labels = {k: system for k, system in self.grid.labels.items() if system in self.systems}
        batch, slots, rows = ess_size(self.grid, self.model, context)
        points = self._points(context, batch) if labels else []
        return self._engine(f"ess {context}", labels, slots, points, hot_rows=rows)


def server_args(engine: Engine, grid: Grid, model: Model) -> dict[str, Any]:
    """Arguments of sglang.Engine, without what DecodeEngine adds. All have one attention kernel."""
    batches = sorted({point.batch for point in engine.points})
    args: dict[str, Any] = dict(
        model_path=model.path, kv_cache_dtype="fp8_e4m3", max_total_tokens=engine.slots,
        context_length=engine.context_tokens(grid), max_running_requests=batches[-1],
        num_reserved_decode_tokens=grid.new_tokens, disaggregation_decode_extra_slots=0,
        disable_radix_cache=True,  # decode of PD has none; HiSparse asks for the flag
    )  # fmt: skip
    if grid.on_cpu:
        return args
    args |= dict(
        dsa_prefill_backend="flashmla_kv", dsa_decode_backend="flashmla_kv", load_format="dummy",
        cuda_graph_bs_decode=batches, disable_prefill_cuda_graph=True, mem_fraction_static=0.9,
        log_level="info",
    )  # fmt: skip
    if engine.ratio is not None:
        config = {"top_k": model.topk, "device_buffer_size": grid.buffer}
        config |= {"host_to_device_ratio": engine.ratio}
        args |= {"enable_hisparse": True, "hisparse_config": json.dumps(config)}
    return args


def ess_options(engine: Engine, grid: Grid, model: Model) -> dict[str, Any]:
    """Options of EssConfig. Slots alone decide how many requests join: batches are planned."""
    if not engine.is_ess:
        return {"enabled": False}
    hot_row_bytes = engine.geometry(grid, model).hot_row_bytes
    options = {"hot_gib": (engine.hot_rows + 0.5) * hot_row_bytes / GIB, "admission": "off"}
    options["layer_budgets"] = "uniform"
    if not grid.on_cpu:
        options["overlap"] = "auto" if len(engine.systems) > 1 else next(iter(engine.systems))
    return options
