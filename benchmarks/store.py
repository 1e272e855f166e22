"""The file store next to plain files: GB/s of page objects written and read, and what a call costs.

    python -m benchmarks.store [--directory PATH] [--quick] [--json PATH] [--plot PATH]

An object is a page of GLM-5.2: 64 slots, the fp8 latent rows of 78 layers and the index keys of 21,
3.5 MB. Systems, in turn in each round, each in a new folder:

    store     PageStore: checksums, lock and limit, temporary name and rename
    plain     one pwritev and one preadv a file of the same bytes, through the page cache
    direct    the same with O_DIRECT, over an aligned buffer of the thread (memory is not aligned)

`write` ends with the last write: dirty pages may still be in memory, but for `direct`. `cold` reads
after fsync and with no page of the files in memory; `warm` reads again. `threads` submit at once.
GB/s of a shared machine are what its disk and cores leave; gb_cpu_s_...: GB for a second of CPU
time of all threads, which other load changes least.

Also: contains_us (for a key, of 512 that are all there), layer_us (one read of a layer's part),
open_seconds and evict_seconds of a store with --objects small objects.

The summary: gb_s_..., gb_cpu_s_..., and ratio_... (store / plain, paired by round) at most threads.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import harness
from sglang_ess.layout import FP8_ROW_BYTES, GIB, PAGE_SLOTS, index_page_bytes
from sglang_ess.store.page_store import PageStore

LAYERS, INDEX_GROUPS = 78, 21
PARTS = [PAGE_SLOTS * FP8_ROW_BYTES] * LAYERS + [index_page_bytes(False)] * INDEX_GROUPS
BYTES = sum(PARTS)
BLOCK = 4096
DIRECT_BYTES = -(-BYTES // BLOCK) * BLOCK
MOVES = ("write", "cold", "warm")
Move = Callable[[int], None]


def parts_of(row: np.ndarray) -> list[np.ndarray]:
    """Views of a page's parts in a flat array of bytes."""
    return np.split(row, np.cumsum(PARTS)[:-1])


class Store:
    """The systems' interface: write or read object number i."""

    def __init__(self, folder: Path, pages: np.ndarray, threads: int):
        self.pages = [parts_of(page) for page in pages]
        self.store = PageStore(folder, 64 * GIB, "benchmark", PARTS, threads)

    def write(self, i: int) -> None:
        if not self.store.write(str(i), self.pages[i]):
            raise RuntimeError(f"the store must take object {i}: got {self.store.stats()}.")

    def read(self, i: int) -> None:
        self.store.read(str(i), range(len(PARTS)), self.pages[i])

    def close(self) -> None:
        self.store.close()


class Plain:
    flags = 0

    def __init__(self, folder: Path, pages: np.ndarray, threads: int):
        self.folder, self.pages = folder, pages
        self._local = threading.local()

    def _move(self, i: int, call: Callable, flags: int) -> None:
        file = os.open(self.folder / str(i), flags | self.flags, 0o600)
        try:
            self.call(call, file, i)
        finally:
            os.close(file)

    def call(self, call: Callable, file: int, i: int) -> None:
        if call(file, [self.pages[i]], 0) != BYTES:
            raise RuntimeError(f"a file must have {BYTES} bytes.")

    def write(self, i: int) -> None:
        self._move(i, os.pwritev, os.O_WRONLY | os.O_CREAT)

    def read(self, i: int) -> None:
        self._move(i, os.preadv, os.O_RDONLY)

    def close(self) -> None:
        pass


class Direct(Plain):
    flags = os.O_DIRECT

    def call(self, call: Callable, file: int, i: int) -> None:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = np.frombuffer(mmap.mmap(-1, DIRECT_BYTES), np.uint8)
        buffer = self._local.buffer
        if call is os.pwritev:
            buffer[:BYTES] = self.pages[i]
        if call(file, [buffer], 0) != DIRECT_BYTES:
            raise RuntimeError(f"a file must have {DIRECT_BYTES} bytes.")
        if call is os.preadv:
            self.pages[i][:] = buffer[:BYTES]


SYSTEMS = {"store": Store, "plain": Plain, "direct": Direct}


def forget(folder: Path) -> None:
    """Write all files to the disk and take them out of memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def rates(move: Move, objects: int, pool: ThreadPoolExecutor) -> tuple[float, float]:
    """(GB/s, GB for a CPU second) of a move of all objects."""
    since, spent = time.perf_counter(), time.process_time()
    list(pool.map(move, range(objects)))
    seconds, spent = time.perf_counter() - since, time.process_time() - spent
    return objects * BYTES / 1e9 / seconds, objects * BYTES / 1e9 / spent


def measure(
    report: harness.Report, root: Path, pages: np.ndarray, threads: int, rounds: int
) -> None:
    """Rows of all systems at some number of threads."""
    found = defaultdict(list)
    expected = pages.copy()
    for number in range(rounds):
        for name, system in SYSTEMS.items():
            with tempfile.TemporaryDirectory(dir=root) as path, ThreadPoolExecutor(threads) as pool:
                folder = Path(path)
                tested = system(folder, pages, threads)
                for move in MOVES:
                    if move == "cold":
                        forget(folder)
                        pages[:] = 0
                    rate = rates(tested.write if move == "write" else tested.read, len(pages), pool)
                    found[name, move].append(rate)
                tested.close()
            if not np.array_equal(pages, expected):
                raise RuntimeError(f"{name} must read what it wrote: round {number} did not.")
    config = {"threads": threads, "objects": len(pages), "bytes": BYTES}
    for (name, move), samples in found.items():
        for metric, values in zip(("gb_s", "gb_cpu_s"), zip(*samples, strict=True), strict=True):
            row = harness.measured(name, config, metric, metric, values, move=move)
            report.add(row)
            report.summarise(f"{metric}_{move}_{name}", row["median"])
    for move in MOVES:
        pairs = ([wall for wall, _ in found[name, move]] for name in ("store", "plain"))
        row = harness.measured(
            "store / plain", config, "ratio", "ratio", harness.ratios(*pairs), move=move
        )
        report.add(row)
        report.summarise(f"ratio_{move}", row["median"])


def measure_calls(report: harness.Report, root: Path, rounds: int) -> None:
    """What contains costs for a key, and a read of one layer."""
    keys = [str(number) for number in range(512)]
    with tempfile.TemporaryDirectory(dir=root) as path:
        store = PageStore(path, GIB, "benchmark", PARTS[:1])
        buffer = [np.zeros(PARTS[0], np.uint8)]
        for key in keys:
            store.write(key, buffer)
        lookups, reads = [], []
        for _ in range(rounds):
            since = time.process_time()
            found = store.contains(keys)
            lookups.append((time.process_time() - since) / found * 1e6)
            since = time.process_time()
            for key in keys:
                store.read(key, [0], buffer)
            reads.append((time.process_time() - since) / len(keys) * 1e6)
        store.close()
    for metric, samples in (("contains_us", lookups), ("layer_us", reads)):
        report.add(harness.measured("store", {}, metric, "CPU us", samples))
        report.summarise(metric, report.median("store", metric))


def measure_scans(report: harness.Report, root: Path, objects: int) -> None:
    """Seconds to open a store with many objects, and of a round of eviction."""
    config = {"objects": objects}
    with tempfile.TemporaryDirectory(dir=root) as path:
        store = PageStore(path, 64 * GIB, "benchmark", [1])
        for number in range(objects):
            store.write(str(number), [b"x"])
        used_bytes = store.stats().used_bytes
        store.close()
        for metric, limit_bytes in (("open", 64 * GIB), ("evict", used_bytes)):
            since, spent = time.perf_counter(), time.process_time()
            store = PageStore(path, limit_bytes, "benchmark", [1])
            if metric == "evict":
                since, spent = time.perf_counter(), time.process_time()
                store.write("one more", [b"x"])
            times = time.perf_counter() - since, time.process_time() - spent
            for kind, value in zip(("seconds", "cpu_seconds"), times, strict=True):
                report.add(harness.measured("store", config, f"{metric}_{kind}", "s", [value]))
                report.summarise(f"{metric}_{kind}", value)
            evicted = store.stats().evicted
            store.close()
        report.summarise("evicted", evicted)  # by the one round that was timed


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--directory", type=Path, help="on the disk to measure [$TMPDIR]")
    parser.add_argument("--objects", type=int, help="of the store that is scanned [100000]")
    args = parser.parse_args(argv)
    report, load, progress = harness.Report(), harness.OtherLoad(), harness.Progress()
    rng = np.random.default_rng(args.seed)
    pages = rng.integers(0, 256, (40 if args.quick else 100, BYTES), dtype=np.uint8)
    for threads in (4,) if args.quick else (1, 4, 8):
        progress(f"{threads} threads")
        measure(report, args.directory, pages, threads, 3 if args.quick else 5)
    progress("calls")
    measure_calls(report, args.directory, 5)
    progress("scans")
    measure_scans(report, args.directory, args.objects or (2000 if args.quick else 100_000))
    for metric in ("gb_s", "gb_cpu_s"):
        columns = {"": "name", "threads": "threads", "move": "move", "median": harness.spread}
        harness.print_table(report.select(metric=metric), columns, metric)
    rows = [row | {"label": f"{row['move']} {row['name']}"} for row in report.select(metric="gb_s")]
    axes = {"xlabel": "threads", "ylabel": "GB/s"}
    harness.finish(
        report, args, harness.Panel(rows, "threads", series="label", axes=axes),
        other_load=load.ratio(), objects=len(pages),
    )  # fmt: skip


if __name__ == "__main__":
    main()
