"""What the serving benchmarks share: prompts, a tiny model, and a run of several parts."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import (
    ROOT,
    OtherLoad,
    Panel,
    Progress,
    Report,
    argument_parser,
    failed,
    finish,
)
from tools.worker import Worker

VOCABULARY = 256  # the plain bytes of the tiny tokenizer
START_SECONDS = 900  # an import of SGLang takes 15 s of CPU, much longer on a busy machine


def prompts_of(seed: int, batch: int, context: int, salt: int = 0) -> list[list[int]]:
    """Distinct random prompts; the same arguments give the same ones."""
    rng = np.random.default_rng((seed, batch, context, salt))
    return rng.integers(0, VOCABULARY, (batch, context)).tolist()


def parser_with_threads(description: str):
    options = argument_parser(description)
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--threads", type=int, default=cores, help="of every system [all cores]")
    return options


def engine_env(threads: int) -> dict[str, str | None]:
    """Environment of an engine: its number of threads; the engine sets how they wait."""
    env: dict[str, str | None] = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    return env | dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"))


def end_on_sigterm() -> None:
    """Leave through the context managers, which end the engines and servers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def run_module(name: str, *flags: str) -> None:
    """Run `python -m name`. Raises: RuntimeError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", name, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{name} must end with status 0: got {done.returncode}, {last}")


def card_facts() -> dict[str, Any]:
    """Name and driver of the card; nothing without one."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(("gpu", "driver"), done.stdout.strip().split(", "), strict=False))


def write_tiny_model(path: Path, seed: int, **shape: Any) -> str:
    """Write a tiny checkpoint and return its path. shape: options of sglang_ess.tiny_model.

    A process of its own writes it: the benchmark's process needs no torch.
    """
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in shape.items()]
    run_module("sglang_ess.tiny_model", "--out", str(path), "--seed", str(seed), *flags)
    return str(path)


class Bench:
    """One run: a grid of points, a report, and a folder for models and logs."""

    def __init__(self, grid, seed: int, directory: Path):
        self.grid, self.seed, self.directory = grid, seed, directory
        self.report, self.progress, self.started = Report(), Progress(), time.monotonic()

    def model(self, name: str, **shape: Any) -> str:
        return write_tiny_model(self.directory / name, self.seed, **shape)

    @contextmanager
    def running(self, workers: Collection[Worker]) -> Iterator[None]:
        """Start all at once and wait for all; at the end tell all at once: each takes seconds."""
        self.progress(f"starting {len(workers)} systems at once")
        with ExitStack() as stack:
            for worker in workers:
                stack.enter_context(worker).start()
            for worker in workers:
                worker.wait(START_SECONDS)
            yield
            for worker in workers:
                worker.hang_up()

    def add(self, rows: Iterable[dict], load: OtherLoad) -> None:
        """Add rows with the share of the machine that other processes had meanwhile."""
        ratio = load.ratio()
        self.report.add(*[{**row, "other_cpu_ratio": ratio} for row in rows])

    def run(self, parts: Iterable[Callable]) -> None:
        """Run each part; one that fails becomes a row, and the next one still runs."""
        load = OtherLoad()
        for part in parts:
            try:
                part(self)
            except (RuntimeError, ValueError, OSError) as error:  # WorkerError is a RuntimeError
                self.report.add(failed(part.__name__, {}, "all", "", error))
                self.progress(f"{part.__name__}: not measured: {error}")
        self.report.machine["other_cpu_ratio"] = load.ratio()

    def minutes(self) -> float:
        return round((time.monotonic() - self.started) / 60, 1)


def run_parts(
    kind: Callable[..., Any], grid: Any, parts: Iterable[Callable], seed: int, threads: int
) -> Any:
    """A Bench of this kind that has run the parts, in a folder of its own."""
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="ess-bench-") as directory:
        bench = kind(grid, seed, threads, Path(directory))
        bench.run(parts)
    return bench


def finish_parts(bench: Any, options: argparse.Namespace, *panels: Panel, **config: Any) -> int:
    """Write what harness.finish() writes. Returns the exit status: 1 if a part failed."""
    grid = asdict(bench.grid)
    finish(bench.report, options, *panels, grid=grid, minutes=bench.minutes(), **config)
    return 0 if not bench.report.select(kind="failed") else 1
