"""Decode attention on the CPU over a hot tier, in as many passes as its size makes necessary."""

from __future__ import annotations

import numpy as np
import torch

from sglang_ess.cpu.attention_backend import attend_rows
from sglang_ess.tiers import HotCache, Plan
from sglang_ess.tiers.contract import CANARY_ROWS


class Canary:
    """Compares some of the rows that attention is about to read with their host rows.

    rate: share of the plans that are checked, in [0, 1]
    """

    def __init__(self, rate: float):
        self._rate, self._random = rate, np.random.default_rng(0)

    def check(self, cache: HotCache, plan: Plan, layer_id: int) -> None:
        """Raises: RowCorruption for a hot row that differs."""
        if self._rate and self._random.random() < self._rate:
            rows = plan.rows.numpy()
            rows = rows[rows >= 0]
            if len(rows):
                picks = self._random.choice(rows, CANARY_ROWS).astype(np.int64)
                cache.check_rows(picks, f"layer {layer_id}")


def attend_hot(
    cache: HotCache, layer, q: torch.Tensor, q_rope: torch.Tensor, topk: torch.Tensor,
    canary: Canary, same_step: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Plan, fetch and attend until every query is done: out [T, heads, 512] in q's dtype.

    layer: SGLang's RadixAttention, of which the scale and layer_id are read
    q [T, heads, 512], q_rope [T, heads, 64]; topk [T, K] int32 slots, -1 pads
    canary: checks each plan once its rows are fetched
    same_step: these are more queries of the step before; see HotCache.plan

    A query whose top-k the hot tier holds is attended in one piece, and the result is that of one
    tier, bit for bit. Otherwise its parts are merged by log-sum-exp in float32 and rounded once,
    so their number only adds float32 error.
    """
    outs: list[torch.Tensor] = []
    parts: tuple[torch.Tensor, torch.Tensor] | None = None  # of the query that is cut, so far
    start: tuple[int, int] | None = (0, 0)
    while start is not None:
        plan = cache.plan(topk, start, same_step)
        cache.fetch(plan)
        canary.check(cache, plan, layer.layer_id)
        start, first, last = plan.stop, plan.first, plan.queries.stop
        is_cut = start is not None and start[1] > 0  # the pass ends inside its only query
        if plan.column > 0 or is_cut:
            query = slice(first, first + 1)
            part = attend_rows(
                layer, q[query].float(), q_rope[query].float(), cache.rows, plan.rows[:1]
            )
            if parts is None:
                parts = part
            else:
                merge_into(*parts, *part)
            if is_cut:
                continue
            outs.append(parts[0].to(q.dtype))
            parts, first = None, first + 1
        if first < last or not outs:
            whole = slice(first, last)
            rows = plan.rows[first - plan.first :]
            outs.append(attend_rows(layer, q[whole], q_rope[whole], cache.rows, rows)[0])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def merge_into(out, lse, other_out, other_lse) -> None:
    """Fold attention over other rows into out [n, heads, dim] float32 and lse [n, heads], in place.

    lse is the natural logarithm. A part without rows (lse -inf) changes nothing, bit for bit.
    """
    total = torch.logaddexp(lse, other_lse)
    some = total > float("-inf")
    shares = [
        torch.where(some, torch.exp(part - total), torch.zeros_like(total)).unsqueeze(-1)
        for part in (lse, other_lse)
    ]
    out.copy_(out * shares[0] + other_out * shares[1])
    lse.copy_(total)
