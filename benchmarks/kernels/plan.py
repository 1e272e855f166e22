"""plan_fetch: the plan alone, and a whole swap-in in comparison with SGLang's HiSparse kernel.

Both kernels resolve a top-k and copy its misses in one launch, of the same requests, hot rows,
order of use and misses (points.Steady). The plan alone lists hits and misses apart, as for DA, DBA.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.kernels.points import PAGE, POISON, Run, Steady
from benchmarks.kernels.timing import Subject, require
from ess_kernels.plan_fetch import plan_fetch
from sglang_ess.layout import FP8_ROW_BYTES

BLOCK_SIZE = 960  # HiSparse's default swap_in_block_size


def plan_subject(steady: Steady) -> Subject:
    ops = [
        functools.partial(plan_fetch, steady.state.group(i), steady.topk[i], steady.buffers,
                          lists=True) for i in range(steady.sets)
    ]  # fmt: skip
    return Subject(ops, steady.restore, steady.check_plan)


class Swap:
    """plan_fetch with copies into hot rows that all sets share, poisoned before a sample."""

    def __init__(self, steady: Steady, host_rows):
        self.steady, self.host = steady, host_rows
        shape = steady.num_rows, host_rows.shape[1]
        self.hot = torch.empty(shape, dtype=host_rows.dtype, device=steady.device)

    def subject(self) -> Subject:
        s, rows = self.steady, (self.host, self.hot)
        ops = [functools.partial(plan_fetch, s.state.group(i), s.topk[i], s.buffers, *rows)
               for i in range(s.sets)]  # fmt: skip
        return Subject(ops, self._before, self._check, s.num_misses * FP8_ROW_BYTES)

    def _before(self) -> None:
        self.steady.restore()
        self.hot.fill_(POISON)

    def _check(self, last: int) -> None:
        self.steady.check_plan(last)
        b, n = self.steady.buffers, self.steady.num_misses
        got = self.hot[b.miss_rows[:n].long()]
        wanted = self.host[b.miss_slots[:n].long().to(self.host.device)].to(got.device)
        require(torch.equal(got, wanted), "a fetched row differs")


def hisparse_kernel(device: torch.device):
    """SGLang's swap-in; it compiles when first called. Raises: ImportError, RuntimeError."""
    if device.type != "cuda":
        raise RuntimeError("HiSparse's kernel needs a CUDA device")
    from sglang.kernels.ops.kvcache.hisparse import load_cache_to_device_buffer_mla

    return load_cache_to_device_buffer_mla


class HiSparse:
    """SGLang's load_cache_to_device_buffer_mla, with the arguments of HiSparseCoordinator.

    Source: sglang 0.5.23 managers/hisparse_coordinator.py (_run_swap_in_kernel and what __init__
    allocates). No top-k here holds the newest token, so its row is never read. The row of rank r
    in `resident` is the request's r-th buffer location; `lru_slots` begins with the oldest.
    """

    def __init__(self, steady: Steady, host_rows):
        self._call = hisparse_kernel(steady.device)
        self.steady, self.host = steady, host_rows
        s, batch, sets, device = steady.sizes, steady.batch, steady.sets, steady.device
        width = s.buffer + PAGE

        def integers(*shape, dtype=torch.int32):
            return torch.full(shape, -1, dtype=dtype, device=device)

        self._tokens_before = integers(sets, batch, width)
        self._tokens_before[:, :, : s.buffer] = steady.resident
        self._tokens = self._tokens_before.clone()
        oldest_first = torch.arange(s.buffer - 1, -1, -1, dtype=torch.int16, device=device)
        self._lru_before = oldest_first.repeat(sets, batch, 1)
        self._lru = self._lru_before.clone()
        self._locs = torch.arange(batch * width, dtype=torch.int32, device=device)
        self._locs = self._locs.view(batch, width)
        slots = torch.arange(batch * s.context, device=device).view(batch, s.context)
        self._host_locs = torch.cat([slots, integers(batch, PAGE, dtype=torch.int64)], 1)
        self._requests = torch.arange(batch, device=device)
        # One past the last position that a top-k may hold: no selected token is the newest.
        self._lengths = torch.full((batch,), s.context + 1, device=device)
        self._num_requests = torch.tensor([batch], dtype=torch.int32, device=device)
        self._found = integers(batch, s.topk)
        shape = batch * width, host_rows.shape[1]
        self._hot = torch.empty(shape, dtype=host_rows.dtype, device=device)

    def subject(self) -> Subject:
        ops = [lambda i=i: self._swap(i) for i in range(self.steady.sets)]
        num_bytes = self.steady.num_misses * FP8_ROW_BYTES
        return Subject(ops, self._before, self._check, num_bytes)

    def _swap(self, index: int) -> None:
        s = self.steady.sizes
        self._call(
            top_k_tokens=self.steady.positions[index], top_k_device_locs=self._found,
            device_buffer_tokens=self._tokens[index], device_buffer_locs=self._locs,
            host_cache_locs=self._host_locs, host_cache=self.host, device_buffer=self._hot,
            req_pool_indices=self._requests, num_real_reqs=self._num_requests,
            seq_lens=self._lengths, lru_slots=self._lru[index], item_size_bytes=FP8_ROW_BYTES,
            num_top_k=s.topk, hot_buffer_size=s.buffer, page_size=1, block_size=BLOCK_SIZE,
        )  # fmt: skip

    def _before(self) -> None:
        self._tokens.copy_(self._tokens_before)
        self._lru.copy_(self._lru_before)
        self._found.fill_(-7)
        self._hot.fill_(POISON)

    def _check(self, last: int) -> None:
        """Each location holds its token now; the misses, which were in none, their host rows."""
        positions, found = self.steady.positions[last], self._found.long()
        width = self._locs.shape[1]
        require(((found >= 0) & (found < self._locs.numel())).all(), "a token without a location")
        place = found - torch.arange(len(found), device=found.device)[:, None] * width
        require(((place >= 0) & (place < width)).all(), "a location of another request")
        require(torch.equal(self._tokens[last].gather(1, place), positions), "another token's row")
        missed = self._tokens_before[last].gather(1, place) != positions
        count = int(missed.sum())
        require(count == self.steady.num_misses, f"HiSparse missed {count} rows")
        slots = self.steady.topk[last][missed].long().to(self.host.device)
        wanted = self.host[slots].to(self._hot.device)
        got = self._hot[found[missed]]
        require(torch.equal(got, wanted), "HiSparse copied another row")


def measure_plans(run: Run) -> None:
    """The plan alone, then swap-ins: ours and HiSparse's; at run.step_points."""
    for batch, misses in run.step_points:
        config = {"batch": batch, "misses": misses}
        run.bench.begin(f"plan and swap-in {config}")
        steady = run.steady(batch, misses)
        at = {"system": "cuda", "topk": run.sizes.topk} | config
        run.bench.time("plan", at, lambda s=steady: plan_subject(s))
        config["row_bytes"] = FP8_ROW_BYTES
        for system, kind in (("ours", Swap), ("hisparse", HiSparse)):
            at = {"system": system} | config
            run.bench.time("swap", at, lambda s=steady, k=kind: k(s, run.host).subject())
