"""On a prefill node: which rows the end of each prompt selects, kept until the prompt is sent.

A prompt may be computed in chunks. The record of its last chunk is the one that is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_ess.disagg import payload
from sglang_ess.tiers.topk_observer import PassQueries, TopkObserver
from sglang_ess.tiers.warmup_window import warm_spans
from sglang_ess.trace.trace import slots_to_positions

logger = logging.getLogger(__name__)


class PromptEndRecorder(TopkObserver):
    """Records the positions that the last WARMUP_QUERIES queries of each request select.

    num_groups: index groups whose top-k lists are observed; num_slots: slots of the pool
    failures: payloads that could not be written
    """

    def __init__(self, num_groups: int, num_slots: int):
        self._num_groups = num_groups
        self._scratch = np.zeros(num_slots, np.uint8)
        # Row of the request table -> (request, positions [queries, K] of each group).
        self._rows: dict[int, tuple[str, list[np.ndarray]]] = {}
        self._request_ids: Sequence[str] = ()
        self._queries: PassQueries | None = None
        self.failures = 0

    def begin_pass(self, request_ids: Sequence[str], queries: PassQueries) -> None:
        self._request_ids, self._queries = request_ids, queries

    def prefill_topk(self, group: int, topk: torch.Tensor) -> None:
        """Record a group's lists topk [T, K] int32 slots, -1 pads, of the pass that began last."""
        queries = self._queries
        assert queries is not None and queries.spans is not None, "a prefill pass has begun"
        slots, lengths = topk.numpy(), queries.lengths.numpy()
        ends = warm_spans([tokens for _, _, tokens in queries.spans])
        for rid, (row, _, _), (first, end) in zip(
            self._request_ids, queries.spans, ends, strict=True
        ):
            known = self._rows.get(row)
            if known is None or known[0] != rid:
                none = np.empty((0, topk.shape[1]), np.int32)
                known = self._rows[row] = (rid, [none] * self._num_groups)
            known[1][group] = slots_to_positions(
                slots[first:end],
                np.full(end - first, row, np.int64),
                lengths[first:end],
                queries.req_to_token.numpy(),
                self._scratch,
            )

    def write(self, req: Any, item: np.ndarray) -> None:
        """Write the payload of a request whose prompt is done into its item [ITEM_BYTES] uint8."""
        rid, lists = self._rows.pop(req.kv.req_pool_idx, (None, []))
        if rid == req.rid and req.bootstrap_room is not None:
            tokens = len(req.origin_input_ids)
            payload.encode(lists, tokens, req.bootstrap_room, item)


# This process's recorder: the platform sets it where it builds a prefill node's backend.
active: PromptEndRecorder | None = None


def write(req: Any, item: np.ndarray) -> None:
    """PromptEndRecorder.write, if this process records. A failure leaves the request cold."""
    if active is None:
        return
    try:
        active.write(req, item)
    except Exception as error:
        item[: payload.HEADER.size] = 0
        active.failures += 1
        if active.failures == 1:
            logger.warning("ESS: no warm-up ids are sent: %s: %s", type(error).__name__, error)
