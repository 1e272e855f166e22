"""What the recall benchmark changes in a running engine: other selections, wrong rows.

install() puts all of them in a scheduler's process, asleep; each asks at its turn which is awake.
CHANGES has them by name. The CPU platform's, whose hot tier is HotCache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving.engines import run_recorded_scheduler, wrap

CHANGE_VAR = "ESS_BENCH_CHANGE"  # a file that holds the name of the change that is awake
NONE, LAST_K = "none", "last k"
WRONG_BEST, WRONG_RANDOM, STALE = "wrong row, best score", "wrong row, any", "stale rows"
CHANGES = {
    LAST_K: "the last k positions stand for the indexer's top-k, in prefill and decode",
    WRONG_BEST: "decode: in each layer, the slot that a query's indexer scores highest resolves to "
    "the hot row of the slot beside it in the list",
    WRONG_RANDOM: "the same, of a slot drawn from the list",
    STALE: "neither writes nor freeing touch hot rows: a reused slot's former row is a hit",
}


def run_changed_scheduler(*args, **kwargs) -> None:
    """A recorded scheduler with all changes; CHANGE_VAR names the file that wakes one."""
    path = Path(os.environ[CHANGE_VAR])
    install(path.read_text)
    run_recorded_scheduler(*args, **kwargs)


def install(awake: Callable[[], str | None]) -> None:
    """awake: gives the name of the change that is awake now; any other name: none is."""
    _last_k(awake)
    _wrong_rows(awake)
    _stale_rows(awake)


def _last_k(awake: Callable[[], str | None]) -> None:
    import torch

    from sglang_ess.cpu import indexer

    def make(select):
        def call(scores, lengths, req_rows, req_to_token, k):
            if awake() != LAST_K:
                return select(scores, lengths, req_rows, req_to_token, k)
            positions = (lengths - k).clamp(min=0)[:, None] + torch.arange(k)
            slots = req_to_token[req_rows[:, None], positions.clamp(max=req_to_token.shape[1] - 1)]
            return torch.where(positions < lengths[:, None], slots, -1).int()

        return call

    wrap(indexer, "topk_select", make)


def _wrong_rows(awake: Callable[[], str | None]) -> None:
    import torch

    from sglang_ess.cpu import indexer
    from sglang_ess.tiers import HotCache

    best = torch.empty(0)  # the slot with the highest score, of each query of the last selection
    drawn = torch.Generator().manual_seed(0)

    def remembering(select):
        def call(scores, lengths, req_rows, req_to_token, k):
            nonlocal best
            if awake() == WRONG_BEST and scores.shape[1]:
                later = torch.arange(scores.shape[1]) >= lengths[:, None]
                best = req_to_token[req_rows, scores.masked_fill(later, -torch.inf).argmax(1)]
            return select(scores, lengths, req_rows, req_to_token, k)

        return call

    def misled(plan):
        def call(cache, topk, *args, **kwargs):
            found, change = plan(cache, topk, *args, **kwargs), awake()
            lookups = topk[found.queries]
            if change == WRONG_BEST and len(best) == len(topk):
                column = (lookups == best[found.queries, None]).int().argmax(1, keepdim=True)
            elif change == WRONG_RANDOM:
                count = (lookups >= 0).sum(1, keepdim=True)
                column = (torch.rand(count.shape, generator=drawn) * count).long()
            else:
                return found
            beside = torch.where(column > 0, column - 1, min(1, lookups.shape[1] - 1))
            wrong = found.rows.gather(1, beside)
            found.rows.scatter_(1, column, torch.where(wrong < 0, found.rows[:, :1], wrong))
            return found

        return call

    wrap(indexer, "topk_select", remembering)
    wrap(HotCache, "plan", misled)


def _stale_rows(awake: Callable[[], str | None]) -> None:
    from sglang_ess.tiers import HotCache

    def make(function):
        def call(cache, *args, **kwargs):
            return 0 if awake() == STALE else function(cache, *args, **kwargs)

        return call

    for name in ("install", "refill", "invalidate"):
        wrap(HotCache, name, make)
