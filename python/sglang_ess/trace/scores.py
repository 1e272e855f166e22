"""The indexer's scores of a plan, and their bytes in a trace file.

A score is kept as float16 times a power of two, which each query has for itself: the largest score
of a query lies in [2**14, 2**15]. So a score down to 2**-29 of the query's largest has a relative
error of at most 2**-11, whatever the model's scale, and order is never reversed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PEAK_EXPONENT = 15


class PlanScores(NamedTuple):
    """What the indexer thought of a plan's top-k and of the slots that just missed it.

    runner_ups  [queries, m] int32: slots of ranks k + 1 to k + m, in any order; -1 pads
    scores      [queries, k + m] float32: of the top-k's entries and then of runner_ups, column by
                column; NaN where the column is a pad or nobody knows
    """

    runner_ups: np.ndarray
    scores: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.runner_ups.nbytes + self.scores.nbytes


def to_halves(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores [n, c] float32 as exponents [n] int64 and halves [n, c] float16.

    scores = halves * 2**exponents, rounded. NaN and infinities stay what they are.
    """
    finite = np.where(np.isfinite(scores), scores, 0)
    peaks = np.abs(finite).max(axis=1, initial=0)
    exponents = np.frexp(peaks)[1].astype(np.int64) - PEAK_EXPONENT
    scaled = np.ldexp(scores.astype(np.float64), -exponents[:, None])
    return exponents, scaled.astype(np.float16)


def from_halves(exponents: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Invert to_halves: [n, c] float32."""
    with np.errstate(over="ignore"):  # of exponents that no writer has written
        scores: np.ndarray = np.ldexp(halves.astype(np.float64), exponents[:, None])
        return scores.astype(np.float32)


def pack_halves(halves: np.ndarray) -> bytes:
    """Return float16 numbers as all low bytes and then all high ones, which compress better."""
    return halves.astype("<f2").reshape(-1, 1).view(np.uint8).T.tobytes()


def unpack_halves(data: np.ndarray) -> np.ndarray:
    """Invert pack_halves: data [2 n] uint8 -> [n] float16."""
    pairs = np.ascontiguousarray(data.reshape(2, -1).T)
    return pairs.view("<f2").reshape(-1).astype(np.float16)
