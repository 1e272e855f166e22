"""How long a layer waits for a fetch in each overlap mode of ESS, section 3.3.

    off   indexer, fetch, attention in turn; the fetch runs early beside a part of PreAttn
    DA    indexer, then the fetch beside the remaining projections (PreAttn) and attention to hits
    DBA   as DA, but the first half's fetch runs beside the second half's indexer

Times are per micro-batch and layer. Figure 7 of ESS plots them for one setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MODES = ("off", "da", "dba")
# Operator's choice -> modes of which each layer takes the cheapest.
CHOICES = {mode: (mode,) for mode in MODES} | {"layerwise": ("da", "dba"), "auto": MODES}
# The halves of two-batch overlap hide each other's fetches too. The server does not do this yet.
HALVES = "halves"
# Share of a fetch's time by which it slows the other half. In figure 7 of ESS, from 128 to 256
# misses, the fetch takes 165 us more and DBA's line rises by 5 us.
CONTENTION = 0.03


@dataclass(frozen=True)
class Window:
    """Seconds in one micro-batch's layer behind which a fetch can hide.

    preattn    work between indexer and attention
    attention  over all rows, hits and misses
    indexer    of the whole micro-batch
    da, dba    added cost of splitting attention (DA), and also the indexer (DBA)
    early      part of preattn behind which a fetch runs even in mode off
    """

    preattn: float
    attention: float
    indexer: float
    da: float
    dba: float
    early: float = 0.0


def exposed(mode: str, fetch: np.ndarray, missed_share: np.ndarray, window: Window) -> np.ndarray:
    """Return [layers] seconds that a fetch adds to a layer; 0 where nothing is fetched.

    fetch         [layers] seconds of the copies
    missed_share  [layers] share of the selected rows that miss; attention to them comes later
    """
    hits = window.attention * (1 - missed_share)
    if mode == "off":
        cost = np.maximum(0, fetch - window.early)
    elif mode == "da":
        cost = np.maximum(0, fetch - window.preattn - hits) + window.da
    else:
        # The second half's fetch begins when both the link and the second indexer are done.
        ready = np.maximum(fetch / 2, window.indexer / 2)
        late = ready + fetch / 2 - window.indexer / 2
        cost = np.maximum(0, late - window.preattn - hits) + window.dba
    return np.where(fetch > 0, cost, 0.0)


def cheapest(
    choice: str, fetch: np.ndarray, missed_share: np.ndarray, window: Window
) -> np.ndarray:
    """Return [layers] seconds, each layer in the cheapest mode that `choice` allows."""
    modes = [exposed(mode, fetch, missed_share, window) for mode in CHOICES[choice]]
    least: np.ndarray = np.minimum.reduce(modes)
    return least


def beside_other_half(
    compute: float, talk: float, fetch: np.ndarray, missed_share: np.ndarray, window: Window
) -> np.ndarray:
    """Return [layers] seconds that the fetches of two micro-batches add to a layer of both.

    compute: one micro-batch in the layer without fetches; talk: its communication
    A layer of both takes as long as the longest of: the compute of both; one micro-batch's
    compute, fetch and communication in turn; the link's work; the network's work. A fetch may
    also run beside the attention to hits, as in DA, at DA's cost.
    """
    base = 2 * max(compute, talk)
    hits = window.attention * (1 - missed_share)
    cycles = []
    for split, waits in (
        (0.0, fetch),
        (window.da, np.maximum(0.0, fetch - window.preattn - hits)),
    ):
        busy = compute + split + CONTENTION * fetch
        cycles.append(
            np.maximum.reduce([2 * busy, 2 * fetch, busy + waits + talk, np.full_like(fetch, base)])
        )
    return np.where(fetch > 0, np.minimum(*cycles) - base, 0.0)
