"""Cuts a decode batch's top-k into parts that a hot tier on a device can always hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """The part of a batch's top-k that one plan resolves."""

    queries: slice
    columns: slice

    @property
    def lookups(self) -> int:
        """Entries of the part."""
        queries: int = self.queries.stop - self.queries.start
        columns: int = self.columns.stop - self.columns.start
        return queries * columns


MAX_WIDTH = 8192  # columns of one plan, at most (kPlanMaxItems of csrc/plan_fetch.h x 512 threads)


def passes(
    num_queries: int,
    width: int,
    num_rows: int,
    max_queries: int,
    lists: int = 1,
    num_slots: int | None = None,
) -> list[Pass]:
    """Cut a top-k [num_queries, width] into plans that num_rows hot rows can always hold.

    max_queries: of one plan
    lists: queries of each request, which follow one another and select much the same slots, so
        that a pass has whole requests. A pass of r requests takes r * lists * width hot rows
    num_slots: of the host tier. With a hot row for each of them every plan fits
    A pass selects at most as many slots as it has lookups, so shapes alone decide. A request that
    does not fit alone is cut by queries, and a query wider than the tier by columns; attention
    merges its parts by log-sum-exp.
    """
    if num_slots is not None and num_rows >= num_slots:
        num_rows = max_queries * width
    columns = min(width, num_rows, MAX_WIDTH)
    queries = 1 if columns < width else min(max_queries, num_rows // columns)
    if queries > lists:
        queries -= queries % lists
    return [
        Pass(slice(q, min(q + queries, num_queries)), slice(k, min(k + columns, width)))
        for q in range(0, num_queries, queries)
        for k in range(0, width, columns)
    ]
