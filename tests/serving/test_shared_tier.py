"""Host memory of a real engine's tier at one, two and four TP ranks, by its own figure and by the
kernel's."""

from pathlib import Path

import pytest

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from tests.support import parity
from tests.support.engine import EngineProcess
from tests.support.tier_ranks import bytes_of, mapped, resident_bytes

SLOTS, PATCH = 4096, "tests.serving.test_shared_tier:expose_memory"


def expose_memory():
    """Add what the tier has to what rank 0 says of itself."""
    from sglang.srt.managers.scheduler import Scheduler

    from sglang_ess.mem_cache.allocator import sparse_pool

    original = Scheduler.get_internal_state

    def with_memory(scheduler, request):
        answer = original(scheduler, request)
        rows = sparse_pool(scheduler.token_to_kv_pool_allocator).kv_buffer
        inodes = [line.split()[4] for line in open("/proc/self/maps") if "ess-host-tier" in line]
        answer.internal_state["tier_memory"] = resident_bytes(rows), inodes
        return answer

    Scheduler.get_internal_state = with_memory


def memory_of(model, ranks):
    """(host_bytes, ranks that share them, bytes that the kernel has taken) of a tier that a
    prompt of almost all slots has filled."""
    ess = {"hot_ratio": 0.3, "canary_rate": 1.0}
    with EngineProcess(
        model, ess, (PATCH,), tp_size=ranks, max_total_tokens=SLOTS, context_length=SLOTS
    ) as engine:
        engine.generate(parity.prompts_of([SLOTS - 200]), 8)
        info = engine.call("_server_info")
        facts, (resident, inodes) = info["ess"], info["internal_states"][0]["tier_memory"]
        if ranks == 1:
            assert not inodes
            return facts["host_bytes"], 1, resident
        (inode,) = {int(inode) for inode in inodes}
        processes = mapped(inode)
        assert len(processes) == ranks
        taken = sum(bytes_of(inode, pid)["Pss"] for pid in processes)
    assert not mapped(inode) and not list(Path("/dev/shm").glob("*ess*"))
    return facts["host_bytes"], facts["host_tier_ranks"], taken


@pytest.mark.slow
def test_the_host_memory_of_several_ranks_is_that_of_one(tmp_path):
    model = write_tiny_model(tmp_path / "model", TinyModelConfig())
    alone, one, taken = memory_of(model, 1)
    assert one == 1 and taken > 0.9 * alone
    for ranks in (2, 4):
        host_bytes, shared_by, found = memory_of(model, ranks)
        print(f"TP{ranks}: {host_bytes} B, kernel {found} B; TP1: {alone} B, kernel {taken} B")
        assert (host_bytes, shared_by) == (alone, ranks)
        assert found <= 1.02 * taken
