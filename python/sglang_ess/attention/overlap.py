"""Which overlap a decode step uses: off, DA or DBA, from live misses and measured costs.

A cost table holds, for each mode, the microseconds that transfer and attention of one layer take
at (batch, misses per query), as the kernel benchmark measured them on this GPU. A step takes the
mode with the smallest sum over its layers. A layer that would lose by listing hits and misses
apart does not (words[SPLIT] of its state). ESS chooses by an offline profile of each layer
(section 3.3); this policy uses the misses of the last steps.

Its layers are the first ones of the index groups: the others cost the same in every mode, because
their rows are fetched behind the layers before.

Ranks that run one model together must replay the same mode's graph at every step: an all-reduce in
a graph addresses the other ranks' buffers as that graph registered them. Their misses and the
moments at which they see them differ, so rank 0 chooses, and SGLang's broadcast of new requests
carries its choice (platforms/cuda.py, requests_with_mode). Every scheduler takes that broadcast
before it launches the iteration's batch.
"""

from __future__ import annotations

import enum
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ess_kernels import hot_state
from sglang_ess.config import EssConfig

SMOOTHING = 0.2  # weight of the newest figure: about the last ten count
# A mode replaces the one in use only if it is cheaper by this share: the figures are noisy.
GAIN = 0.03


class Mode(enum.Enum):
    """How a decode step orders transfer and attention; two_tier_decode.py describes them."""

    OFF = "off"
    DA = "da"
    DBA = "dba"


@dataclass(frozen=True)
class CostTable:
    """Microseconds of one layer: us[mode][i][j] at batches[i] and misses[j] per query.

    batches, misses: ascending
    empty_us: added where a layer of a DA graph does not split: attention to no row, and a merge
    halving_us: added per layer where the indexer is launched twice
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
        """The table under key "overlap_costs" in the kernel benchmark's JSON.

        Raises: ValueError if the file has no table, or a malformed one.
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
        """The table as read() reads it."""
        return {
            "batches": self.batches,
            "misses": self.misses,
            "us": {mode.value: us for mode, us in self.us.items()},
            "empty_us": self.empty_us,
            "halving_us": self.halving_us,
            "source": self.source,
        }

    def cost(self, mode: Mode, batch: float, misses: np.ndarray) -> np.ndarray:
        """Microseconds of each layer at `misses` [layers] per query: linear between points, flat
        outside.
        """
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
    """The mode of a step. split [layers] bool: the layers that list hits and misses apart."""

    mode: Mode
    split: np.ndarray


class OverlapPolicy:
    """Follows the misses of each layer and chooses the mode of the next steps.

    table: None if nothing was measured: then the policy does not choose between modes
    modes: the modes that it may choose
    ranks: that run the model together. With more than one, choose() answers the mode that was last
    given to agree(), and announcement() is this rank's own choice.
    """

    def __init__(
        self,
        layers: int,
        table: CostTable | None,
        modes: Sequence[Mode] = tuple(Mode),
        ranks: int = 1,
    ):
        # Without a table nothing says which mode is faster: take the operator's, or OFF.
        modes = tuple(modes) if table is not None or len(modes) == 1 else (Mode.OFF,)
        self._table, self.modes = table, modes
        self._misses = np.zeros(layers)
        self._counted: np.ndarray | None = None
        self._seen = False
        self._mode: dict[int, Mode] = {}
        self._agreed = self.modes[0] if ranks > 1 else None
        self._own = self.modes[0]
        self.layers = layers
        self.forced: Mode | None = None  # a mode that replaces every choice

    @property
    def source(self) -> str | None:
        """Where the costs were measured; None without any."""
        return None if self._table is None else self._table.source

    @property
    def misses(self) -> np.ndarray:
        """Misses per query and step of each layer, smoothed: [layers]."""
        return self._misses

    def observe(self, counters: np.ndarray, topk: int) -> None:
        """Take in the counters [layers, NUM_COUNTERS] since the start. topk: lookups per query."""
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
        """The mode for a step of `batch` queries."""
        apart = np.ones(self.layers, bool)
        if self.forced is not None:
            return Choice(self.forced, apart)
        if self._table is None:
            return Choice(self.modes[0], apart)
        off = self._table.cost(Mode.OFF, batch, self._misses)
        costs: dict[Mode, float] = {}
        splits: dict[Mode, np.ndarray] = {}
        for mode in self.modes:
            if mode is Mode.OFF:
                costs[mode], splits[mode] = off.sum(), apart
                continue
            extra = self._table.halving_us if mode is Mode.DBA else 0.0
            together = off + self._table.empty_us
            split = self._table.cost(mode, batch, self._misses)
            costs[mode] = np.minimum(split, together).sum() + extra * self.layers
            splits[mode] = split <= together
        best = min(costs, key=costs.__getitem__)
        used = self._mode.get(batch)
        if used in costs and costs[best] > (1 - GAIN) * costs[used]:
            best = used
        self._mode[batch] = self._own = best
        if self._agreed is not None:
            best = self._agreed
        return Choice(best, splits[best])

    def announcement(self) -> Mode | None:
        """This rank's own choice, if other ranks have to be told of it."""
        return None if self._agreed in (None, self._own) else self._own

    def agree(self, mode: Mode) -> None:
        """Take the mode that rank 0 announced, on every rank alike."""
        self._agreed = mode


def policy_for(config: EssConfig, layers: int, parallel: Any) -> OverlapPolicy:
    """The policy of a server with these options. parallel: SGLang's ParallelContext.

    Raises: ValueError for a bad file of costs; RuntimeError where no choice reaches every rank.
    """
    modes = tuple(Mode) if config.overlap == "auto" else (Mode(config.overlap),)
    table = CostTable.read(config.overlap_costs) if config.overlap_costs else None
    policy = OverlapPolicy(layers, table, modes, parallel.tp_size)
    local = parallel.attn_dp_enabled and parallel.enable_dp_attention_local_control_broadcast
    if local and len(policy.modes) > 1:
        raise RuntimeError(
            "--ess-overlap must be off, da or dba where each data-parallel group broadcasts its "
            "own control messages: got auto. Name one, or drop --ess-overlap-costs."
        )
    return policy
