"""SGLang's metadata of a transferred request, with one buffer more: the warm-up payload.

SGLang pairs the buffers of two nodes by their place and sends as many as both have, so a buffer
at the end leaves a plain peer alone: what it does not send stays zero here, and what it does
not have it does not get. (It logs an error line once per peer that the numbers differ.)
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from sglang.srt.disaggregation.utils import MetadataBuffers

from sglang_ess.disagg import prefill_side
from sglang_ess.disagg.payload import HEADER, ITEM_BYTES


class EssMetadataBuffers(MetadataBuffers):
    """MetadataBuffers with warmup [size, ITEM_BYTES] uint8, an item of warmup_payload each.

    arrived: of requests that have come and not started, by bootstrap room; the oldest go
    first when there are more than the buffers could hold.
    """

    def __init__(self, size: int, *args, **kwargs):
        super().__init__(size, *args, **kwargs)
        # On the host, as all of them are but on an NPU; pages are taken when they are written.
        self.warmup = torch.zeros(size, ITEM_BYTES, dtype=torch.uint8)
        self.arrived: OrderedDict[int, np.ndarray] = OrderedDict()

    def get_buf_infos(self):
        pointers, lengths, item_lengths = super().get_buf_infos()
        pointers.append(self.warmup.data_ptr())
        lengths.append(self.warmup.nbytes)
        item_lengths.append(ITEM_BYTES)
        return pointers, lengths, item_lengths

    def set_buf(self, req) -> None:
        """Prefill: fill the request's items."""
        super().set_buf(req)
        item = self.warmup[req.metadata_buffer_index].numpy()
        item[: HEADER.size] = 0
        prefill_side.write(req, item)

    def get_buf(self, idx: int):
        """Decode: what has arrived for the request of the items idx."""
        item = self.warmup[idx].numpy()
        if item[: HEADER.size].any():
            self.arrived[int(self.bootstrap_room[idx, 0])] = item.copy()
            if len(self.arrived) > len(self.warmup):
                self.arrived.popitem(last=False)
        return super().get_buf(idx)

    def clear_slot(self, idx: int) -> None:
        """The next owner's prefill may be a plain one, which writes nothing here."""
        super().clear_slot(idx)
        self.warmup[idx, : HEADER.size] = 0
