"""Records what a running engine decided, from inside it: all that rounding may turn over.

Kinds: "selection", the positions the indexer selected (-1 pads); "experts", the ids the router
chose; "rows", the latent rows as they stand in the pool. See EngineProcess.recorded.
"""

import os
import pickle

import numpy as np

from tests.support.engine import RECORD_VAR


def install() -> None:
    """Record selections."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    from sglang.srt.layers.attention.dsa.dsa_indexer_kpool import IndexerKPool

    from sglang_ess.cpu.indexer import indexer_forward
    from sglang_ess.cpu.kpool_indexer import kpool_indexer_forward
    from sglang_ess.platforms.cpu import DISPATCH_KEY

    write = _writer()

    def recorded(forward):
        def recording(indexer, x, q_lora, positions, forward_batch, layer_id, *args, **kwargs):
            slots = forward(indexer, x, q_lora, positions, forward_batch, layer_id, *args, **kwargs)
            write("selection", layer_id, forward_batch, slots.numpy())
            return slots

        return recording

    BaseFusedOp.register_oot_forward(Indexer, recorded(indexer_forward), DISPATCH_KEY)
    BaseFusedOp.register_oot_forward(IndexerKPool, recorded(kpool_indexer_forward), DISPATCH_KEY)


def install_experts() -> None:
    """Record the experts of every token."""
    import sglang.srt.layers.moe.topk as moe

    from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend

    write = _writer()
    begin, select, batch = CpuSparseMlaBackend.init_forward_metadata, moe.select_experts, None

    def beginning(backend, forward_batch):
        nonlocal batch
        batch = forward_batch
        begin(backend, forward_batch)

    def recording(*args, layer_id=None, **kwargs):
        output = select(*args, layer_id=layer_id, **kwargs)
        own = output.topk_ids[_tokens_before(batch) :]
        write("experts", layer_id, batch, own.numpy())
        return output

    CpuSparseMlaBackend.init_forward_metadata = beginning
    moe.select_experts = recording


def _tokens_before(forward_batch) -> int:
    """Where this rank's tokens begin in what the ranks of data-parallel attention gather."""
    from sglang.srt.runtime_context import get_parallel

    sizes = forward_batch.global_num_tokens_padded_cpu
    return sum(sizes[: get_parallel().attn_dp_rank]) if sizes else 0


def install_rows() -> None:
    """Record the rows that each pass writes, [tokens, 576] float32."""
    from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend
    from sglang_ess.cpu.ops.rows import unpack_rows

    write = _writer()
    forward = CpuSparseMlaBackend.forward_extend

    def recording(backend, q, k, v, layer, forward_batch, *args, **kwargs):
        out = forward(backend, q, k, v, layer, forward_batch, *args, **kwargs)
        rows = backend.token_to_kv_pool.latent_rows(layer.layer_id)[forward_batch.out_cache_loc]
        write("rows", layer.layer_id, forward_batch, unpack_rows(rows).numpy())
        return out

    CpuSparseMlaBackend.forward_extend = CpuSparseMlaBackend.forward_decode = recording


def _writer():
    """A function that appends what it is given to this process's file, beside RECORD_VAR's."""
    file = None

    def write(kind, layer, forward_batch, values):
        nonlocal file
        file = file or open(f"{os.environ[RECORD_VAR]}.{os.getpid()}", "ab")
        for rid, first, table, of in _requests(forward_batch):
            own = values[of]
            if kind == "selection":
                own = _positions(table, own)
            pickle.dump((kind, layer, rid, first, np.ascontiguousarray(own)), file)
        file.flush()

    return write


def _requests(forward_batch):
    """Of each request: rid, first query position, slots by position, its part of the batch."""
    from sglang.srt.model_executor.forward_context import get_attn_backend

    backend = get_attn_backend()
    # With linear attention layers it stands beside theirs.
    table = getattr(backend, "full_attn_backend", backend).req_to_token.numpy()
    decode = forward_batch.forward_mode.is_decode()
    start, rids = 0, forward_batch.rids or ()  # an idle rank has none
    # Requests that pad the batch come after the others.
    for i, (rid, row) in enumerate(zip(rids, forward_batch.req_pool_indices, strict=False)):
        total = int(forward_batch.seq_lens[i])
        tokens = 1 if decode else int(forward_batch.extend_seq_lens_cpu[i])
        yield rid, total - tokens, table[row, :total], slice(start, start + tokens)
        start += tokens


def _positions(table, slots):
    """Slots as positions; -1 stays."""
    of_slot = np.full(table.max() + 2, -1, np.int32)
    of_slot[table] = np.arange(len(table))
    return of_slot[slots]
