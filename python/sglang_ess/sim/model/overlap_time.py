"""How much of a fetch a layer waits for: off, DA and DBA of ESS section 3.3, as time lines.

    off   indexer, fetch, attention: all of the fetch, less what runs early beside PreAttn
    DA    indexer, then fetch beside the projections left (PreAttn) and attention to the hits
    DBA   as DA, but the first half's fetch runs beside the second half's indexer

Each is per micro-batch and layer; ESS's figure 7 plots them for one setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MODES = ("off", "da", "dba")
# What an operator may choose: the modes that a layer takes the cheapest of.
CHOICES = {mode: (mode,) for mode in MODES} | {"layerwise": ("da", "dba"), "auto": MODES}
# Two-batch overlap's halves hide one another's fetches too, which the server does not do yet.
HALVES = "halves"
# Of a fetch's seconds: what it slows the other half down. ESS figure 7: from 128 to 256 misses
# the fetch grows by 165 us and DBA's line by 5.
CONTENTION = 0.03


@dataclass(frozen=True)
class Window:
    """Seconds of one micro-batch's layer that a fetch can hide behind.

    preattn    between indexer and attention, not attention itself
    attention  over all rows, hits and misses
    indexer    of the whole micro-batch
    da, dba    that the split of attention, and of the indexer too, adds
    early      of preattn, behind which a fetch runs in off too
    """

    preattn: float
    attention: float
    indexer: float
    da: float
    dba: float
    early: float = 0.0


def exposed(mode: str, fetch: np.ndarray, missed_share: np.ndarray, window: Window) -> np.ndarray:
    """[layers] seconds that a fetch adds to a layer; zero where nothing is fetched.

    fetch         [layers] seconds of the copies
    missed_share  [layers] of the selected rows that are missed: attention to them comes later
    """
    hits = window.attention * (1 - missed_share)
    if mode == "off":
        cost = np.maximum(0, fetch - window.early)
    elif mode == "da":
        cost = np.maximum(0, fetch - window.preattn - hits) + window.da
    else:
        # The link takes the second half's rows when both it and the second indexer are done.
        ready = np.maximum(fetch / 2, window.indexer / 2)
        late = ready + fetch / 2 - window.indexer / 2
        cost = np.maximum(0, late - window.preattn - hits) + window.dba
    return np.where(fetch > 0, cost, 0.0)


def cheapest(
    choice: str, fetch: np.ndarray, missed_share: np.ndarray, window: Window
) -> np.ndarray:
    """[layers] seconds with each layer in the cheapest mode that `choice` allows."""
    return np.min([exposed(m, fetch, missed_share, window) for m in CHOICES[choice]], axis=0)


def beside_other_half(
    compute: float, talk: float, fetch: np.ndarray, missed_share: np.ndarray, window: Window
) -> np.ndarray:
    """[layers] seconds that the fetches of two micro-batches add to a layer of both.

    compute, talk: of one micro-batch in the layer, without fetches, and its communication
    A layer of both takes as long as its compute, twice, or as one micro-batch's way through it,
    compute, fetch and communication in turn, or as the link or the network is busy: whichever
    is longest. A fetch may run beside the hits' attention too, as in DA, at DA's cost.
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
