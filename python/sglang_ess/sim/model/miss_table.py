"""A table of misses by hot rows, which the planner makes of a locality profile or a trace.

A few layers and sizes are measured once and then interpolated. The misses of a batch follow from
the hot rows of one of its requests, whatever the size of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_ess.sim.model.decode_tiers import Sampling, miss_curves
from sglang_ess.sim.model.locality import Locality
from sglang_ess.sim.model.trace_replay import SCALES, curve, layer_curves
from sglang_ess.tiers.balance.ghost_cache import MissCurve
from sglang_ess.tiers.index_groups import IndexGroups
from sglang_ess.trace.trace import Kind, Trace

LAYERS = 12  # measured layers of the profile, which stand for all
STEPS, SETTLE, REQUESTS = 24, 8, 2
# Sizes at which misses are measured, as multiples of top-k.
SIZES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
FLOOR = 0.5  # fewest hot rows of a request and layer, as a share of a step's selected rows


@dataclass(frozen=True, eq=False)  # hashed by identity, because its curves are long
class MissTable:
    """Misses of one request by its hot rows.

    context  tokens of a request; with that many rows or more nothing misses
    curves   one for each index group: hot rows of a request -> misses a step in each of its layers
    groups   the model's index groups; None: each layer is one
    """

    context: int
    curves: tuple[MissCurve, ...]
    groups: IndexGroups | None = None

    @classmethod
    def from_profile(
        cls,
        locality: Locality,
        layers: int | IndexGroups,
        context: int,
        queries: int,
        *,
        sampled: int = LAYERS,
        seed: int = 0,
        progress: Callable[[], None] = lambda: None,
    ) -> MissTable:
        """Measure `sampled` layers of the profile; each stands for several of the model's.

        layers: of the model, or its index groups: then a layer of the profile stands for groups
        progress: called REQUESTS times for each sampled layer
        """
        groups = IndexGroups.single(layers) if isinstance(layers, int) else layers
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
        curves = tuple(measured[i] for i in _stands_for(locality, chosen, len(groups)))
        return cls(context, curves, groups)

    @classmethod
    def from_trace(
        cls, trace: Trace, layers: int | IndexGroups, context: int, queries: int,
        progress: Callable[[int], object] = lambda _: None,
    ) -> MissTable:  # fmt: skip
        """Replay a trace at several sizes. It has (queries of a step) / `queries` requests.

        progress: called with bytes read
        layers: of the model, or its index groups, for which a trace has one layer each
        Raises: ValueError for a trace of another number of layers, without a decode step, or with
        verify steps of another number of queries.
        """
        groups = IndexGroups.single(layers) if isinstance(layers, int) else layers
        if trace.layers != len(groups):
            what = "layers" if len(groups) == groups.layers else "index groups"
            raise ValueError(
                f"trace must be of the model's {len(groups)} {what}: got {trace.layers}."
            )
        plans, recorded = [], 1
        for event in trace.events():
            if event.kind == Kind.PLAN and event.layer == 0:
                plans.append(event)
            elif event.kind == Kind.ACCEPTED:
                recorded = event.argument
        steps = sum(not event.argument for event in plans)
        if not steps:
            raise ValueError("trace must hold a decode step: got none.")
        if recorded not in (1, queries):
            raise ValueError(
                f"trace must be of steps with {queries} queries a request: got {recorded}. Plan "
                f"with --mtp {recorded}."
            )
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
        return cls(context, tuple(curves), groups)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each curve."""
        return self.groups.sizes if self.groups is not None else (1,) * len(self.curves)

    @property
    def floor(self) -> int:
        """Fewest hot rows of a request and layer for which the curves hold.

        With fewer a step needs several passes of attention, which the cost model does not price.
        """
        return max(1, int(FLOOR * self.curves[0].union))

    def uniform(self, rows: float) -> np.ndarray:
        """Return [layers] misses with `rows` hot rows of a request in every layer."""
        return np.repeat([curve.at(rows) for curve in self.curves], self.sizes)


def _stands_for(locality: Locality, chosen: Sequence[int], layers: int) -> list[int]:
    """Return for each of the model's layers (or index groups) the index of the chosen layer."""
    if locality.num_layers != layers:  # another model's profile: keep its mixture of layers
        return [layer * len(chosen) // layers for layer in range(layers)]
    reach = locality.layers.reach
    ranks = np.argsort(np.argsort(reach, kind="stable"), kind="stable")
    # `chosen` is in the order of layers, the parts are in the order of reach.
    by_reach = sorted(range(len(chosen)), key=lambda i: (reach[chosen[i]], chosen[i]))
    return [by_reach[int(rank) * len(chosen) // layers] for rank in ranks]
