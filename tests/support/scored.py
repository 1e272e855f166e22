"""Scores every decode query once more in the engine's process: float64, from the stored bytes."""

import pickle
from pathlib import Path

import torch

from sglang_ess.config import EssConfig
from sglang_ess.layout import INDEX_DIM, PAGE_SLOTS


def install() -> None:
    """Append (layer id, request id, length, scores by position) of each query, in their order.

    The file is that of --ess-trace with ".scores" after its name.
    """
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    from sglang_ess.cpu import indexer
    from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend

    begin, select, rids = CpuSparseMlaBackend.init_forward_metadata, indexer.decode_slots, []
    file = Path(EssConfig.from_env().trace + ".scores")

    def beginning(backend, forward_batch):
        begin(backend, forward_batch)
        rids[:] = [rid for rid in forward_batch.rids for _ in range(backend.forward_metadata.width)]

    def selecting(layer_id, metadata, query, weights, topk):
        slots, pool = select(layer_id, metadata, query, weights, topk), get_token_to_kv_pool()
        if hasattr(pool, "topk_observers"):  # a draft model's has none
            pages = pool.get_index_k_with_scale_buffer(layer_id)
            with file.open("ab") as out:
                for i, (row, length) in enumerate(
                    zip(metadata.req_rows, metadata.lengths, strict=True)
                ):
                    keys = keys_of(pages, metadata.req_to_token[row, :length].long())
                    products = (keys @ query[i].double().T).relu()
                    scores = (products @ weights[i].double()).numpy()
                    pickle.dump((layer_id, rids[i], int(length), scores), out)
        return slots

    CpuSparseMlaBackend.init_forward_metadata, indexer.decode_slots = beginning, selecting


def keys_of(pages, slots):
    """[n, 128] float64: a page has 64 keys of 128 float32, or of 128 e4m3 and then 64 scales."""
    page, place = pages[slots // PAGE_SLOTS], slots % PAGE_SLOTS
    count = torch.arange(len(slots))
    if pages.shape[1] == 4 * PAGE_SLOTS * INDEX_DIM:
        return page.view(torch.float32).view(-1, PAGE_SLOTS, INDEX_DIM)[count, place].double()
    keys, scales = page[:, : PAGE_SLOTS * INDEX_DIM], page[:, PAGE_SLOTS * INDEX_DIM :]
    keys = keys.contiguous().view(torch.float8_e4m3fn).view(-1, PAGE_SLOTS, INDEX_DIM)
    scales = scales.contiguous().view(torch.float32)
    return keys[count, place].double() * scales[count, place].double().unsqueeze(1)


def shift_scores() -> None:
    """A fault: the recorder is given each score one column too far."""
    from sglang_ess.trace.trace_recorder import TraceRecorder

    keep = TraceRecorder.decode_scores

    def shifted(recorder, group, topk, runner_ups, scores):
        keep(recorder, group, topk, runner_ups, scores.roll(1, dims=1))

    TraceRecorder.decode_scores = shifted


def read(file) -> list:
    """What install() has written so far."""
    found = []
    with open(file, "rb") as stream:
        while True:
            try:
                found.append(pickle.load(stream))
            except EOFError:
                return found
