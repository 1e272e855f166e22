"""The slots of one decode rank: which request holds how many, and how many are free."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_ess.layout import PAGE_SLOTS


def whole_pages(tokens: int) -> int:
    """Slots that so many tokens take."""
    return -(-int(tokens) // PAGE_SLOTS) * PAGE_SLOTS


class Slots:
    """num_slots, in whole pages: free ones, and those that requests hold.

    peak: the most that were held at once
    Raises: ValueError for less than a page; RuntimeError where more are taken than are free.
    """

    def __init__(self, num_slots: int):
        if num_slots < PAGE_SLOTS or num_slots % PAGE_SLOTS:
            raise ValueError(
                f"slots must be whole pages of {PAGE_SLOTS}, one at least: got {num_slots}."
            )
        self.num_slots = self.free = num_slots
        self._held: dict[int, int] = {}
        self.peak = 0

    def held(self, request: int) -> int:
        return self._held.get(request, 0)

    def needs(self, request: int, tokens: int) -> int:
        """Slots that the request does not hold yet, of those that so many tokens take."""
        return max(0, whole_pages(tokens) - self.held(request))

    def take(self, request: int, tokens: int) -> None:
        """The request holds the slots of so many tokens."""
        more = self.needs(request, tokens)
        if more > self.free:
            raise RuntimeError(f"request {request} takes {more} slots: {self.free} are free.")
        self._held[request] = self.held(request) + more
        self.free -= more
        self.peak = max(self.peak, self.num_slots - self.free)

    def release(self, request: int) -> None:
        self.free += self._held.pop(request, 0)

    def reclaim(self, slots: int, owners: Iterable[int]) -> None:
        """Take pages from the owners, in their order, until so many slots are free.

        Of an owner no more than it takes: a radix tree is cut so that a prompt's end goes first.
        """
        for owner in owners:
            if self.free >= slots:
                return
            given = min(self.held(owner), whole_pages(slots - self.free))
            self.free += given
            if given:
                self._held[owner] -= given

    def check(self) -> None:
        """Every slot is free or held, by one request. Raises: RuntimeError."""
        held = sum(self._held.values())
        if self.free < 0 or self.free + held != self.num_slots:
            raise RuntimeError(
                f"slots must be free or held: got {self.free} + {held} of {self.num_slots}."
            )
