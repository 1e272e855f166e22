"""Input of the cost model: a model, a GPU, a link, a deployment and its calibration.

`load("gpu", "h200")` reads sim/data/gpus/h200.toml. A name that ends in .toml is a path. The data
files give the source of each number in a comment on its line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from sglang_ess.layout import FP8_ROW_BYTES
from sglang_ess.sim.inputs.files import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Checked,
    Limit,
    SpecError,
    find,
    names,
    read,
    spec,
)
from sglang_ess.tiers.index_groups import IndexGroups

__all__ = [
    "Calibration", "Deployment", "Gpu", "Link", "Model", "Node", "SpecError", "from_kernels",
    "load", "names", "read",
]  # fmt: skip

R = TypeVar("R", bound=Checked)
OVERLAPS: tuple[str, ...] = ("off", "da", "dba", "layerwise", "auto", "halves")
AT_LEAST_ONE: Limit = ("1 or more", lambda value: 1 <= value < float("inf"))


@dataclass(frozen=True)
class Model(Checked):
    """A model with MLA and sparse attention, as its config.json describes it.

    row_bytes     latent row of one token in one layer
    index_bytes   index key of one token in one layer that selects
    weight_bytes  one weight of the projections and experts
    mtp_layers    layers that draft tokens, used if a request has several queries in a step; not
                  among `layers`
    gated         a gate as wide as all heads' values multiplies attention's output
    index_groups  layers of each index group: its first layer selects, the others read the same
                  rows; left out: each layer selects. See `groups`.
    """

    layers: int = spec(AT_LEAST_ONE)
    dense_layers: int = spec(NOT_NEGATIVE)
    hidden: int = spec(AT_LEAST_ONE)
    heads: int = spec(AT_LEAST_ONE)
    q_lora_rank: int = spec(AT_LEAST_ONE)
    kv_lora_rank: int = spec(AT_LEAST_ONE)
    nope_dim: int = spec(AT_LEAST_ONE)
    rope_dim: int = spec(AT_LEAST_ONE)
    v_dim: int = spec(AT_LEAST_ONE)
    index_heads: int = spec(AT_LEAST_ONE)
    index_dim: int = spec(AT_LEAST_ONE)
    topk: int = spec(AT_LEAST_ONE)
    experts: int = spec(AT_LEAST_ONE)
    experts_per_token: int = spec(AT_LEAST_ONE)
    shared_experts: int = spec(NOT_NEGATIVE)
    expert_width: int = spec(AT_LEAST_ONE)
    dense_width: int = spec(AT_LEAST_ONE)
    vocabulary: int = spec(AT_LEAST_ONE)
    max_context: int = spec(AT_LEAST_ONE)
    row_bytes: int = spec(AT_LEAST_ONE)
    index_bytes: int = spec(AT_LEAST_ONE)
    weight_bytes: float = spec(POSITIVE)
    mtp_layers: int = spec(NOT_NEGATIVE, default=0)
    gated: bool = spec(default=False)
    index_groups: tuple[int, ...] | None = spec(AT_LEAST_ONE, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.index_groups is not None and sum(self.index_groups) != self.layers:
            raise ValueError(
                f"index_groups must add up to layers: got {sum(self.index_groups)}, layers "
                f"{self.layers}."
            )
        if self.dense_layers > self.layers:
            raise ValueError(f"dense_layers must be at most layers: got {self.dense_layers}.")
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token must be at most experts: got {self.experts_per_token}."
            )

    @cached_property
    def groups(self) -> IndexGroups:
        """The index groups. A hot tier, its map and its plan belong to a group."""
        if self.index_groups is None:
            return IndexGroups.single(self.layers)
        return IndexGroups(self.index_groups)

    @property
    def all_row_bytes(self) -> int:
        """Latent rows of one token in every layer."""
        return self.layers * self.row_bytes

    @property
    def all_index_bytes(self) -> int:
        """Index keys of one token: those of the layers that select."""
        return len(self.groups) * self.index_bytes

    @property
    def draft_bytes(self) -> int:
        """Latent rows and index keys of one token in the MTP layers, each of which selects."""
        return self.mtp_layers * (self.row_bytes + self.index_bytes)

    @property
    def projection_weights(self) -> int:
        """Weights of one layer's attention, without the indexer."""
        queries = self.hidden + self.heads * (self.nope_dim + self.rope_dim)
        latent = self.hidden * (self.kv_lora_rank + self.rope_dim)
        up = self.kv_lora_rank * self.heads * (self.nope_dim + self.v_dim)
        output = self.heads * self.v_dim * self.hidden
        return self.q_lora_rank * queries + latent + up + output * (2 if self.gated else 1)

    @property
    def indexer_weights(self) -> int:
        """Weights of one layer's indexer: its queries, its key, its head weights."""
        queries = self.q_lora_rank * self.index_heads * self.index_dim
        return queries + self.hidden * (self.index_dim + self.index_heads)

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.expert_width

    @property
    def dense_weights(self) -> int:
        return 3 * self.hidden * self.dense_width

    @property
    def attention_flops(self) -> int:
        """FLOPs of one query and one selected row: scores over latent and rope, then values."""
        return 2 * self.heads * (2 * self.kv_lora_rank + self.rope_dim)

    @property
    def index_flops(self) -> int:
        """FLOPs of one query and one index key."""
        return 2 * self.index_heads * self.index_dim


@dataclass(frozen=True)
class Gpu(Checked):
    """One GPU. TFLOPS are dense.

    matmul_tflops     peak in the number format of the weights
    attention_tflops  reached by the sparse MLA decode kernel where compute limits it
    prefill_tflops    reached by the sparse prefill kernel
    """

    memory_gib: float = spec(POSITIVE)
    hbm_gb_s: float = spec(POSITIVE)
    matmul_tflops: float = spec(POSITIVE)
    attention_tflops: float = spec(POSITIVE)
    prefill_tflops: float = spec(POSITIVE)


@dataclass(frozen=True)
class Link(Checked):
    """The link between host and one GPU.

    nominal_gb_s  rate of the bus in one direction
    gather_gb_s   rate of scattered latent rows, host to device
    scatter_gb_s  rate of scattered latent rows, device to host
    own_memory    each GPU's host memory is its own, so that links do not slow each other
    """

    nominal_gb_s: float = spec(POSITIVE)
    gather_gb_s: float = spec(POSITIVE)
    scatter_gb_s: float = spec(POSITIVE)
    own_memory: bool = spec(default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        fastest = max(self.gather_gb_s, self.scatter_gb_s)
        if fastest > self.nominal_gb_s:
            raise ValueError(f"nominal_gb_s must be the largest of the three: got {fastest:g}.")


@dataclass(frozen=True)
class Node(Checked):
    """What the GPUs of one node share. fetch_ways.py has the formulas.

    sockets      of CPUs, each with as many GPUs
    dram_gb_s    rate of scattered latent rows from one socket's memory
    socket_gb_s  rate between the sockets, in one direction
    gather_us, gather_gb_s  an all-gather over NVLink: without its bytes, and what a GPU receives
    push_us, push_gb_s  stores to all peers over NVLink, with a signal before and after: the same
    """

    sockets: int = spec(AT_LEAST_ONE)
    dram_gb_s: float = spec(POSITIVE)
    socket_gb_s: float = spec(POSITIVE)
    gather_us: float = spec(NOT_NEGATIVE)
    gather_gb_s: float = spec(POSITIVE)
    push_us: float = spec(NOT_NEGATIVE)
    push_gb_s: float = spec(POSITIVE)


@dataclass(frozen=True)
class Calibration(Checked):
    """Numbers that no data sheet and no config file gives. They are fitted or measured.

    roofline_share  share of peak that matrix kernels reach, counting bytes and FLOPs in turn
    prefill_share   share of peak that prefill reaches, communication included
    layer_us        launches and gaps in one layer of one micro-batch
    token_bytes     HBM bytes of one token's element-wise work in one layer
    step_us         once a step: sampling, drafting, scheduling
    transfer_ratio  seconds of a fetch / (bytes / gather_gb_s)
    preattn_us      work between indexer and attention that can hide a fetch
    da_us, dba_us   cost of splitting attention (DA), and also the indexer (DBA), in one layer
    scan_ratio      the indexer's pass over all keys, with top-k, / what roofline_share gives
    plan_us         resolving top-k to hot rows before a fetch; two tiers need it at any misses
    early_us        the part of preattn_us that hides a fetch even in mode off, as in our server
    """

    roofline_share: float = spec(SHARE)
    prefill_share: float = spec(SHARE)
    layer_us: float = spec(NOT_NEGATIVE)
    token_bytes: float = spec(NOT_NEGATIVE)
    step_us: float = spec(NOT_NEGATIVE)
    transfer_ratio: float = spec(POSITIVE)
    preattn_us: float = spec(NOT_NEGATIVE)
    da_us: float = spec(NOT_NEGATIVE)
    dba_us: float = spec(NOT_NEGATIVE)
    scan_ratio: float = spec(NOT_NEGATIVE, default=1.0)
    plan_us: float = spec(NOT_NEGATIVE, default=0.0)
    early_us: float = spec(NOT_NEGATIVE, default=0.0)


@dataclass(frozen=True)
class Deployment(Checked):
    """How a model is served. A decode rank is one data-parallel replica of attention.

    queries          of a request in one decode step: 1 + draft tokens
    accepted_tokens  mean tokens that a request gains in one step
    overlap          of fetches and compute. layerwise: DA or DBA, the cheaper in each layer;
                     auto: also off; halves: also behind the other half of two-batch overlap
    early_fetch      the rows of an index group's later layers are fetched behind the layers
                     before them, as soon as the group is planned; false: each layer's in its turn
    share_fetch      each GPU of a rank fetches its share of the missed rows and pushes it to the
                     others of its node; false: each fetches all
    node             what the GPUs of a node share
    decode_ranks     of the whole deployment, each with tensor_parallel GPUs
    expert_gpus      GPUs over which the experts are spread
    network_gb_s     rate of dispatch and combine, of one GPU
    remote_share     share of the experts' traffic that crosses that network
    network_us       one dispatch and one combine without their bytes
    kv_gib           device memory of one GPU for latent rows and index keys; left out:
                     memory_fraction of the GPU's memory less weights and workspace_gib
    host_gib         host memory for latent rows, of a node / its GPUs; 0: no offloading
    prefill_gpus     GPUs that share one prompt; prefill_ranks: prompts at once
    hand_off_gb_s, hand_off_us  rate and latency of one request's way from prefill to decode
    """

    queries: int = spec(AT_LEAST_ONE)
    accepted_tokens: float = spec(AT_LEAST_ONE)
    two_batch_overlap: bool = spec()
    overlap: str = spec(choices=OVERLAPS)
    decode_ranks: int = spec(AT_LEAST_ONE)
    tensor_parallel: int = spec(AT_LEAST_ONE)
    expert_gpus: int = spec(AT_LEAST_ONE)
    gpus_per_node: int = spec(AT_LEAST_ONE)
    network_gb_s: float = spec(POSITIVE)
    remote_share: float = spec(FRACTION)
    network_us: float = spec(NOT_NEGATIVE)
    memory_fraction: float = spec(SHARE)
    workspace_gib: float = spec(NOT_NEGATIVE)
    host_gib: float = spec(NOT_NEGATIVE)
    prefill_ranks: int = spec(AT_LEAST_ONE)
    prefill_gpus: int = spec(AT_LEAST_ONE)
    hand_off_gb_s: float = spec(POSITIVE)
    hand_off_us: float = spec(NOT_NEGATIVE)
    calibration: str = spec()
    kv_gib: float | None = spec(POSITIVE, default=None)
    early_fetch: bool = spec(default=True)
    share_fetch: bool = spec(default=False)
    node: str = spec(default="hgx")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accepted_tokens > self.queries:
            raise ValueError(
                f"accepted_tokens must be at most queries: got {self.accepted_tokens:g}, "
                f"limit {self.queries}."
            )

    @property
    def rank_gpus(self) -> int:
        """GPUs of one node that a decode rank has. They share one host tier."""
        return min(self.tensor_parallel, self.gpus_per_node)

    @property
    def host_tiers(self) -> int:
        """Host tiers of a node: one for each decode rank that has GPUs of it."""
        return self.gpus_per_node // self.rank_gpus


KINDS: dict[str, tuple[str, type]] = {
    "model": ("models", Model),
    "gpu": ("gpus", Gpu),
    "link": ("links", Link),
    "node": ("nodes", Node),
    "deployment": ("deployments", Deployment),
    "calibration": ("calibrations", Calibration),
}


def load(kind: str, name_or_path: str | Path) -> Any:
    """Load a Model, Gpu, Link, Node, Deployment or Calibration by its name, or from a .toml file.

    kind: a key of KINDS. Raises: SpecError as files.read; KeyError for an unknown kind.
    """
    folder, cls = KINDS[kind]
    return read(find(folder, name_or_path), cls)


def from_kernels(
    path: Path | str, link: Link, calibration: Calibration
) -> tuple[Link, Calibration]:
    """Replace figures of link and calibration by those that the kernel benchmarks measured.

    The gather rate is that of our better fetch kernel: the median over fetches of 656-byte rows
    at 64 misses and 16 requests or more. transfer_ratio becomes 1, because this rate is
    measured. da_us and dba_us come from the overlap cost table: an empty second pass, and two
    launches of the indexer.
    Raises: SpecError if the file has no such rows or was not measured on a GPU.
    """
    try:
        found = json.loads(Path(path).read_text())
        rows, costs = found["rows"], found["overlap_costs"]
        gather = _gather_gb_s(rows)
        peaks = {r["config"]["direction"]: float(r["gb_per_s"]) for r in _rows(rows, "pcie_peak")}
        da_us = float(costs["empty_us"])
        link = replace(
            link, nominal_gb_s=max(peaks["h2d"], gather), gather_gb_s=gather,
            scatter_gb_s=min(peaks["d2h"], max(peaks["h2d"], gather)),
        )  # fmt: skip
        return link, replace(
            calibration, transfer_ratio=1.0, da_us=da_us,
            dba_us=da_us + float(costs["halving_us"]),
        )  # fmt: skip
    except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
        raise SpecError(
            f"{path} must hold rows pcie_peak and fetch and a cost table, measured on a GPU: got "
            f"{type(error).__name__} {error}. Write it with python -m benchmarks.kernels --json."
        ) from None


def _rows(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"] == name and row["kind"] == "measured"]


def _gather_gb_s(rows: list[dict[str, Any]]) -> float:
    """Gather rate of the better kernel. Raises: IndexError without such a fetch."""
    rates: dict[str, list[float]] = {}
    for row in _rows(rows, "fetch"):
        at = row["config"]
        if (
            at["system"] in ("triton", "cuda")
            and at["row_bytes"] == FP8_ROW_BYTES
            and at["batch"] >= 16
            and at["misses"] >= 64
        ):
            rates.setdefault(at["system"], []).append(float(row["gb_per_s"]))
    middles = sorted(sorted(each)[len(each) // 2] for each in rates.values())
    return middles[-1]


def changed(record: R, **values: Any) -> R:
    """Return record with some fields replaced. Raises: SpecError for an unknown or bad field."""
    known = [f.name for f in fields(record)]
    if unknown := sorted(set(values).difference(known)):
        raise SpecError(f"{type(record).__name__} must know its fields: got {unknown}.")
    try:
        return replace(record, **values)
    except ValueError as error:
        raise SpecError(str(error)) from None
