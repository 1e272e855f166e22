"""How gpu_serving goes through its engines: waves, time, what is lost, and what is kept."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import Report, Worker, WorkerError, failed, measured
from benchmarks.gpu_serving_engine import LEAVE_SECONDS
from benchmarks.gpu_serving_plan import (
    FIRST,
    GIB,
    RESIDENT,
    THEN,
    EnginePlan,
    Model,
    Plan,
    Point,
    budget_bytes,
)
from benchmarks.gpu_serving_probe import Probe
from benchmarks.gpu_serving_report import point_rows, windows_of

CLOSE_SECONDS = 5
DECODE_SECONDS = 60  # of a fill, at most
ENGINE_METRICS = {
    "start": "s",
    "device_bytes": "B",
    "latent_bytes": "B",
    "index_bytes": "B",
    "metadata_bytes": "B",
    "host_bytes": "B",
    "budget_bytes": "B",
    "allocated_bytes": "B",
    "reserved_bytes": "B",
    "free_bytes": "B",
    "slots": "",
    "hot_rows": "",
}


@dataclass(frozen=True)
class Pace:
    """Seconds that have to be left to begin something, and the most that it may take.

    wave       from its start to the end of what is wanted first; point: a batch
    start      of an engine; straggler: the same once another of its wave serves
    """

    wave: float
    point: float
    start: float
    straggler: float


PACES = {"cuda": Pace(90, 12, 330, 180), "cpu": Pace(25, 4, 300, 300)}


class Clock:
    """Time that is left of --seconds."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._until = now, now() + seconds

    def left(self) -> float:
        return self._until - self._now()


class EngineWorker(Worker):
    """A Worker that tells whether its process is there: calling a dead one would start it anew."""

    @property
    def alive(self) -> bool:
        return self._process is not None

    def reason(self) -> str:
        """The line of its log that says most about a death; empty if none does."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        telling = re.compile(r"^(sglang-ess: |[\w.]*(Error|Exception|Refusal)\b.*: )")
        found = [line for line in lines if telling.match(line)]
        return found[-1][:300] if found else ""


# --- one run ----------------------------------------------------------------------------


@dataclass
class Run:
    """Engines, wave by wave; every result goes to the report at once.

    stream    the top-k stream's name
    make      EnginePlan -> an EngineWorker that has not started
    save      after every result; progress: a line for people
    alive, sizes: of engines by name; a lost one's sizes say why
    """

    plan: Plan
    model: Model
    stream: str
    report: Report
    clock: Clock
    pace: Pace
    probe: Probe
    make: Callable[[EnginePlan], EngineWorker]
    save: Callable[[], None]
    progress: Callable[[str], None]
    alive: dict[str, EngineWorker] = field(default_factory=dict)
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def all(self, waves: Sequence[Sequence[EnginePlan]], parts: Sequence[str]) -> None:
        """parts: the points to measure, FIRST or THEN or both."""
        retries: list[EnginePlan] = []
        try:
            for number, wave in enumerate(waves):
                retries += self._wave(wave, waves[number + 1 :], parts)
            for engine in retries:
                self._wave([engine], [], parts)
        finally:
            self._close(set(self.alive))

    def _wave(
        self, wave: Sequence[EnginePlan], rest: Sequence[Sequence[EnginePlan]], parts: Sequence[str]
    ) -> list[EnginePlan]:
        """Returns engines that did not start beside others: alone they may."""
        wave = [engine for engine in wave if engine.parts & set(parts)]
        retries = self._start(wave)
        later = sum(any(FIRST in engine.parts for engine in one) for one in rest)
        for part in (FIRST, THEN):
            keep = later * self.pace.wave if part == THEN and FIRST in parts else 0
            for engine in wave:
                if part in parts and engine not in retries:
                    self._points(engine, part, keep)
        reused = {engine.reuses for one in rest for engine in one}
        self._close(set(self.alive) - reused)
        return retries

    def _start(self, wave: Sequence[EnginePlan]) -> list[EnginePlan]:
        """Start them together; returns those of several that did not."""
        fresh = [engine for engine in wave if engine.reuses not in self.alive]
        if fresh and self.clock.left() < self.pace.wave:
            return []  # _why_not says so
        began = {}
        for engine in fresh:
            self.progress(f"starting {engine.name}: {engine.slots} slots")
            self.sizes.pop(engine.name, None)
            worker = self.make(engine)
            self.alive[engine.name], began[engine.name] = worker, time.monotonic()
            worker.start()
        until, lost = None, []
        for engine in fresh:
            if not self._serves(engine, began[engine.name], until):
                lost.append(engine)
            elif until is None:
                until = time.monotonic() + self.pace.straggler
        return lost if len(fresh) > 1 else []

    def _serves(self, engine: EnginePlan, began: float, until: float | None) -> bool:
        """Wait for an engine that was started; until: no longer than this."""
        worker = self.alive[engine.name]
        limits = [began + self.pace.start, until or float("inf")]
        seconds = min(min(limits) - time.monotonic(), self.clock.left() - self.pace.point)
        try:
            worker.wait(max(seconds, 1))
            sizes = worker.call("sizes", timeout=60)
        except WorkerError as error:
            self._lost(engine.name, f"start: {error}")
            return False
        sizes |= {"start": time.monotonic() - began}
        sizes["budget_bytes"] = budget_bytes(self.plan, self.model)
        sizes["device_bytes"] = sizes["latent_bytes"] + sizes["index_bytes"]
        if engine.ratio is None:  # see gpu_serving_plan: HiSparse's tables come on top
            sizes["device_bytes"] += sizes["metadata_bytes"]
        self.sizes[engine.name] = sizes
        config = {"engine": engine.name, "systems": list(engine.systems.values())}
        rows = [
            measured("engine", config, metric, unit, [sizes[metric]])
            for metric, unit in ENGINE_METRICS.items()
            if sizes.get(metric) is not None
        ]
        self.report.add(*rows)
        self.save()
        self.progress(
            f"{engine.name} serves after {sizes['start']:.0f} s: {sizes['slots']} slots, "
            f"{sizes['device_bytes'] / GIB:.3f} GiB of KV pool"
        )
        return True

    def _lost(self, name: str, error: str) -> None:
        worker = self.alive.pop(name)
        worker.close(grace=0)
        why = worker.reason()
        self.sizes[name] = {"lost": f"{error} | {why}" if why else error}
        self.progress(f"{name} is lost: {self.sizes[name]['lost'][:300]}")

    def _close(self, names: set[str]) -> None:
        for name in names:
            self.alive[name].hang_up()
        for name in names:
            self.alive.pop(name).close(grace=CLOSE_SECONDS)

    # --- points ---------------------------------------------------------------------------

    def _points(self, engine: EnginePlan, part: str, keep: float) -> None:
        """keep: seconds that are not this part's to spend."""
        for point in engine.points:
            if point.part == part:
                self.report.add(*self._point(engine, point, keep))
                self.save()

    def _point(self, engine: EnginePlan, point: Point, keep: float) -> list[dict]:
        name = engine.reuses if engine.reuses in self.alive else engine.name
        sizes = self.sizes.get(name, {})
        config = {"context": point.context, "batch": point.batch, "layers": self.model.layers}
        config |= {"engine": engine.name, "part": point.part, "round": engine.round}
        config |= {"topk_stream": self.stream, "slots": sizes.get("slots")}
        config |= {"hot_rows": sizes.get("hot_rows")}
        error = self._why_not(engine, name, keep)
        found: list[dict] = []
        if error is None:
            try:
                found = self._measure(engine, self.alive[name], point, config)
            except (WorkerError, ValueError) as caught:
                error = str(caught)
                # One that hangs would take the time of everything that comes after it.
                if not self.alive[name].alive or error.startswith("TimeoutError"):
                    self._lost(name, error)
                    error = self.sizes[name]["lost"]
                self.progress(f"{engine.name}, {point.batch} x {point.context}: {error[:300]}")
        if error is None:
            return found
        return [
            failed("decode", {"system": system} | config, "decode_tokens_per_s", "tokens/s", error)
            for system in engine.systems.values()
        ]

    def _why_not(self, engine: EnginePlan, name: str, keep: float) -> str | None:
        """A reason to leave a point out."""
        sizes = self.sizes.get(name, {})
        if "lost" in sizes:
            return sizes["lost"]
        if name not in self.alive:
            return f"out of time: {self.clock.left():.0f} s left for a start"
        if sizes["device_bytes"] > sizes["budget_bytes"] and engine.system != RESIDENT:
            got, limit = sizes["device_bytes"], sizes["budget_bytes"]
            return f"the KV pool must take the compared device bytes: got {got}, limit {limit}"
        if self.clock.left() - keep < self.pace.point:
            kept = f", {keep:.0f} s kept for what comes first" if keep else ""
            return f"out of time: {self.clock.left():.0f} s left{kept}"
        return None

    def _measure(
        self, engine: EnginePlan, worker: EngineWorker, point: Point, config: dict
    ) -> list[dict]:
        plan, labels = self.plan, list(engine.systems)
        seconds = min(max(self.clock.left() - LEAVE_SECONDS, 5), DECODE_SECONDS)
        with self.probe.sampling():
            passes = worker.call(
                "decode", point.batch, point.context, plan.new_tokens, labels, plan.steps, seconds,
                timeout=seconds + LEAVE_SECONDS + 5,
            )  # fmt: skip
        windows = windows_of(passes, plan.dropped, plan.steps)
        rows = []
        for label, system in engine.systems.items():
            mine = [window for window in windows if window.label == label]
            if not mine:
                raise ValueError(f"a fill must have windows of {system}: got none")
            rows += point_rows(
                mine, {"system": system} | config, self.model.layers, self.probe.between,
                self.probe.why_none,
            )  # fmt: skip
            self.progress(
                f"{system}, {mine[0].running} of {point.batch} x {point.context}: "
                f"{1e3 * mine[-1].running / mine[-1].tokens_per_s:.2f} ms"
            )
        return rows
