"""Two ranks over a fake CUDA runtime: who populates which part of the host tier, who locks when."""

import time

import pytest
import torch

from sglang_ess.layout import MIB
from sglang_ess.tiers import HostTier, host_memory, numa
from sglang_ess.tiers.host_memory import HostMemory, HostMemoryError
from tests.support.ranks import on_two_ranks
from tests.tiers.test_host_tier import Cudart, needs_a_fake

LAYERS, SLOTS, ROW = 4, 5000, 656
LAYER_BYTES = -(-SLOTS * ROW // 4096) * 4096
NODES = 1, 0  # of the ranks' GPUs
SLOW_SECONDS = 0.3


def shared_tier(rank, fails):
    """Returns (ranges populated, calls of bind, layers locked, when it populated last and locked
    first), or the error's line. fails: rank 1 has no memory
    """
    from sglang_ess.mem_cache.host_share import tier_group

    cudart, populated, bound, times = Cudart(), [], [], []
    populate, lock = HostMemory._populate, cudart.cudaHostRegister

    def record(memory, chunk):
        time.sleep(SLOW_SECONDS * rank)
        if fails and rank == 1:
            raise memory._error("nothing left")
        populate(memory, chunk)
        populated.append((chunk.start, chunk.stop))
        times.append(time.monotonic())

    def record_lock(*args):
        times.append(time.monotonic())
        return lock(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "CHUNK_BYTES", 2 * MIB)
        patch.setattr(HostMemory, "_populate", record)
        patch.setattr(cudart, "cudaHostRegister", record_lock)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "cudart", lambda: cudart)
        patch.setattr(numa, "node_of_gpu", lambda: NODES[rank])
        patch.setattr(numa, "bind", lambda *call, strict: bound.append((*call[1:], strict)))
        group = tier_group()
        try:
            tier = HostTier(LAYERS, SLOTS, (ROW,), torch.uint8, group)
        except HostMemoryError as error:
            return str(error), not cudart.locked
        except Exception as error:
            return f"{type(error).__name__}: {error}", not cudart.locked
        locked = [rows.data_ptr() for rows in tier.rows] == list(cudart.locked)
        chunks = len(populated)
        return sorted(populated), bound, locked, times[chunks - 1], times[chunks]


@needs_a_fake
def test_each_rank_populates_its_share_and_locks_all_once_all_is_there(tmp_path):
    ranks = on_two_ranks(shared_tier, tmp_path, False)
    populated = [chunk for chunks, *_ in ranks for chunk in chunks]
    assert populated[0][0] == 0 and populated[-1][1] == LAYERS * LAYER_BYTES
    assert all(a[1] == b[0] for a, b in zip(populated, populated[1:], strict=False))
    assert all(len(chunks) > 1 for chunks, *_ in ranks)
    for _, bound, locked, _, _ in ranks:
        assert locked and bound
        assert {call[1:] for call in bound} == {((0, 1), False)}, "both nodes take turns"
    assert max(populated for *_, populated, _ in ranks) < min(locks for *_, locks in ranks)


@needs_a_fake
def test_a_rank_without_memory_ends_both_before_anyone_locks(tmp_path):
    (writer, nothing), (reader, neither) = on_two_ranks(shared_tier, tmp_path, True)
    assert "got nothing left" in reader and nothing and neither
    assert writer.startswith("PeerRefusal: all 2 ranks") and "rank 1 has failed" in writer
