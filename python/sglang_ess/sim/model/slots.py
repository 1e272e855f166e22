"""The slots of one decode rank: how many each request holds, and how many are free."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_ess.layout import PAGE_SLOTS


def whole_pages(tokens: int) -> int:
    """Return the slots that `tokens` tokens take, in whole pages."""
    return -(-int(tokens) // PAGE_SLOTS) * PAGE_SLOTS


class Slots:
    """Counts the slots of a rank, which are free or held by a request, in whole pages.

    peak: most slots held at once so far
    Raises: ValueError for less than a page or a part of one.
    """

    def __init__(self, num_slots: int):
        if num_slots < PAGE_SLOTS or num_slots % PAGE_SLOTS:
            raise ValueError(
                f"slots must be one or more whole pages of {PAGE_SLOTS}: got {num_slots}."
            )
        self.num_slots = self.free = num_slots
        self._held: dict[int, int] = {}
        self.peak = 0

    def held(self, request: int) -> int:
        return self._held.get(request, 0)

    def needs(self, request: int, tokens: int) -> int:
        """Slots that the request needs for `tokens` tokens and does not hold yet."""
        return max(0, whole_pages(tokens) - self.held(request))

    def take(self, request: int, tokens: int) -> None:
        """Give the request the slots of `tokens` tokens. Raises: RuntimeError without room."""
        more = self.needs(request, tokens)
        if more > self.free:
            raise RuntimeError(f"request {request} takes {more} slots: {self.free} are free.")
        self._held[request] = self.held(request) + more
        self.free -= more
        self.peak = max(self.peak, self.num_slots - self.free)

    def release(self, request: int) -> None:
        self.free += self._held.pop(request, 0)

    def reclaim(self, slots: int, owners: Iterable[int]) -> None:
        """Take pages from the owners, in their order, until `slots` slots are free.

        An owner loses no more than needed, as a radix tree first drops the end of a prompt.
        """
        for owner in owners:
            if self.free >= slots:
                return
            given = min(self.held(owner), whole_pages(slots - self.free))
            self.free += given
            if given:
                self._held[owner] -= given

    def check(self) -> None:
        """Check that every slot is free or held. Raises: RuntimeError."""
        held = sum(self._held.values())
        if self.free < 0 or self.free + held != self.num_slots:
            raise RuntimeError(
                f"slots must be free or held: got {self.free} + {held} of {self.num_slots}."
            )
