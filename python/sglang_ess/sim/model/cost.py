"""Seconds of a decode step, a prefill and a hand-off, from specs: a roofline with few free terms.

A matrix kernel takes (bytes / HBM + flops / peak) / roofline_share: added, not the larger of
the two, which is how DeepGEMM's published times go between its memory and compute bound shapes.
Per layer and micro-batch of n requests with q queries each:

    projections, indexer, experts   that rule, over weights, index keys and tokens; dense matrices
                                    compute whole tiles of 64 or 128 tokens
    attention                       tokens x top-k rows x flops / attention_tflops
    elementwise, latency            token_bytes x tokens / HBM; layer_us
    communication                   dispatch and combine: network_us + bytes / network_gb_s
    transfer                        what plan and fetch expose, see sim/overlap.py

Two-batch overlap runs two micro-batches, which hide their communication behind one another's
compute: 2 x max(compute, communication) a layer, weights read twice. Without it: compute +
communication. Write-back of new rows (0.3 ms in ESS's largest step) is taken as hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sglang_ess.sim.inputs.specs import Calibration, Deployment, Gpu, Link, Model, load
from sglang_ess.sim.model.overlap_time import HALVES, Window, beside_other_half, cheapest

GB, TERA, MICRO = 1e9, 1e12, 1e-6
BF16_BYTES = 2
FP8_SCALE = 1 + 4 / 128  # dispatch sends an fp32 scale with 128 fp8 values (DeepEP)
HEAD_WEIGHT_BYTES = BF16_BYTES  # the output layer is not quantised
# DeepGEMM's first get_best_configs: block_m is 64 up to 64 tokens and 128 beyond. Routed experts
# have varying tokens: their padding is about the same at any batch and belongs to layer_us.
SMALL_TILE, TILE = 64, 128
MERGE_PASSES = 3  # two partial outputs are read, one is written


@dataclass(frozen=True)
class StepTime:
    """seconds of one decode step; parts, by name, sum to it."""

    seconds: float
    parts: Mapping[str, float]


class CostModel:
    """Times of one decode rank. calibration: in place of the one that deployment names."""

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

    def step(self, batch: float, context_tokens: float, misses=0.0) -> StepTime:
        """One decode step of `batch` requests of context_tokens each.

        misses: rows fetched per request, layer and step, one figure or [layers]; 0: all resident
        Raises: ValueError for a batch below 1, negative misses, or another number of layers.
        """
        if not batch >= 1:
            raise ValueError(f"batch must be 1 or more: got {batch}.")
        halves = 2 if self.deployment.two_batch_overlap and batch >= 2 else 1
        size, queries = batch / halves, self.deployment.queries
        transfer = self.transfer(size, context_tokens, misses)
        beside = halves == 2 and self.deployment.overlap == HALVES and transfer.any()
        parts = dict.fromkeys(("communication", "transfer"), 0.0)
        first_moe = self.model.dense_layers
        for dense, layers in ((True, slice(0, first_moe)), (False, slice(first_moe, None))):
            compute = self.compute(size, queries, context_tokens, dense)
            for name, seconds in compute.items():
                parts[name] = parts.get(name, 0.0) + halves * len(transfer[layers]) * seconds
            total, talk = sum(compute.values()), self.communication(size * queries, dense)
            waits = transfer[layers]
            if beside:
                fetches = self._fetches(size, context_tokens, misses)
                waits = beside_other_half(total, talk, *fetches)[layers] / 2
                talk = np.full(len(waits), max(0.0, talk - total))
            elif halves == 2:  # behind the other half's compute
                talk = np.maximum(0.0, talk - total - waits)
            else:
                talk = np.full(len(waits), talk)
            parts["transfer"] += halves * float(waits.sum())
            parts["communication"] += halves * float(talk.sum())
        parts["draft"] = (queries - 1) * self._draft_seconds(batch, context_tokens)
        parts["head"] = self._head_seconds(batch * queries)
        parts["step"] = self.calibration.step_us * MICRO
        return StepTime(sum(parts.values()), parts)

    def compute(
        self, requests: float, queries: int, context_tokens: float, dense: bool = False
    ) -> dict[str, float]:
        """Seconds by part of one layer for a micro-batch, without fetches and communication."""
        model, tensor = self.model, self.deployment.tensor_parallel
        tokens = requests * queries
        return {
            "projections": self._matrices(model.projection_weights / tensor, tokens),
            "indexer": self.indexer(requests, queries, context_tokens),
            "attention": self.attention(tokens, context_tokens),
            "experts": self._dense(tokens) if dense else self._experts(tokens),
            "elementwise": self.calibration.token_bytes * tokens / self._hbm,
            "latency": self.calibration.layer_us * MICRO,
        }

    def indexer(self, requests: float, queries: int, context_tokens: float) -> float:
        """Seconds of one layer's indexer: its matrices, then every key for every query.

        A request's queries share one read of its keys. Each tensor-parallel rank does it all.
        """
        model = self.model
        keys = requests * context_tokens
        num_bytes, flops = keys * model.index_bytes, keys * queries * model.index_flops
        scan = self.calibration.scan_ratio * self._roofline(num_bytes, flops)
        return scan + self._matrices(model.indexer_weights, requests * queries)

    def attention(self, tokens: float, context_tokens: float) -> float:
        """Seconds of one layer's attention core over the selected rows."""
        rows = min(self.model.topk, context_tokens)
        flops = tokens * rows * self.model.attention_flops / self.deployment.tensor_parallel
        return flops / (self.gpu.attention_tflops * TERA)

    def transfer(self, requests: float, context_tokens: float, misses) -> np.ndarray:
        """[layers] seconds that a micro-batch waits for its missed rows, layer by layer."""
        misses = self._per_layer(misses)
        if not misses.any() and not self.calibration.plan_us:
            return np.zeros(len(misses))
        choice = self.deployment.overlap
        return cheapest(
            "layerwise" if choice == HALVES else choice,
            *self._fetches(requests, context_tokens, misses),
        )

    def _fetches(
        self, requests: float, context_tokens: float, misses
    ) -> tuple[np.ndarray, np.ndarray, Window]:
        """[layers] seconds of a micro-batch's copies and missed shares; what they hide behind."""
        misses, calibration = self._per_layer(misses), self.calibration
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
        share = np.minimum(1.0, misses / selected)
        fetch = calibration.plan_us * MICRO + self.fetch_seconds(requests * misses)
        return fetch, share, window

    def fetch_seconds(self, rows):
        """Seconds that the link takes for scattered rows, number or array."""
        rate = self.link.gather_gb_s * GB / self.calibration.transfer_ratio
        return rows * self.model.row_bytes / rate

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
        """Tokens a node of decode GPUs gains with `batch` requests a rank and such steps."""
        ranks = self.deployment.gpus_per_node / self.deployment.tensor_parallel
        return ranks * batch * self.deployment.accepted_tokens / seconds

    def prefill_seconds(self, tokens: float, prefix_tokens: float = 0) -> float:
        """One prompt's `tokens` after prefix_tokens that are cached, on one prefill rank."""
        model, calibration = self.model, self.calibration
        moe = (model.experts_per_token + model.shared_experts) * model.expert_weights
        moe_layers = model.layers - model.dense_layers
        weights = model.layers * (model.projection_weights + model.indexer_weights)
        weights += model.dense_layers * model.dense_weights + moe_layers * moe
        seconds = 2 * weights * tokens / (self._matmul * calibration.prefill_share)
        end, short = prefix_tokens + tokens, model.topk
        rows = _selected_before(end, short) - _selected_before(prefix_tokens, short)
        attention = model.layers * rows * model.attention_flops
        seconds += attention / (self.gpu.prefill_tflops * TERA)
        pairs = model.layers * (end**2 - prefix_tokens**2) / 2
        seconds += pairs * model.index_flops / (self._matmul * calibration.roofline_share)
        launches = model.layers * calibration.layer_us * MICRO if tokens else 0.0
        return seconds / self.deployment.prefill_gpus + launches

    def hand_off_seconds(self, tokens: float) -> float:
        """Latent rows and index keys of a request, from its prefill to its decode rank."""
        model, deployment = self.model, self.deployment
        num_bytes = tokens * model.layers * (model.row_bytes + model.index_bytes)
        return deployment.hand_off_us * MICRO + num_bytes / (deployment.hand_off_gb_s * GB)

    # --- parts --------------------------------------------------------------------------

    def _per_layer(self, misses) -> np.ndarray:
        misses = np.asarray(misses, float)
        if misses.shape not in ((), (self.model.layers,)):
            raise ValueError(
                f"misses must be one figure or one a layer: got {misses.shape}, layers "
                f"{self.model.layers}."
            )
        if not np.all(misses >= 0):
            raise ValueError(f"misses must be 0 or more: got {misses.min()}.")
        return np.broadcast_to(misses, (self.model.layers,))

    def _roofline(self, num_bytes: float, flops: float) -> float:
        return (num_bytes / self._hbm + flops / self._matmul) / self.calibration.roofline_share

    def _matrices(self, weights: float, tokens: float) -> float:
        """Seconds of matrices with so many weights, each token through all of them."""
        return self._roofline(weights * self.model.weight_bytes, 2 * weights * _tiled(tokens))

    def _dense(self, tokens: float) -> float:
        return self._matrices(self.model.dense_weights / self.deployment.tensor_parallel, tokens)

    def _experts(self, tokens: float) -> float:
        """One GPU's experts: those it holds and any token chose, and the shared ones."""
        model, deployment = self.model, self.deployment
        own = tokens / deployment.tensor_parallel
        everyone = own * deployment.expert_gpus
        chosen = 1 - (1 - model.experts_per_token / model.experts) ** everyone
        held = model.experts / deployment.expert_gpus * chosen
        num_bytes = held * model.expert_weights * model.weight_bytes
        routed = self._roofline(num_bytes, 2 * own * model.experts_per_token * model.expert_weights)
        return routed + self._matrices(model.shared_experts * model.expert_weights, own)

    def _merge_seconds(self, tokens: float) -> float:
        """Of the partial outputs of attention to hits and to misses."""
        values = tokens * self.model.heads / self.deployment.tensor_parallel
        num_bytes = MERGE_PASSES * values * self.model.kv_lora_rank * BF16_BYTES
        return self._roofline(num_bytes, 0)

    def _head_seconds(self, tokens: float) -> float:
        weights = self.model.vocabulary * self.model.hidden / self.deployment.tensor_parallel
        return self._roofline(weights * HEAD_WEIGHT_BYTES, 2 * weights * _tiled(tokens))

    def _draft_seconds(self, batch: float, context_tokens: float) -> float:
        """One draft token: the MTP layer over all requests, one query each, and the head."""
        layer = sum(self.compute(batch, 1, context_tokens).values())
        return layer + self.communication(batch) + self._head_seconds(batch)


def _tiled(tokens: float) -> float:
    """Tokens that a dense matrix kernel computes for so many."""
    tile = SMALL_TILE if tokens <= SMALL_TILE else TILE
    return math.ceil(tokens / tile) * tile


def _selected_before(position: float, topk: int) -> float:
    """Rows that the queries at positions 1 to `position` attend to."""
    short = min(position, topk)
    return short * short / 2 + (position - short) * topk
