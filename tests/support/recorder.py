"""Records which positions the indexer selected, from inside a running engine."""

import os
import pickle

import numpy as np

from tests.support.engine import RECORD_VAR


def install() -> None:
    """Wrap the platform's indexer; every call appends to the file named by RECORD_VAR."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer

    from sglang_ess.cpu.indexer import indexer_forward
    from sglang_ess.cpu.platform import DISPATCH_KEY

    file = open(os.environ[RECORD_VAR], "ab")

    def recording(indexer, x, q_lora, positions, forward_batch, layer_id, *args, **kwargs):
        slots = indexer_forward(
            indexer, x, q_lora, positions, forward_batch, layer_id, *args, **kwargs
        )
        for row in _rows(forward_batch, slots.numpy()):
            pickle.dump((layer_id, *row), file)
        file.flush()
        return slots

    BaseFusedOp.register_oot_forward(Indexer, recording, DISPATCH_KEY)


def _rows(forward_batch, slots):
    """(rid, first query position, selected positions [queries, top-k]) of each request."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    table = get_attn_backend().req_to_token.numpy()
    decode = forward_batch.forward_mode.is_decode()
    start = 0
    for i, (rid, row) in enumerate(
        zip(forward_batch.rids, forward_batch.req_pool_indices, strict=True)
    ):
        total = int(forward_batch.seq_lens[i])
        tokens = 1 if decode else int(forward_batch.extend_seq_lens_cpu[i])
        of_slot = np.full(table[row, :total].max() + 2, -1, np.int32)
        of_slot[table[row, :total]] = np.arange(total)
        yield rid, total - tokens, of_slot[slots[start : start + tokens]]
        start += tokens
