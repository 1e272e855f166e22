"""Attention of every decode kernel alone, all rows resident."""

from __future__ import annotations

import torch

from benchmarks.kernels.points import PAGE, Run, Sizes, make_rows
from benchmarks.kernels.timing import Subject, require
from ess_kernels.sparse_mla import sparse_mla_reference
from sglang_ess.attention.mla_kernels import KERNELS, Need
from sglang_ess.layout import FP8_ROW_BYTES, ROPE_DIM, ROW_DIM

SM_SCALE = (128 + ROPE_DIM) ** -0.5  # of V3.2's heads before absorption
CHECKED_QUERIES = 4  # against the float64 reference
TOLERANCE = 2e-2  # |out - reference| / |reference|, bfloat16 operands


def make_kernel(name: str, device, rows_dtype, heads: int, split: bool = False):
    """A decode kernel by name. Raises: RuntimeError with its refusals, ImportError."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    need = Need(rows_dtype, capability, heads, split_lists=split)
    refusals = KERNELS[name].refusals(need)
    if refusals:
        raise RuntimeError(f"{name} {'; '.join(refusals)}")
    return KERNELS[name](need, SM_SCALE, device)


def check_output(out, q, rows, indices, lengths=None) -> None:
    """Compare the first queries with sparse_mla_reference. Raises: WrongResult."""
    n = min(CHECKED_QUERIES, len(q))
    lengths = None if lengths is None else lengths[:n]
    wanted, _ = sparse_mla_reference(q[:n], rows, indices[:n], SM_SCALE, lengths)
    error = ((out[:n].double() - wanted).norm() / wanted.norm()).item()
    require(error < TOLERANCE, f"attention is off by {error:.2g} of its norm")


class Attention:
    """Attention with every row resident: `sets` lists of the rows of a hot tier."""

    def __init__(self, sizes: Sizes, batch: int, heads: int, device, seed: int):
        generator = torch.Generator(device).manual_seed(seed)
        num_rows = -(-batch * sizes.buffer // PAGE) * PAGE
        self.rows = make_rows(num_rows, device, generator)
        shape = batch, heads, ROW_DIM
        self.q = torch.randn(shape, generator=generator, device=device).bfloat16()
        shape = sizes.sets_of(batch), batch, sizes.buffer
        picks = torch.rand(shape, generator=generator, device=device)
        first = torch.arange(batch, device=device)[:, None] * sizes.buffer
        self.indices = (picks.argsort(2)[:, :, : sizes.topk] + first).int().contiguous()
        self.lengths = torch.full((batch,), sizes.topk, dtype=torch.int32, device=device)
        self.out = None

    def subject(self, kernel) -> Subject:
        if hasattr(kernel, "plan"):  # FlashInfer plans once a step
            kernel.plan(self.lengths.tolist(), self.indices.shape[2])

        def op(index):
            self.out = kernel.attend(self.q, self.rows, self.indices[index], self.lengths)[0]

        def check(last):
            check_output(self.out, self.q, self.rows, self.indices[last])

        return Subject([lambda i=i: op(i) for i in range(len(self.indices))], check=check)


def measure_attention(run: Run) -> None:
    sizes, bench, row_bytes = run.sizes, run.bench, FP8_ROW_BYTES
    ends = sizes.batches[0], sizes.batches[-1]
    for batch in sizes.batches:
        for heads in sizes.heads if batch in ends else sizes.heads[:1]:
            config = {"batch": batch, "heads": heads, "row_bytes": row_bytes, "topk": sizes.topk}
            bench.begin(f"attention {config}")
            case = Attention(sizes, batch, heads, bench.device, run.seed)
            for name in KERNELS:

                def subject(name=name, case=case, heads=heads):
                    return case.subject(make_kernel(name, bench.device, torch.uint8, heads))

                bench.time("attention", {"kernel": name} | config, subject)
