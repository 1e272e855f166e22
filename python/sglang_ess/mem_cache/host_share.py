"""How much host memory a rank's host tier may take, and how ranks agree on their sizes."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch

from sglang_ess.config import EssConfig
from sglang_ess.errors import Refusal
from sglang_ess.layout import GIB

# The host tier's share of free host memory. The rest is for the process and the page cache.
AUTO_HOST_SHARE = 0.6
# The options by which ranks size their pools.
SIZE_OPTIONS = ("hot_ratio", "hot_gib", "host_gib", "index_dtype", "layer_budgets")
SIZE_FLAGS = tuple(f"--ess-{name.replace('_', '-')}" for name in SIZE_OPTIONS)


class CapacityError(Refusal):
    """One line for the operator: sizes that cannot be served."""


class NodeRanks(NamedTuple):
    """Ranks that SGLang places on one node. Each has a host tier of its own.

    replica: of one replica, which size their tiers together; total: of all replicas
    Source: _calculate_rank_ranges in sglang/srt/entrypoints/engine.py, launch_dp_schedulers in
    sglang/srt/managers/data_parallel_controller.py (replicas never span nodes).
    """

    replica: int = 1
    total: int = 1

    @classmethod
    def of(cls, options: Any) -> NodeRanks:
        """options: SGLang's ServerArgs before they are resolved, or its get_parallel() after"""
        # With DP attention, the data-parallel groups are part of the TP group.
        is_within = options.enable_dp_attention or options.attn_dp_size > 1
        replica = max(1, options.tp_size * options.pp_size // options.nnodes)
        return cls(replica, replica if is_within else replica * options.dp_size)


def host_limit_bytes(config: EssConfig, free: int, ranks: NodeRanks) -> int:
    """Bytes that the host tier of one rank may take.

    free: host bytes of the node that are free; another replica may have taken its share already
    Raises: CapacityError if fewer are free than --ess-host-gib says.
    """
    if config.host_gib is None:
        return int(free * AUTO_HOST_SHARE) // ranks.total
    wanted = int(config.host_gib * GIB)
    share = wanted // ranks.total
    if wanted * ranks.replica > free * ranks.total:
        of = f", {share / GIB:.2f} GiB for each of {ranks.total} ranks" if ranks.total > 1 else ""
        raise CapacityError(
            f"--ess-host-gib must fit into free host memory: got {config.host_gib:g} GiB{of}, "
            f"limit {free / GIB:.2f} GiB (MemAvailable and the cgroup's). Lower it or leave it out "
            f"for {AUTO_HOST_SHARE:.0%} of what is free."
        )
    return share


def node_text(rank_bytes: int, ranks: int) -> str:
    """What the host tiers of a node's ranks take, for a rank and together."""
    gib = rank_bytes / GIB
    return f"{gib:.2f} GiB a rank, {gib * ranks:.2f} GiB on this node ({ranks} ranks)"


def agreed(config: EssConfig, *values: int) -> tuple[int, ...]:
    """The minimum of each value over all ranks that size their pools together.

    Schedulers of a TP group that had different numbers of slots would run different batches, and
    their collectives would never end. All sizes and refusals follow from these values, the options
    and the model, so the ranks choose alike and refuse alike. (They are those of SGLang's world:
    with one pipeline stage, the TP group. SGLang takes the minimum of their free device memory by
    the same group, in KVCacheConfigurator._profile_available_bytes.)
    Raises: CapacityError on every rank, if their options of the tiers differ.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if parallel.launch_world_size == 1:
        return values
    mark = zlib.crc32(repr([getattr(config, name) for name in SIZE_OPTIONS]).encode())
    least = torch.tensor([*values, mark, -mark], dtype=torch.int64)
    group = parallel.world_group.cpu_group
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
    *found, low, high = least.tolist()
    if low != -high:
        raise CapacityError(
            "ESS's options of the two tiers must be the same on every node: got others on some. "
            f"Start every node with the same {', '.join(SIZE_FLAGS)}."
        )
    return tuple(found)
