"""Ranks with the same misses fetch a share of the rows each and give them to one another.

The ranks of a TierGroup plan alike, so they miss the same slots in the same order. Of n ranks and m
misses, rank r copies those at positions [r c, (r + 1) c), c = ceil(m / n), from the host tier. Then
the ranks gather all rows. Each has its own hot tier, and afterwards the same rows in it as if it
had copied all.

A gather needs messages of one size. The first one of a fetch has a fixed size: a header and up to
FIRST_ROWS rows. The header says what its rank fetches. If the ranks do not agree, all of them
raise, before a second message whose size follows from the number of misses. So ranks meet at every
fetch, also at one without misses.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch

from sglang_ess.tiers import lru
from sglang_ess.tiers.tier_group import TierGroup

FIRST_ROWS = 16
HEADER = 3  # words: number of the fetch, misses, checksum of their slots and hot rows

# Give a message [words] int64 to every rank and return theirs [ranks, words], in their order.
Gather = Callable[[np.ndarray], np.ndarray]


class FetchMismatch(RuntimeError):
    """One line for the operator: ranks that share fetches have planned different ones."""


class SharedFetch:
    """What one rank does in the fetches that its group shares.

    gather: all ranks must call it together
    One thread at a time may use it: a fetch in layer order, or early ones of an index group.
    """

    def __init__(self, rank: int, size: int, gather: Gather):
        self.rank, self.size, self._gather = rank, size, gather
        self.fetches = 0

    @classmethod
    def over_gloo(cls, group: TierGroup) -> SharedFetch:
        """The ranks of a group, with a process group of their own. All of them must call it.

        SGLang's groups have collectives of the main thread under way while a thread fetches.
        Raises: ValueError for a rank by itself.
        """
        if group.size == 1:
            raise ValueError(
                "--ess-fetch-share must be off for a rank that has its host tier alone: got on."
            )
        ranks = group.exchange(torch.distributed.get_rank())
        own = torch.distributed.new_group(ranks, backend="gloo", use_local_synchronization=True)

        def gather(message: np.ndarray) -> np.ndarray:
            found = torch.empty(group.size * len(message), dtype=torch.int64)
            torch.distributed.all_gather_into_tensor(found, torch.from_numpy(message), group=own)
            return found.numpy().reshape(group.size, -1)

        return cls(group.rank, group.size, gather)

    def share(self, misses: int, rank: int | None = None) -> slice:
        """The positions in a list of misses that a rank copies. rank: None for this one"""
        rank = self.rank if rank is None else rank
        each = -(-misses // self.size)
        return slice(min(misses, rank * each), min(misses, (rank + 1) * each))

    def exchange(self, hot: np.ndarray, slots: np.ndarray, rows: np.ndarray) -> None:
        """Fill the hot rows of the other ranks' shares. This rank's share must be there.

        hot [hot rows, words] int64; slots, rows [misses] int32: as the plan has them
        Raises: FetchMismatch on every rank, if one of them fetches other rows.
        """
        self.fetches += 1
        width, each = hot.shape[1], -(-len(slots) // self.size)
        first = np.zeros(HEADER + FIRST_ROWS * width, np.int64)
        checksum = zlib.crc32(rows.tobytes(), zlib.crc32(slots.tobytes()))
        first[:HEADER] = self.fetches, len(slots), checksum
        self._meet(first, hot, rows, 0, min(each, FIRST_ROWS))
        if each > FIRST_ROWS:
            rest = np.zeros((each - FIRST_ROWS) * width, np.int64)
            self._meet(rest, hot, rows, FIRST_ROWS, each)

    def _meet(
        self, message: np.ndarray, hot: np.ndarray, rows: np.ndarray, begin: int, end: int
    ) -> None:
        """Send this rank's rows begin to end of its share, and put those of the others in place."""
        header, width = HEADER if begin == 0 else 0, hot.shape[1]
        places = np.arange(end - begin, dtype=np.int32)
        own = rows[self.share(len(rows))][begin:end]
        lru.copy_rows(hot, message[header:].reshape(-1, width), own, places, len(own))
        found = self._gather(message)
        if header:
            _check(found[:, :HEADER])
        for rank in range(self.size):
            if rank != self.rank:
                theirs = rows[self.share(len(rows), rank)][begin:end]
                sent = found[rank, header:].reshape(-1, width)
                lru.copy_rows(sent, hot, places, theirs, len(theirs))


def _check(headers: np.ndarray) -> None:
    """Raises: FetchMismatch if headers [ranks, HEADER] differ."""
    differs = (headers != headers[0]).any(1)
    if differs.any():
        shown = (
            f"rank {rank} has fetch {number} of {misses} rows, crc32 {checksum:08x}"
            for rank, (number, misses, checksum) in enumerate(headers.tolist())
            if rank == 0 or differs[rank]
        )
        raise FetchMismatch(
            f"ranks that share fetches must miss the same rows: got {'; '.join(shown)}. Start "
            "without --ess-fetch-share, keep the log and report it."
        )
