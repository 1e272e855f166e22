"""How ranks that run one batch decide alike, whatever each one measures.

Clocks, links, free memory and sampled lists differ between ranks. What follows from them is decided
by one rank, or reduced over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.disaggregation.utils import all_reduce_flags

UNDECIDED = 2**31 - 1  # the largest number that SGLang's reduction carries


def leads(group: Any) -> bool:
    """Whether this rank decides for its group, a process group of torch: rank 0 does."""
    return group.size() == 1 or group.rank() == 0


def least(values: Sequence[int], group: Any) -> list[int]:
    """The smallest of each value over the ranks of a group. Every rank must call it alike.

    values: below UNDECIDED, or UNDECIDED itself on a rank that leaves the choice to the others
    """
    return all_reduce_flags(list(values), group, torch.distributed.ReduceOp.MIN)


def of_leader(values: Sequence[int], group: Any) -> list[int]:
    """The leading rank's values on every rank, as many on each. Every rank must call it alike."""
    return least(values if leads(group) else [UNDECIDED] * len(values), group)


def of_attention_leader(values: Sequence[int]) -> list[int]:
    """of_leader() over the ranks that share this rank's attention: those of one batch."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.attn_tp_size == 1:
        return list(values)
    return of_leader(values, parallel.attn_tp_group.cpu_group)
