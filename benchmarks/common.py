"""What every benchmark shares: rows, the JSON file, machine facts, worker processes, tables.

No torch and no sglang here: what reads the environment at import runs in a Worker.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.processes import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sglang", "torch", "numba", "transformers", "numpy")


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer points, in minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write rows and summary here")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG here")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and weights [0]")
    return parser


# --- rows -------------------------------------------------------------------------------


def measured(name, config: dict, metric, unit, samples: Sequence[float], **extra) -> dict:
    """One row: median, p10, p90 and mean of the samples. extra adds fields (warmup, ...)."""
    if not len(samples):
        return failed(name, config, metric, unit, "no samples", **extra)
    low, middle, high = np.percentile(np.asarray(samples, float), (10, 50, 90))
    spread = {"median": float(middle), "p10": float(low), "p90": float(high)}
    spread["mean"] = float(np.mean(samples))
    row = {"name": name, "kind": "measured", "config": config, "metric": metric, "unit": unit}
    return row | spread | {"n": len(samples)} | extra


def simulated(name, config: dict, metric, unit, samples: Sequence[float], **extra) -> dict:
    """As measured, for a number that a simulation gave."""
    return measured(name, config, metric, unit, samples, **extra) | {"kind": "simulated"}


def failed(name, config: dict, metric, unit, error, **extra) -> dict:
    """A row for a point that gave no number: its medians are null, `error` says why."""
    spread = {"median": None, "p10": None, "p90": None, "mean": None, "n": 0}
    row = {"name": name, "kind": "failed", "config": config, "metric": metric, "unit": unit}
    return row | spread | {"error": str(error)} | extra


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above[i] / below[i] of the rounds that both have: a paired comparison.

    What slows one round of a shared machine slows both its halves, so the median of the
    paired ratios moves less than the ratio of two medians.
    """
    return [a / b for a, b in zip(above, below, strict=False)]


def find(rows: Iterable[dict], name, metric, **config) -> dict | None:
    """The last measured row with this name, metric and (at least) this config."""
    matches = [
        row
        for row in rows
        if row["kind"] == "measured"
        and (row["name"], row["metric"]) == (name, metric)
        and config.items() <= row["config"].items()
    ]
    return matches[-1] if matches else None


@dataclass
class Report:
    """What one run found; summary holds flat name: number."""

    rows: list[dict] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: machine_facts())

    def add(self, *rows: dict) -> None:
        self.rows += [{**row, "load1": round(os.getloadavg()[0], 2)} for row in rows]

    def median(self, name, metric, **config) -> float | None:
        row = find(self.rows, name, metric, **config)
        return row and row["median"]

    def summarise(self, key: str, value: float | None) -> None:
        """Keep a number; what could not be measured is left out, never zero."""
        if value is not None:
            self.summary[key] = float(value)

    def as_dict(self, seed: int, **config) -> dict:
        return {
            "machine": self.machine | {"loadavg_end": os.getloadavg()},
            "versions": versions(),
            "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
            "seed": seed,
            "config": config,
            "rows": self.rows,
            "summary": self.summary,
        }

    def write(self, path: Path, seed: int, **config) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(seed, **config), indent=1) + "\n")


# --- the machine ------------------------------------------------------------------------


def machine_facts() -> dict[str, Any]:
    """The host now, load included: on a shared machine no number means much without it."""
    usable = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    return {
        "cpu": _cpu_model(),
        "cores": usable,
        "simd": next((f for f in ("amx_tile", "avx512f", "avx2") if f in _cpu_flags()), "none"),
        "memory_gib": round(memory.total / 2**30, 1),
        "available_gib": round(memory.available / 2**30, 1),
        "os": platform.platform(),
        "loadavg_start": os.getloadavg(),
    }


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    return _cpuinfo("flags").split()


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["commit"] = _git("rev-parse", "HEAD") or None
    status = _git("status", "--porcelain")
    found["dirty"] = None if status is None else bool(status)
    return found


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ("git", "-C", ROOT, *args), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this host
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class OtherLoad:
    """How much of the machine other people's processes took since this object was made."""

    def __init__(self):
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        ours = os.times()
        total = sum(ours[:4])  # own and reaped children's
        for child in psutil.Process().children(recursive=True):
            try:
                spent = child.cpu_times()
            except psutil.Error:
                continue
            total += spent.user + spent.system
        return time.monotonic(), sum(times[:8]) - idle, total

    def ratio(self) -> float:
        """CPU seconds of others / (cores x wall seconds), in [0, 1].

        Processes that a worker reaped on its own are counted as others: start this object
        and ask it while the same workers live.
        """
        wall, busy, ours = (b - a for a, b in zip(self._start, self._now(), strict=True))
        others = (busy - ours) / max(wall * psutil.cpu_count(), 1e-9)
        return round(min(max(others, 0.0), 1.0), 3)


# --- worker processes -------------------------------------------------------------------


class WorkerError(RuntimeError):
    """A call that failed, ran out of time, or lost its process."""


class Worker:
    """An object in a process of its own, with an environment of its own.

    worker = Worker(Factory, *args, env={"NAME": "value", "GONE": None}); worker.call("method")
    start() returns at once; call() starts what is not there and waits until it is ready.
    After a timeout or a death the next call starts a new process. Calls block: two workers
    never compute at once, unless one is still starting.
    """

    def __init__(self, factory: Callable, *args, env=None, log: Path, memory_gib=None):
        self._factory, self._args = factory, args
        self._env, self._log, self._memory_gib = env or {}, log, memory_gib
        self._process = self._pipe = None
        self._ready = False

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        target = (child, str(self._log), self._memory_gib, self._factory, self._args)
        self._process = context.Process(target=_worker_main, args=target)
        # SGLang's children are killed with semaphores in hand; the tracker tells the console.
        with _environment({"PYTHONWARNINGS": "ignore:resource_tracker"} | self._env):
            self._process.start()
        child.close()
        self._ready = False

    def wait(self, timeout: float = 300) -> None:
        """Until the object is there. Raises: WorkerError if its constructor failed."""
        if self._process is None:
            self.start()
        if not self._ready:
            self._receive(timeout)
            self._ready = True

    def call(self, method: str, *args, timeout: float = 600) -> Any:
        """object.method(*args). Raises: WorkerError for whatever it raised, and for no answer."""
        self.wait()
        try:
            self._pipe.send((method, args))
        except OSError:
            pass  # the process died: _receive says so
        return self._receive(timeout)

    def _receive(self, timeout: float) -> Any:
        try:
            if not self._pipe.poll(timeout):
                raise WorkerError(f"no answer in {timeout:.0f} s")
            status, value = self._pipe.recv()
        except (EOFError, ConnectionError, WorkerError) as error:
            self.close(grace=0)
            lines = self._log.read_text(errors="replace").splitlines()[-3:]
            reason = str(error) or "the process died"
            raise WorkerError(" | ".join([reason, *lines])) from None
        if status == "error":
            raise WorkerError(value)
        return value

    def hang_up(self) -> None:
        """Tell the process to end, without waiting for it."""
        if self._pipe is not None:
            self._pipe.close()

    def close(self, grace: float = 30) -> None:
        """End the process and everything it started."""
        if self._process is None:
            return
        family = _family(self._process.pid)
        self.hang_up()
        self._process.join(grace)
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                pass
        self._process.join()
        self._process = self._pipe = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.Error:
        return []


@contextmanager
def _environment(changes: dict[str, str | None]):
    before = os.environ.copy()
    for key, value in changes.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _worker_main(pipe, log: str, memory_gib, factory, args) -> None:
    """Body of a worker's process. What it prints goes to the log."""
    end_with_parent()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if memory_gib is not None:  # an allocation past it raises, instead of waking the OOM killer
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        target = factory(*args)
    except BaseException as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))
        raise
    pipe.send(("ok", None))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(("ok", getattr(target, method)(*arguments)))
        except Exception as error:  # goes to the caller, as a row
            first_line = str(error).strip().splitlines()[:1]
            pipe.send(("error", " ".join([f"{type(error).__name__}:", *first_line])))
    getattr(target, "close", lambda: None)()


# --- output -----------------------------------------------------------------------------


class Progress:
    """Lines on stderr, each with the seconds since the start."""

    def __init__(self):
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.0f} s] {text}", file=sys.stderr, flush=True)


def table(headers: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Text columns, right-aligned; None becomes "-" and floats get three digits."""
    cells = [list(headers)] + [[_cell(value) for value in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headers))]
    text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def save_figure(path: Path, draw: Callable[[Any], None], size=(11, 4.5), panels: int = 2) -> None:
    """A PNG with `panels` axes side by side; draw(axes) fills them. No display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots(1, panels))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
