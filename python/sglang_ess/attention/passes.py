"""Decode attention on the CPU over a hot tier, in as many passes as its size makes necessary."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from sglang_ess.cpu.attention_backend import attend_all, attend_rows, with_sink
from sglang_ess.tiers import HotCache, Plan
from sglang_ess.tiers.contract import CANARY_ROWS

logger = logging.getLogger(__name__)


class Canary:
    """Compares some of the rows that attention is about to read with their host rows.

    rate: share of the plans that are checked, in [0, 1]
    """

    def __init__(self, rate: float):
        self._rate, self._random = rate, np.random.default_rng(0)

    def check(self, cache: HotCache, plan: Plan, layer_id: int, layer: int = 0) -> None:
        """layer: position in the index group. Raises: RowCorruption for a hot row that differs."""
        if self._rate and self._random.random() < self._rate:
            rows = plan.rows.numpy()
            rows = rows[rows >= 0]
            if len(rows):
                picks = self._random.choice(rows, CANARY_ROWS).astype(np.int64)
                cache.check_rows(picks, f"layer {layer_id}", layer=layer)


class EarlyFetch:
    """Fetches the missed rows of an index group, layer after layer, behind the caller's work.

    The rows of the later layers are known when the first one's plan is done. One thread copies
    them in the order of the layers, as one link would.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ess-fetch")
        self._copies: list[Future[None]] = []

    def start(self, cache: HotCache, plan: Plan) -> None:
        """Begin to fetch every layer. Valid until the next plan: wait for each before that."""
        layers = range(cache.num_layers)
        self._copies = [self._thread.submit(cache.fetch, plan, layer) for layer in layers]

    def wait(self, layer: int) -> None:
        """Wait until a layer's rows are there."""
        self._copies[layer].result()

    def drop(self) -> None:
        """Wait for the copies of an abandoned step; they use buffers of the next one."""
        copies, self._copies = self._copies, []
        for copy in copies:
            if (error := copy.exception()) is not None:
                logger.warning(
                    "ESS: a fetch of a decode step that was given up has failed: %s: %s",
                    type(error).__name__, error,
                )  # fmt: skip


class GroupStep:
    """One decode step of an index group: its plan, made in the first layer and executed in each.

    cache   the group's hot tier
    topk    blocks [queries, K] int32 slots, -1 pads; a plan covers at most one block
    fetches the copier of later layers' rows
    canary  checks each plan once its rows are there

    Each layer takes the same passes over the same rows, in its own copies of them. A pass changes
    a layer's hot rows only when the layer executes it, so that layers may be at different passes.
    Where the whole step is one pass, all layers' rows are fetched from its plan on.
    """

    def __init__(
        self, cache: HotCache, topk: Sequence[torch.Tensor], fetches: EarlyFetch, canary: Canary
    ):
        self.cache, self._topk = cache, topk
        self._fetches, self._canary = fetches, canary
        self._plans: list[list[Plan]] = [[] for _ in topk]  # by block, for the later layers
        self._early = False

    def passes(self, block: int, layer: int, layer_id: int) -> Iterator[Plan]:
        """Yield the plans of a block whose rows are there in this layer of the group."""
        for plan in self._plans[block] if layer else self._make(block):
            if self._early:
                self._fetches.wait(layer)
            else:
                self.cache.fetch(plan, layer)
            # The state that tells whose row is whose is that of the last plan.
            if layer == 0 or plan is self._plans[-1][-1]:
                self._canary.check(self.cache, plan, layer_id, layer)
            yield plan

    def _make(self, block: int) -> Iterator[Plan]:
        start: tuple[int, int] | None = (0, 0)
        while start is not None:
            plan = self.cache.plan(self._topk[block], start, same_step=block > 0)
            start = plan.stop
            if self.cache.num_layers > 1:
                plan = self._keep(block, plan)
            yield plan

    def _keep(self, block: int, plan: Plan) -> Plan:
        """Keep a plan for the later layers, and begin to fetch their rows if it is the only one."""
        if len(self._topk) > 1 or plan.stop is not None or self._plans[block]:
            plan = plan.kept()
        elif len(plan.miss_slots) and self.cache.keeps_installed():
            self._early = True
            self._fetches.start(self.cache, plan)
        self._plans[block].append(plan)
        return plan


def attend_passes(
    plans: Iterable[Plan], rows: torch.Tensor, layer, q: torch.Tensor, q_rope: torch.Tensor
) -> torch.Tensor:
    """Attend to each plan's rows until every query is done: out [T, heads, 512] in q's dtype.

    plans: of one block of queries, in order; each is asked for when its rows may be fetched
    rows: the layer's hot rows; layer: SGLang's RadixAttention, of which the scale is read
    q [T, heads, 512], q_rope [T, heads, 64]

    A query whose top-k the hot tier holds is attended in one piece, and the result is that of one
    tier, bit for bit. Otherwise its parts are merged by log-sum-exp in float32 and rounded once,
    so their number only adds float32 error.
    """
    outs: list[torch.Tensor] = []
    parts: tuple[torch.Tensor, torch.Tensor] | None = None  # of the query that is cut, so far
    for plan in plans:
        first, last = plan.first, plan.queries.stop
        is_cut = plan.stop is not None and plan.stop[1] > 0  # the pass ends inside its only query
        if plan.column > 0 or is_cut:
            query = slice(first, first + 1)
            part = attend_rows(layer, q[query].float(), q_rope[query].float(), rows, plan.rows[:1])
            if parts is None:
                parts = part
            else:
                merge_into(*parts, *part)
            if is_cut:
                continue
            outs.append(with_sink(layer, *parts).to(q.dtype))
            parts, first = None, first + 1
        if first < last or not outs:
            whole = slice(first, last)
            hot_rows = plan.rows[first - plan.first :]
            outs.append(attend_all(layer, q[whole], q_rope[whole], rows, hot_rows))
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
