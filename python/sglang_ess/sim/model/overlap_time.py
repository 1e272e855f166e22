"""How long a layer waits for a fetch in each overlap mode of ESS, section 3.3.

    off   indexer, fetch, attention in turn; the fetch runs early beside a part of PreAttn
    DA    indexer, then the fetch beside the remaining projections (PreAttn) and attention to hits
    DBA   as DA, but the first half's fetch runs beside the second half's indexer

Times are per micro-batch and layer. Figure 7 of ESS plots them for one setting.

The layers of an index group read the same rows, so all of the group's fetches are known when its
first layer is planned. They run on the link in the order of the layers, behind the compute of the
layers before: see `grouped`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_ess.tiers.index_groups import IndexGroups

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
        late = arrived(mode, fetch, window)
        cost = np.maximum(0, late - window.preattn - hits) + window.dba
    return np.where(fetch > 0, cost, 0.0)


def arrived(mode: str, fetch: np.ndarray, window: Window) -> np.ndarray:
    """Return [layers] seconds from the end of a layer's indexer to the end of its fetch."""
    if mode != "dba":
        return fetch
    # The second half's fetch begins when both the link and the second indexer are done.
    ready = np.maximum(fetch / 2, window.indexer / 2)
    late: np.ndarray = ready + fetch / 2 - window.indexer / 2
    return late


def cheapest(
    choice: str, fetch: np.ndarray, missed_share: np.ndarray, window: Window
) -> np.ndarray:
    """Return [layers] seconds, each layer in the cheapest mode that `choice` allows."""
    modes = [exposed(mode, fetch, missed_share, window) for mode in CHOICES[choice]]
    least: np.ndarray = np.minimum.reduce(modes)
    return least


def grouped(
    choice: str,
    groups: IndexGroups,
    fetch: np.ndarray,
    missed_share: np.ndarray,
    window: Window,
    compute: np.ndarray,
) -> np.ndarray:
    """Return [layers] seconds that fetches add to each layer, if they are issued early.

    fetch    [layers] seconds of the copies; with the plan's in each group's first layer
    compute  [layers] seconds of a layer without indexer and fetch, communication included
    All of a group's fetches are issued with the first, in order. A later layer attends in one pass
    in every mode, as in our server: it waits before attention for what is left of its fetch. The
    link is idle again when a group ends, because its last layer has waited for the last fetch.
    """
    added = np.zeros(len(fetch))
    members = np.arange(max(groups.sizes))[:, None] + np.array(groups.firsts)
    inside = np.arange(max(groups.sizes))[:, None] < np.array(groups.sizes)
    first = members[0]
    each = [exposed(mode, fetch[first], missed_share[first], window) for mode in CHOICES[choice]]
    ends = [arrived(mode, fetch[first], window) for mode in CHOICES[choice]]
    chosen, column = np.argmin(each, axis=0), np.arange(len(first))
    added[first] = np.array(each)[chosen, column]
    # Of each group: when the link is done, and how far compute is, from the first's indexer on.
    link = np.array(ends)[chosen, column]
    now = compute[first] + added[first]
    for place, there in zip(members[1:], inside[1:], strict=True):
        layer = place[there]
        link[there] += fetch[layer]
        left = np.maximum(0.0, link[there] - now[there] - window.preattn)
        added[layer] = np.where(fetch[layer] > 0, left, 0.0)
        now[there] += compute[layer] + added[layer]
    return added


def sharing(window: Window) -> Window:
    """The window of a layer without an indexer: nothing of it to halve, so DBA is DA."""
    return replace(window, indexer=0.0, dba=window.da)


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
