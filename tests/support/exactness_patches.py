"""What engines of tests/gpu have installed, so that they can be compared and understood."""

import functools
import os
import pickle
import zlib

import torch

from tests.support.engine import RECORD_VAR

LAST = torch.iinfo(torch.int32).max


def sorted_topk() -> None:
    """SGLang's top-k lists come in the order of the slots, pads last.

    Its kernels append with atomics, so that sums run in another order every time, one tier
    against itself too (sglang/kernels/jit/csrc/deepseek_v4/topk_v2.cuh).
    """
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import DSATopKBackend

    select = DSATopKBackend.topk_transform

    @functools.wraps(select)
    def sorting(*args, **kwargs):
        slots = select(*args, **kwargs)
        slots = slots.masked_fill(slots < 0, LAST).sort(dim=-1).values
        return slots.masked_fill_(slots == LAST, -1)

    DSATopKBackend.topk_transform = sorting


def retract_group() -> None:
    """Retract at every third step while a request of the group "retract" runs."""
    import sglang.srt.managers.scheduler as module

    update = module.Scheduler.update_running_batch
    module.TEST_RETRACT_INTERVAL = 3

    def updating(scheduler, batch):
        module.TEST_RETRACT = any(req.rid.startswith("retract:") for req in batch.reqs)
        return update(scheduler, batch)

    module.Scheduler.update_running_batch = updating


def layers() -> None:
    """Append to RECORD_VAR's file, for each attention call outside of graphs: its mode, its
    layer, and a checksum of each query's output and of what it selected.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    attend, file = RadixAttention.forward, None

    @functools.wraps(attend)
    def recording(self, q, k, v, forward_batch, *args, **kwargs):
        nonlocal file
        out = attend(self, q, k, v, forward_batch, *args, **kwargs)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return out
        file = file or open(os.environ[RECORD_VAR], "ab")
        topk = kwargs.get("topk_indices")
        sums = [None if rows is None else _checksums(rows) for rows in (out, topk)]
        pickle.dump((forward_batch.forward_mode.name, self.layer_id, *sums), file)
        file.flush()
        return out

    RadixAttention.forward = recording


def _checksums(rows: torch.Tensor) -> list[int]:
    host = rows.detach().contiguous().cpu().view(len(rows), -1).view(torch.uint8).numpy()
    return [zlib.crc32(row.tobytes()) for row in host]
