"""On a decode node: the warm-up ids of requests that have arrived, and their way into the tier."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from sglang_ess.disagg.payload import NUM_CLASSES, PayloadError, decode
from sglang_ess.mem_cache.pool import EssTokenToKVPool
from sglang_ess.tiers.warmup_window import WARMUP_QUERIES

logger = logging.getLogger(__name__)

IDS = "ess_warm_up_ids"  # attribute of a request: Groups, or None where nobody said
# Of a layer, oldest use first.
Groups = list[list[np.ndarray]]


class RequestWarmup:
    """Takes each request's payload when it is first asked for, and warms once.

    What was taken stays on the request (IDS) until then, so that it goes with one that never
    starts: nobody has to look through the queue for those.
    buffers: the scheduler's EssMetadataBuffers
    """

    def __init__(self, pool: EssTokenToKVPool, buffers: Any):
        self._pool, self._buffers = pool, buffers
        self.refused = 0

    def working_set(self, req: Any) -> int | None:
        """Rows that the request has at least in its largest layer; None if nobody said.

        Of the last 16 positions, near the window that working sets are measured in; a payload
        leaves out what exceeds its size.
        """
        ids = self._take(req)
        if ids is None:
            return None
        recent = [groups[1:] if len(groups) == NUM_CLASSES else groups for groups in ids]
        return max(sum(map(len, groups)) for groups in recent)

    def warm(self, req: Any, req_to_token: torch.Tensor) -> None:
        """Make the request's rows hot, those of its last query the most recently used.

        req_to_token: SGLang's table; the request's row is brought to the host if it is needed
        """
        ids = self._take(req)
        delattr(req, IDS)
        if ids is None:
            return
        table_row = req_to_token[req.kv.req_pool_idx].cpu()
        width = self._pool.capacity.geometry.topk
        for layer_id, groups in enumerate(ids, self._pool.start_layer):
            topk = _as_queries([table_row[torch.from_numpy(group)] for group in groups], width)
            for part in topk.split(WARMUP_QUERIES):
                self._pool.warm(layer_id, part)

    def _take(self, req: Any) -> Groups | None:
        if not hasattr(req, IDS):
            item = self._buffers.arrived.pop(req.bootstrap_room, None)
            setattr(req, IDS, None if item is None else self._decode(item, req))
        return getattr(req, IDS)

    def _decode(self, item: np.ndarray, req: Any) -> Groups | None:
        layers = self._pool.capacity.geometry.layers
        try:
            return decode(item, layers, len(req.origin_input_ids), req.bootstrap_room)
        except PayloadError as error:
            self.refused += 1
            if self.refused == 1:
                logger.warning(
                    "ESS: warm-up ids of a prefill node are ignored, here and from now on without "
                    "a line: %s", error,
                )  # fmt: skip
            return None


def _as_queries(groups: list[torch.Tensor], width: int) -> torch.Tensor:
    """Slots of each group as rows of a top-k [queries, width] int32, -1 pads, in order."""
    rows = [part for group in groups for part in group.split(width)]
    topk = torch.full((len(rows), width), -1, dtype=torch.int32)
    for row, part in zip(topk, rows, strict=True):
        row[: len(part)] = part
    return topk
