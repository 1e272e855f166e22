"""fetch: rows from the host tier into hot rows, beside PCIe's peak."""

from __future__ import annotations

import functools

import torch

from benchmarks.kernels.points import POISON, Run, Sizes
from benchmarks.kernels.timing import EVENTS, Subject, require
from ess_kernels.fetch import fetch, fetch_reference
from sglang_ess.layout import FP8_ROW_BYTES

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
            fetch_reference(*self.arguments(index))
        got, self.hot = self.hot, got
        require(torch.equal(got, self.hot),
                "fetched rows differ from their host rows, or others changed")  # fmt: skip

    def subject(self) -> Subject:
        ops = [lambda i=i: fetch(*self.arguments(i)) for i in range(self.sets)]
        return Subject(ops, self.poison, self.check, self.count * FP8_ROW_BYTES)


def measure_fetch(run: Run) -> None:
    """Our fetch at run.points (batch, misses)."""
    for batch, misses in run.points:
        config = {"system": "triton", "batch": batch, "misses": misses, "row_bytes": FP8_ROW_BYTES}
        run.bench.begin(f"fetch {config}")
        case = Fetches(run.host, run.sizes, batch, misses, run.bench.device, run.seed)
        run.bench.time("fetch", config, case.subject)
