"""The hot tier's policy and copies on one core: lookups of plan per second, GB/s of fetch.

    python -m benchmarks.hot_cache [--quick] [--json PATH] [--plot PATH]

Each point replays synthetic decode steps of DeepSeek-V3.2's shape: 2048 slots of 64 Ki tokens a
request, most of them those of the step before, the rest from the request's core of often-used slots
or, for misses, from its whole context. NUM_LAYERS hot tiers take turns, as layers do, so a tier's
tables are not in the core's cache from its last plan; `turn` 1 asks one tier again and again.

The roof does the scattered accesses that no LRU of this kind can avoid, over tables of the same
size and in the same blocks; plan adds branches, the queue, and what a miss needs. At ratio 1 plan
may be faster: its rows lie in the order in which they came in, those of the roof at random.
`sustained` is all lookups over all seconds, compactions included; the median leaves them out.
Seconds are CPU time of this thread.

`recording` is the time that --ess-trace adds to the plans of a decode step in their own thread;
another thread finds positions and writes. `replay` reads that trace and repeats the lookups.

`index_groups` is a token's planning with GLM-5.2's 78 layers: a plan for each of its 21 index
groups, over a plan for each layer; both in turn, in one run.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import thread_time as clock

import numba
import numpy as np
import torch

from benchmarks import harness
from sglang_ess.sim.model.trace_replay import replay
from sglang_ess.tiers import HotCache, PlanBuffers, lru
from sglang_ess.trace.trace import read_trace
from sglang_ess.trace.trace_recorder import TraceRecorder

TOPK, CONTEXT, PAGE = 2048, 64 << 10, 64
SIMILARITY = 0.6  # ESS, figure 2: mean over layers, at any context
CORE = 4096  # a request's often-used slots; less than any hot tier here has for it
NUM_LAYERS = 8  # 55 MB of tables at the headline point
ROW_BYTES = 656
WARM_STEPS = 6
HEADLINE = {"batch": 16, "ratio": 0.2, "miss": 0.09}  # 190 of 2048, ESS at 32K
HITS = {"batch": 16, "ratio": 0.2, "miss": 0.0}
GLM52 = {"batch": 2, "ratio": 0.2, "miss": 0.09, "layers": 78, "groups": 21}
POINTS = [  # HEADLINE and HITS are the first two
    {"batch": batch, "ratio": ratio, "miss": miss}
    for batch in (16, 64)
    for ratio, miss in ((0.2, 0.09), (0.2, 0.0), (0.2, 0.02), (0.1, 0.09), (0.1, 0.02), (0.1, 0.0),
                        (1.0, 0.0))
]  # fmt: skip


class Trace:
    """Decode steps of `batch` requests, each in its own pages of a shared pool."""

    def __init__(self, batch: int, cold_ratio: float, seed: int):
        self._random = np.random.default_rng(seed)
        self._cold_ratio = cold_ratio
        pages = self._random.permutation(batch * CONTEXT // PAGE).reshape(batch, -1, 1)
        self.slots = (pages * PAGE + np.arange(PAGE)).reshape(batch, CONTEXT).astype(np.int32)
        self._order = np.argsort(self._random.random((batch, CONTEXT)), axis=1)  # core first
        self._last = self._order[:, :TOPK].copy()

    def step(self, ordered: bool = False) -> np.ndarray:
        """[batch, TOPK] int32 slots, distinct within a request.

        ordered: in context order, as the CPU indexer gives them; else in none
        """
        for request in range(len(self._last)):
            self._last[request] = self._next(self._order[request], self._last[request])
        positions = np.sort(self._last, axis=1) if ordered else self._last
        return np.take_along_axis(self.slots, positions, axis=1)

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
        """All slots, [CONTEXT, batch] int32, to fill a hot tier before a run: the cores last."""
        order = self._order[:, ::-1]
        return np.ascontiguousarray(np.take_along_axis(self.slots, order, axis=1).T)


def cold_ratio(ratio: float, miss: float) -> float:
    """The share of a request's entries to draw from its whole context, so that `miss` of all miss.

    A draw hits if it is in the core or still hot from an earlier draw.
    """
    return miss / max(1 - ratio, miss, 1e-9)


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

    def run(self, num_steps: int) -> dict[str, list]:
        """Steps of all layers in turn, then the roof's; at the end one tier asked again.

        Returns seconds ("plan", "roof", "one") and "misses", "passes" of each timed step.
        """
        found: dict[str, list] = defaultdict(list)
        for step in range(WARM_STEPS + num_steps):
            if step == WARM_STEPS:
                found.clear()
            topk = self.trace.step()
            for tier in self.tiers:
                figures = timed_plan(tier, topk)
                for key, figure in zip(("plan", "misses", "passes"), figures, strict=True):
                    found[key].append(figure)
            for tables in self.tables:
                start = clock()
                roof(topk.reshape(-1), *tables, self.out, step)
                found["roof"].append(clock() - start)
        for _ in range(num_steps):
            found["one"].append(timed_plan(self.tiers[0], self.trace.step())[0])
        return found


def timed_plan(tier: HotCache, topk: np.ndarray) -> tuple[float, int, int]:
    """Seconds, misses and passes of one step."""
    topk, start, misses, passes = torch.from_numpy(topk), (0, 0), 0, 0
    began = clock()
    while start is not None:
        plan = tier.plan(topk, start)
        start, misses, passes = plan.stop, misses + len(plan.miss_slots), passes + 1
    return clock() - began, misses, passes


def measure_fetch(report: harness.Report, num_steps: int, seed: int) -> None:
    """fetch of real rows, a memcpy of the same bytes and torch's indexed copy."""
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
        first = step * count % (slots - count)  # another part each time: uncached
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
    fixed = HEADLINE | {"row_bytes": ROW_BYTES, "threads": 1}
    for kind, rates in kinds.items():
        report.add(harness.measured("fetch", fixed | {"kind": kind}, "rate", "GB/s", rates))


def measure_recording(report: harness.Report, num_steps: int, seed: int) -> None:
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
            topk = trace.step(ordered=True)
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
    size = writer.written_bytes / (writer.records * TOPK)
    report.add(
        harness.measured("recording", HEADLINE, "time", "us/query", per_query, **facts),
        harness.measured("recording", HEADLINE, "size", "B/index", [size]),
        harness.measured("replay", HEADLINE, "lookups", "lookups/s", [rate], **facts),
    )


def measure_groups(report: harness.Report, num_steps: int, seed: int) -> None:
    """A decode step's plans: one for each index group, and one for each layer."""
    trace = Trace(GLM52["batch"], cold_ratio(GLM52["ratio"], GLM52["miss"]), seed)
    slots, filling = GLM52["batch"] * CONTEXT, torch.from_numpy(trace.filling())
    buffers, seconds = PlanBuffers(), {"groups": [], "layers": []}
    rows = int(slots * GLM52["ratio"])
    tiers = {k: [HotCache(None, rows, slots, buffers) for _ in range(GLM52[k])] for k in seconds}
    for tier in (*tiers["groups"], *tiers["layers"]):
        tier.warm(filling)
    for _ in range(WARM_STEPS + num_steps):
        topk = trace.step()
        for kind, caches in tiers.items():
            seconds[kind].append(sum(timed_plan(cache, topk)[0] for cache in caches))
    kept = [found[WARM_STEPS:] for found in seconds.values()]
    per_token = [one / GLM52["batch"] * 1e6 for one in kept[0]]
    report.add(
        harness.measured("index_groups", GLM52, "time", "us/token", per_token),
        harness.measured("index_groups", GLM52, "share", "ratio", harness.ratios(*kept)),
    )


def measure_point(report: harness.Report, point: dict, num_steps: int, seed: int) -> None:
    """Add rows for plan and roof with the layers in turn, and for plan on one layer only."""
    stage = Point(**point, seed=seed)
    found = stage.run(num_steps)
    lookups = point["batch"] * TOPK
    facts = {"slots": stage.num_slots, "hot_rows": stage.tiers[0].num_rows, "threads": 1,
             "miss_ratio": float(np.mean(found["misses"])) / lookups,
             "passes": float(np.mean(found["passes"]))}  # fmt: skip
    sustained = len(found["plan"]) * lookups / sum(found["plan"])
    report.add(harness.measured("sustained", point, "lookups", "lookups/s", [sustained]))
    for name, turn, key in (("plan", NUM_LAYERS, "plan"), ("plan", 1, "one"),
                            ("roof", NUM_LAYERS, "roof")):  # fmt: skip
        rates = [lookups / seconds for seconds in found[key]]
        config = point | {"turn": turn}
        report.add(harness.measured(name, config, "lookups", "lookups/s", rates, **facts))
    share = harness.ratios(found["roof"], found["plan"])
    report.add(harness.measured("share_of_roof", point, "share", "ratio", share))


def summarise(report: harness.Report) -> None:
    """The figures of the two headline points."""
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
        **{f"{kind}_gb_per_s": ("fetch", "rate", {"kind": kind})
           for kind in ("fetch", "memcpy", "torch_indexed")},
        "glm52_plan_share": ("index_groups", "share", GLM52),
        "glm52_plan_us_per_token": ("index_groups", "time", GLM52),
        "recording_us_per_query": ("recording", "time", HEADLINE),
        "recording_bytes_per_index": ("recording", "size", HEADLINE),
        "replay_lookups_per_s": ("replay", "lookups", HEADLINE),
    }  # fmt: skip
    for key, (name, metric, config) in figures.items():
        report.summarise(key, report.median(name, metric, **config))
    missed = report.figure("plan", "lookups", "miss_ratio", **HEADLINE | turn)
    report.summarise("miss_ratio", missed)


def print_tables(report: harness.Report) -> None:
    def of_point(row: dict, name: str, metric: str, **more) -> float:
        return report.median(name, metric, **{key: row["config"][key] for key in HEADLINE}, **more)

    def millions(name: str, **more) -> Callable[[dict], float]:
        return lambda row: of_point(row, name, "lookups", **more) / 1e6

    columns = {
        "batch": "batch", "hot ratio": "ratio", "missed": "miss_ratio", "passes": "passes",
        "M lookups/s": lambda row: row["median"] / 1e6, "p10": lambda row: row["p10"] / 1e6,
        "p90": lambda row: row["p90"] / 1e6, "sustained": millions("sustained"),
        "one layer": millions("plan", turn=1), "roof": millions("roof"),
        "share": lambda row: of_point(row, "share_of_roof", "share"),
    }  # fmt: skip
    harness.print_table(report.select("plan", turn=NUM_LAYERS), columns)


def panels(report: harness.Report) -> list[harness.Panel]:
    """Left: lookups per second by point, of plan and of the roof. Right: GB/s of the copies."""
    speeds = [row for name in ("plan", "roof") for row in report.select(name, turn=NUM_LAYERS)]
    return [
        harness.Panel(speeds, lambda row: "{batch} x {ratio}\n{miss:.0%}".format(**row["config"]),
                      lambda row: row["median"] / 1e6, "name", kind="bar", levels={"target": 30},
              axes={"xlabel": "batch x hot ratio, missed", "ylabel": "M lookups/s on one core"}),
        harness.Panel(report.select("fetch"), "kind", kind="bar",
                      axes={"ylabel": f"GB/s, rows of {ROW_BYTES} B, one core"}),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = harness.argument_parser(__doc__).parse_args(argv)
    torch.set_num_threads(1)  # torch's copies are compared per core
    report, progress, load = harness.Report(), harness.Progress(), harness.OtherLoad()
    steps = 6 if args.quick else 20
    for point in POINTS[:2] if args.quick else POINTS:
        progress(f"plan: {point}")
        measure_point(report, point, steps, args.seed)
    progress("fetch")
    measure_fetch(report, steps, args.seed)
    progress("index groups")
    measure_groups(report, steps, args.seed)
    progress("recording and replay")
    measure_recording(report, steps, args.seed)
    summarise(report)
    print_tables(report)
    harness.finish(report, args, *panels(report), other_load=load.ratio())


if __name__ == "__main__":
    main()
