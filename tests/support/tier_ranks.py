"""Processes that share one host tier, as the ranks of a node do; the test gives them commands."""

import mmap
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch

from sglang_ess.tiers import TierGroup
from tests.support import forked
from tools.processes import end_with_parent

SECONDS, PAGE, NAME = 60, mmap.PAGESIZE, "memfd:ess-host-tier"


class TierRanks:
    """Ranks that each run body(group, rank's end of a pipe). Their exchange is by pipes, too.

    A rank that ends breaks the exchange of the others, as gloo does.
    """

    def __init__(self, body: Callable[[TierGroup, Connection], Any], size: int = 2):
        self._commands, self._exchange, self.processes = [], [], []
        for rank in range(size):
            ours, theirs = forked.context.Pipe()
            gather, asks = forked.context.Pipe()
            process = forked.context.Process(target=_run, args=(body, rank, size, theirs, asks))
            process.start()
            theirs.close()
            asks.close()
            self._commands.append(ours)
            self._exchange.append(gather)
            self.processes.append(process)
        Thread(target=self._serve_exchange, daemon=True).start()

    def tell(self, rank: int, *command: Any) -> None:
        self._commands[rank].send(command)

    def answer(self, rank: int) -> Any:
        """Raises: AssertionError with the rank's traceback, or if it says nothing in time."""
        assert self._commands[rank].poll(SECONDS), f"rank {rank} must answer"
        worked, value = self._commands[rank].recv()
        assert worked, value
        return value

    def ask(self, rank: int, *command: Any) -> Any:
        self.tell(rank, *command)
        return self.answer(rank)

    def has_answered(self, rank: int, seconds: float = 0.0) -> bool:
        return self._commands[rank].poll(seconds)

    def kill(self, *ranks: int) -> None:
        """SIGKILL, and wait for the end."""
        for rank in ranks:
            self.processes[rank].kill()
            self.processes[rank].join()

    def _serve_exchange(self) -> None:
        try:
            while True:
                values = [pipe.recv() for pipe in self._exchange]
                for pipe in self._exchange:
                    pipe.send(values)
        except (EOFError, OSError):
            for pipe in self._exchange:
                pipe.close()


@contextmanager
def tier_ranks(body: Callable[[TierGroup, Connection], Any], size: int = 2) -> Iterator[TierRanks]:
    ranks = TierRanks(body, size)
    try:
        yield ranks
    finally:
        ranks.kill(*range(size))


def _run(body, rank: int, size: int, commands: Connection, pipe: Connection) -> None:
    end_with_parent()

    def exchange(value: Any) -> list[Any]:
        pipe.send(value)
        return pipe.recv()

    try:
        body(TierGroup(rank, size, exchange), commands)
    except BaseException:
        commands.send((False, traceback.format_exc()))


def mapped(inode: int) -> list[int]:
    """Processes that map a host tier's memory, or hold a descriptor of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text().splitlines()
            held = [
                fd.stat().st_ino for fd in (process / "fd").iterdir() if NAME in str(fd.readlink())
            ]
        except OSError:
            continue
        tiers = [int(line.split()[4]) for line in maps if NAME in line]
        if inode in held + tiers:
            found.append(int(process.name))
    return found


def bytes_of(inode: int, pid: int | str = "self") -> dict[str, int]:
    """{"Size": ..., "Rss": ..., "Pss": ...} of the file's mappings in a process."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            inside = rest[3] == str(inode) and NAME in line
        elif inside and key[:-1] in ("Size", "Rss", "Pss"):
            found[key[:-1]] = found.get(key[:-1], 0) + 1024 * int(rest[0])
    return found


def resident_bytes(rows: Iterable[torch.Tensor]) -> int:
    """Bytes of the pages of these rows that are there in this process.

    Source: admin-guide/mm/pagemap of the kernel's documentation: bit 63 is "present".
    """
    pages: set[int] = set()
    with Path("/proc/self/pagemap").open("rb") as file:
        for one in rows:
            first = one.data_ptr() // PAGE
            count = -(-(one.data_ptr() + one.nbytes) // PAGE) - first
            file.seek(first * 8)
            entries = np.frombuffer(file.read(count * 8), np.uint64)
            pages |= set((first + (entries >> np.uint64(63)).nonzero()[0]).tolist())
    return len(pages) * PAGE
