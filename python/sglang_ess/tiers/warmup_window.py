"""The queries of a prompt that warm the hot tier before the first decode step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

WARMUP_QUERIES = 32  # ESS warms with "the last 32 windows of prefill"


def warm_spans(new_tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first, end) of each request's last WARMUP_QUERIES queries in the batch.

    new_tokens: of each request, in batch order
    """
    ends = accumulate(new_tokens)
    return [
        (end - min(tokens, WARMUP_QUERIES), end)
        for tokens, end in zip(new_tokens, ends, strict=True)
    ]
