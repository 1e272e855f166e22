"""SparseServe's ablation (arXiv 2509.24626) from its stated hardware: paper, model, ratio.

    python -m benchmarks.sim.reproduce_sparseserve [--quick] [--json PATH] [--plot PATH]

The model: a roofline, a stack model of the blocks that a head selects, and the production LRU and
working sets over them. sparseserve.toml has every number with its source, stated or assumed.
Fitted, one number: the device memory that the decode batches of Figure 1 had for blocks, to the
growth of its loads (21.36x). It enters the three rows of Figure 1 and no other.
The paper has no absolute curves, hit rates, or settings of Figures 1 and 14a. One load of 200
requests and one seed: a goodput moves by a few percent with another. docs/simulator.md says where
the model is far off, and why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import harness
from sglang_ess.layout import GIB
from sglang_ess.sim.engine import block_serving
from sglang_ess.sim.engine.block_serving import SYSTEMS, BlockCache, BlockServer, Result, System
from sglang_ess.sim.engine.blocks import DenseModel, Roofline, Setting

DATA = Path(__file__).with_name("sparseserve.toml")
FIG1_LOADS = 21.36
FITTED, CONSTRUCTION = "FITTED", "construction"  # rows that are no prediction
DECODE_STEPS, SKIPPED_STEPS = 200, 50
SLO_BATCH, SLO_CONTEXT = 32, 4096  # Sarathi-Serve sec. 5.1: whose definition sec. 4.2 follows
CONTROL_RISE = 0.3 / 0.25  # of the rate, in sec. 4.3.2
GOODPUT_PARTS = [*(system.name for system in SYSTEMS[1:]), "_total"]
GOODPUTS = {
    "LWM-7B": (1.20, 1.33, 1.88, 1.33, 1.25, 5.00),
    "Llama3-8B": (1.13, 1.12, 1.19, 1.11, 1.10, 1.83),
}
FALL = 0.02  # of throughput between two rates: more than the noise of one load
UNCONTROLLED = System("+LP -WC", sparse=True, offload=True, flash=True, segmented=True)


@dataclass(frozen=True)
class Item:
    """One number of the paper. neutral: its value if the part had no effect"""

    name: str
    paper: float
    unit: str
    basis: str
    neutral: float = 1.0

    def is_right(self, model: float) -> bool:
        """Whether the model's effect has the paper's direction, by 1 % of neutral or more."""
        effect = self.paper - self.neutral
        if effect == 0:
            return bool(abs(model - self.neutral) < 0.02)
        return bool((model - self.neutral) * np.sign(effect) > 0.01)


ITEMS = {
    item.name: item
    for item in (
        Item("flash_h2d_speedup", 9.97, "x", "stated bounds"),
        Item("save_memcpy", 1.76, "x compute", "stated bound, assumed compute"),
        Item("save_gpu_direct", 1.28, "x compute", "stated bound, assumed compute"),
        Item("save_flash_d2h", 1.00, "x compute", "stated bound, assumed compute"),
        Item("chunk_512_attention", 1.51, "x plain", "roofline"),
        Item("segmented_attention", 1.00, "x plain", CONSTRUCTION),
        Item("batch_2_to_6", 2.07, "x tokens/s", "fitted memory, roofline"),
        Item("batch_6_to_12_down", 1.73, "x tokens/s", "fitted memory, roofline"),
        Item("loads_6_to_12", FIG1_LOADS, "x blocks", FITTED),
        Item("memcpy_loading_share", 0.6994, "of a step", "assumed lengths", 0.0),
        Item("uncontrolled_drop", 0.2952, "of tokens/s", "assumed lengths", 0.0),
        Item("controlled_loads_cut", 52.78, "x blocks", "assumed lengths"),
        Item("segmented_ttft", 8.68, "x lower", "assumed lengths"),
        *(
            Item(f"goodput_{model}{part}", paper, "x", "assumed lengths")
            for model, papers in GOODPUTS.items()
            for part, paper in zip(GOODPUT_PARTS, papers, strict=True)
        ),
    )
}


def record(report: harness.Report, name: str, value: float, **config) -> None:
    """Add a row with our number and the paper's."""
    item = ITEMS[name]
    facts = {"paper": item.paper, "basis": item.basis, "right": item.is_right(value)}
    report.add(harness.simulated(name, config, "effect", item.unit, [value], **facts))
    report.summarise(name, value / item.paper)


def prompts(setting: Setting, model: DenseModel, count: int, seed: int) -> np.ndarray:
    return setting.draw(count, model.max_prompt_tokens, seed)[0].astype(float)


def transfers(setting: Setting, model: DenseModel, seed: int) -> dict[str, float]:
    """The speed-up of loads, and prefill with saves over prefill alone.

    memcpy and FlashD2H run during the compute, so the longer of both counts. A GPU-direct save
    occupies the GPU while it lasts.
    """
    machine, cost = setting.machine, Roofline(setting.machine, model, setting.sparse)
    lengths = prompts(setting, model, 2000, seed)
    compute = np.array([cost.linear(n) + cost.prefill_attention(n, 0) for n in lengths])
    written = lengths * model.token_bytes

    def overlapped(rate: float) -> float:
        return float(np.maximum(compute, written / rate).sum() / compute.sum())

    direct = (written / machine.flash_h2d_bytes_per_second).sum() / compute.sum()
    return {
        "flash_h2d_speedup": machine.flash_h2d_bytes_per_second / machine.memcpy_bytes_per_second,
        "save_memcpy": overlapped(machine.memcpy_save_bytes_per_second),
        "save_gpu_direct": float(1 + direct),
        "save_flash_d2h": overlapped(machine.flash_d2h_bytes_per_second),
    }


def chunked_attention(setting: Setting, model: DenseModel, chunk: int, seed: int) -> float:
    """Attention of chunked prefill over that of the whole prompts at once."""
    cost = Roofline(setting.machine, model, setting.sparse)
    chunked = plain = 0.0
    for length in prompts(setting, model, 300, seed):
        plain += cost.prefill_attention(length, 0)
        firsts = np.arange(0, length, chunk)
        chunked += sum(cost.prefill_attention(min(chunk, length - f), f) for f in firsts)
    return chunked / plain


class Batches:
    """Decode batches over a block cache.

    churn: requests end after their output and cold requests take their place
    """

    def __init__(self, setting: Setting, model: DenseModel, seed: int, draws: int):
        self._setting, self._model = setting, model
        self._seed, self._draws = seed, draws
        self._cost = Roofline(setting.machine, model, setting.sparse)

    def rows(self, num_bytes: float) -> int:
        return int(num_bytes / self._model.heads / self._setting.block_bytes(self._model))

    def run(self, batch: int, rows: int, churn: bool) -> tuple[float, float]:
        """(blocks loaded a step, seconds of a step without loads), means over draws."""
        found = [self._one(batch, rows, churn, draw) for draw in range(self._draws)]
        return tuple(float(value) for value in np.mean(found, axis=0))

    def _one(self, batch: int, rows: int, churn: bool, draw: int) -> tuple[float, float]:
        setting, model = self._setting, self._model
        count = batch * (2 + DECODE_STEPS // 32)
        lengths, outputs = setting.draw(count, model.max_prompt_tokens, self._seed + draw)
        cache = BlockCache(setting, model, rows, self._seed + draw)
        running = np.arange(batch)
        left, taken = outputs[:batch].copy(), batch
        for stream in running:
            cache.streams.join(stream, cache.blocks(lengths[stream]))
        contexts, loads, seconds = lengths[:batch].copy(), [], []
        for step in range(DECODE_STEPS):
            held = [cache.metadata(stream, contexts[stream]) for stream in running]
            missed, _ = cache.step(running, held)
            if step >= SKIPPED_STEPS:
                loads.append(missed * model.heads)
                attention = self._cost.decode_attention(contexts.astype(float), True)
                seconds.append(self._cost.linear(batch) + attention)
            left -= 1
            for stream in running[left <= 0] if churn else ():
                cache.leave(stream)
                contexts[stream], left[stream] = lengths[taken], outputs[taken]
                cache.streams.join(stream, cache.blocks(contexts[stream]))
                taken += 1
        return np.mean(loads), np.mean(seconds)

    def step_seconds(self, found: tuple[float, float], rate: float) -> float:
        """Seconds of a step whose loads run at `rate` bytes per second."""
        return found[1] + found[0] * self._setting.block_bytes(self._model) / rate

    def fit_bytes(self, most: float, goal: float) -> float:
        """Device bytes, at most `most`, at which loads grow by `goal` from batch 6 to batch 12."""
        low, high = most / 2, most
        for _ in range(8):
            middle = (low + high) / 2
            rows = self.rows(middle)
            growth = self.run(12, rows, False)[0] / self.run(6, rows, False)[0]
            low, high = (middle, high) if growth > goal else (low, middle)
        return (low + high) / 2


def figure_1(batches: Batches, num_bytes: float, rate: float) -> dict[str, float]:
    """Throughput and loads of batches 2, 6 and 12 with memcpy."""
    rows = batches.rows(num_bytes)
    found = {batch: batches.run(batch, rows, False) for batch in (2, 6, 12)}
    speed = {b: b / batches.step_seconds(value, rate) for b, value in found.items()}
    return {
        "batch_2_to_6": speed[6] / speed[2],
        "batch_6_to_12_down": speed[6] / speed[12],
        "loads_6_to_12": found[12][0] / found[6][0],
    }


class Serving:
    """Runs of the systems with one model. Each run is made once and kept."""

    def __init__(self, setting: Setting, model: DenseModel, requests: int, seed: int):
        self.setting, self.model = setting, model
        self._requests, self._seed = requests, seed
        self._cost = Roofline(setting.machine, model, setting.sparse)
        self._known: dict[tuple[str, float], Result] = {}

    def result(self, system: System, rate: float) -> Result:
        key = system.name, rate
        if key not in self._known:
            shape = self.setting, self.model
            requests = block_serving.load(*shape, self._requests, rate, self._seed)
            self._known[key] = BlockServer(*shape, system, requests, self._seed).run()
        return self._known[key]

    def keeps_limits(self, result: Result) -> bool:
        contexts = np.full(SLO_BATCH, float(SLO_CONTEXT))
        decode = self._cost.linear(SLO_BATCH) + self._cost.decode_attention(contexts, False)
        limits, tail = self.setting.limits, np.percentile(result.tbt, 99)
        in_time = result.queue.mean() <= limits.queue_seconds
        return in_time and tail <= limits.tbt_decode_steps * decode

    def goodput(self, system: System, start: float, steps: int) -> float:
        """The highest rate that keeps the limits. The search begins at `start`."""
        low = high = start
        while low > 1e-3 and not self.keeps_limits(self.result(system, low)):
            low, high = low / 1.5, low
        while low == high or self.keeps_limits(self.result(system, high)):
            low, high = high, high * 1.5
        for _ in range(steps):
            middle = (low * high) ** 0.5
            kept = self.keeps_limits(self.result(system, middle))
            low, high = (middle, high) if kept else (low, middle)
        return low


def serving_effects(serving: Serving, goodputs: list[float]) -> dict[str, float]:
    """Control and segmented prefill, at rates below and above the whole system's goodput."""
    whole, chunked = SYSTEMS[-1], SYSTEMS[-2]
    rates = [goodputs[-1] * CONTROL_RISE**k for k in range(-3, 4)]
    speeds = [serving.result(UNCONTROLLED, rate).tokens_per_second for rate in rates]
    drops = [1 - after / before for before, after in zip(speeds, speeds[1:], strict=False)]
    # The paper's two rates are the first between which throughput falls.
    first = next((i for i, drop in enumerate(drops) if drop > FALL), int(np.argmax(drops)))
    without, controlled = (
        serving.result(system, rates[first + 1]).loads for system in (UNCONTROLLED, whole)
    )
    ttft_ratios = [
        serving.result(chunked, rate).ttft.mean() / serving.result(whole, rate).ttft.mean()
        for rate in rates
        if rate <= goodputs[-1]
    ]
    return {
        "uncontrolled_drop": drops[first],
        "controlled_loads_cut": without / max(1.0, controlled),
        "segmented_ttft": max(ttft_ratios),
    }


def measure_serving(report: harness.Report, serving: Serving, steps: int, progress) -> list[float]:
    """Add a row for each goodput. Returns them in requests per second."""
    name, found = serving.model.name, []
    for system in SYSTEMS:
        progress(f"{name}: goodput of {system.name}")
        found.append(serving.goodput(system, found[-1] if found else 0.2, steps))
        config = {"model": name, "system": system.name}
        report.add(harness.simulated("goodput", config, "rate", "req/s", found[-1:]))
        if len(found) > 1:
            record(report, f"goodput_{name}{system.name}", found[-1] / found[-2], model=name)
    record(report, f"goodput_{name}_total", found[-1] / found[0], model=name)
    return found


def is_prediction(row: Mapping) -> bool:
    return row["basis"] not in (FITTED, CONSTRUCTION)


def print_tables(report: harness.Report, effects: Sequence[dict]) -> None:
    columns = {
        "": "name", "paper": "paper", "model": "median",
        "model/paper": lambda row: row["median"] / row["paper"], "unit": "unit",
        "rests on": "basis",
        "direction": lambda row: ("NO", "yes")[row["right"]] if is_prediction(row) else None,
    }  # fmt: skip
    harness.print_table(effects, columns)
    columns = {"goodput": "model", "": "system", "req/s": "median"}
    harness.print_table(report.select("goodput"), columns)


def panels(report: harness.Report, effects: Sequence[dict]) -> list[harness.Panel]:
    """Left: model over paper of every item. Right: goodput by system."""
    return [
        harness.Panel(effects, "name", lambda row: row["median"] / row["paper"], kind="bar",
                      levels={"paper": 1}, axes={"ylabel": "model / paper"}),
        harness.Panel(report.select("goodput"), "system", series="model",
                      axes={"ylabel": "goodput, req/s (simulated)"}),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = harness.argument_parser(__doc__).parse_args(argv)
    report, progress = harness.Report(), harness.Progress()
    setting = Setting.load(DATA)
    model = setting.models[0]
    progress("transfers and prefill")
    for name, value in transfers(setting, model, args.seed).items():
        record(report, name, value, model=model.name)
    record(report, "chunk_512_attention", chunked_attention(setting, model, 512, args.seed))
    whole = chunked_attention(setting, model, model.max_prompt_tokens, args.seed)
    record(report, "segmented_attention", whole)
    progress("decode batches")
    batches = Batches(setting, model, args.seed, 3 if args.quick else 8)
    num_bytes = batches.fit_bytes(setting.cache_bytes(model), FIG1_LOADS)
    rate = setting.machine.memcpy_bytes_per_second
    for name, value in figure_1(batches, num_bytes, rate).items():
        record(report, name, value, cache_gib=num_bytes / GIB)
    found = batches.run(8, batches.rows(setting.cache_bytes(model)), True)
    share = 1 - found[1] / batches.step_seconds(found, rate)
    record(report, "memcpy_loading_share", share, batch=8)
    for model in setting.models[:1] if args.quick else setting.models:
        serving = Serving(setting, model, 60 if args.quick else 200, args.seed)
        goodputs = measure_serving(report, serving, 3 if args.quick else 5, progress)
        if model is setting.models[0]:
            progress(f"{model.name}: control and segmented prefill")
            for name, value in serving_effects(serving, goodputs).items():
                record(report, name, value, model=model.name)
    effects = [row for row in report.rows if "paper" in row]
    known = [row for row in effects if is_prediction(row)]
    report.summarise("fitted_gib", num_bytes / GIB)
    report.summarise("directions_right", sum(row["right"] for row in known))
    report.summarise("directions", len(known))
    print_tables(report, effects)
    harness.finish(report, args, *panels(report, effects))


if __name__ == "__main__":
    main()
