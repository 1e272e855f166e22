"""This process's table of top-k streams on its device, which the hooks play."""

from __future__ import annotations

import logging
from functools import cache

import torch

from ess_kernels.replay_topk import replay_topk, replay_topk_reference
from sglang_ess.layout import PAGE_SLOTS
from sglang_ess.testing.topk_stream.announce import requested
from sglang_ess.testing.topk_stream.spec import table_for
from sglang_ess.testing.topk_stream.table import StreamTable

logger = logging.getLogger(__name__)


class Playback:
    """A table on a device.

    The played top-k always contains the newest position. A real indexer is trained to follow
    attention, which gives weight to a query's own position, so it selects that position
    practically always. ESS and HiSparse both have its row hot from its write on.
    """

    def __init__(self, table: StreamTable, device: torch.device | str):
        self.table = table.on(device)
        self._layers = table.layers
        on_device = torch.device(device).type == "cuda"
        self._replay = replay_topk if on_device else replay_topk_reference

    def replace(
        self,
        topk: torch.Tensor,
        lengths: torch.Tensor,
        page_table: torch.Tensor,
        layer_id: int,
        as_slots: bool,
    ) -> None:
        """Overwrite a decode step's top-k [q, K] int32 of a layer, see ess_kernels.replay_topk.

        lengths [q] int32, page_table [q, pages] int32: of the requests
        as_slots: write slots, not positions
        """
        place = layer_id % self._layers
        self._replay(topk, lengths, page_table, self.table, place, PAGE_SLOTS, as_slots)


@cache
def playback(topk: int, layers: int, device: torch.device) -> Playback:
    """Return the playback for a model with this top-k and number of layers.

    It is made at the first decode step. SGLang runs two steps before it captures one, so no
    capture comes first.
    Raises: RuntimeError in a capture; ValueError as table_for.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a table of top-k streams must be loaded before a CUDA graph is captured: got a "
            "capture first. Add --disable-cuda-graph."
        )
    table = table_for(requested(), topk, layers)
    logger.warning(
        "top-k stream %s (%s) plays in decode: %d layers, contexts %s, %.1f MiB on %s. Outputs "
        "are wrong.",
        requested(), table.note, table.layers, ", ".join(map(str, table.contexts)),
        table.device_bytes / 2**20, device,
    )  # fmt: skip
    return Playback(table, device)
