"""How benchmarks/kernels times an operation: it is checked first, on the device or interpreted.

On a CUDA device a sample is one replay of a CUDA graph that holds the subject's operations, one
for each of its input sets: the time between two events around it over the number of operations,
without the host's launch gaps. Before each sample, untimed, `before` restores the state, and a
write of twice the L2 evicts it. What cannot be captured is timed by events ("events") or, where the
host takes part, by its clock up to a synchronize ("wall"). Without a device the same calls run
under Triton's interpreter: rows of kind "interpreted", whose figures say nothing about speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness import Progress, Report, failed, measured

SAMPLES, QUICK_SAMPLES = 25, 11
MAX_SAMPLES_S = 2.0  # slow subjects take fewer samples, at least MIN_SAMPLES
MIN_SAMPLES = 3
GRAPH, EVENTS, WALL = "graph", "events", "wall"


class WrongResult(AssertionError):
    """An operation disagrees with its reference. It is not timed, and the run fails."""


class OutOfTime(RuntimeError):
    """The run's time is up: what is left becomes failed rows."""


def nothing(_last: int = 0) -> None:
    """Restore or check nothing."""


@dataclass(frozen=True)
class Subject:
    """An operation to time.

    ops: one call for each input set; they take turns in a sample
    before: restores state and poisons outputs, on the current stream, untimed
    check: check(i) after `before` and ops[0] to ops[i] in order; raises WrongResult
    num_bytes: moved over PCIe by one operation; 0: the row has no rate
    """

    ops: Sequence[Callable[[], None]]
    before: Callable[[], None] = nothing
    check: Callable[[int], None] = nothing
    num_bytes: int = 0


def require(condition, what: str) -> None:
    """Raises: WrongResult with `what`."""
    if not bool(condition):
        raise WrongResult(what)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


class Bench:
    """Times subjects into rows of a report.

    device: cuda, or cpu under the interpreter; seconds: of the whole run, None: no limit
    wrong: names of the operations whose result was wrong
    """

    def __init__(self, report: Report, device: torch.device, quick: bool, seconds=None):
        self.report, self.device = report, device
        self.on_cuda = device.type == "cuda"
        self.quick = quick or not self.on_cuda
        self.progress = Progress()
        self.wrong: list[str] = []
        self._samples = 1 if not self.on_cuda else QUICK_SAMPLES if quick else SAMPLES
        self._end = None if seconds is None else time.monotonic() + seconds
        if self.on_cuda:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def time(self, name: str, config: dict, make: Callable[[], Subject], timer=GRAPH, **extra):
        """Add a row "time" in us of what make() returns, or a failed one with the reason.

        Returns the median in us, None if it failed.
        """
        try:
            self._check_time()
            subject = make()
            subject.before()
            subject.ops[0]()
            self._synchronize()
            subject.check(0)
            samples = self._measure(subject, timer if self.on_cuda else WALL)
        except Exception as error:
            self.fail(name, config, error, **extra)
            return None
        row = measured(name, config, "time", "us", samples, timer=timer, **extra)
        row |= {"l2": "cold" if timer == GRAPH else "as left", "sets": len(subject.ops)}
        if subject.num_bytes:
            row["bytes_moved"] = subject.num_bytes
            row["gb_per_s"] = subject.num_bytes / row["median"] / 1e3
        if not self.on_cuda:
            row["kind"] = "interpreted"
        self.report.add(row)
        return row["median"]

    def fail(self, name: str, config: dict, error: Exception, **extra) -> None:
        """Add a failed row; a wrong result also fails the run."""
        if isinstance(error, WrongResult):
            self.wrong.append(f"{name} {config}")
        reason = _line(error)
        if error.__context__ is not None:  # a capture that breaks raises once more when it ends
            reason += f" (after {_line(error.__context__)})"
        self.report.add(failed(name, config, "time", "us", reason, **extra))
        self.progress(f"failed: {name} {config}: {reason}")

    def begin(self, what: str) -> None:
        """Print what comes next. Raises: OutOfTime once the run's time is up."""
        self._check_time()
        self.progress(what)

    def _check_time(self) -> None:
        if self._end is not None and time.monotonic() > self._end:
            raise OutOfTime("the run's time (--seconds) was up")

    def _synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def captured(self, call: Callable[[], None]) -> Callable[[], None]:
        """The replay of a graph of call, which must have run before."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _measure(self, subject: Subject, timer: str) -> list[float]:
        """us of one operation, a figure a sample."""

        def run_all() -> None:
            for op in subject.ops:
                op()

        call = self._capture(subject, run_all) if timer == GRAPH else run_all
        take = self._wall if timer == WALL else self.events
        spent, samples = 0.0, []
        while len(samples) < self._samples and (
            len(samples) < MIN_SAMPLES or spent < MAX_SAMPLES_S
        ):
            start = time.monotonic()
            samples.append(take(subject.before, call) / len(subject.ops))
            spent += time.monotonic() - start
        if timer == GRAPH:  # the last replay's results, too
            subject.check(len(subject.ops) - 1)
        return samples

    def _capture(self, subject: Subject, run_all: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and makes what a first call makes
            subject.before()
            run_all()
        replay = self.captured(run_all)
        subject.before()
        replay()
        torch.cuda.synchronize()
        return replay

    def events(self, before, call) -> float:
        """us between two events around call, after `before` and a flush of the L2."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        self._flush.fill_(1)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    def _wall(self, before, call) -> float:
        before()
        self._synchronize()
        start = time.perf_counter()
        call()
        self._synchronize()
        return (time.perf_counter() - start) * 1e6
