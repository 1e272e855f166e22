"""The first touch of a GPU's host tier: GiB/s in huge pages by several threads, and before that.

    python -m benchmarks.serving.host_tier [--gib N] [--quick] [--json PATH] [--plot PATH]

A start takes and zeroes all memory of the host tier, then page-locks it. No GPU is needed for the
first part, which this measures. Systems, in turn in each round, each with a new mapping:

    before      4 KiB pages, one thread: how cudaHostRegister took them when nobody had touched them
                (both fault in each page inside the kernel; here by MADV_POPULATE_WRITE)
    one thread  HostMemory (huge pages where the kernel has them) with one thread
    after       HostMemory as a server uses it, a thread for each core

Locking itself is not measured, nor NUMA. A sample counts only if the process has grown by its
bytes. Just before it, the same number of bytes is touched and given back untimed: a hypervisor may
have taken free pages away, and would give them back inside the sample. On a busy virtual machine it
does so all the same if --gib is large.

The summary: touch_gib_s_before, touch_gib_s_one_thread, touch_gib_s_after; cpu_gib_s_...: GiB for a
second of CPU time of all threads, which other people's load changes least; speedup (after / before,
paired by round); huge_share (of the bytes of `after`).
"""

from __future__ import annotations

import mmap
import os
import time
from collections import defaultdict
from collections.abc import Callable

import psutil

from benchmarks import harness
from sglang_ess.layout import GIB, MIB
from sglang_ess.tiers import free_host_bytes
from sglang_ess.tiers.host_memory import MADV_POPULATE_WRITE, HostMemory

PART_BYTES = 512 * MIB  # about a layer
GROWN = 0.95  # of the bytes of a sample, at least


def small_pages(num_bytes: int) -> mmap.mmap:
    """Touched 4 KiB pages. Raises: OSError on a kernel before Linux 5.14."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    pages.madvise(MADV_POPULATE_WRITE)
    return pages


def host_memory(num_bytes: int, threads: int | None = None) -> HostMemory:
    memory = HostMemory(num_bytes, threads=threads)
    starts = range(0, num_bytes, PART_BYTES)
    for _ in memory.populate([range(i, min(i + PART_BYTES, num_bytes)) for i in starts]):
        pass
    return memory


SYSTEMS: dict[str, Callable] = {
    "before": small_pages,
    "one thread": lambda num_bytes: host_memory(num_bytes, 1),
    "after": host_memory,
}


def sample(touch: Callable, num_bytes: int) -> tuple[float, float, float | None]:
    """(GiB/s, GiB for a CPU second, share in huge pages).

    Raises: RuntimeError if the memory is not there after it.
    """
    host_memory(num_bytes)
    process = psutil.Process()
    rss, since, spent = process.memory_info().rss, time.perf_counter(), time.process_time()
    memory = touch(num_bytes)
    seconds, spent = time.perf_counter() - since, time.process_time() - spent
    if (grown := process.memory_info().rss - rss) < GROWN * num_bytes:
        raise RuntimeError(f"the process must grow by {num_bytes} bytes: got {grown}.")
    share = memory.residence().huge_share if isinstance(memory, HostMemory) else None
    return num_bytes / GIB / seconds, num_bytes / GIB / spent, share


def measure(report: harness.Report, num_bytes: int, rounds: int, progress: Callable) -> None:
    rates, cpu_rates, shares = defaultdict(list), defaultdict(list), []
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for name, touch in SYSTEMS.items():
            rate, cpu_rate, share = sample(touch, num_bytes)
            rates[name].append(rate)
            cpu_rates[name].append(cpu_rate)
            shares += [share] if name == "after" else []
    config = {"gib": num_bytes / GIB, "cores": len(os.sched_getaffinity(0))}
    for metric, of_systems in (("touch", rates), ("cpu", cpu_rates)):
        for name, found in of_systems.items():
            report.add(harness.measured(name, config, metric, "GiB/s", found))
            key = f"{metric}_gib_s_{name.replace(' ', '_')}"
            report.summarise(key, report.median(name, metric))
    speedup = harness.ratios(rates["after"], rates["before"])
    report.add(harness.measured("after / before", config, "speedup", "ratio", speedup))
    report.add(harness.measured("after", config, "huge_share", "share", shares))
    report.summarise("speedup", report.median("after / before", "speedup"))
    report.summarise("huge_share", report.median("after", "huge_share"))


def main(argv: list[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--gib", type=float, default=1, help="at most half of what is free [1]")
    args = parser.parse_args(argv)
    report, load = harness.Report(), harness.OtherLoad()
    num_bytes = int(min(args.gib * GIB, free_host_bytes() / 2)) // (2 * MIB) * 2 * MIB
    measure(report, num_bytes, 3 if args.quick else 5, harness.Progress())
    rows = report.select(metric="touch")
    for shown, title in ((rows, "GiB/s"), (report.select(metric="cpu"), "GiB for a CPU second")):
        harness.print_table(shown, {"": "name", "median [p10, p90]": harness.spread}, title)
    panel = harness.Panel(rows, "name", kind="bar", axes={"ylabel": "GiB/s of first touch"})
    harness.finish(report, args, panel, other_load=load.ratio())


if __name__ == "__main__":
    main()
