"""Fetches rows ahead in the draft window: a verify step is over, and the link is idle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_ess.tiers.hot_cache import HotCache
from sglang_ess.tiers.topk_observer import PassQueries, TopkObserver


class DraftWindow(TopkObserver):
    """Makes the runner-ups of each request's last kept query hot, before the next drafts.

    caches: of the index groups; topk: runner-ups to choose from
    most: rows fetched of a request and group
    Scores of the lists come from the indexer. The copies run on the thread that calls `accepted`,
    so that no demanded fetch waits for them; that thread does.
    """

    def __init__(self, caches: Sequence[HotCache], topk: int, most: int):
        self._caches, self._topk, self._most = caches, topk, most
        self._width = 1
        self._found: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # group -> slots, scores

    @property
    def runner_ups(self) -> int | None:
        return self._topk

    def watches(self, group: int) -> bool:
        return False

    def begin_pass(self, request_ids: Sequence[str], queries: PassQueries) -> None:
        self._found.clear()
        self._width = queries.width

    def decode_scores(
        self, group: int, topk: torch.Tensor, runner_ups: torch.Tensor, scores: torch.Tensor
    ) -> None:
        self._found[group] = runner_ups.numpy(), scores.numpy()[:, topk.shape[1] :]

    def accepted(self, lengths: Sequence[int]) -> None:
        last = np.arange(len(lengths)) * self._width + np.asarray(lengths, np.int64) - 1
        for group, (slots, scores) in self._found.items():
            order = np.argsort(-scores[last], axis=1, kind="stable")  # NaN, of pads, comes last
            best = np.take_along_axis(slots[last], order, axis=1)
            self._caches[group].fetch_ahead(best, self._most)
        self._found.clear()
