"""The draft window fetches the best runner-ups of each request's last kept query."""

import numpy as np
import torch

from sglang_ess.tiers import HotCache
from sglang_ess.tiers.draft_window import DraftWindow
from sglang_ess.tiers.topk_observer import PassQueries

K, REQUESTS, WIDTH, SLOTS = 4, 2, 3, 60


def begin(window):
    nothing = torch.zeros(0)
    window.begin_pass(["a", "b"], PassQueries(nothing, nothing, nothing, None, WIDTH))


def hot(cache):
    return set(np.flatnonzero(cache.slot_row >= 0).tolist())


def scored(window, group, slots, scores):
    lists = torch.zeros(REQUESTS * WIDTH, K, dtype=torch.int32)
    own = torch.full((REQUESTS * WIDTH, K), 9.0)
    window.decode_scores(group, lists, slots, torch.cat([own, scores], 1))


def test_of_the_last_kept_query_by_score():
    caches = [HotCache(None, 20, SLOTS) for _ in range(2)]
    window = DraftWindow(caches, 3, 2)
    assert window.runner_ups == 3
    slots = torch.arange(REQUESTS * WIDTH * 3, dtype=torch.int32).view(-1, 3)
    scores = torch.tensor([[1.0, 3.0, 2.0]]).repeat(REQUESTS * WIDTH, 1)
    slots[5, 0], scores[5, 0] = -1, torch.nan
    begin(window)
    scored(window, 0, slots, scores)
    scored(window, 1, slots + 20, scores.flip(1))
    window.accepted([2, 3])  # queries 1 and 5
    assert hot(caches[0]) == {4, 5, 16, 17}
    assert hot(caches[1]) == {19, 23, 24, 36}
    window.accepted([1, 1])  # nothing was scored since
    assert [cache.counters["early"] for cache in caches] == [4, 4]


def test_scores_of_an_abandoned_step_are_forgotten():
    cache = HotCache(None, 20, SLOTS)
    window = DraftWindow([cache], 3, 2)
    begin(window)
    scored(window, 0, torch.ones(6, 3, dtype=torch.int32), torch.ones(6, 3))
    begin(window)
    window.accepted([1, 1])
    assert hot(cache) == set()
