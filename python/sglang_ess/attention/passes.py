"""Sparse attention over a hot tier, in as many passes as the hot tier makes necessary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from sglang_ess.tiers import HotCache, Plan

# (queries, hot rows [n, K] int32) -> (out [n, heads, dim], lse [n, heads], natural log)
Attend = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def attend_hot(
    cache: HotCache,
    topk: torch.Tensor,
    attend: Attend,
    check: Callable[[Plan], None],
    same_step: bool = False,
) -> torch.Tensor:
    """attend over the rows of topk [queries, K] int32 slots, -1 pads: out [queries, heads, dim].

    A query is attended whole where the hot tier holds its top-k: then the result is that of
    one tier, bit for bit. Else its parts are merged by log-sum-exp (invariant 5).
    check: called for each plan once its rows are there; same_step: see HotCache.plan
    """
    passes = _passes(cache, topk, check, same_step)
    plan = next(passes)
    out, lse = attend(plan.queries, plan.rows)
    if plan.stop is None:
        return out
    outs, lses = [out], [lse]
    for plan in passes:
        continues = plan.column > 0
        out, lse = attend(plan.queries, plan.rows)
        if continues:
            merge_into(outs[-1][-1:], lses[-1][-1:], out[:1], lse[:1])
            out, lse = out[1:], lse[1:]
        if len(out):  # else the pass was one more part of a query that may go on
            outs.append(out)
            lses.append(lse)
    return torch.cat(outs)


def _passes(cache: HotCache, topk: torch.Tensor, check, same_step) -> Iterator[Plan]:
    start: tuple[int, int] | None = (0, 0)
    while start is not None:
        plan = cache.plan(topk, start, same_step)
        cache.fetch(plan)
        check(plan)
        yield plan
        start = plan.stop


def merge_into(out, lse, other_out, other_lse) -> None:
    """Fold attention over other rows into out [n, heads, dim] and lse [n, heads], in place.

    A part without rows (lse -inf) changes nothing, bit for bit.
    """
    total = torch.logaddexp(lse, other_lse)
    some = total > float("-inf")
    shares = [
        torch.where(some, torch.exp(part - total), torch.zeros_like(total)).unsqueeze(-1)
        for part in (lse, other_lse)
    ]
    out.copy_(out.float() * shares[0] + other_out.float() * shares[1])
    lse.copy_(total)
