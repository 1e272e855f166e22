"""In which order ranks write and read the host tier that they share, without a lock.

Rank 0 writes the rows, the others read them. All run the same passes and, in a pass, the same
writes in the same order (SGLang's ranks run one program). Two kinds of counters, in the shared
memory itself, keep them apart:

written  the writer's last write that is done. A reader returns from its own call of the same write
    only then. So what a rank reads after a layer's write is there: in this layer (a prompt's new
    rows are staged from the host), in later layers and in later passes.
begun    each reader's last pass that has begun. Before its first write of a pass, the writer waits
    until every reader has begun it. So no reader still reads, for the pass before, a slot that was
    freed and belongs to another request now.

Memory order: the writer's threads are joined before the counter is stored, with release; a reader
loads it with acquire before it reads a row. On x86 both are plain moves, which the processor keeps
in order (streaming stores of memcpy end in a fence); on ARM they are stlr and ldar.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from sglang_ess.tiers.tier_group import TierGroup

P = ParamSpec("P")

LINE = 8  # int64 counters of a cache line; each counter has a line of its own
SPINS = 2000  # looks before the first sleep: some 2 us
YIELD_SECONDS = 0.002  # then the core goes to others, who may be the rank that is awaited
SLEEP_SECONDS = 50e-6
CHECK_SECONDS = 0.2  # between two looks whether the awaited process lives
PASS = 1 << 20  # writes of a pass, at most


class RankLost(RuntimeError):
    """One line for the operator: a rank that shares the host tier has ended or hangs."""


@intrinsic
def _load_acquire(_typing, counters, index):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.gep(array.data, [args[1]])
        return builder.load_atomic(pointer, "acquire", 8, typ=context.get_value_type(types.int64))

    return types.int64(counters, types.int64), generate


@intrinsic
def _store_release(_typing, counters, index, value):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, args[0])
        builder.store_atomic(args[2], builder.gep(array.data, [args[1]]), "release", 8)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), generate


@njit(cache=True, nogil=True)
def publish(counters, index, value) -> None:  # type: ignore[no-untyped-def]
    _store_release(counters, index, value)


@njit(cache=True, nogil=True)
def reached(counters, index, value, looks) -> bool:  # type: ignore[no-untyped-def]
    """Whether counters[index] is at least value, at one of so many looks at it."""
    for _ in range(looks):
        if _load_acquire(counters, index) >= value:
            return True
    return False


class RankOrder:
    """The counters of this rank's group. With one rank, every wait is over at once.

    counters [lines, LINE] int64, zero, the same memory on every rank: line 0 is `written`, line
        1 + r is `begun` of rank r; None for one rank
    All ranks construct it together.
    """

    def __init__(self, group: TierGroup, counters: np.ndarray | None = None):
        self._group = group
        self._is_sole = counters is None
        self._counters = np.zeros(0, np.int64) if counters is None else counters.reshape(-1)
        self._processes = group.exchange((os.getpid(), _start_of(os.getpid())))
        self._pass = self._writes = 0
        self._met = True  # whether every reader is known to have begun this pass

    @staticmethod
    def num_bytes(ranks: int) -> int:
        """Bytes of the counters of so many ranks."""
        return (1 + ranks) * LINE * 8

    @property
    def is_writer(self) -> bool:
        return self._group.is_writer

    @property
    def is_sole(self) -> bool:
        """Whether this rank shares its tier with no other."""
        return self._is_sole

    def begin(self) -> None:
        """Begin a pass, or a change of rows between two passes: this rank reads for no older one.

        All ranks must begin the same ones. A pass that was given up in the middle does no harm:
        writes are counted within their pass.
        """
        if self._is_sole:
            return
        self._pass, self._writes, self._met = self._pass + 1, 0, False
        publish(self._counters, (1 + self._group.rank) * LINE, self._pass)

    def write(self, write: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Write host rows: the writer calls write(*args), and the rows are there at the return.

        Raises: RankLost if another rank has ended, or sends no word for the group's limit_seconds.
        """
        if self._is_sole:
            write(*args, **kwargs)
            return
        self._writes += 1
        number = self._pass * PASS + self._writes
        if not self.is_writer:
            self._wait(0, number, rank=0)
            return
        if not self._met:
            for rank in range(1, self._group.size):
                self._wait(1 + rank, self._pass, rank)
            self._met = True
        write(*args, **kwargs)
        publish(self._counters, 0, number)

    def _wait(self, line: int, value: int, rank: int) -> None:
        """Wait until a counter is at least value. rank: whose counter it is"""
        if reached(self._counters, line * LINE, value, SPINS):
            return
        since = checked = time.monotonic()
        limit = self._group.limit_seconds
        while not reached(self._counters, line * LINE, value, 10):
            now = time.monotonic()
            if now - since < YIELD_SECONDS:
                os.sched_yield()
                continue
            time.sleep(SLEEP_SECONDS)
            if now - checked > CHECK_SECONDS:
                checked, process = now, self._processes[rank]
                has_ended = _start_of(process[0]) != process[1]
                # It may have gone on to the counter just before its end.
                if has_ended and reached(self._counters, line * LINE, value, 1):
                    return
                if has_ended or now - since > limit:
                    found = "it has ended" if has_ended else f"none for {limit:.0f} s"
                    raise RankLost(
                        "ranks that share a host tier must go on together: got no word from rank "
                        f"{rank} (process {process[0]}): {found}. Its own log says why; restart "
                        "the server."
                    )


def _start_of(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None if it has ended.

    A number that a new process has got meanwhile is told by it. Source: proc(5), on stat.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def warm_up() -> None:
    """Compile the kernels, or load them from numba's cache."""
    counters = np.zeros(LINE, np.int64)
    publish(counters, 0, 1)
    reached(counters, 0, 1, 1)
