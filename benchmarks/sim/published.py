"""What ESS (arXiv 2512.10576, v1) and HiSparse publish, as far as it could be read.

ESS's tables are exact. Its figures were digitised from the page images: about +-5 on miss counts
and microseconds, +-3 % on figure 1. A miss is a row fetched per request, layer and decode step, by
all queries of the step together. Only step times are computed here (`Row.step_seconds`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GPUS_PER_NODE = 8  # throughput = 8 x batch x OTPS in every row but one
LAYERS, TOPK, ROW_BYTES, INDEX_BYTES = 61, 2048, 656, 132
K = 1024


@dataclass(frozen=True)
class Row:
    """A row of Table 2.

    queries: MTP n; accepted: tokens that a request gains per step; batch: requests on one GPU;
    ratio: Sparse Memory Ratio; throughput: tokens/s of a node of 8 GPUs
    """

    queries: int
    accepted: float
    context: int
    batch: int
    ratio: float
    throughput: float

    @property
    def name(self) -> str:
        return f"MTP {self.queries} acc {self.accepted} {self.context // K}K batch {self.batch}"

    @property
    def step_seconds(self) -> float:
        return GPUS_PER_NODE * self.batch * self.accepted / self.throughput


# Table 2. The OTPS printed for 128K, batch 13 (23.19, that of 32K) is a misprint: its
# throughput gives 35.28. Acceptance 3.4 has the steps of 2.8: the same rows but for the factor.
TABLE2 = (
    Row(2, 1.7, 32 * K, 52, 1.0, 9647.71),
    Row(2, 1.7, 32 * K, 64, 0.82, 10693.31),
    Row(2, 1.7, 32 * K, 96, 0.48, 13155.98),
    Row(2, 1.7, 32 * K, 128, 0.31, 15620.14),
    Row(2, 1.7, 32 * K, 160, 0.21, 16347.88),
    Row(4, 2.8, 32 * K, 52, 1.0, 12168.02),
    Row(4, 2.8, 32 * K, 64, 0.82, 13656.66),
    Row(4, 2.8, 32 * K, 96, 0.48, 15814.07),
    Row(4, 2.8, 32 * K, 128, 0.31, 17746.10),
    Row(4, 2.8, 32 * K, 160, 0.21, 17601.03),
    Row(4, 3.4, 32 * K, 52, 1.0, 14775.45),
    Row(4, 3.4, 32 * K, 64, 0.82, 16583.08),
    Row(4, 3.4, 32 * K, 96, 0.48, 19202.80),
    Row(4, 3.4, 32 * K, 128, 0.31, 21548.83),
    Row(4, 3.4, 32 * K, 160, 0.21, 21372.68),
    Row(2, 1.7, 128 * K, 13, 1.0, 3669.19),
    Row(2, 1.7, 128 * K, 40, 0.2, 6925.06),
    Row(2, 1.7, 128 * K, 54, 0.1, 8169.60),
)
BASELINES = tuple(row for row in TABLE2 if row.ratio == 1)
ESS_ROWS = tuple(row for row in TABLE2 if row.ratio < 1)

# Figure 1, throughput without a limit of memory: 32K, MTP 2. Batches are marked in the figure;
# tokens/s are read off its axis, the first to +-100 (4 %), the others to +-3 %.
FIGURE1 = {12: (2700, 0.04), 128: (16000, 0.03), 256: (20600, 0.03), 320: (22300, 0.03)}
FIGURE1_SETTING = (2, 1.7, 32 * K)  # queries, accepted, context

# Figure 5 at ratio 0.2 (the same curve as figure 8's 32K): misses of layers 0 to 60.
FIGURE5_CONTEXT, FIGURE5_RATIO, FIGURE5_QUERIES = 32 * K, 0.2, 2
FIGURE5 = np.array([
    30, 67, 39, 17, 55, 30, 200, 122, 94, 100, 160, 258, 210, 70, 45, 123, 148, 607, 50, 215,
    313, 268, 75, 90, 225, 111, 258, 258, 250, 322, 222, 286, 250, 396, 172, 255, 189, 65, 215,
    360, 310, 220, 147, 322, 80, 165, 374, 70, 185, 243, 263, 152, 194, 169, 133, 250, 107, 105,
    86, 186, 97,
], float)  # fmt: skip

# Figure 7: added microseconds at 128K, batch 160 in two micro-batches, MTP 2, PCIe at 37 GB/s.
FIGURE7_BATCH, FIGURE7_CONTEXT, FIGURE7_QUERIES = 160, 128 * K, 2
FIGURE7_MISSES = (32, 64, 128, 256, 512)
FIGURE7 = {
    "off": (38, 80, 168, 333, 674),
    "da": (29, 29, 21, 63, 421),
    "dba": (38, 36, 29, 34, 152),
}

# Figure 9: mean misses by ratio; axis labels 0.1 to 0.9 are inferred. 32K's are hidden behind
# the others from 0.5 to 0.8.
FIGURE9 = {
    32 * K: {0.1: 638, 0.2: 190, 0.3: 103, 0.4: 80, 0.9: 14},
    64 * K: {0.1: 220, 0.2: 106, 0.3: 75, 0.4: 63, 0.5: 52, 0.6: 40, 0.7: 32, 0.8: 19, 0.9: 14},
    96 * K: {0.1: 177, 0.2: 113, 0.3: 94, 0.4: 81, 0.5: 66, 0.6: 52, 0.7: 42, 0.8: 28, 0.9: 14},
    128 * K: {0.1: 135, 0.2: 98, 0.3: 84, 0.4: 72, 0.5: 58, 0.6: 47, 0.7: 39, 0.8: 25, 0.9: 14},
}  # fmt: skip

# Figure 5, its highest line, layer 17, by figure 9's ratios; figure 8: the same layer at ratio 0.2,
# by context. None: not read.
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LAYER_17 = (None, 607, 350, 220, 150, 112, 80, 52, 25)
LAYER_17_AT_02 = {64 * K: 555, 96 * K: 630}

# HiSparse (GLM-5.1, top-k 2048, LongBench-V2): missed lookups in %, by policy and rows. It does not
# state the context.
HISPARSE = {
    ("lru", 2048): 30.0, ("lru", 4096): 13.4, ("lru", 8192): 6.7,
    ("fifo", 4096): 17.2, ("random", 4096): 16.1, ("belady", 4096): 8.2,
}  # fmt: skip

# Table 2's memory, derived from its ESS rows: their rows and index keys take at most this much.
DEVICE_BYTES = 85.7e9
# Printed in the abstract and Table 2. 64K is the claim of a digest (euno.news), not of the paper.
GAIN_32K, GAIN_128K, DIGEST_GAIN_64K = 0.694, 1.227, 0.86


def mean_misses(context: int, ratio: float) -> float:
    """Figure 9 between its points: the logarithm is linear in the ratio, constant outside.

    Raises: KeyError for a context that the figure does not have.
    """
    if ratio >= 1:
        return 0.0
    points = FIGURE9[context]
    return float(np.exp(np.interp(ratio, list(points), np.log(list(points.values())))))


def layer_misses(context: int, ratio: float) -> np.ndarray:
    """[61] misses at MTP 2: figure 5's shape over the layers, scaled to figure 9's mean."""
    return FIGURE5 / FIGURE5.mean() * mean_misses(context, ratio)
