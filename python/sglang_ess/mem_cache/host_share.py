"""How much host memory a rank's host tier may take, and how ranks agree on their sizes."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sglang_ess.config import EssConfig
from sglang_ess.errors import Refusal
from sglang_ess.layout import GIB, MIB
from sglang_ess.tiers.tier_group import TierGroup

# The host tier's share of free host memory. The rest is for the process and the page cache.
AUTO_HOST_SHARE = 0.6
# The options by which ranks size their pools.
SIZE_OPTIONS = ("hot_ratio", "hot_gib", "host_gib", "index_dtype", "layer_budgets")
SIZE_FLAGS = tuple(f"--ess-{name.replace('_', '-')}" for name in SIZE_OPTIONS)


class CapacityError(Refusal):
    """One line for the operator: sizes that cannot be served."""


class NodeRanks(NamedTuple):
    """Ranks that SGLang places on one node.

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


class NodeTiers(NamedTuple):
    """Host tiers on one node. The ranks of an attention-TP group have the same rows: one tier.

    replica: of one replica, which size theirs together; total: of all replicas
    ranks: that share one
    Source: derive_spawn_ranks in sglang/srt/runtime_context.py: a group has consecutive ranks, and
    so has a node.
    """

    replica: int = 1
    total: int = 1
    ranks: int = 1

    @classmethod
    def of(cls, options: Any) -> NodeTiers:
        """options: as NodeRanks.of takes them"""
        node = NodeRanks.of(options)
        groups = options.attn_dp_size
        if options.enable_dp_attention and groups == 1:
            groups = options.dp_size
        width = max(1, options.tp_size // groups // options.attn_cp_size)
        # A group may begin on one node and end on the next.
        replica = max(
            (first + node.replica - 1) // width - first // width + 1
            for first in range(0, options.nnodes * node.replica, node.replica)
        )
        return cls(replica, replica * node.total // node.replica, min(width, node.replica))


def tier_group() -> TierGroup:
    """The ranks that share this rank's host tier: those of its attention-TP group on its node.

    A node is what SGLang's --node-rank says. Two of them may run on one host. They wait for each
    other as long as SGLang's watchdog lets a pass take.
    Raises: Refusal on every rank, if the group's nodes have different numbers of them: they build
    their tiers together, and a rank by itself takes fewer steps.
    """
    from sglang.srt.runtime_context import get_device, get_parallel

    parallel = get_parallel()
    if parallel.attn_tp_size == 1:
        return TierGroup()
    group = parallel.attn_tp_group
    nodes = group.all_gather_object(parallel.node_rank)
    counts = {node: nodes.count(node) for node in nodes}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} on node {node}" for node, count in counts.items())
        raise Refusal(
            f"{len(nodes)} ranks that share their attention must be equally many on each of their "
            f"nodes: got {found}. Choose other values of --tp-size, --dp-size or --nnodes."
        )
    members = [i for i, node in enumerate(nodes) if node == parallel.node_rank]

    def exchange(value: Any) -> list[Any]:
        values = group.all_gather_object(value)
        return [values[i] for i in members]

    seconds = get_device().watchdog_timeout
    limit = math.inf if seconds is None or seconds < 0 else seconds  # without a watchdog: none
    return TierGroup(members.index(group.rank_in_group), len(members), exchange, limit)


def trace_file(path: str) -> Path:
    """The file of --ess-trace for this rank's host tier.

    That is path for the server's first tier. The others' names say whose they are, for example
    steps.dp1.trace. The ranks that share a tier plan alike, so the writer's trace has all of it.
    """
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    is_within = parallel.attn_dp_size > 1
    replica = (parallel.attn_dp_rank if is_within else parallel.dp_rank) or 0
    numbers = {"dp": replica, "pp": parallel.pp_rank, "node": parallel.node_rank}
    parts = "".join(f".{name}{number}" for name, number in numbers.items() if number)
    file = Path(path)
    return file.with_name(f"{file.stem}{parts}{file.suffix}")


def host_limit_bytes(config: EssConfig, free: int, tiers: NodeTiers) -> int:
    """Bytes that one host tier may take.

    free: host bytes of the node that are free; another replica may have taken its share already
    Raises: CapacityError if fewer are free than --ess-host-gib says.
    """
    if config.host_gib is None:
        return int(free * AUTO_HOST_SHARE) // tiers.total
    wanted = int(config.host_gib * GIB)
    share = wanted // tiers.total
    if wanted * tiers.replica > free * tiers.total:
        several = tiers.total > 1
        of = f", {share / GIB:.2f} GiB for each of {tiers.total} host tiers" if several else ""
        raise CapacityError(
            f"--ess-host-gib must fit into free host memory: got {config.host_gib:g} GiB{of}, "
            f"limit {free / GIB:.2f} GiB (MemAvailable and the cgroup's). Lower it or leave it out "
            f"for {AUTO_HOST_SHARE:.0%} of what is free."
        )
    return share


def node_text(tier_bytes: int, tiers: int, ranks: int) -> str:
    """What the host tiers of a node take, and who shares them.

    tiers: on the node; ranks: that share one. For example "12 MiB, shared by 2 ranks; 24 MiB on
    this node (2 host tiers)"
    """
    text = f"{tier_bytes / MIB:.0f} MiB"
    if ranks > 1:
        text += f", shared by {ranks} ranks"
    if tiers > 1:
        text += f"; {tier_bytes * tiers / MIB:.0f} MiB on this node ({tiers} host tiers)"
    return text


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
