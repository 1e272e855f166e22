"""Rows of any format as machine words, and the copies between tiers."""

import numba
import numpy as np
import torch

jit = numba.njit(cache=True, nogil=True)


def as_words(rows: torch.Tensor) -> np.ndarray:
    """rows [n, ...] as [n, words] int64, the same memory.

    Raises: ValueError if a row is not a multiple of 8 bytes; RuntimeError for strides that
    would take a copy, which a write could not reach.
    """
    width = rows.shape[1:].numel() * rows.itemsize
    if width % 8:
        raise ValueError(f"a row must be a multiple of 8 bytes: got {width}.")
    return rows.view(torch.uint8).view(len(rows), width).numpy().view(np.int64)


@jit
def _gather_words(source, source_rows, target):
    for i in range(source_rows.shape[0]):
        row = source_rows[i]
        for w in range(source.shape[1]):
            target[i, w] = source[row, w]


def copy_rows(source: torch.Tensor, indices: torch.Tensor, target: torch.Tensor) -> None:
    """target[i] = source[indices[i]]: rows [n, ...] of one format, indices [n] int64."""
    _gather_words(as_words(source), indices.numpy(), as_words(target))
