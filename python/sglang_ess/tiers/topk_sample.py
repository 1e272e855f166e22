"""A sample of each decode step's top-k on the host, for measuring working sets.

A step's first lists are copied as it runs, and nobody waits for the copy. So a reader may see a
list of the step before, or one half written. That is good enough to count distinct slots.
"""

from __future__ import annotations

import torch

from sglang_ess.tiers.topk_observer import TopkObserver

SAMPLES = 8  # requests of a step
GROUPS = 4  # spaced evenly: they differ by up to ten times in what they miss


class TopkSample(TopkObserver):
    """The last decode step's top-k of a few index groups and requests.

    groups  the sampled ones
    rows    [groups, SAMPLES, topk] int32 on the host, -1 pads
    """

    def __init__(self, num_groups: int, topk: int, pinned: bool = False):
        count = min(GROUPS, num_groups)
        self.groups = tuple((2 * i + 1) * num_groups // (2 * count) for i in range(count))
        self.rows = torch.full((count, SAMPLES, topk), -1, dtype=torch.int32, pin_memory=pinned)
        self._index = {group: i for i, group in enumerate(self.groups)}

    def watches(self, group: int) -> bool:
        return group in self._index

    def decode_topk(self, group: int, topk: torch.Tensor) -> None:
        """Copy the lists of the step's first requests: topk [requests, K] int32."""
        if (index := self._index.get(group)) is not None:
            first = topk[:SAMPLES]
            self.rows[index, : len(first), : first.shape[1]].copy_(first, non_blocking=True)
