"""The hot tier's policy and copies on one core: lookups of plan per second, GB/s of fetch.

Each point replays synthetic decode steps of DeepSeek-V3.2's shape: per request 2048 slots of
a context of 64 Ki tokens, of which 0.6 were in the step before (papers.md 1.6) and the rest
come from the request's core of often-used slots, or, at the rate that gives the wanted miss
share, from its whole context. NUM_LAYERS hot tiers take turns, as layers do, so a tier's
tables are not in the core's cache from its last plan; `turn` 1 asks one tier again and again.

The roof does the scattered accesses that no LRU of this kind goes without, over tables of
the same size and in the same blocks: two dependent reads a lookup (the slot's row, then the
row's place) and a write where the second read was. plan adds branches, a sequential queue
entry a lookup, its share of the queue's compaction, and for a miss about four more scattered
accesses (the victim's place and slot, the map entries of the old and the new slot). Where
all hit, plan comes near it and at ratio 1 above: its rows lie as they came in, not at random.
`sustained` is all lookups over all seconds, compactions included: the median leaves them out.
Seconds are of this thread on a core, not of the wall: what others run counts only as far as
they take cache and memory.

`recording` is what --ess-trace adds to a decode step's plans in their own thread; finding
positions and writing is another thread's. `replay` reads that trace and does it all again.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from time import thread_time as clock

import numba
import numpy as np
import torch

from benchmarks import common
from sglang_ess.sim.model.trace_replay import replay
from sglang_ess.tiers import HotCache, PlanBuffers, lru
from sglang_ess.trace.trace import read_trace
from sglang_ess.trace.trace_recorder import TraceRecorder

TOPK, CONTEXT, PAGE = 2048, 64 << 10, 64
SIMILARITY = 0.6  # papers.md 1.6: mean over layers, at any context
CORE = 4096  # a request's often-used slots; less than any hot tier here has for it
NUM_LAYERS = 8  # 55 MB of tables at the headline point
ROW_BYTES = 656
WARM_STEPS = 6
HEADLINE = {"batch": 16, "ratio": 0.2, "miss": 0.09}  # 190 of 2048, ESS at 32K
HITS = {"batch": 16, "ratio": 0.2, "miss": 0.0}
POINTS = [HEADLINE, HITS] + [
    {"batch": batch, "ratio": ratio, "miss": miss}
    for batch in (16, 64)
    for ratio, miss in ((0.1, 0.0), (0.1, 0.02), (0.1, 0.09), (0.2, 0.0), (0.2, 0.02), (0.2, 0.09),
                        (1.0, 0.0))
    if (batch, ratio, miss) not in ((16, 0.2, 0.09), (16, 0.2, 0.0))
]  # fmt: skip
DICT_QUERIES = 4


class Trace:
    """Decode steps of `batch` requests, each in its own pages of a shared pool."""

    def __init__(self, batch: int, cold_ratio: float, seed: int):
        self._random = np.random.default_rng(seed)
        self._cold_ratio = cold_ratio
        pages = self._random.permutation(batch * CONTEXT // PAGE).reshape(batch, -1, 1)
        self.slots = (pages * PAGE + np.arange(PAGE)).reshape(batch, CONTEXT).astype(np.int32)
        self._order = np.argsort(self._random.random((batch, CONTEXT)), axis=1)  # core first
        self._last = self._order[:, :TOPK].copy()

    def step(self) -> np.ndarray:
        """[batch, TOPK] int32 slots, distinct within a request, in no order."""
        for request in range(len(self._last)):
            self._last[request] = self._next(self._order[request], self._last[request])
        return np.take_along_axis(self.slots, self._last, axis=1)

    def ordered_step(self) -> np.ndarray:
        """step(), each request's slots in the order of its context, as the CPU's indexer has."""
        self.step()
        return np.take_along_axis(self.slots, np.sort(self._last, axis=1), axis=1)

    def _next(self, order: np.ndarray, last: np.ndarray) -> np.ndarray:
        kept = last[self._random.random(TOPK) < SIMILARITY]
        taken = np.zeros(CONTEXT, bool)
        taken[kept] = True
        cold = self._random.binomial(TOPK, self._cold_ratio)
        rest = order[self._random.permutation(CONTEXT)[: cold * 2]]
        rest = rest[~taken[rest]][:cold]
        taken[rest] = True
        core = order[self._random.permutation(CORE)]
        core = core[~taken[core]][: TOPK - len(kept) - len(rest)]
        return self._random.permutation(np.concatenate([kept, rest, core])[:TOPK])

    def filling(self) -> np.ndarray:
        """All slots, [CONTEXT, batch] int32: the cores last, to fill a hot tier before a run."""
        order = self._order[:, ::-1]
        return np.ascontiguousarray(np.take_along_axis(self.slots, order, axis=1).T)


def cold_ratio(ratio: float, miss: float) -> float:
    """How many of a request's entries to draw from its whole context, to miss `miss` of all.

    What is drawn there hits if it is in the core or still hot from an earlier draw.
    """
    return miss / max(1 - ratio, miss, 1e-9)


# --- what is timed ----------------------------------------------------------------------


@numba.njit(cache=True, nogil=True)
def roof(topk, slot_row, row_place, rows, place):
    """The scattered accesses of a hit and no more: two reads and a write a lookup."""
    found = 0
    for first in range(0, topk.shape[0], lru.BLOCK):
        last = min(first + lru.BLOCK, topk.shape[0])
        for i in range(first, last):
            rows[i] = slot_row[np.uint32(topk[i])]
        for i in range(first, last):
            row = np.uint32(rows[i])
            found += row_place[row] < place
            row_place[row] = place + i
    return found


@dataclass
class Rounds:
    """Seconds and misses of each timed step of a point."""

    plan: list[float] = field(default_factory=list)
    one: list[float] = field(default_factory=list)
    roof: list[float] = field(default_factory=list)
    misses: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)


class Point:
    """NUM_LAYERS filled hot tiers without rows, the roof's tables, and a trace."""

    def __init__(self, batch: int, ratio: float, miss: float, seed: int):
        self.trace = Trace(batch, cold_ratio(ratio, miss), seed)
        self.num_slots = batch * CONTEXT
        num_rows = int(self.num_slots * ratio)
        buffers = PlanBuffers(batch * TOPK)
        self.tiers = [HotCache(None, num_rows, self.num_slots, buffers) for _ in range(NUM_LAYERS)]
        filling = torch.from_numpy(self.trace.filling())
        for tier in self.tiers:
            tier.warm(filling)
        rows = np.random.default_rng(seed).integers(0, num_rows, self.num_slots, np.int32)
        self.tables = [(rows.copy(), np.zeros(num_rows, np.int32)) for _ in range(NUM_LAYERS)]
        self.out = np.empty(batch * TOPK, np.int32)

    def run(self, num_steps: int) -> Rounds:
        """Steps of all layers in turn, each beside the roof and one tier asked again."""
        rounds = Rounds()
        for step in range(WARM_STEPS + num_steps):
            if step == WARM_STEPS:
                rounds = Rounds()
            topk = self.trace.step()
            for tier in self.tiers:
                seconds, misses, passes = timed_plan(tier, topk)
                rounds.plan.append(seconds)
                rounds.misses.append(misses)
                rounds.passes.append(passes)
            for tables in self.tables:
                start = clock()
                roof(topk.reshape(-1), *tables, self.out, step)
                rounds.roof.append(clock() - start)
        for _ in range(num_steps):
            topk = self.trace.step()
            rounds.one.append(timed_plan(self.tiers[0], topk)[0])
        return rounds


def timed_plan(tier: HotCache, topk: np.ndarray) -> tuple[float, int, int]:
    """Seconds, misses and passes of one step."""
    topk, start, misses, passes = torch.from_numpy(topk), (0, 0), 0, 0
    began = clock()
    while start is not None:
        plan = tier.plan(topk, start)
        start, misses, passes = plan.stop, misses + len(plan.miss_slots), passes + 1
    return clock() - began, misses, passes


def dict_lookups(order: OrderedDict, num_rows: int, topk: np.ndarray) -> float:
    """Seconds of the same lookups in the LRU that Python has."""
    slots = topk.reshape(-1).tolist()
    start = clock()
    for slot in slots:
        if slot in order:
            order.move_to_end(slot)
        else:
            if len(order) == num_rows:
                order.popitem(last=False)
            order[slot] = True
    return clock() - start


def measure_fetch(report: common.Report, num_steps: int, seed: int) -> None:
    """fetch of real rows beside a memcpy of as many bytes and torch's indexed copy."""
    trace = Trace(HEADLINE["batch"], cold_ratio(HEADLINE["ratio"], HEADLINE["miss"]), seed)
    slots = HEADLINE["batch"] * CONTEXT
    host = torch.randint(256, (slots, 1, ROW_BYTES), dtype=torch.uint8)
    tier = HotCache(host, int(slots * HEADLINE["ratio"]))
    tier.warm(torch.from_numpy(trace.filling()))
    kinds = {"fetch": [], "memcpy": [], "torch_indexed": []}
    for step in range(WARM_STEPS + num_steps):
        plan = tier.plan(torch.from_numpy(trace.step()))
        sources, targets = (torch.from_numpy(a.astype(np.int64)) for a in
                            (plan.miss_slots, plan.miss_rows))  # fmt: skip
        count = len(sources)
        first = step * count % (slots - count)  # another part each time: not from the cache
        place = first % (tier.num_rows - count)
        spare = tier.rows[place : place + count].clone()
        calls = {
            "fetch": lambda plan=plan: tier.fetch(plan),
            "memcpy": lambda a=spare, b=host[first : first + count]: a.copy_(b),
            "torch_indexed": lambda t=targets, s=sources: tier.rows.index_copy_(
                0, t, host.index_select(0, s)
            ),
        }
        for kind, call in calls.items():
            start = clock()
            call()
            seconds = clock() - start
            if step >= WARM_STEPS:
                kinds[kind].append(count * ROW_BYTES / seconds / 1e9)
    tier.check_integrity()
    for kind, rates in kinds.items():
        config = HEADLINE | {"kind": kind, "row_bytes": ROW_BYTES, "threads": 1}
        report.add(common.measured("fetch", config, "rate", "GB/s", rates))


def measure_recording(report: common.Report, num_steps: int, seed: int) -> None:
    """A decode step's plans in all layers with and without a recorder; then the trace's replay."""
    batch = HEADLINE["batch"]
    trace = Trace(batch, cold_ratio(HEADLINE["ratio"], HEADLINE["miss"]), seed)
    slots, rows = batch * CONTEXT, int(batch * CONTEXT * HEADLINE["ratio"])
    names, requests = [f"request {i}" for i in range(batch)], np.arange(batch)
    lengths = np.full(batch, CONTEXT, np.int32)
    seconds = {"plain": [], "recorded": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        recorder = TraceRecorder(path, NUM_LAYERS, TOPK, slots, {})
        tiers = {
            "plain": [HotCache(None, rows, slots) for _ in range(NUM_LAYERS)],
            "recorded": [recorder.hot_cache(None, rows, slots) for _ in range(NUM_LAYERS)],
        }
        for _ in range(WARM_STEPS + num_steps):
            topk = trace.ordered_step()
            for kind, caches in tiers.items():
                start = clock()
                if kind == "recorded":
                    recorder.begin_step(names, requests, lengths, trace.slots)
                for cache in caches:
                    timed_plan(cache, topk)
                seconds[kind].append(clock() - start)
        recorder.writer.close()
        writer, opened = recorder.writer, read_trace(path)
        next(event for event in opened.events() if event.slots.size)  # compiles the reader
        start = clock()
        found = replay(opened)
        rate = found.total("lookups") / (clock() - start)
    per_query = [
        (after - before) / (batch * NUM_LAYERS) * 1e6
        for before, after in zip(*(kind[WARM_STEPS:] for kind in seconds.values()), strict=True)
    ]
    facts = {"dropped": writer.dropped, "exact": not found.differences, "threads": 1}
    report.add(
        common.measured("recording", HEADLINE, "time", "us/query", per_query, **facts),
        common.measured("recording", HEADLINE, "size", "B/index",
                        [writer.written_bytes / (writer.records * TOPK)]),
        common.measured("replay", HEADLINE, "lookups", "lookups/s", [rate], **facts),
    )  # fmt: skip


def measure_point(report: common.Report, point: dict, num_steps: int, seed: int) -> None:
    """Rows of plan and roof, layers in turn, and of plan asked of one layer only."""
    stage = Point(**point, seed=seed)
    found = stage.run(num_steps)
    lookups = point["batch"] * TOPK
    facts = {"slots": stage.num_slots, "hot_rows": stage.tiers[0].num_rows, "threads": 1,
             "miss_ratio": float(np.mean(found.misses)) / lookups,
             "passes": float(np.mean(found.passes))}  # fmt: skip
    report.add(
        common.measured("sustained", point, "lookups", "lookups/s",
                        [len(found.plan) * lookups / sum(found.plan)])
    )  # fmt: skip
    for name, turn, seconds in (
        ("plan", NUM_LAYERS, found.plan),
        ("plan", 1, found.one),
        ("roof", NUM_LAYERS, found.roof),
    ):
        rates = [lookups / value for value in seconds]
        config = point | {"turn": turn}
        report.add(common.measured(name, config, "lookups", "lookups/s", rates, **facts))
    share = common.ratios(found.roof, found.plan)
    report.add(common.measured("share_of_roof", point, "share", "ratio", share))
    if point == HEADLINE:
        order = OrderedDict.fromkeys(stage.tiers[0].row_slot.tolist(), True)
        rates = []
        for _ in range(5):
            topk = stage.trace.step()[:DICT_QUERIES]
            rates.append(topk.size / dict_lookups(order, len(order), topk))
        report.add(common.measured("ordered_dict", point, "lookups", "lookups/s", rates))


# --- output -----------------------------------------------------------------------------


def summarise(report: common.Report) -> None:
    """The figures of the two headline points; what was not measured is left out."""
    turn = {"turn": NUM_LAYERS}
    figures = {
        "lookups_per_s": ("plan", "lookups", HEADLINE | turn),
        "sustained_lookups_per_s": ("sustained", "lookups", HEADLINE),
        "one_layer_lookups_per_s": ("plan", "lookups", HEADLINE | {"turn": 1}),
        "roof_lookups_per_s": ("roof", "lookups", HEADLINE | turn),
        "share_of_roof": ("share_of_roof", "share", HEADLINE),
        "hit_lookups_per_s": ("plan", "lookups", HITS | turn),
        "hit_sustained_lookups_per_s": ("sustained", "lookups", HITS),
        "hit_share_of_roof": ("share_of_roof", "share", HITS),
        "ordered_dict_lookups_per_s": ("ordered_dict", "lookups", HEADLINE),
        "fetch_gb_per_s": ("fetch", "rate", {"kind": "fetch"}),
        "memcpy_gb_per_s": ("fetch", "rate", {"kind": "memcpy"}),
        "torch_indexed_gb_per_s": ("fetch", "rate", {"kind": "torch_indexed"}),
        "recording_us_per_query": ("recording", "time", HEADLINE),
        "recording_bytes_per_index": ("recording", "size", HEADLINE),
        "replay_lookups_per_s": ("replay", "lookups", HEADLINE),
    }
    for key, (name, metric, config) in figures.items():
        report.summarise(key, report.median(name, metric, **config))
    row = common.find(report.rows, "plan", "lookups", **HEADLINE | turn)
    report.summarise("miss_ratio", row and row["miss_ratio"])


def print_tables(report: common.Report) -> None:
    headers = ("batch", "hot ratio", "missed", "passes", "M lookups/s", "p10", "p90", "sustained",
               "one layer", "roof", "share")  # fmt: skip
    lines = []
    for row in report.rows:
        if row["name"] != "plan" or row["config"]["turn"] != NUM_LAYERS:
            continue
        point = {key: row["config"][key] for key in HEADLINE}
        found = [row[key] for key in ("median", "p10", "p90")]
        found.append(report.median("sustained", "lookups", **point))
        found.append(report.median("plan", "lookups", **point, turn=1))
        found.append(report.median("roof", "lookups", **point))
        speeds = [value / 1e6 for value in found]
        share = report.median("share_of_roof", "share", **point)
        lines.append([point["batch"], point["ratio"], row["miss_ratio"], row["passes"], *speeds,
                      share])  # fmt: skip
    print(common.table(headers, lines), end="\n\n")
    print(common.table(("", "value"), report.summary.items()))


def draw(report: common.Report, axes) -> None:
    """Left: lookups per second by point, beside the roof. Right: GB/s of the copies."""
    rows = [r for r in report.rows if r["name"] == "plan" and r["config"]["turn"] == NUM_LAYERS]
    points = [{key: row["config"][key] for key in HEADLINE} for row in rows]
    names = [
        f"{point['batch']} x {point['ratio']}\n{row['miss_ratio']:.1%}"
        for point, row in zip(points, rows, strict=True)
    ]
    roofs = [report.median("roof", "lookups", **point) for point in points]
    places = np.arange(len(rows))
    axes[0].bar(places - 0.2, [r["median"] / 1e6 for r in rows], 0.4, label="plan")
    axes[0].bar(places + 0.2, [value / 1e6 for value in roofs], 0.4, label="roof")
    axes[0].axhline(30, color="gray", linestyle=":", label="target")
    axes[0].set_xticks(places, names, fontsize=7, rotation=60)
    axes[0].set_xlabel("batch x hot ratio, missed")
    axes[0].set_ylabel("M lookups/s on one core")
    axes[0].legend(loc="lower right")
    copies = [r for r in report.rows if r["name"] == "fetch"]
    axes[1].bar([r["config"]["kind"] for r in copies], [r["median"] for r in copies])
    axes[1].set_ylabel(f"GB/s, rows of {ROW_BYTES} B, one core")


def main(argv: list[str] | None = None) -> None:
    args = common.arguments(__doc__.splitlines()[0]).parse_args(argv)
    torch.set_num_threads(1)  # torch's copies are compared per core
    report, progress = common.Report(), common.Progress()
    load = common.OtherLoad()
    for point in [HEADLINE, HITS] if args.quick else POINTS:
        progress(f"plan: {point}")
        measure_point(report, point, 6 if args.quick else 20, args.seed)
    progress("fetch")
    measure_fetch(report, 6 if args.quick else 20, args.seed)
    progress("recording and replay")
    measure_recording(report, 6 if args.quick else 20, args.seed)
    summarise(report)
    print_tables(report)
    if args.json:
        report.write(args.json, args.seed, quick=args.quick, other_load=load.ratio())
    if args.plot:
        common.save_figure(args.plot, lambda axes: draw(report, axes))


if __name__ == "__main__":
    main()
