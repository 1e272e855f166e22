"""A sample of each decode step's top-k on the host, from which working sets are measured.

A step's first rows are copied as it runs; nobody waits for the copy. So whoever reads may see
a row of the step before, or one half written: good enough for counting distinct slots.
"""

from __future__ import annotations

import torch

SAMPLES = 8  # requests of a step
LAYERS = 4  # evenly spaced: layers differ by up to ten times in what they miss (papers.md 1.6)


class TopkSample:
    """The last decode step's top-k of a few layers and requests.

    layers  sampled, counted from 0; rows [layers, SAMPLES, topk] int32 on the host, -1 pads
    """

    def __init__(self, num_layers: int, topk: int, pinned: bool = False):
        count = min(LAYERS, num_layers)
        self.layers = tuple((2 * i + 1) * num_layers // (2 * count) for i in range(count))
        self.rows = torch.full((count, SAMPLES, topk), -1, dtype=torch.int32, pin_memory=pinned)
        self._index = {layer: i for i, layer in enumerate(self.layers)}

    def take(self, layer: int, topk: torch.Tensor) -> None:
        """Copy what this step's first requests select in a layer: topk [requests, K] int32."""
        if (index := self._index.get(layer)) is not None:
            first = topk[:SAMPLES]
            self.rows[index, : len(first), : first.shape[1]].copy_(first, non_blocking=True)
