"""Sparse attention over a hot tier, in as many passes as the hot tier makes necessary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sglang_ess.tiers import HotCache, Plan

# (queries, hot rows [n, K] int32, dtype) -> (out [n, heads, dim] of dtype, lse [n, heads], natural
# log)
Attend = Callable[[slice, torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]


def attend_hot(
    cache: HotCache,
    topk: torch.Tensor,
    attend: Attend,
    check: Callable[[Plan], None],
    dtype: torch.dtype,
    same_step: bool = False,
) -> torch.Tensor:
    """attend over topk [queries, K] int32 slots, -1 pads: out [queries, heads, dim] of dtype.

    A query is attended whole where the hot tier holds its top-k: then the result is that of
    one tier, bit for bit. Else its parts are merged by log-sum-exp (invariant 5), in float32, and
    rounded once: however many they are, only float32's error grows with them.
    check: called for each plan once its rows are there; same_step: see HotCache.plan
    """
    outs: list[torch.Tensor] = []
    parts: tuple[torch.Tensor, torch.Tensor] | None = None  # of the query under way
    for plan in _passes(cache, topk, check, same_step):
        first, goes_on = plan.first, plan.stop is not None and plan.stop[1] > 0
        if plan.column > 0 or goes_on:  # a part of its first query; if not the last, its only one
            part = attend(slice(first, first + 1), plan.rows[:1], torch.float32)
            if parts is None:
                parts = part
            else:
                merge_into(*parts, *part)
            if goes_on:
                continue
            outs.append(parts[0].to(dtype))
            parts, first = None, first + 1
        if first < plan.queries.stop or not outs:
            whole = attend(slice(first, plan.queries.stop), plan.rows[first - plan.first :], dtype)
            outs.append(whole[0])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _passes(cache: HotCache, topk: torch.Tensor, check, same_step) -> Iterator[Plan]:
    start: tuple[int, int] | None = (0, 0)
    while start is not None:
        plan = cache.plan(topk, start, same_step)
        cache.fetch(plan)
        check(plan)
        yield plan
        start = plan.stop


def merge_into(out, lse, other_out, other_lse) -> None:
    """Fold attention over other rows into out [n, heads, dim] float32 and lse [n, heads], in place.

    A part without rows (lse -inf) changes nothing, bit for bit.
    """
    total = torch.logaddexp(lse, other_lse)
    some = total > float("-inf")
    shares = [
        torch.where(some, torch.exp(part - total), torch.zeros_like(total)).unsqueeze(-1)
        for part in (lse, other_lse)
    ]
    out.copy_(out * shares[0] + other_out * shares[1])
    lse.copy_(total)
