"""What the CPU kernels give on fixed inputs: python -m tests.support.kernel_results FILE.

Writes {name: array} to FILE (.npz) and, under "compiled", how many kernels numba compiled here.
"""

import sys

import numpy as np
import torch

from sglang_ess.cpu.ops import index_scores, sparse_mla
from sglang_ess.cpu.ops.rows import pack_fp8_rows, store_index_keys
from sglang_ess.layout import PAGE_SLOTS, index_page_bytes

ROWS = 256
KERNELS = (sparse_mla._sparse_mla_kernel, index_scores._index_scores_kernel)


def sparse_mla_results(g: torch.Generator) -> dict[str, np.ndarray]:
    """Lists that end in the loops for what is left of four rows, as below top-k, and in none."""
    latent, rope = torch.randn(ROWS, 512, generator=g), torch.randn(ROWS, 64, generator=g)
    wide = torch.cat([latent, rope], -1)
    formats = {"fp8": pack_fp8_rows(latent, rope), "bf16": wide.bfloat16(), "fp32": wide}
    results = {}
    for fmt, rows in formats.items():
        for dtype in (torch.float32, torch.bfloat16):
            for topk in (1, 3, 18, 39, 128):
                slots = torch.randint(0, ROWS, (4, topk), generator=g).int()
                slots[0, topk // 2 :] = -1
                q = torch.randn(4, 5, 576, generator=g).to(dtype).split([512, 64], -1)
                out, lse = sparse_mla.sparse_mla(*q, rows, slots, 0.05)
                name = f"sparse_mla {fmt} {dtype} {topk}"
                results |= {name: out.float().numpy(), f"{name} lse": lse.numpy()}
    return results


def index_scores_results(g: torch.Generator) -> dict[str, np.ndarray]:
    """Heads that fill the loop of four and heads that do not; lengths in mid-page."""
    results = {}
    for fp32 in (False, True):
        pages = torch.zeros(ROWS // PAGE_SLOTS, index_page_bytes(fp32), dtype=torch.uint8)
        store_index_keys(pages, torch.arange(ROWS), torch.randn(ROWS, 128, generator=g))
        table = torch.arange(ROWS // PAGE_SLOTS, dtype=torch.int32).view(2, -1)
        for heads in (3, 4, 6, 64):
            q, weights = torch.randn(2, heads, 128, generator=g), torch.randn(2, heads, generator=g)
            lengths = torch.tensor([PAGE_SLOTS + 9, 2 * PAGE_SLOTS], dtype=torch.int32)
            scores = index_scores.index_scores_paged(q, weights, pages, table, lengths)
            kept = torch.cat([row[:n] for row, n in zip(scores, lengths.tolist(), strict=True)])
            results[f"index_scores {'fp32' if fp32 else 'fp8'} {heads}"] = kept.numpy()
    return results


def main(file: str) -> None:
    g = torch.Generator().manual_seed(1)
    results = sparse_mla_results(g) | index_scores_results(g)
    compiled = sum(sum(kernel.stats.cache_misses.values()) for kernel in KERNELS)
    np.savez(file, compiled=np.array(compiled), **results)


if __name__ == "__main__":
    main(sys.argv[1])
