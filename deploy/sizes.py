"""Sizes of a deployment, by the server's own formulas: python -m deploy.sizes

For a model, the format of its KV rows and its ranks on one node: the slots that the GPUs' memory
allows, the host memory that they take, and how many requests of some lengths they hold. The bytes
are those of mem_cache/capacity.py. The device memory that the weights leave is modelled, as in the
planner (sim/model/memory.py); a server finds its own when it starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from sglang_ess.config import EssConfig
from sglang_ess.layout import FP8_ROW_BYTES, GIB, PAGE_SLOTS, ROW_DIM
from sglang_ess.mem_cache.capacity import GPU_TIER, Geometry, hot_rows_at, max_slots
from sglang_ess.sim.inputs.specs import Deployment, Gpu, Model, load
from sglang_ess.sim.model.memory import kv_bytes, weight_bytes

ROW_BYTES = {"fp8": FP8_ROW_BYTES, "bf16": ROW_DIM * 2}
GPUS = 8  # of a node
HOT_RATIO = 0.2  # the least that a server takes if it is not told otherwise
LENGTHS = (32_768, 131_072, 1_048_576)  # tokens of a request
# Memory that a node needs beside its host tiers, assumed: one process a GPU, and /dev/shm.
PROCESS_GIB, SHM_GIB = 12, 32


class Sizes(NamedTuple):
    """One way to serve a model on one node.

    tiers       host tiers on the node: 1 where all ranks share one, GPUS with one for each rank
    kv_bytes    device memory of one GPU that the weights leave for the KV pool
    slots       of one host tier; hot_rows: of a layer on each GPU
    one_tier    slots of the same device memory without ESS, of as many pools as there are tiers
    """

    model: Model
    geometry: Geometry
    tiers: int
    kv_bytes: float
    slots: int
    hot_rows: int
    one_tier: int

    @property
    def tier_bytes(self) -> int:
        """Bytes of one host tier."""
        return self.geometry.host_bytes(self.slots)

    @property
    def node_bytes(self) -> int:
        """Bytes of all host tiers of the node."""
        return self.tiers * self.tier_bytes

    def requests(self, tokens: int, slots: int | None = None) -> int | None:
        """Requests of this length on the node; None if the model takes none so long."""
        if tokens > self.model.max_context:
            return None
        pages = -(-tokens // PAGE_SLOTS) * PAGE_SLOTS
        return self.tiers * ((self.slots if slots is None else slots) // pages)


def geometry_of(model: Model, rows: str, context: int | None = None) -> Geometry:
    """Bytes of a slot and of a hot row on a GPU. rows: "fp8" or "bf16"

    context: tokens of the longest request; None: the model's limit
    """
    return Geometry(
        layers=model.layers,
        row_bytes=ROW_BYTES[rows],
        index_bytes=model.all_index_bytes,
        topk=model.topk,
        context_tokens=context or model.max_context,
        page_slots=PAGE_SLOTS,
        tier=GPU_TIER,
        groups=model.groups,
    )


def sizes(
    name: str, rows: str, tensor: int, ratio: float = HOT_RATIO, context: int | None = None,
    nodes: int = 1,
) -> Sizes:  # fmt: skip
    """Sizes of a node of H200s whose host memory is no limit.

    tensor: GPUs of a node that attention is divided over; 1 is attention with a data-parallel rank
        on each. nodes: over which experts, and attention where it is divided, extend
    """
    model: Model = load("model", name)
    gpu: Gpu = load("gpu", "h200")
    node: Deployment = load("deployment", "node-8")
    over = tensor * nodes if tensor > 1 else 1
    layout = replace(
        node, queries=1, accepted_tokens=1.0, tensor_parallel=over, expert_gpus=GPUS * nodes
    )
    device = kv_bytes(model, gpu, layout)
    geometry = geometry_of(model, rows, context)
    slots = max_slots(EssConfig(hot_ratio=ratio), geometry, int(device), sys.maxsize)
    cell = geometry.layers * geometry.row_bytes + geometry.index_bytes
    one_tier = int(device / cell) // PAGE_SLOTS * PAGE_SLOTS
    hot_rows = hot_rows_at(ratio, geometry, slots)
    return Sizes(model, geometry, GPUS // tensor, device, slots, hot_rows, one_tier)


def weights_gib(name: str) -> float:
    """GiB of all weights of a model."""
    alone: Deployment = load("deployment", "one-gpu")
    return weight_bytes(load("model", name), alone) / GIB


HEADER = (
    "Model", "KV rows", "Attention", "Device GiB a GPU", "Slots a host tier", "Host GiB a tier",
    "Host GiB a node", *(f"{tokens >> 10}K requests" for tokens in LENGTHS),
)  # fmt: skip


def lines() -> Iterator[tuple[str, ...]]:
    """Rows of the table in docs/deployment.md; in brackets the requests of one tier."""
    for name, title in (("deepseek-v3.2", "DeepSeek-V3.2"), ("glm-5.2", "GLM-5.2")):
        for rows in ROW_BYTES:
            for tensor, attention in ((GPUS, f"TP{GPUS}"), (1, f"DP{GPUS}")):
                found = sizes(name, rows, tensor)
                counts = (
                    "-" if (fit := found.requests(tokens)) is None
                    else f"{fit:,} ({found.requests(tokens, found.one_tier):,})"
                    for tokens in LENGTHS
                )  # fmt: skip
                yield (
                    title, rows, attention, f"{found.kv_bytes / GIB:.1f}", f"{found.slots:,}",
                    f"{found.tier_bytes / GIB:.1f}", f"{found.node_bytes / GIB:.0f}", *counts,
                )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.sizes", description=__doc__)
    parser.parse_args(argv)
    for line in (HEADER, *lines()):
        print(" | ".join(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
