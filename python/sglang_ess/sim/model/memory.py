"""How many requests and hot rows fit into memory, as ESS counts and as our pool allocates.

    device bytes = slots x slot_bytes + hot rows x hot_row_bytes + staging and fixed buffers
    host bytes   = slots x layers x row_bytes, once for the GPUs of a rank on one node

ESS counts only `batch x context x layers x (ratio x row + index key)`, which gives the batch and
the ratio of each row in its tables. Our pool adds maps, row state and staging, as
mem_cache/capacity.py does, and the rows and keys of the MTP layers where tokens are drafted: these
stay on the device. This room may not import that file; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_ess.layout import GIB, MAP_BYTES, PAGE_SLOTS, PLAN_QUERIES_CUDA, STAGING_BUFFERS
from sglang_ess.sim.inputs.specs import Deployment, Gpu, Model
from sglang_ess.sim.model.cost import HEAD_WEIGHT_BYTES
from sglang_ess.tiers.throttled_link import probe_bytes

ROW_STATE_BYTES = 8  # of a hot row in one index group (ess_kernels.hot_state)
PLAN_BYTES_PER_LOOKUP = 20


@dataclass(frozen=True)
class Charges:
    """Device bytes that the KV pool charges.

    slot_bytes         for each slot, hot or not; slots come in pages of page_slots
    hot_row_bytes      for one hot row in every layer, with its state in every index group
    staging_row_bytes  for each token of the longest request
    fixed_bytes        for any size
    draft_bytes        of slot_bytes: rows and index keys of the MTP layers
    """

    slot_bytes: float
    hot_row_bytes: float
    staging_row_bytes: float
    fixed_bytes: float
    page_slots: int
    draft_bytes: float = 0

    @classmethod
    def paper(cls, model: Model) -> Charges:
        """As ESS counts: rows and index keys alone, without those of the MTP layer."""
        return cls(model.all_index_bytes, model.all_row_bytes, 0, 0, 1)

    @classmethod
    def ours(cls, model: Model, drafts: bool = False) -> Charges:
        """As the GPU pool allocates: a map and row states for each index group.

        drafts: the MTP layers draft tokens
        """
        groups = len(model.groups)
        draft = model.draft_bytes if drafts else 0
        plans = PLAN_QUERIES_CUDA * model.topk * PLAN_BYTES_PER_LOOKUP
        return cls(
            slot_bytes=model.all_index_bytes + (groups + 1) * MAP_BYTES + draft,
            hot_row_bytes=model.all_row_bytes + groups * ROW_STATE_BYTES,
            staging_row_bytes=STAGING_BUFFERS * model.row_bytes,
            fixed_bytes=plans + probe_bytes(model.row_bytes),
            page_slots=PAGE_SLOTS,
            draft_bytes=draft,
        )


class Memory:
    """Memory of one rank: device_bytes for rows and index keys, host_bytes for latent rows."""

    def __init__(
        self,
        model: Model,
        device_bytes: float,
        host_bytes: float = float("inf"),
        charges: Charges | None = None,
    ):
        self.model, self.device_bytes, self.host_bytes = model, device_bytes, host_bytes
        self.charges = charges or Charges.ours(model)

    @classmethod
    def of(
        cls, model: Model, gpu: Gpu, deployment: Deployment, charges: Charges | None = None
    ) -> Memory:
        """Memory of a decode rank. With tensor parallelism each of its GPUs has the device bytes
        of every slot and hot row, and those of one node share one host tier.

        charges: None: ours
        """
        charges = charges or Charges.ours(model, deployment.queries > 1)
        host_bytes = deployment.host_gib * deployment.rank_gpus * GIB
        return cls(model, kv_bytes(model, gpu, deployment), host_bytes, charges)

    @property
    def resident_bytes(self) -> float:
        """Device bytes of a slot in one tier, with all its rows and no maps."""
        rows = self.model.all_row_bytes + self.model.all_index_bytes
        return rows + self.charges.draft_bytes

    def slots(self, batch: float, context: float) -> float:
        """Slots of `batch` requests of `context` tokens, each in whole pages."""
        page = self.charges.page_slots
        return batch * -(-context // page) * page

    def device_used(self, batch: float, context: float, hot_rows: float) -> float:
        """Device bytes with hot_rows in each layer, all requests together."""
        return self._used_without_rows(batch, context) + hot_rows * self.charges.hot_row_bytes

    def host_used(self, batch: float, context: float) -> float:
        """Host bytes of the latent rows."""
        return self.slots(batch, context) * self.model.all_row_bytes

    def hot_rows(self, batch: float, context: float) -> int:
        """Hot rows of a layer that fit together with the slots of the batch; 0 if none fit."""
        left = self.device_bytes - self._used_without_rows(batch, context)
        return max(0, min(int(left // self.charges.hot_row_bytes), int(batch * context)))

    def ratio(self, batch: float, context: float) -> float:
        """Hot rows / tokens: the Sparse Memory Ratio of ESS."""
        return self.hot_rows(batch, context) / (batch * context)

    def resident_batch(self, context: float) -> int:
        """Requests that fit one-tier."""
        return int(self.device_bytes // (self.slots(1, context) * self.resident_bytes))

    def max_batch(self, context: float, ratio: float = 0.0) -> int:
        """Most requests that fit, with ratio x context hot rows for each."""
        charges = self.charges
        request = self._used_without_rows(1, context) - self._used_without_rows(0, context)
        request += ratio * context * charges.hot_row_bytes
        left = self.device_bytes - self._used_without_rows(0, context)
        return max(0, int(min(left // request, self.host_bytes // self.host_used(1, context))))

    def _used_without_rows(self, batch: float, context: float) -> float:
        charges = self.charges
        if charges.page_slots == 1:
            return batch * context * charges.slot_bytes
        padding = charges.page_slots  # SGLang's page 0 takes the writes of padding
        return (
            (self.slots(batch, context) + padding) * charges.slot_bytes
            + (context + padding) * charges.staging_row_bytes
            + charges.fixed_bytes
        )


def weight_bytes(model: Model, deployment: Deployment) -> float:
    """Bytes of weights on one GPU.

    Tensor parallelism divides attention and dense layers, expert_gpus the routed experts. MTP
    layers count where they draft; they share the model's head, and each has a matrix of its own
    that joins a token's embedding and its hidden state.
    """
    tensor = deployment.tensor_parallel
    mtp = model.mtp_layers if deployment.queries > 1 else 0
    moe = model.layers - model.dense_layers + mtp
    indexers = (len(model.groups) + mtp) * model.indexer_weights
    attention = (model.layers + mtp) * model.projection_weights / tensor + indexers
    dense = model.dense_layers * model.dense_weights / tensor
    shared = moe * model.shared_experts * model.expert_weights
    routed = moe * model.experts / deployment.expert_gpus * model.expert_weights
    head = 2 * model.vocabulary * model.hidden / tensor * HEAD_WEIGHT_BYTES
    head += mtp * 2 * model.hidden**2 * HEAD_WEIGHT_BYTES
    return (attention + dense + shared + routed) * model.weight_bytes + head


def kv_bytes(model: Model, gpu: Gpu, deployment: Deployment) -> float:
    """Device bytes of one GPU for latent rows and index keys.

    Raises: ValueError if the weights leave none.
    """
    if deployment.kv_gib is not None:
        return deployment.kv_gib * GIB
    weights = weight_bytes(model, deployment)
    left = (gpu.memory_gib * deployment.memory_fraction - deployment.workspace_gib) * GIB
    if left <= weights:
        raise ValueError(
            f"weights must fit into a GPU: got {weights / GIB:.1f} GiB, limit {left / GIB:.1f} "
            "GiB. Spread the experts over more GPUs (expert_gpus) or take a larger one."
        )
    return left - weights
