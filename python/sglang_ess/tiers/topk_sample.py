"""A sample of each decode step's top-k on the host, for measuring working sets.

The lists of a step's first requests are copied as it runs, and nobody waits for the copy. So a
reader may see a list of the step before, or one half written. That is good enough to count distinct
slots.
"""

from __future__ import annotations

import torch

from sglang_ess.tiers.topk_observer import TopkObserver

SAMPLES = 8  # requests of a step
GROUPS = 4  # spaced evenly: they differ by up to ten times in what they miss


class TopkSample(TopkObserver):
    """The last decode step's top-k of a few index groups and requests.

    width   queries of a request in a decode step: 1, or the draft tokens of a verify step
    groups  the sampled ones
    rows    [groups, SAMPLES, width * topk] int32 on the host, -1 pads: a request's lists in a row
    """

    def __init__(self, num_groups: int, topk: int, pinned: bool = False, width: int = 1):
        count = min(GROUPS, num_groups)
        self.groups = tuple((2 * i + 1) * num_groups // (2 * count) for i in range(count))
        shape = count, SAMPLES * width, topk
        self._lists = torch.full(shape, -1, dtype=torch.int32, pin_memory=pinned)
        self.rows = self._lists.view(count, SAMPLES, width * topk)
        self._index = {group: i for i, group in enumerate(self.groups)}

    def watches(self, group: int) -> bool:
        return group in self._index

    def decode_topk(self, group: int, topk: torch.Tensor) -> None:
        """Copy the lists of the step's first requests: topk [requests * width, K] int32."""
        if (index := self._index.get(group)) is not None:
            lists = self._lists[index]
            first = topk[: len(lists)]
            lists[: len(first), : first.shape[1]].copy_(first, non_blocking=True)
