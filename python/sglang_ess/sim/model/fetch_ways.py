"""How long the GPUs of a node take to get a layer's missed rows: each all of them, or its share.

The GPUs of a tensor-parallel rank have the same misses, and one host tier. With n of them, m
missed rows of r bytes, and L bytes/s of a link (less where the links together ask more than the
memory of the node gives):

    each    m r / L                                        every GPU fetches every row
    gather  m r / (n L) + gather_us + (n-1)/n c r / gather  a share, then an all-gather by NCCL
    push    push_us + max(m r / (n L), (n-1)/n m r / push)  a share, stored to all as it arrives

c is the number of rows that the all-gather moves: m where the host knows it, else what the shapes
of a CUDA graph allow. A push moves only rows that missed. It takes a signal before it (the peers
have planned, and their rows are free) and one after it.

Half of the rows of a tier that two sockets share cross the link between them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_ess.sim.inputs.specs import Link, Node

GB, MICRO = 1e9, 1e-6
WAYS = EACH, GATHER, PUSH = ("each", "gather", "push")


def link_gb_s(node: Node, link: Link, gpus: int, gpus_per_node: int, ratio: float = 1.0) -> float:
    """GB/s of scattered rows on each link, where `gpus` of the node's fetch at once.

    ratio: Calibration.transfer_ratio
    """
    if link.own_memory:
        return link.gather_gb_s / ratio
    sockets = min(node.sockets, -(-gpus * node.sockets // gpus_per_node))
    memory = sockets * node.dram_gb_s
    if sockets > 1:  # of all that is read, 1 - 1 / sockets crosses, in both directions
        memory = min(memory, 2 * node.socket_gb_s / (1 - 1 / sockets))
    return min(link.gather_gb_s, memory / gpus) / ratio


class FetchWays:
    """Seconds of each way, for `gpus` GPUs of one node that have the same misses.

    rate  GB/s of each link, as link_gb_s gives it
    """

    def __init__(self, node: Node, rate: float, gpus: int, row_bytes: int):
        self.node, self.rate, self.gpus, self.row_bytes = node, rate, gpus, row_bytes

    def each(self, rows: Any) -> Any:
        """rows: a layer's misses, a number or an array; so in the other ways."""
        return rows * self.row_bytes / (self.rate * GB)

    def gather(self, rows: Any, capacity: float | None = None) -> Any:
        """capacity: rows that the all-gather moves; None: as many as missed."""
        moved = (rows if capacity is None else capacity) * self.row_bytes * self._others
        seconds = self.node.gather_us * MICRO + moved / (self.node.gather_gb_s * GB)
        return np.where(np.asarray(rows) > 0, self.each(rows) / self.gpus + seconds, 0.0)

    def push(self, rows: Any) -> Any:
        moved = rows * self.row_bytes * self._others / (self.node.push_gb_s * GB)
        seconds = np.maximum(self.each(rows) / self.gpus, moved) + self.node.push_us * MICRO
        return np.where(np.asarray(rows) > 0, seconds, 0.0)

    def pays_from(self, way: str) -> float:
        """Misses of a layer above which a way is faster than `each`; inf if it never is."""
        node, row = self.node, self.row_bytes / GB
        alone, share = row / self.rate, row / self.rate / self.gpus
        if way == GATHER:
            fixed, a_row = node.gather_us, share + row * self._others / node.gather_gb_s
        elif way == PUSH:
            fixed, a_row = node.push_us, max(share, row * self._others / node.push_gb_s)
        else:
            raise ValueError(f"way must be {GATHER} or {PUSH}: got {way!r}.")
        return fixed * MICRO / (alone - a_row) if a_row < alone else float("inf")

    @property
    def _others(self) -> float:
        """The share of the rows that a GPU gets from its peers."""
        return 1 - 1 / self.gpus
