"""fetch and pack_write: rows from the host tier and to it, with PCIe's peak; install."""

from __future__ import annotations

import copy
import functools

import torch

from benchmarks.kernels.points import AGES, POISON, Run, Sizes, begin_step, overwrite
from benchmarks.kernels.timing import EVENTS, Subject, require
from ess_kernels.hot_state import HotState
from ess_kernels.pack_write import pack_write
from ess_kernels.plan_fetch import fetch, install
from sglang_ess.layout import FP8_ROW_BYTES, LATENT_DIM, ROPE_DIM

MANY_ROWS = 1 << 16  # of 656 B: 43 MB, about the L2


def measure_peak(run: Run) -> None:
    """One large copy between pinned and device memory, each way: the limit of all the others."""
    bench, size = run.bench, run.sizes.peak_bytes
    host = torch.empty(size, dtype=torch.uint8, pin_memory=bench.on_cuda)
    device = torch.randint(256, (size,), dtype=torch.uint8, device=bench.device)
    host.copy_(device)
    for direction, target, source in (("h2d", device, host), ("d2h", host, device)):
        copy = functools.partial(target.copy_, source, non_blocking=True)
        subject = Subject([copy], num_bytes=size)
        config = {"direction": direction, "bytes": size}
        bench.time("pcie_peak", config, lambda s=subject: s, EVENTS)


class Fetches:
    """`sets` miss lists of batch x misses random rows, with room for a plan of all misses."""

    def __init__(self, host_rows, sizes: Sizes, batch: int, misses: int, device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        self.host, self.count = host_rows, batch * misses
        self.sets = sizes.sets if self.count < MANY_ROWS else 2
        num_rows = batch * sizes.buffer
        self.hot = torch.empty(num_rows, host_rows.shape[1], dtype=host_rows.dtype, device=device)

        def lists(limit):
            picks = [torch.randperm(limit, generator=generator, device=device)[: batch * sizes.topk]
                     for _ in range(self.sets)]  # fmt: skip
            return torch.stack(picks).int()

        self.slots, self.rows = lists(batch * sizes.context), lists(num_rows)
        self.num_misses = torch.tensor([self.count], dtype=torch.int32, device=device)

    def arguments(self, index: int) -> tuple:
        return self.host, self.hot, self.slots[index], self.rows[index], self.num_misses

    def poison(self) -> None:
        self.hot.fill_(POISON)

    def check(self, last: int) -> None:
        """All hot rows after sets 0 to `last`: those that no list names are still poison."""
        got, self.hot = self.hot, torch.empty_like(self.hot)
        self.poison()
        for index in range(last + 1):
            slots = self.slots[index][: self.count].long().to(self.host.device)
            rows = self.rows[index][: self.count].long()
            self.hot[rows] = self.host[slots].to(self.hot.device)
        got, self.hot = self.hot, got
        require(torch.equal(got, self.hot),
                "fetched rows differ from their host rows, or others changed")  # fmt: skip

    def subject(self) -> Subject:
        ops = [lambda i=i: fetch(*self.arguments(i)) for i in range(self.sets)]
        return Subject(ops, self.poison, self.check, self.count * FP8_ROW_BYTES)


def measure_fetch(run: Run) -> None:
    """Our fetch at run.points (batch, misses)."""
    for batch, misses in run.points:
        config = {"system": "cuda", "batch": batch, "misses": misses, "row_bytes": FP8_ROW_BYTES}
        run.bench.begin(f"fetch {config}")
        case = Fetches(run.host, run.sizes, batch, misses, run.bench.device, run.seed)
        run.bench.time("fetch", config, case.subject)


def measure_pack(run: Run) -> None:
    """pack_write of a row a request and of a prompt, all hot, by SGLang's packing; also fenced."""
    from sglang.kernels.ops.quantization.dsa_quant_k_cache import quantize_k_cache_separate as pack

    slots, device = torch.randperm(len(run.host))[:8192], run.bench.device
    new = torch.randn(len(slots), LATENT_DIM + ROPE_DIM, device=device).bfloat16()
    nope, rope, at = new[:, :LATENT_DIM], new[:, LATENT_DIM:], slots.to(device)
    rows = torch.full((len(run.host),), -1, dtype=torch.int32, device=device)
    rows[at], want = torch.arange(len(at)).int().to(device), torch.cat(pack(nope, rope), -1)[:, 0]
    for n, publishes in [(n, f) for n in (*run.sizes.batches, len(slots)) for f in (False, True)]:
        args = nope[:n], rope[:n], at[:n], rows, (hot := torch.empty_like(want[:n])), run.host
        call = functools.partial(pack_write, *args, publishes=publishes)

        def check(_last, n=n, hot=hot):
            require(hot.equal(want[:n]), "a packed row differs")
            require(run.host[slots[:n]].equal(want[:n].cpu()), "a saved row differs")

        subject = Subject([call], hot.zero_, check, n * FP8_ROW_BYTES)
        run.bench.time("pack", {"rows": n, "published": publishes}, lambda s=subject: s)


def measure_install(run: Run) -> None:
    """install, as a step reserves rows of full tiers: one launch for all groups."""
    for batch in run.sizes.batches:
        rows, device = batch * run.sizes.buffer, run.bench.device
        slots = torch.arange(rows, rows + batch, device=device)
        state = HotState.new(run.sizes.groups, rows + batch, rows, device)
        state.row_slot[:] = state.slot_row[:, :rows] = torch.arange(rows, device=device)
        begin_step(state, state.row_stamp.random_(1, AGES + 1))
        restore = functools.partial(overwrite, state, copy.deepcopy(state))

        def check(_last, state=state, slots=slots):
            found = state.slot_row[:, slots].long()
            require((found >= 0).all(), "a new slot has no row")
            stamps = state.row_stamp.gather(1, found)
            require((stamps == AGES + 1).all(), "a reserved row does not count as used")

        subject = Subject([functools.partial(install, state, slots, reserve=True)], restore, check)
        run.bench.time("install", {"batch": batch, "groups": len(state.words)}, lambda s=subject: s)
