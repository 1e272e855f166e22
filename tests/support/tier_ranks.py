"""Processes that share one host tier, as the ranks of a node do; the test gives them commands."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from sglang_ess.tiers import TierGroup
from tests.support import forked
from tools.processes import end_with_parent

SECONDS = 60


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
    """Processes that map a file, or hold a descriptor of it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text().splitlines()
            held = [entry.stat().st_ino for entry in (process / "fd").iterdir()]
        except OSError:
            continue
        if inode in held or any(line.split()[4] == str(inode) for line in maps):
            found.append(int(process.name))
    return found


def bytes_of(inode: int) -> dict[str, int]:
    """{"Size": ..., "Rss": ..., "Pss": ...} of the file's mappings in this process."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *rest = line.split()
        if not key.endswith(":"):
            inside = rest[3] == str(inode)
        elif inside and key[:-1] in ("Size", "Rss", "Pss"):
            found[key[:-1]] = found.get(key[:-1], 0) + 1024 * int(rest[0])
    return found
