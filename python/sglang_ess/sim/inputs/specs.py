"""What the cost model is told: a model, a GPU, a link, a deployment and its calibration.

`load("gpu", "h200")` reads data/gpus/h200.toml; a path that ends in .toml is read as such. The
data files name the source of each number in the comment beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sglang_ess.layout import FP8_ROW_BYTES
from sglang_ess.sim.inputs.files import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Checked,
    SpecError,
    find,
    names,
    read,
    spec,
)

__all__ = [
    "Calibration", "Deployment", "Gpu", "Link", "Model", "SpecError", "from_kernels", "load",
    "names", "read",
]  # fmt: skip

OVERLAPS = ("off", "da", "dba", "layerwise", "auto", "halves")
AT_LEAST_ONE = ("1 or more", lambda value: 1 <= value < float("inf"))


@dataclass(frozen=True)
class Model(Checked):
    """A sparse-attention MLA model, as in its config.json.

    row_bytes, index_bytes  of one token in one layer: latent row, index key
    weight_bytes            of one weight of the projections and experts
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_layers > self.layers:
            raise ValueError(f"dense_layers must be at most layers: got {self.dense_layers}.")
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token must be at most experts: got {self.experts_per_token}."
            )

    @property
    def projection_weights(self) -> int:
        """Weights of one layer's attention, without the indexer."""
        queries = self.hidden + self.heads * (self.nope_dim + self.rope_dim)
        latent = self.hidden * (self.kv_lora_rank + self.rope_dim)
        up = self.kv_lora_rank * self.heads * (self.nope_dim + self.v_dim)
        return self.q_lora_rank * queries + latent + up + self.heads * self.v_dim * self.hidden

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
        """Of one query and one selected row: scores over latent and rope, values over latent."""
        return 2 * self.heads * (2 * self.kv_lora_rank + self.rope_dim)

    @property
    def index_flops(self) -> int:
        """Of one query and one key."""
        return 2 * self.index_heads * self.index_dim


@dataclass(frozen=True)
class Gpu(Checked):
    """One GPU. TFLOPS are dense; matmul's is of the format in which the weights are served.

    attention_tflops  that the sparse MLA decode kernel reached where it is bound by compute
    prefill_tflops    the same of the sparse prefill kernel
    """

    memory_gib: float = spec(POSITIVE)
    hbm_gb_s: float = spec(POSITIVE)
    matmul_tflops: float = spec(POSITIVE)
    attention_tflops: float = spec(POSITIVE)
    prefill_tflops: float = spec(POSITIVE)


@dataclass(frozen=True)
class Link(Checked):
    """Host to device and back, of one GPU.

    nominal_gb_s  of the bus, one way
    gather_gb_s   that scattered latent rows reach, host to device
    scatter_gb_s  the same, device to host
    """

    nominal_gb_s: float = spec(POSITIVE)
    gather_gb_s: float = spec(POSITIVE)
    scatter_gb_s: float = spec(POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        fastest = max(self.gather_gb_s, self.scatter_gb_s)
        if fastest > self.nominal_gb_s:
            raise ValueError(f"nominal_gb_s must be the largest of the three: got {fastest:g}.")


@dataclass(frozen=True)
class Calibration(Checked):
    """What neither a data sheet nor a config file says.

    roofline_share    of peak that matrix kernels reach, bytes and flops taken one after the other
    prefill_share     of peak in prefill, communication included
    layer_us          launches and gaps of one layer of one micro-batch
    token_bytes       of a token's element-wise work in one layer
    step_us           of one step: sampling, drafting, scheduling
    transfer_ratio    seconds of a fetch over bytes / gather_gb_s
    preattn_us        of work between indexer and attention that hides a fetch, beside attention
    da_us, dba_us     that splitting attention, and the indexer too, adds to a micro-batch's layer
    scan_ratio        seconds of the indexer's pass over all keys, top-k included, over the rule's
    plan_us           before a fetch: resolving top-k to hot rows, which two tiers do at any misses
    early_us          of preattn_us that a fetch runs beside without overlap too, as our server's
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

    queries            of a request in one decode step: 1 + draft tokens
    accepted_tokens    a request gains in one step, its mean
    decode_ranks       of the whole deployment; each has tensor_parallel GPUs
    expert_gpus        GPUs that the experts are spread over
    network_gb_s       that dispatch and combine have, of one GPU
    remote_share       of the experts' traffic that crosses that network
    network_us         of one dispatch and one combine without their bytes
    kv_gib             of device memory for latent rows and index keys, of one GPU; left out:
                       memory_fraction of the GPU's, less weights and workspace_gib
    host_gib           of host memory for latent rows, of one GPU; 0: without offloading
    prefill_gpus       that share one prompt; prefill_ranks: prompts at once
    hand_off_gb_s, hand_off_us  of one request from prefill to decode
    overlap            layerwise: DA or DBA, the cheaper per layer; auto: off, too; halves: a fetch
                       runs behind the other half of two-batch overlap as well
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accepted_tokens > self.queries:
            raise ValueError(
                f"accepted_tokens must be at most queries: got {self.accepted_tokens:g}, "
                f"limit {self.queries}."
            )


KINDS: dict[str, tuple[str, type]] = {
    "model": ("models", Model),
    "gpu": ("gpus", Gpu),
    "link": ("links", Link),
    "deployment": ("deployments", Deployment),
    "calibration": ("calibrations", Calibration),
}


def load(kind: str, name_or_path: str | Path) -> Any:
    """A Model, Gpu, Link, Deployment or Calibration by its name, or from a .toml file.

    Raises: SpecError, see files.read; KeyError for an unknown kind.
    """
    folder, cls = KINDS[kind]
    return read(find(folder, name_or_path), cls)


def from_kernels(
    path: Path | str, link: Link, calibration: Calibration
) -> tuple[Link, Calibration]:
    """link and calibration with what benchmarks/kernels measured on a card in their place.

    The gather rate is the median over fetches of 656 B rows from 64 misses and 16 requests up,
    of the better of our kernels; transfer_ratio becomes 1, the rate being a measured one. What
    DA and DBA add is the cost table's own: an empty second pass, and two launches of the indexer.
    Raises: SpecError if the file has no such rows, or was interpreted on a CPU.
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


def _rows(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if row["name"] == name and row["kind"] == "measured"]


def _gather_gb_s(rows: list[dict]) -> float:
    """Raises: IndexError without such a fetch."""
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


def changed(record: Any, **values: Any) -> Any:
    """record with some fields replaced. Raises: SpecError for an unknown field or a bad value."""
    known = [f.name for f in fields(record)]
    if unknown := sorted(set(values).difference(known)):
        raise SpecError(f"{type(record).__name__} must know its fields: got {unknown}.")
    try:
        return replace(record, **values)
    except ValueError as error:
        raise SpecError(str(error)) from None
