"""A table of misses by hot rows, which the planner makes of a locality profile or a trace.

A few layers and sizes are measured once and then interpolated. The misses of a batch follow from
the hot rows of one of its requests, whatever the size of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sglang_ess.sim.model.decode_tiers import Sampling, miss_curves
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.trace_replay import SCALES, curve, layer_curves
from sglang_ess.tiers.balance.budgets import allot
from sglang_ess.tiers.balance.ghost_cache import MissCurve
from sglang_ess.trace.trace import Kind, Trace

LAYERS = 12  # measured layers, which stand for all
STEPS, SETTLE, REQUESTS = 24, 8, 2
# Sizes at which misses are measured, as multiples of top-k.
SIZES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
FLOOR = 0.5  # fewest hot rows of a request and layer, as a share of a step's selected rows
GRANULARITY = 64  # budgets move in units of this many rows of a request


@dataclass(frozen=True, eq=False)  # hashed by identity, because its curves are long
class MissTable:
    """Misses of one request by its hot rows.

    context  tokens of a request; with that many rows or more nothing misses
    curves   one for each layer of the model: hot rows of a request -> misses a step
    """

    context: int
    curves: tuple[MissCurve, ...]

    @classmethod
    def from_profile(
        cls,
        locality: Locality,
        layers: int,
        context: int,
        queries: int,
        *,
        sampled: int = LAYERS,
        seed: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> MissTable:
        """Measure `sampled` layers of the profile; each stands for several of the model's.

        progress: called REQUESTS times for each sampled layer
        """
        chosen = locality.spread(sampled)
        sizes = [int(share * locality.topk) for share in SIZES]
        sizes = [rows for rows in sizes if rows < context]
        found = np.zeros((len(chosen), 0))
        if sizes:
            found = miss_curves(
                locality, context, sizes, Sampling(STEPS, SETTLE, queries, chosen, seed),
                requests=REQUESTS, progress=progress,
            )  # fmt: skip
        # With no hot rows a step misses all it selects; with all rows hot it misses nothing.
        most = min(queries * locality.topk, context)
        rows = (0, *sizes, context)
        points = np.hstack([np.full((len(chosen), 1), float(most)), found])
        points = np.minimum.accumulate(np.hstack([points, np.zeros((len(chosen), 1))]), axis=1)
        measured = [
            MissCurve(rows, tuple(line.tolist()), queries * locality.topk, most, STEPS * REQUESTS)
            for line in points
        ]
        return cls(context, tuple(measured[i] for i in _stands_for(locality, chosen, layers)))

    @classmethod
    def from_trace(
        cls, trace: Trace, layers: int, context: int, queries: int,
        progress: Callable[[int], object] = lambda _: None,
    ) -> MissTable:  # fmt: skip
        """Replay a trace at several sizes. It has (queries of a step) / `queries` requests.

        progress: called with bytes read
        Raises: ValueError for a trace of another number of layers or without a decode step.
        """
        if trace.layers != layers:
            raise ValueError(f"trace must be of the model's {layers} layers: got {trace.layers}.")
        plans = [e for e in trace.events() if e.kind == Kind.PLAN and e.layer == 0]
        steps = sum(not event.argument for event in plans)
        if not steps:
            raise ValueError("trace must hold a decode step: got none.")
        requests = max(1.0, sum(len(event.slots) for event in plans) / steps / queries)
        most = min(queries * trace.topk, context)
        curves = []
        for one in layer_curves(curve(trace, SCALES, progress).values()):
            points = {0: float(most)} | {
                round(rows / requests): misses / requests
                for rows, misses in zip(one.rows, one.misses, strict=True)
                if rows / requests < context
            }
            points[context] = 0.0
            misses = np.minimum.accumulate([points[rows] for rows in sorted(points)]).tolist()
            curves.append(
                MissCurve(tuple(sorted(points)), tuple(misses), one.lookups, most, one.steps)
            )
        return cls(context, tuple(curves))

    @property
    def floor(self) -> int:
        """Fewest hot rows of a request and layer for which the curves hold.

        With fewer a step needs several passes of attention, which the cost model does not price.
        """
        return max(1, int(FLOOR * self.curves[0].union))

    def uniform(self, rows: float) -> np.ndarray:
        """Return [layers] misses with `rows` hot rows of a request in every layer."""
        return np.array([curve.at(rows) for curve in self.curves])

    def budgeted(self, levels: Sequence[int]) -> np.ndarray:
        """Return [levels, layers] misses at the best budgets with a mean of each level's rows."""
        return np.array([_shared_out(self, rows) for rows in levels])


@lru_cache(maxsize=256)  # the planner asks again with limits lifted
def _shared_out(table: MissTable, rows: int) -> tuple[float, ...]:
    """Return [layers] misses at the best budgets with a mean of `rows`."""
    rows = min(max(rows, table.floor), table.context)
    total = rows * len(table.curves)
    budgets = allot(table.curves, total, table.floor, table.context, GRANULARITY)
    return tuple(curve.at(count) for curve, count in zip(table.curves, budgets.rows, strict=True))


def _stands_for(locality: Locality, chosen: Sequence[int], layers: int) -> list[int]:
    """Return for each layer of the model the index of the chosen layer that stands for it."""
    if locality.num_layers != layers:  # another model's profile: keep its mixture of layers
        return [layer * len(chosen) // layers for layer in range(layers)]
    reach = locality.layers.reach
    ranks = np.argsort(np.argsort(reach, kind="stable"), kind="stable")
    # `chosen` is in the order of layers, the parts are in the order of reach.
    by_reach = sorted(range(len(chosen)), key=lambda i: (reach[chosen[i]], chosen[i]))
    return [by_reach[int(rank) * len(chosen) // layers] for rank in ranks]
