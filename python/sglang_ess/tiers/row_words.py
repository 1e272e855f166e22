"""Rows of any format as 8-byte words, and copies of rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import numba
import numpy as np
import torch
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

jit = numba.njit(cache=True, nogil=True)


def as_words(rows: torch.Tensor) -> np.ndarray:
    """View rows [n, ...] as [n, words] int64.

    Raises: ValueError if a row is not a multiple of 8 bytes; RuntimeError for strides that
    would take a copy, which a write could not reach.
    """
    width = rows.shape[1:].numel() * rows.itemsize
    if width % 8:
        raise ValueError(f"a row must be a multiple of 8 bytes: got {width}.")
    return rows.view(torch.uint8).view(len(rows), width).numpy().view(np.int64)


@jit
def _gather_words(source: Array, source_rows: Array, target: Array) -> None:
    for i in range(source_rows.shape[0]):
        row = source_rows[i]
        for w in range(source.shape[1]):
            target[i, w] = source[row, w]


def copy_rows(source: torch.Tensor, indices: torch.Tensor, target: torch.Tensor) -> None:
    """Set target[i] = source[indices[i]]. source, target: rows [n, ...]; indices [n] int64."""
    _gather_words(as_words(source), indices.numpy(), as_words(target))
