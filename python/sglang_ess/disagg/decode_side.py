"""On a decode node: takes the warm-up ids of arriving requests and warms the hot tier with them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from sglang_ess.disagg.payload import NUM_CLASSES, PayloadError, decode
from sglang_ess.mem_cache.pool import EssTokenToKVPool

logger = logging.getLogger(__name__)

IDS = "ess_warm_up_ids"  # attribute of a request: Groups, or None where no payload came
# For each index group: sets of positions by the age of their last use, the oldest first.
Groups = list[list[np.ndarray]]


class RequestWarmup:
    """Decodes each request's payload once, and warms the hot tier with it once.

    In between, the decoded ids are an attribute of the request (IDS), so that they disappear with a
    request that never starts.
    buffers: the scheduler's EssMetadataBuffers
    refused: payloads that broke the format
    """

    def __init__(self, pool: EssTokenToKVPool, buffers: Any):
        self._pool, self._buffers = pool, buffers
        self.refused = 0

    def working_set(self, req: Any) -> int | None:
        """Rows that the request needs in its largest index group, at least; None without a payload.

        Counted over the prompt's last 16 queries, close to the window that working sets are
        measured in. A payload omits what exceeds its size, so the true number may be larger.
        """
        ids = self._take(req)
        if ids is None:
            return None
        recent = [ages[1:] if len(ages) == NUM_CLASSES else ages for ages in ids]
        return max(sum(map(len, ages)) for ages in recent)

    def warm(self, req: Any, req_to_token: torch.Tensor) -> None:
        """Make the request's rows hot, those of its last query as the most recently used.

        req_to_token: SGLang's table
        """
        ids = self._take(req)
        delattr(req, IDS)
        if ids is None:
            return
        width = self._pool.capacity.geometry.topk
        positions = [_as_queries(ages, width) for ages in ids]
        self._pool.warm_request(req_to_token[req.kv.req_pool_idx], positions)

    def _take(self, req: Any) -> Groups | None:
        if not hasattr(req, IDS):
            item = self._buffers.arrived.pop(req.bootstrap_room, None)
            setattr(req, IDS, None if item is None else self._decode(item, req))
        return getattr(req, IDS)

    def _decode(self, item: np.ndarray, req: Any) -> Groups | None:
        groups = len(self._pool.groups)
        try:
            return decode(item, groups, len(req.origin_input_ids), req.bootstrap_room)
        except PayloadError as error:
            self.refused += 1
            if self.refused == 1:
                logger.warning(
                    "ESS: warm-up ids of a prefill node are ignored (logged once): %s", error,
                )  # fmt: skip
            return None


def _as_queries(ages: list[np.ndarray], width: int) -> torch.Tensor:
    """The positions of a group's sets, in order, as queries [n, width] int32, -1 pads."""
    parts = [age[i : i + width] for age in ages for i in range(0, len(age), width)]
    queries = np.full((len(parts), width), -1, np.int32)
    for query, part in zip(queries, parts, strict=True):
        query[: len(part)] = part
    return torch.from_numpy(queries)
