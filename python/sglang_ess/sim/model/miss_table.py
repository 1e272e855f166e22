"""Misses by hot rows a request: what the planner asks of a locality profile or a recorded trace.

Measured once on a few layers and sizes, then interpolated: a batch's misses follow from the hot
rows that one of its requests has, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sglang_ess.sim.model.decode_tiers import miss_curves
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.trace_replay import SCALES, curve, layer_curves
from sglang_ess.tiers.balance.budgets import allot
from sglang_ess.tiers.balance.ghost_cache import MissCurve
from sglang_ess.trace.trace import Kind, Trace

LAYERS = 12  # measured for all: their spread by reach
STEPS, SETTLE, REQUESTS = 24, 8, 2
# Of top-k: sizes at which misses are measured.
SIZES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
FLOOR = 0.5  # of what a step selects at most: the least hot rows of a layer, a request's
GRANULARITY = 64  # rows of a request, in which budgets move


@dataclass(frozen=True, eq=False)  # by identity: its curves are many
class MissTable:
    """curves: of each layer of the model, rows and misses a request, step and layer.

    context: tokens of a request; from so many rows on nothing is missed
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
        """Measured on `sampled` layers of the profile, each of which stands for others.

        progress: called REQUESTS times a sampled layer
        """
        chosen = locality.spread(sampled)
        sizes = [int(share * locality.topk) for share in SIZES]
        sizes = [rows for rows in sizes if rows < context]
        found = np.zeros((len(chosen), 0))
        if sizes:
            found = miss_curves(
                locality, context, sizes, queries=queries, requests=REQUESTS, steps=STEPS,
                warmup_steps=SETTLE, layers=chosen, seed=seed, progress=progress,
            )  # fmt: skip
        # Of no rows and of all: what a step selects, at most, and nothing.
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
        """Replayed at several sizes; requests are the recorded queries of a step / `queries`.

        progress: called with bytes read
        Raises: ValueError for a trace of other layers, or one without a decode step.
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
        """The least hot rows a request and layer that the curves speak of: with fewer, a step
        takes several passes of attention, which nothing here prices.
        """
        return max(1, int(FLOOR * self.curves[0].union))

    def uniform(self, rows: float) -> np.ndarray:
        """[layers] misses with so many hot rows a request in every layer."""
        return np.array([curve.at(rows) for curve in self.curves])

    def budgeted(self, levels: Sequence[int]) -> np.ndarray:
        """[levels, layers] misses where the rows of all layers are shared out by their curves."""
        return np.array([_shared_out(self, rows) for rows in levels])


@lru_cache(maxsize=256)  # a question is asked again with its limits lifted
def _shared_out(table: MissTable, rows: int) -> tuple[float, ...]:
    """[layers] misses at the best budgets with a mean of `rows`."""
    rows = min(max(rows, table.floor), table.context)
    total = rows * len(table.curves)
    budgets = allot(table.curves, total, table.floor, table.context, GRANULARITY)
    return tuple(curve.at(count) for curve, count in zip(table.curves, budgets.rows, strict=True))


def _stands_for(locality: Locality, chosen: Sequence[int], layers: int) -> list[int]:
    """For each layer of the model the index of the chosen one that stands for it."""
    if locality.num_layers != layers:  # another model's: the same mixture of layers
        return [layer * len(chosen) // layers for layer in range(layers)]
    reach = locality.layers.reach
    ranks = np.argsort(np.argsort(reach, kind="stable"), kind="stable")
    # chosen is by layer number; parts are by reach.
    by_reach = sorted(range(len(chosen)), key=lambda i: (reach[chosen[i]], chosen[i]))
    return [by_reach[int(rank) * len(chosen) // layers] for rank in ranks]
