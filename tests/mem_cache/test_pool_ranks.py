"""Two ranks of a CUDA pool over one host tier, as two processes: the order of pool_cuda.py.

Each rank is a server in small (tests/support/small_backend.py) that attends to its own hot rows and
checks every output against one tier. The ranks meet where the model reduces, after each layer's
attention, and nowhere else unless the pool has them meet. A rank's transfer stream does its work
when it is issued (early), or when its main stream waits for it (late): the two extremes.
"""

import ctypes
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from ess_kernels.checks import interpreted
from sglang_ess.mem_cache import pool_cuda
from sglang_ess.tiers import HostTier
from tests.support import device_tier, small_backend
from tests.support.interpreter import make_fast
from tests.support.ranks import on_two_ranks
from tests.support.small_backend import NOPE, PAGE, ROPE, SLOTS, TOPK, Run

pytestmark = pytest.mark.skipif(not interpreted(), reason="the CPU is the device of these tests")

EARLY, LATE = "early", "late"
WRITER, READER = 0, 1
FULL = 2 * (TOPK + 1) + 2  # hot rows: two requests' new rows are reserved, a prompt's are not hot
FEW = TOPK  # a step's new rows are not reserved
TURN_SECONDS = 0.25  # for which a rank lets the other one go first
PROT_READ = 1


class Turns:
    """The layers that each rank has done. The ranks meet at the end of each.

    folder: of the file with them
    first: the rank that does each layer first, as far as it can; None: no one
    """

    def __init__(self, rank, folder, first):
        self.rank, self.first, self.mine = rank, first, 0
        self.done = np.memmap(folder / "turns", np.int64, "r+", shape=(2,))

    def layer(self, forward):
        def call(*args, **kwargs):
            until = time.monotonic() + TURN_SECONDS
            if self.first not in (None, self.rank):
                while self.done[self.first] <= self.mine and time.monotonic() < until:
                    time.sleep(0.001)
            out = forward(*args, **kwargs)
            self.mine += 1
            self.done[self.rank] = self.mine
            torch.distributed.barrier()  # the reduction
            return out

        return call


def passes(run):
    """Prompts of more tokens than there are hot rows: warm-ups fetch rows of the same pass."""
    run.prefill({1: 30, 2: 20})
    run.decode([1, 2])
    run.decode([1, 2])
    run.finish(1)
    run.prefill({3: 25, 2: 3})
    run.decode([2, 3])
    run.finish(3)
    run.prefill({4: 28})
    run.decode([2, 4], padding=1)


def served(rank, folder, cases):
    """A rank's servers, one for each case. Returns what each gives."""
    make_fast()
    return [serve(rank, folder / str(i), case) for i, case in enumerate(cases)]


def serve(rank, folder, case) -> tuple[int, int, bool]:
    """Returns how many outputs and hot rows are not the one tier's, and changed_by_the_cpu()."""
    from sglang_ess.mem_cache.host_share import tier_group

    torch.distributed.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if case.streams[rank] == LATE:
            device_tier.launches_are_late(patch.setattr)
        if case.fault is not None:
            case.fault(patch)
        wrong, compare = [], torch.testing.assert_close
        patch.setattr(torch.testing, "assert_close", lambda *a, **k: note(wrong, compare, *a, **k))
        layers, row_shape = sum(case.sizes), (1, NOPE + ROPE)
        host = HostTier(layers, SLOTS, row_shape, torch.float32, tier_group())
        build = small_backend.builder(patch)
        backend = build("da", case.hot_rows, sizes=case.sizes, host_tier=host)
        pool, turns = backend.token_to_kv_pool, Turns(rank, folder, case.first)
        assert pool.is_shared and pool.is_writer == (rank == WRITER)
        if not pool.is_writer:
            allow_reads_only(pool.kv_buffer)
        torch.distributed.barrier()
        for name in ("forward_extend", "forward_decode"):
            patch.setattr(backend, name, turns.layer(getattr(backend, name)))
        passes(Run(backend))
        pool.synchronize()
        torch.distributed.barrier()
        return len(wrong), wrong_rows(pool), changed_by_the_cpu(pool, patch)


def note(wrong, compare, *args, **kwargs):
    """compare(...), but a difference is noted: the other rank waits at the end of this layer."""
    try:
        compare(*args, **kwargs)
    except AssertionError as error:
        wrong.append(str(error))


def allow_reads_only(layers):
    """A store to these rows by this process is a segmentation fault from now on."""
    libc = ctypes.CDLL(None, use_errno=True)
    for rows in layers:
        address, size = ctypes.c_void_p(rows.data_ptr()), ctypes.c_size_t(rows.nbytes)
        assert libc.mprotect(address, size, PROT_READ) == 0


def wrong_rows(pool) -> int:
    """Hot rows, of all layers, that are not their host rows."""
    wrong = 0
    for cache in pool.hot_caches:
        hot = (cache.state.slot_row >= 0).nonzero().flatten()
        hot = hot[hot >= PAGE]
        for host, rows in zip(cache.host_layers, cache.hot_layers, strict=True):
            wrong += int((host[hot] != rows[cache.state.slot_row[hot].long()]).any(-1).sum())
    return wrong


def changed_by_the_cpu(pool, patch) -> bool:
    """Slots that are copied, moved and restored: whether rows are right, and index keys are told.

    The writer comes late; a reader looks at the rows as soon as it may.
    """
    calls = []
    patch.setattr(torch.cuda, "synchronize", lambda: None)  # SGLang's, without asking
    pool.cpu_offloading_chunk_size, pool.write_loc_is_dcp_resolved = 8, True
    pool.index_key_cache = SimpleNamespace(
        move=lambda *_: calls.append("move"), load_cpu_copy=lambda *_: calls.append("load")
    )
    pool._load_compress_tail_cpu_copy = lambda *_: None
    first, then = torch.arange(20, 40), torch.arange(60, 80)
    before = [rows[first].clone() for rows in pool.kv_buffer]
    copies = {"kv": [[rows[:8], rows[8:16], rows[16:]] for rows in before], "index_k": None}
    torch.distributed.barrier()

    def late():
        time.sleep(0.2 * pool.is_writer)

    late()
    pool.move_kv_cache(then, first)
    right = all(map(same, pool.kv_buffer, [then] * len(before), before))
    torch.distributed.barrier()
    late()
    pool.load_cpu_copy(copies, first + 20)
    right &= all(map(same, pool.kv_buffer, [first + 20] * len(before), before))
    return right and calls == ["move", "load"]


def same(rows, slots, wanted) -> bool:
    return torch.equal(rows[slots].nan_to_num(7), wanted.nan_to_num(7))


def on_ranks(folder, cases):
    """For each case what the writer and what the reader gives."""
    for i in range(len(cases)):
        (folder / str(i)).mkdir()
        np.zeros(2, np.int64).tofile(folder / str(i) / "turns")
    return list(zip(*on_two_ranks(served, folder, folder, cases), strict=True))


# --- what the order needs -----------------------------------------------------------------


def warm_ups_do_not_wait(patch):
    patch.setattr(pool_cuda, "SAVE_LAYERS", 0)


def ranks_do_not_meet(patch):
    patch.setattr(pool_cuda.CudaEssTokenToKVPool, "meet", lambda pool: None)


def the_last_layer_does_not_wait(patch):
    write = pool_cuda.CudaEssTokenToKVPool.write_prompt

    def write_prompt(pool, layer_id, slots, rows):
        shared, pool.is_shared = pool.is_shared, False
        write(pool, layer_id, slots, rows)
        pool.is_shared = shared

    patch.setattr(pool_cuda.CudaEssTokenToKVPool, "write_prompt", write_prompt)


class Case(NamedTuple):
    """streams: of both ranks; sizes: layers of each index group; first: as Turns; fault: on both"""

    streams: tuple[str, str] = (LATE, EARLY)
    sizes: tuple[int, ...] = (1,) * 4
    hot_rows: int = FULL
    first: int | None = None
    fault: Callable[[pytest.MonkeyPatch], None] | None = None


RIGHT = (0, 0, True)
# a. Rows are saved late and read early. b. The reader comes first to a layer that fetches its own
# new rows. c. Rows are read late and written early.
ORDERS = [
    Case(),
    Case(sizes=(1, 2), hot_rows=FEW, first=READER),
    Case((EARLY, LATE), (1, 2, 2), first=WRITER),
]
FAULTS = [
    Case(fault=warm_ups_do_not_wait),
    Case(fault=the_last_layer_does_not_wait),
    Case(fault=ranks_do_not_meet, first=READER),
    Case(fault=ranks_do_not_meet, sizes=(1, 2), hot_rows=FEW, first=READER),
]


def test_each_rank_answers_as_one_tier(tmp_path):
    assert on_ranks(tmp_path, ORDERS) == [(RIGHT, RIGHT)] * len(ORDERS)


def test_without_its_order_a_reader_reads_old_rows(tmp_path):
    for case, (writer, reader) in zip(FAULTS, on_ranks(tmp_path, FAULTS), strict=True):
        assert writer[:2] == RIGHT[:2], case
        assert reader[0] + reader[1] > 0, case
