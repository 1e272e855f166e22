"""Which queries of a prompt warm the hot tier before its first decode step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

WARMUP_QUERIES = 32  # ESS: "the last 32 windows of prefill" (papers.md 1.5)


def warm_spans(new_tokens: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of each request's last WARMUP_QUERIES queries in a batch of its new tokens."""
    ends = accumulate(new_tokens)
    return [
        (end - min(tokens, WARMUP_QUERIES), end)
        for tokens, end in zip(new_tokens, ends, strict=True)
    ]
