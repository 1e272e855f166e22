"""SGLang's metadata buffers of a transferred request, and one more for the warm-up payload.

SGLang pairs the buffers of two nodes by their index and sends as many as both have. A buffer at
the end therefore does not disturb a plain peer: what a plain prefill node does not send stays zero
here, and a plain decode node is sent nothing more. SGLang logs one error line per peer whose number
of buffers differs.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from sglang.srt.disaggregation.utils import MetadataBuffers

from sglang_ess.disagg import prefill_side
from sglang_ess.disagg.payload import HEADER, ITEM_BYTES


class EssMetadataBuffers(MetadataBuffers):
    """MetadataBuffers with warmup [size, ITEM_BYTES] uint8, one item of payload.py each.

    arrived: items of requests that have arrived and not started, by bootstrap room. When there
        are more than the buffers hold, the oldest is dropped.
    """

    def __init__(self, size: int, *args, **kwargs):
        super().__init__(size, *args, **kwargs)
        # On the host, as all buffers are except on an NPU. Unwritten pages take no memory.
        self.warmup = torch.zeros(size, ITEM_BYTES, dtype=torch.uint8)
        self.arrived: OrderedDict[int, np.ndarray] = OrderedDict()

    def get_buf_infos(self):
        pointers, lengths, item_lengths = super().get_buf_infos()
        pointers.append(self.warmup.data_ptr())
        lengths.append(self.warmup.nbytes)
        item_lengths.append(ITEM_BYTES)
        return pointers, lengths, item_lengths

    def set_buf(self, req) -> None:
        """Prefill: fill the request's items, warm-up payload included."""
        super().set_buf(req)
        item = self.warmup[req.metadata_buffer_index].numpy()
        item[: HEADER.size] = 0
        prefill_side.write(req, item)

    def get_buf(self, idx: int):
        """Decode: take what has arrived in the items idx."""
        item = self.warmup[idx].numpy()
        if item[: HEADER.size].any():
            self.arrived[int(self.bootstrap_room[idx, 0])] = item.copy()
            if len(self.arrived) > len(self.warmup):
                self.arrived.popitem(last=False)
        return super().get_buf(idx)

    def clear_slot(self, idx: int) -> None:
        """Clear the items idx. The next owner's prefill node may not write a payload."""
        super().clear_slot(idx)
        self.warmup[idx, : HEADER.size] = 0
