"""Which overlap a decode step uses: off, DA or DBA, from live misses and measured costs.

A cost table holds, for each mode, the microseconds that one layer's transfer and attention
take at (batch, misses a query), as `benchmarks/kernels` measured them on this card. A step
takes the mode whose layers cost least in sum; inside it a layer that would lose by listing
hits and misses apart does not (words[SPLIT] of its state). ESS chooses by an offline profile of
each layer (section 3.3); here the misses are the ones of the last steps.
"""

from __future__ import annotations

import enum
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ess_kernels import hot_state

SMOOTHING = 0.2  # weight of the newest figure: about the last ten of them count
# A mode must be this much cheaper than the one in use: graphs differ, their figures are noisy.
GAIN = 0.03


class Mode(enum.Enum):
    """How one decode step orders transfer and attention."""

    OFF = "off"
    DA = "da"
    DBA = "dba"


@dataclass(frozen=True)
class CostTable:
    """us[mode][i][j]: of one layer at batches[i] and misses[j] a query; both ascending.

    empty_us: what attention to no row and a merge add where a layer of a DA graph does not split
    halving_us: what two launches of the indexer add to one, per layer
    source: where it was measured
    """

    batches: tuple[int, ...]
    misses: tuple[int, ...]
    us: dict[Mode, tuple[tuple[float, ...], ...]]
    empty_us: float
    halving_us: float
    source: str

    def __post_init__(self) -> None:
        shape = (len(self.batches), len(self.misses))
        for mode in Mode:
            got = np.shape(self.us.get(mode, ()))
            if got != shape or not np.all(np.isfinite(self.us[mode])):
                raise ValueError(
                    f"cost table must have {shape[0]} x {shape[1]} finite figures for "
                    f"{mode.value}: got {got}. Run benchmarks/kernels on this card."
                )
        for name in ("batches", "misses"):
            if list(getattr(self, name)) != sorted(set(getattr(self, name))):
                raise ValueError(f"cost table's {name} must ascend: got {getattr(self, name)}.")

    @classmethod
    def read(cls, path: Path | str) -> CostTable:
        """From the JSON of benchmarks/kernels, key "overlap_costs".

        Raises: ValueError if the file has none, or a malformed one.
        """
        try:
            table = json.loads(Path(path).read_text())["overlap_costs"]
            return cls(
                tuple(table["batches"]),
                tuple(table["misses"]),
                {Mode(mode): tuple(map(tuple, us)) for mode, us in table["us"].items()},
                float(table["empty_us"]),
                float(table["halving_us"]),
                str(table["source"]),
            )
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} must hold a cost table: got {type(error).__name__} {error}. Write one "
                "with python -m benchmarks.kernels --json PATH."
            ) from None

    def as_dict(self) -> dict:
        """What read() reads."""
        return {
            "batches": self.batches,
            "misses": self.misses,
            "us": {mode.value: us for mode, us in self.us.items()},
            "empty_us": self.empty_us,
            "halving_us": self.halving_us,
            "source": self.source,
        }

    def cost(self, mode: Mode, batch: float, misses: np.ndarray) -> np.ndarray:
        """us of layers with `misses` [layers] a query: linear between points, flat outside."""
        low, high, share = _between(self.batches, batch)
        rows = (np.interp(misses, self.misses, self.us[mode][i]) for i in (low, high))
        below, above = rows
        return below + share * (above - below)


def _between(points: Sequence[int], value: float) -> tuple[int, int, float]:
    high = min(bisect_right(points, value), len(points) - 1)
    low = max(high - 1, 0)
    if points[high] == points[low]:
        return low, high, 0.0
    share = (value - points[low]) / (points[high] - points[low])
    return low, high, float(np.clip(share, 0, 1))


@dataclass(frozen=True)
class Choice:
    """mode of a step, and per layer whether it lists hits and misses apart."""

    mode: Mode
    split: np.ndarray


class OverlapPolicy:
    """Follows the misses of each layer and chooses for the next steps.

    modes: what may be chosen
    """

    def __init__(self, layers: int, table: CostTable | None, modes: Sequence[Mode] = tuple(Mode)):
        # Without a table the choice is the operator's, or off: nothing says what is faster.
        modes = tuple(modes) if table is not None or len(modes) == 1 else (Mode.OFF,)
        self._table, self.modes = table, modes
        self._misses = np.zeros(layers)
        self._counted: np.ndarray | None = None
        self._seen = False
        self._mode: dict[int, Mode] = {}
        self.layers = layers
        self.forced: Mode | None = None  # a mode that replaces every choice

    @property
    def misses(self) -> np.ndarray:
        """Misses a query and step of each layer, smoothed: [layers]."""
        return self._misses

    def observe(self, counters: np.ndarray, topk: int) -> None:
        """Take in counters [layers, NUM_COUNTERS] as they stand; topk: lookups a query."""
        now = counters[:, [hot_state.LOOKUPS, hot_state.MISSES]].astype(float)
        before, self._counted = self._counted, now
        if before is None:
            return
        lookups, misses = (now - before).T
        if (lookups <= 0).any():
            return
        fresh = misses / lookups * topk
        self._misses = fresh if not self._seen else self._misses + SMOOTHING * (
            fresh - self._misses
        )  # fmt: skip
        self._seen = True

    def choose(self, batch: int) -> Choice:
        """For a step of `batch` queries."""
        apart = np.ones(self.layers, bool)
        if self.forced is not None:
            return Choice(self.forced, apart)
        if self._table is None:
            return Choice(self.modes[0], apart)
        off = self._table.cost(Mode.OFF, batch, self._misses)
        costs, splits = {}, {}
        for mode in self.modes:
            if mode is Mode.OFF:
                costs[mode], splits[mode] = off.sum(), apart
                continue
            extra = self._table.halving_us if mode is Mode.DBA else 0.0
            together = off + self._table.empty_us
            split = self._table.cost(mode, batch, self._misses)
            costs[mode] = np.minimum(split, together).sum() + extra * self.layers
            splits[mode] = split <= together
        best = min(costs, key=costs.get)
        used = self._mode.get(batch)
        if used in costs and costs[best] > (1 - GAIN) * costs[used]:
            best = used
        self._mode[batch] = best
        return Choice(best, splits[best])
