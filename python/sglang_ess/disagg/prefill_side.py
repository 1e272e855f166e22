"""On a prefill node: what the last positions of each prompt select, until the prompt is sent.

A prompt's chunks come one after another; the last one's record stays.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_ess.disagg import payload
from sglang_ess.tiers.warmup_window import warm_spans
from sglang_ess.trace.trace import slots_to_positions

logger = logging.getLogger(__name__)


class PromptEndRecorder:
    """Positions selected by the last WARMUP_QUERIES queries of each request's last pass.

    num_layers: that record; num_slots: of the pool
    """

    def __init__(self, num_layers: int, num_slots: int):
        self._num_layers = num_layers
        self._scratch = np.zeros(num_slots, np.uint8)
        # Row of the request table -> (request, positions [queries, K] of each layer).
        self._rows: dict[int, tuple[str, list[np.ndarray]]] = {}
        self.failures = 0

    def record(
        self,
        layer: int,
        rids: Sequence[str],
        spans: Sequence[tuple[int, int, int]],
        topk: np.ndarray,
        lengths: np.ndarray,
        req_to_token: np.ndarray,
    ) -> None:
        """One layer of one prefill pass.

        layer counts from 0; spans: (row, prefix, tokens) of each request, in query order
        topk [T, K] int32 slots, -1 pads; lengths [T] int32 positions each query sees
        """
        ends = warm_spans([tokens for _, _, tokens in spans])
        for rid, (row, _, _), (first, end) in zip(rids, spans, ends, strict=True):
            held = self._rows.get(row)
            if held is None or held[0] != rid:
                none = np.empty((0, topk.shape[1]), np.int32)
                held = self._rows[row] = (rid, [none] * self._num_layers)
            held[1][layer] = slots_to_positions(
                topk[first:end],
                np.full(end - first, row, np.int64),
                lengths[first:end],
                req_to_token,
                self._scratch,
            )

    def write(self, req: Any, item: np.ndarray) -> None:
        """The payload of a request whose prompt is done into its item [ITEM_BYTES] uint8."""
        rid, layers = self._rows.pop(req.kv.req_pool_idx, (None, []))
        if rid == req.rid and req.bootstrap_room is not None:
            tokens = len(req.origin_input_ids)
            payload.encode(layers, tokens, req.bootstrap_room, item)


active: PromptEndRecorder | None = (
    None  # of this process; the attention backend of a prefill node sets it
)


def write(req: Any, item: np.ndarray) -> None:
    """PromptEndRecorder.write, if this process records. A failure costs a warm-up, no request."""
    if active is None:
        return
    try:
        active.write(req, item)
    except Exception as error:
        item[: payload.HEADER.size] = 0
        active.failures += 1
        if active.failures == 1:
            logger.warning("ESS: no warm-up ids are sent: %s: %s", type(error).__name__, error)
