"""Seconds of a decode step, a prefill and a hand-off, from specs: a roofline with few free terms.

A matrix kernel takes (bytes / HBM + flops / peak) / roofline_share. The two are added, because
DeepGEMM's published times behave so between its memory-bound and compute-bound shapes. In one
layer, for a micro-batch of n requests with q queries each:

    projections, indexer, experts   this rule, over weights, index keys and tokens; dense matrices
                                    compute whole tiles of 64 or 128 tokens
    attention                       tokens x top-k rows x flops / attention_tflops
    elementwise, latency            token_bytes x tokens / HBM; layer_us
    communication                   dispatch and combine: network_us + bytes / network_gb_s
    transfer                        the exposed part of plan and fetch, see overlap_time.py

In an index group only the first layer has an indexer and is planned. The fetches of the others are
issued with the first one's, unless the deployment says early_fetch = false.

Two-batch overlap runs two micro-batches, each of which hides its communication behind the other's
compute. A layer then takes 2 x max(compute, communication), and reads its weights twice. Without
it a layer takes compute + communication. The model takes the write-back of new rows (0.3 ms in
the largest step of ESS) as hidden.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_ess.sim.inputs.specs import Calibration, Deployment, Gpu, Link, Model, Node, load
from sglang_ess.sim.model import fetch_ways
from sglang_ess.sim.model.overlap_time import (
    HALVES,
    Window,
    beside_other_half,
    cheapest,
    grouped,
    sharing,
)

GB, TERA, MICRO = 1e9, 1e12, 1e-6
BF16_BYTES = 2
FP8_SCALE = 1 + 4 / 128  # DeepEP sends an fp32 scale with every 128 fp8 values
HEAD_WEIGHT_BYTES = BF16_BYTES  # the output layer is not quantised
# DeepGEMM's get_best_configs: block_m is 64 up to 64 tokens and 128 beyond. The padding of routed
# experts is about the same at any batch, so it is part of layer_us.
SMALL_TILE, TILE = 64, 128
# FlashMLA's sparse kernels take whole tiles of 64 heads: SGLang pads a rank's heads with zeros
# (layers/attention/dsa_backend.py), which take as long as others.
HEAD_TILE = 64
MERGE_PASSES = 3  # read two partial outputs, write one
Misses = float | np.ndarray  # rows per request, layer and step: one figure or [layers]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one decode step, and its parts by name, which sum to it.

    in_turn  the part `transfer`, if each layer's rows were fetched in its turn (no early fetch)
    """

    seconds: float
    parts: Mapping[str, float]
    in_turn: float = 0.0


class CostModel:
    """Times of one decode rank.

    fetch: how long the GPUs that share a host tier take to get missed rows, in each way

    calibration: replaces the one that the deployment names
    Raises: ValueError if tensor_parallel does not divide the heads.
    """

    def __init__(
        self,
        model: Model,
        gpu: Gpu,
        link: Link,
        deployment: Deployment,
        calibration: Calibration | None = None,
    ):
        self.model, self.gpu, self.link, self.deployment = model, gpu, link, deployment
        self.calibration = calibration or load("calibration", deployment.calibration)
        self._hbm, self._matmul = gpu.hbm_gb_s * GB, gpu.matmul_tflops * TERA
        if model.heads % deployment.tensor_parallel:
            raise ValueError(
                f"tensor_parallel must divide heads: got {deployment.tensor_parallel}, heads "
                f"{model.heads}."
            )
        node: Node = load("node", deployment.node)
        gpus, rank_gpus = deployment.gpus_per_node, deployment.rank_gpus
        rate = fetch_ways.link_gb_s(node, link, gpus, gpus, self.calibration.transfer_ratio)
        self.fetch = fetch_ways.FetchWays(node, rate, rank_gpus, model.row_bytes)
        self._selects = np.zeros(model.layers, bool)
        self._selects[list(model.groups.firsts)] = True
        is_dense = np.arange(model.layers) < model.dense_layers
        # (dense, selects, layers): layers of one kind take the same time.
        self._kinds: list[tuple[bool, bool, np.ndarray]] = []
        for dense, selects in itertools.product((True, False), (True, False)):
            layers = np.flatnonzero((is_dense == dense) & (self._selects == selects))
            if len(layers):
                self._kinds.append((dense, selects, layers))

    def step(self, batch: float, context_tokens: float, misses: Misses = 0.0) -> StepTime:
        """Time one decode step of `batch` requests of context_tokens each.

        misses: rows fetched per request, layer and step, one figure or [layers]; 0: all resident
        Raises: ValueError for a batch below 1, negative misses, or another number of layers.
        """
        if not batch >= 1:
            raise ValueError(f"batch must be 1 or more: got {batch}.")
        halves = 2 if self.deployment.two_batch_overlap and batch >= 2 else 1
        size, queries = batch / halves, self.deployment.queries
        transfer = self.transfer(size, context_tokens, misses, halves)
        beside = halves == 2 and self.deployment.overlap == HALVES and transfer.any()
        parts = dict.fromkeys(("communication", "transfer"), 0.0)
        for dense, selects, layers in self._kinds:
            compute = self.compute(size, queries, context_tokens, dense, selects)
            for name, seconds in compute.items():
                parts[name] = parts.get(name, 0.0) + halves * len(layers) * seconds
            total, talk = sum(compute.values()), self.communication(size * queries, dense)
            waits = transfer[layers]
            if beside:
                fetches = self._fetches(size, context_tokens, misses)
                waits = beside_other_half(total, talk, *fetches)[layers] / 2
                exposed = np.full(len(waits), max(0.0, talk - total))
            elif halves == 2:  # behind the other half's compute
                exposed = np.maximum(0.0, talk - total - waits)
            else:
                exposed = np.full(len(waits), talk)
            parts["transfer"] += halves * float(waits.sum())
            parts["communication"] += halves * float(exposed.sum())
        in_turn = parts["transfer"]
        if self._issues_early and not beside:
            in_turn = halves * float(self._in_turn(size, context_tokens, misses).sum())
        parts["draft"] = (queries - 1) * self._draft_seconds(batch, context_tokens)
        parts["head"] = self._head_seconds(batch * queries)
        parts["step"] = self.calibration.step_us * MICRO
        return StepTime(sum(parts.values()), parts, in_turn)

    def compute(
        self, requests: float, queries: int, context_tokens: float, dense: bool = False,
        selects: bool = True,
    ) -> dict[str, float]:  # fmt: skip
        """Seconds of one layer's parts for a micro-batch, without fetches and communication."""
        model, tensor = self.model, self.deployment.tensor_parallel
        tokens = requests * queries
        return {
            "projections": self._matrices(model.projection_weights / tensor, tokens),
            "indexer": self.indexer(requests, queries, context_tokens) if selects else 0.0,
            "attention": self.attention(tokens, context_tokens),
            "experts": self._dense(tokens) if dense else self._experts(tokens),
            "elementwise": self.calibration.token_bytes * tokens / self._hbm,
            "latency": self.calibration.layer_us * MICRO,
        }

    def indexer(self, requests: float, queries: int, context_tokens: float) -> float:
        """Seconds of one layer's indexer: its matrices, then a score of every key and query.

        A request's queries share one read of its keys. Each tensor-parallel rank does all of it.
        """
        model = self.model
        keys = requests * context_tokens
        num_bytes, flops = keys * model.index_bytes, keys * queries * model.index_flops
        scan = self.calibration.scan_ratio * self._roofline(num_bytes, flops)
        return scan + self._matrices(model.indexer_weights, requests * queries)

    def attention(self, tokens: float, context_tokens: float) -> float:
        """Seconds of one layer's attention core over the selected rows."""
        rows = min(self.model.topk, context_tokens)
        heads = _whole(self.model.heads / self.deployment.tensor_parallel, HEAD_TILE)
        flops = tokens * rows * self.model.attention_flops * heads / self.model.heads
        return flops / (self.gpu.attention_tflops * TERA)

    def transfer(
        self, requests: float, context_tokens: float, misses: Misses, halves: int = 1
    ) -> np.ndarray:
        """Return [layers] seconds that a micro-batch waits for its missed rows.

        halves: 2 if another micro-batch runs in turns with it
        """
        each = self._per_layer(misses)
        if not self._issues_early:
            return self._in_turn(requests, context_tokens, each)
        return grouped(
            self.deployment.overlap, self.model.groups,
            *self._fetches(requests, context_tokens, each),
            self._without_indexer(requests, context_tokens, halves),
        )  # fmt: skip

    @property
    def _issues_early(self) -> bool:
        """Whether fetches are issued before their layer's turn. `halves` does not model that."""
        shares = len(self.model.groups) < self.model.layers
        return shares and self.deployment.early_fetch and self.deployment.overlap != HALVES

    def _in_turn(self, requests: float, context_tokens: float, misses: Misses) -> np.ndarray:
        """Return [layers] seconds that a micro-batch waits if each layer issues its own fetch."""
        each = self._per_layer(misses)
        if not each.any() and not self.calibration.plan_us:
            return np.zeros(len(each))
        choice = self.deployment.overlap
        choice = "layerwise" if choice == HALVES else choice
        fetch, share, window = self._fetches(requests, context_tokens, each)
        waits = cheapest(choice, fetch, share, window)
        if self._selects.all():
            return waits
        return np.where(self._selects, waits, cheapest(choice, fetch, share, sharing(window)))

    def _without_indexer(self, requests: float, context_tokens: float, halves: int) -> np.ndarray:
        """Return [layers] seconds of a micro-batch in a layer, without its indexer and fetch.

        Two halves take turns on the link as they do on the GPU, so one is alone in half the time.
        """
        queries = self.deployment.queries
        seconds = np.zeros(self.model.layers)
        for dense, _, layers in self._kinds:
            total = sum(self.compute(requests, queries, context_tokens, dense, False).values())
            talk = self.communication(requests * queries, dense)
            seconds[layers] = max(total, talk) if halves == 2 else total + talk
        return seconds

    def _fetches(
        self, requests: float, context_tokens: float, misses: Misses
    ) -> tuple[np.ndarray, np.ndarray, Window]:
        """([layers] seconds of plan and copies, [layers] missed shares, the window) of a
        micro-batch. The window is that of a layer that selects."""
        each, calibration = self._per_layer(misses), self.calibration
        queries = self.deployment.queries
        merge = self._merge_seconds(requests * queries)
        window = Window(
            preattn=calibration.preattn_us * MICRO,
            attention=self.attention(requests * queries, context_tokens),
            indexer=self.indexer(requests, queries, context_tokens),
            da=calibration.da_us * MICRO + merge,
            dba=calibration.dba_us * MICRO + merge,
            early=calibration.early_us * MICRO,
        )
        selected = queries * min(self.model.topk, context_tokens)
        share = np.minimum(1.0, each / selected)
        plans = np.where(self._selects, calibration.plan_us * MICRO, 0.0)
        return plans + self.fetch_seconds(requests * each), share, window

    def fetch_seconds(self, rows: Any) -> Any:
        """Seconds until each GPU of the rank has scattered rows (number or array)."""
        shares = self.deployment.share_fetch and self.fetch.gpus > 1
        return self.fetch.push(rows) if shares else self.fetch.each(rows)

    def communication(self, tokens: float, dense: bool = False) -> float:
        """Seconds of one layer's dispatch and combine, and of attention's all-reduce."""
        model, deployment = self.model, self.deployment
        rate = deployment.network_gb_s * GB
        seconds = 0.0
        if deployment.expert_gpus > 1 and not dense:
            sent = model.experts_per_token * model.hidden * (FP8_SCALE + BF16_BYTES)
            sent *= tokens / deployment.tensor_parallel * deployment.remote_share
            seconds = deployment.network_us * MICRO + sent / rate
        if deployment.tensor_parallel > 1:
            share = 2 * (1 - 1 / deployment.tensor_parallel)
            reduced = share * tokens * model.hidden * BF16_BYTES
            seconds += deployment.network_us / 2 * MICRO + reduced / rate
        return seconds

    def node_tokens_per_second(self, batch: float, seconds: float) -> float:
        """Tokens/s of a node of decode GPUs with `batch` requests a rank and steps of `seconds`."""
        ranks = self.deployment.gpus_per_node / self.deployment.tensor_parallel
        return ranks * batch * self.deployment.accepted_tokens / seconds

    def prefill_seconds(self, tokens: float, prefix_tokens: float = 0) -> float:
        """Seconds of a prompt's `tokens` after prefix_tokens that are cached, on a prefill rank."""
        model, calibration = self.model, self.calibration
        moe = (model.experts_per_token + model.shared_experts) * model.expert_weights
        moe_layers = model.layers - model.dense_layers
        selecting = len(model.groups)
        weights = model.layers * model.projection_weights + selecting * model.indexer_weights
        weights += model.dense_layers * model.dense_weights + moe_layers * moe
        seconds = 2 * weights * tokens / (self._matmul * calibration.prefill_share)
        end, short = prefix_tokens + tokens, model.topk
        rows = _selected_before(end, short) - _selected_before(prefix_tokens, short)
        attention = model.layers * rows * model.attention_flops
        seconds += attention / (self.gpu.prefill_tflops * TERA)
        pairs = selecting * (end**2 - prefix_tokens**2) / 2
        seconds += pairs * model.index_flops / (self._matmul * calibration.roofline_share)
        launches = model.layers * calibration.layer_us * MICRO if tokens else 0.0
        return seconds / self.deployment.prefill_gpus + launches

    def hand_off_seconds(self, tokens: float) -> float:
        """Seconds to send a request's latent rows and index keys to its decode rank."""
        model, deployment = self.model, self.deployment
        num_bytes = tokens * (model.all_row_bytes + model.all_index_bytes)
        return deployment.hand_off_us * MICRO + num_bytes / (deployment.hand_off_gb_s * GB)

    # --- parts --------------------------------------------------------------------------

    def _per_layer(self, misses: Misses) -> np.ndarray:
        """Return misses as [layers]."""
        each = np.asarray(misses, float)
        if each.shape not in ((), (self.model.layers,)):
            raise ValueError(
                f"misses must be one figure or one a layer: got {each.shape}, layers "
                f"{self.model.layers}."
            )
        if not np.all(each >= 0):
            raise ValueError(f"misses must be 0 or more: got {each.min()}.")
        return np.broadcast_to(each, (self.model.layers,))

    def _roofline(self, num_bytes: float, flops: float) -> float:
        return (num_bytes / self._hbm + flops / self._matmul) / self.calibration.roofline_share

    def _matrices(self, weights: float, tokens: float) -> float:
        """Seconds of matrices with `weights` weights, all of which each token passes."""
        return self._roofline(weights * self.model.weight_bytes, 2 * weights * _tiled(tokens))

    def _dense(self, tokens: float) -> float:
        return self._matrices(self.model.dense_weights / self.deployment.tensor_parallel, tokens)

    def _experts(self, tokens: float) -> float:
        """Seconds of one GPU's experts: the held ones that any token chose, and the shared ones."""
        model, deployment = self.model, self.deployment
        own = tokens / deployment.tensor_parallel
        everyone = own * deployment.expert_gpus
        chosen = 1 - (1 - model.experts_per_token / model.experts) ** everyone
        held = model.experts / deployment.expert_gpus * chosen
        num_bytes = held * model.expert_weights * model.weight_bytes
        routed = self._roofline(num_bytes, 2 * own * model.experts_per_token * model.expert_weights)
        return routed + self._matrices(model.shared_experts * model.expert_weights, own)

    def _merge_seconds(self, tokens: float) -> float:
        """Seconds to merge the outputs of attention to hits and to misses."""
        values = tokens * self.model.heads / self.deployment.tensor_parallel
        num_bytes = MERGE_PASSES * values * self.model.kv_lora_rank * BF16_BYTES
        return self._roofline(num_bytes, 0)

    def _head_seconds(self, tokens: float) -> float:
        weights = self.model.vocabulary * self.model.hidden / self.deployment.tensor_parallel
        return self._roofline(weights * HEAD_WEIGHT_BYTES, 2 * weights * _tiled(tokens))

    def _draft_seconds(self, batch: float, context_tokens: float) -> float:
        """Seconds of a draft token: the MTP layer and the head, one query for each request."""
        layer = sum(self.compute(batch, 1, context_tokens).values())
        return layer + self.communication(batch) + self._head_seconds(batch)


def _tiled(tokens: float) -> float:
    """Tokens that a dense matrix kernel computes: `tokens` rounded up to whole tiles."""
    return _whole(tokens, SMALL_TILE if tokens <= SMALL_TILE else TILE)


def _whole(count: float, tile: int) -> int:
    return math.ceil(count / tile) * tile


def _selected_before(position: float, topk: int) -> float:
    """Number of rows that the queries at positions 1 to `position` attend to."""
    short = min(position, topk)
    return short * short / 2 + (position - short) * topk
