"""Least recently used: the production HotCache, without row contents."""

import numpy as np
import torch

from sglang_ess.sim.policies.base import does_not_fit
from sglang_ess.tiers import HotCache


class Lru:
    """HotCache with the interface of base.Policy."""

    def __init__(self, rows: int, num_slots: int):
        self.cache = HotCache(None, rows, num_slots)

    def step(self, topk: np.ndarray) -> np.ndarray:
        """As Policy.step."""
        if self.cache.plan(torch.from_numpy(topk)).stop is not None:
            distinct = len(np.unique(topk[topk >= 0]))
            raise ValueError(does_not_fit(self.cache.num_rows, distinct))
        return self.cache.query_misses.copy()
