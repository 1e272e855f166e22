"""How many slots and hot rows fit into device and host memory.

    device bytes = slots x (index keys + maps + draft) + hot rows x (layers x row)
                   + staging + plan + ghosts
    host bytes   = slots x layers x row, once for all ranks of a node that have the same rows

Maps, row states and ghosts exist once for each index group, rows for each layer. A draft model's
layers (MTP) have one tier: the device holds their latent rows and index keys of every slot.

SGLang sizes its pool once, with the device bytes that it has left for KV. The numbers are chosen
then, and the pool is built by them. All ranks of a TP group choose the same ones, and the host
tiers of a node share its memory.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

from ess_kernels.hot_state import GROUP_STATE_BYTES, HOT_ROW_STATE_BYTES, LAYER_STATE_BYTES
from ess_kernels.plan_fetch import PlanBuffers as DevicePlanBuffers
from sglang_ess.config import LINKER_MODULE, EssConfig
from sglang_ess.layout import (
    GIB,
    MAP_BYTES,
    PAGE_SLOTS,
    PLAN_LOOKUP_BYTES_CPU,
    PLAN_QUERIES_CPU,
    PLAN_QUERIES_CUDA,
    STAGING_BUFFERS,
    index_page_bytes,
)
from sglang_ess.mem_cache.host_share import (
    CapacityError,
    NodeTiers,
    agreed,
    host_limit_bytes,
    node_text,
)
from sglang_ess.tiers import free_host_bytes
from sglang_ess.tiers.balance.rebalance import ghost_bytes
from sglang_ess.tiers.early_rows import COUNTER_BYTES
from sglang_ess.tiers.hot_cache import HOT_ROW_OVERHEAD_BYTES
from sglang_ess.tiers.hot_cache_cuda import TierScratch
from sglang_ess.tiers.index_groups import IndexGroups
from sglang_ess.tiers.lru import STATE_SIZE
from sglang_ess.tiers.throttled_link import probe_bytes

logger = logging.getLogger(__name__)

# The smallest hot tier of a layer. Below top-k rows every query takes several passes.
MIN_HOT_ROWS = 64
# ESS's operating point: misses are stable above a hot ratio of 0.2 and climb below it.
AUTO_HOT_RATIO = 0.2
STATE_BYTES = STATE_SIZE * 8 + COUNTER_BYTES  # counters of one group's hot tier


def size(num_bytes: int) -> str:
    """num_bytes as text: in GiB, or in MiB below one GiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / GIB * 1024:.2f} MiB"


@dataclass(frozen=True)
class TierBytes:
    """Device bytes of a hot tier without its rows.

    row_state    bytes per hot row and index group
    group_state  bytes per index group; layer_state: per layer
    page_rows    rows are allocated in multiples of this
    """

    row_state: int
    group_state: int
    layer_state: int
    page_rows: int

    def shared(self, topk: int, row_bytes: int) -> int:
        """Bytes of the buffers that groups use one after another."""
        return PLAN_QUERIES_CPU * topk * PLAN_LOOKUP_BYTES_CPU


class GpuTierBytes(TierBytes):
    """TierBytes of DeviceTiers."""

    def shared(self, topk: int, row_bytes: int) -> int:
        plans = DevicePlanBuffers.bytes_for(PLAN_QUERIES_CUDA, topk)
        return plans + TierScratch.HALVES * 4 + probe_bytes(row_bytes)


CPU_TIER = TierBytes(HOT_ROW_OVERHEAD_BYTES, STATE_BYTES, 0, 1)
GPU_TIER = GpuTierBytes(HOT_ROW_STATE_BYTES, GROUP_STATE_BYTES, LAYER_STATE_BYTES, PAGE_SLOTS)


@dataclass(frozen=True)
class Geometry:
    """The bytes that a slot and a hot row cost.

    row_bytes    one latent row
    index_bytes  index keys of one slot, all layers
    page_slots   slots of a page
    draft_bytes  latent rows and index keys of one slot in the draft model's layers; 0 without one
    ghosts       index groups have ghost caches, by which hot rows move between them
    groups       the index groups of the layers; None: each layer is one
    queries      of a request in a decode step: 1, or the draft tokens of a verify step
    Raises: ValueError for groups of another number of layers.
    """

    layers: int
    row_bytes: int
    index_bytes: int
    topk: int
    context_tokens: int
    page_slots: int
    tier: TierBytes = CPU_TIER
    ghosts: bool = False
    queries: int = 1
    groups: IndexGroups | None = None
    draft_bytes: int = 0

    def __post_init__(self) -> None:
        if self.groups is not None and self.groups.layers != self.layers:
            raise ValueError(
                f"index groups must cover {self.layers} layers: got {self.groups.layers}."
            )

    @property
    def index_groups(self) -> IndexGroups:
        return self.groups or IndexGroups.single(self.layers)

    @property
    def num_groups(self) -> int:
        """Index groups, each with one map and one order of use."""
        return len(self.index_groups)

    @property
    def num_ghosts(self) -> int:
        """Ghost caches: one for each index group that can exchange rows with another."""
        sizes = self.index_groups.by_size().values()
        return sum(len(groups) for groups in sizes if len(groups) > 1) if self.ghosts else 0

    @property
    def slot_device_bytes(self) -> int:
        """Bytes of a slot: index keys, its entries in the groups' maps and in the staging map,
        and the draft model's row and key.
        """
        return self.index_bytes + (self.num_groups + 1) * MAP_BYTES + self.draft_bytes

    @property
    def hot_row_bytes(self) -> int:
        """Bytes of one hot row in every layer, and of its state in every group."""
        return self.layers * self.row_bytes + self.num_groups * self.tier.row_state

    def paged(self, rows: int) -> int:
        """Rows that are allocated for `rows` rows: whole pages."""
        return -(-rows // self.tier.page_rows) * self.tier.page_rows

    def staging_rows(self, slots: int) -> int:
        """Rows of one staging buffer: those of the longest request."""
        return min(self.context_tokens, slots) + self.page_slots

    def staging_bytes(self, slots: int) -> int:
        return STAGING_BUFFERS * self.paged(self.staging_rows(slots)) * self.row_bytes

    def device_bytes(self, slots: int, hot_rows: int) -> int:
        """Bytes of everything that the pool and the draft model's allocate on the device."""
        padded = slots + self.page_slots  # SGLang's page 0 takes padding's writes
        return (
            padded * self.slot_device_bytes
            + hot_rows * self.hot_row_bytes
            + (self.paged(hot_rows) - hot_rows) * self.layers * self.row_bytes
            + self.staging_bytes(slots)
            + self.tier.shared(self.topk, self.row_bytes)
            + self.num_groups * self.tier.group_state
            + self.layers * self.tier.layer_state
            + self.num_ghosts * ghost_bytes(padded)
        )

    def host_bytes(self, slots: int) -> int:
        return (slots + self.page_slots) * self.layers * self.row_bytes


@dataclass(frozen=True)
class Capacity:
    """The sizes of a pool.

    hot_rows: per index group, on average; device_limit_bytes: what SGLang left for KV
    """

    geometry: Geometry
    slots: int
    hot_rows: int
    device_limit_bytes: int

    @property
    def device_bytes(self) -> int:
        return self.geometry.device_bytes(self.slots, self.hot_rows)

    @property
    def staging_rows(self) -> int:
        return self.geometry.staging_rows(self.slots)


def max_slots(config: EssConfig, geometry: Geometry, device_bytes: int, host_bytes: int) -> int:
    """The largest number of slots, in whole pages, that fits into both memories.

    Raises: CapacityError if not even one page fits, with the bytes that it takes.
    """
    page = geometry.page_slots

    def fits(pages: int) -> bool:
        slots = pages * page
        rows = _min_hot_rows(config, geometry, slots)
        return (
            geometry.device_bytes(slots, rows) <= device_bytes
            and geometry.host_bytes(slots) <= host_bytes
        )

    if not fits(1):
        need = geometry.device_bytes(page, _min_hot_rows(config, geometry, page))
        host_need, advice = geometry.host_bytes(page), []
        if need > device_bytes:
            advice.append(
                "raise the device memory (--mem-fraction-static; --ess-device-gib on the CPU "
                "platform)" + (" or lower --ess-hot-gib" if config.hot_gib is not None else "")
            )
        if host_need > host_bytes:
            # Unset, the limit is a share of the free memory.
            verb = "raise" if config.host_gib is not None else "free host memory or set"
            advice.append(f"{verb} --ess-host-gib")
        remedy = " and ".join(advice)
        raise CapacityError(
            f"memory must hold one page of {page} slots and the hot tier: got {size(device_bytes)} "
            f"of device and {size(host_bytes)} of host memory, limits {size(need)} and "
            f"{size(host_need)} ({geometry.layers} layers x {geometry.row_bytes} "
            f"B rows, {size(geometry.staging_bytes(page))} of staging). "
            f"{remedy[0].upper()}{remedy[1:]}."
        )
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * page


def _min_hot_rows(config: EssConfig, geometry: Geometry, slots: int) -> int:
    """Hot rows of a layer that a pool of this many slots must have at least."""
    if config.hot_gib is not None:
        return min(int(config.hot_gib * GIB) // geometry.hot_row_bytes, slots + geometry.page_slots)
    ratio = config.hot_ratio if config.hot_ratio is not None else AUTO_HOT_RATIO
    return hot_rows_at(ratio, geometry, slots)


def hot_rows_at(ratio: float, geometry: Geometry, slots: int) -> int:
    """Hot rows of a layer at a hot ratio; at 1.0 one for every slot, SGLang's padding included."""
    if ratio == 1.0:
        return slots + geometry.page_slots
    return max(1, round(ratio * slots))


def choose_capacity(
    config: EssConfig, geometry: Geometry, slots: int, device_bytes: int, host_bytes: int
) -> Capacity:
    """Size the hot tier for the number of slots that SGLang chose.

    Without --ess-hot-ratio and --ess-hot-gib the hot tier takes the device memory that is left.
    Raises: CapacityError for a hot tier below the minimum, or a host tier that does not fit.
    """
    rows = _min_hot_rows(config, geometry, slots)
    if (config.hot_gib, config.hot_ratio) == (None, None):
        padding = (geometry.tier.page_rows - 1) * geometry.layers * geometry.row_bytes
        left = device_bytes - geometry.device_bytes(slots, 0) - padding
        rows = min(max(rows, left // geometry.hot_row_bytes), slots + geometry.page_slots)
    least = min(MIN_HOT_ROWS, slots)
    if rows < least:
        # The two flags exclude each other. Advise the one that was given.
        flag, value = "--ess-hot-ratio", least / slots
        if config.hot_gib is not None:
            flag, value = "--ess-hot-gib", least * geometry.hot_row_bytes / GIB
        verb = "Set" if (config.hot_gib, config.hot_ratio) == (None, None) else "Raise"
        raise CapacityError(
            f"hot tier must hold {least} rows a layer: got {rows} for {slots} slots "
            f"({size(rows * geometry.hot_row_bytes)}). {verb} {flag} to {_rounded_up(value)}."
        )
    if geometry.host_bytes(slots) > host_bytes:
        raise CapacityError(
            f"host tier must fit into host memory: got {size(geometry.host_bytes(slots))} "
            f"for {slots} slots, limit {size(host_bytes)}. Lower --max-total-tokens."
        )
    if rows == slots + geometry.page_slots:  # every row is hot: no layer needs more
        geometry = replace(geometry, ghosts=False)
    return Capacity(geometry, slots, rows, device_bytes)


def _rounded_up(value: float) -> str:
    """Round up to four decimals, so that the suggested value is itself accepted."""
    return f"{math.ceil(value * 10_000) / 10_000:.4f}"


def serves_two_tiers(config: EssConfig | None) -> bool:
    """Whether this SGLang process has ESS's pool.

    A prefill server has SGLang's own: every query reads each row once, so no row is worth keeping
    hot. The transfer to its peer finds the rows where SGLang has them.
    """
    from sglang.srt.runtime_context import get_disagg

    return config is not None and config.enabled and get_disagg().disaggregation_mode != "prefill"


_decided: Capacity | None = None


def decided() -> Capacity:
    """The capacity of this process. Raises: RuntimeError before SGLang has sized its pool."""
    if _decided is None:
        raise RuntimeError("capacity must be decided before the pool is built: got none.")
    return _decided


def config_from_budget(original: Any, configurator: Any, budget_bytes: int, **kwargs: Any) -> Any:
    """Body of the AROUND hook on KVCacheConfigurator.config_from_budget.

    Under ESS the budget buys index keys and hot rows instead of latent rows. With one tier, the
    CPU platform takes --ess-device-gib for its device memory. Effect: decided() is set.
    Raises: CapacityError, on every rank; errors.make_scheduler makes one line of them.
    """
    from sglang.srt.runtime_context import get_parallel

    global _decided
    config = EssConfig.from_env() or EssConfig(enabled=False)
    if config.device_gib is not None:
        budget_bytes = int(config.device_gib * GIB)
    if not serves_two_tiers(config):
        if config.device_gib is not None:
            budget_bytes -= _padding_bytes(configurator)
        return original(configurator, budget_bytes, **kwargs)
    cell_bytes, geometry = _geometry(configurator, config)
    budget_bytes, free = agreed(config, budget_bytes, free_host_bytes())
    tiers = NodeTiers.of(get_parallel())
    host_bytes = host_limit_bytes(config, free, tiers)
    slots = max_slots(config, geometry, budget_bytes, host_bytes)
    # SGLang divides by the bytes of a token in one tier, then applies its own constraints.
    result = original(configurator, slots * cell_bytes, **kwargs)
    slots = result.max_total_num_tokens
    _decided = choose_capacity(config, geometry, slots, budget_bytes, host_bytes)
    if max(tiers.total, tiers.ranks) > 1:
        text = node_text(geometry.host_bytes(slots), tiers.total, tiers.ranks)
        logger.info("ESS: host tier: %s", text)
    if configurator.device != "cpu" and (advice := graph_advice(_decided, _largest_graph())):
        logger.warning("ESS: %s", advice)
    return result


def graph_advice(capacity: Capacity, largest: int | None) -> str | None:
    """The warning for decode batches that outgrow the captured graphs; None where none does.

    largest: requests of the largest decode graph; None without graphs. SGLang chooses it by the
    size of the GPU's memory, for the batches that one tier can hold.
    """
    requests = capacity.slots // capacity.geometry.context_tokens
    if largest is None or requests <= largest:
        return None
    return (
        f"{capacity.slots} slots hold {requests} requests of {capacity.geometry.context_tokens} "
        f"tokens, and decode graphs end at {largest}: larger batches run without one. Add "
        f"--cuda-graph-max-bs-decode {requests}."
    )


def _largest_graph() -> int | None:
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.runtime_context import get_exec

    decode = get_exec().graph.cuda_graph_config.decode
    return None if decode.backend == Backend.DISABLED or not decode.bs else max(decode.bs)


def moves_rows(config: EssConfig, groups: IndexGroups) -> bool:
    """Whether hot rows may move between index groups of as many layers, on the CPU.

    Pointless where no two groups have as many, or with every row hot.
    """
    several = max(map(len, groups.by_size().values())) > 1
    return config.layer_budgets != "uniform" and config.hot_ratio != 1.0 and several


def _padding_bytes(configurator: Any) -> int:
    """Bytes of SGLang's page 0. SGLang does not count them, but --ess-device-gib is a cap."""
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator

    cell_bytes = create_memory_pool_configurator(configurator)._cell_size
    return configurator.pool_page_size * cell_bytes


def _geometry(configurator: Any, config: EssConfig) -> tuple[int, Geometry]:
    """(SGLang's bytes per token, geometry) from a KVCacheConfigurator for sparse attention.

    SGLang's bytes per token include the draft model's.
    """
    from sglang.srt.configs.model_config import get_dsa_mtp_topk_width
    from sglang.srt.mem_cache.kv_cache_configurator import calculate_mla_kv_cache_dim
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator
    from sglang.srt.runtime_context import get_spec

    model, dtype = configurator.model_config, configurator.kv_cache_dtype
    groups, drafts = index_groups(configurator), get_spec().speculative_num_draft_tokens
    layers = groups.layers
    row_bytes = calculate_mla_kv_cache_dim(model_config=model, kv_cache_dtype=dtype)
    row_bytes *= dtype.itemsize
    sizes = create_memory_pool_configurator(configurator)
    cell_bytes, target_bytes = sizes._cell_size, sizes._compute_cell_size(configurator, layers)
    # None without a draft model, as for n-grams.
    draft_rows = (configurator.spec_aux_config.eagle_draft_num_layers or 0) * row_bytes
    draft_keys = cell_bytes - target_bytes - draft_rows
    on_cpu = configurator.device == "cpu"
    return cell_bytes, Geometry(
        layers=layers,
        row_bytes=row_bytes,
        index_bytes=_key_bytes(config, target_bytes - layers * row_bytes),
        topk=get_dsa_mtp_topk_width(model.hf_config),  # with pooled keys above index_topk
        context_tokens=model.context_len,
        page_slots=configurator.pool_page_size,
        queries=1 if configurator.spec_algorithm.is_none() else drafts,
        tier=CPU_TIER if on_cpu else GPU_TIER,
        ghosts=on_cpu and moves_rows(config, groups),
        groups=groups,
        draft_bytes=draft_rows + _key_bytes(config, draft_keys),
    )


def _key_bytes(config: EssConfig, counted: int) -> int:
    """Bytes of the index keys for which SGLang counted `counted`: always those of fp8 keys."""
    if config.index_dtype != "float32":
        return counted
    return counted * index_page_bytes(fp32=True) // index_page_bytes(fp32=False)


def index_groups(owner: Any) -> IndexGroups:
    """The index groups of a model's sparse layers.

    owner: SGLang's KVCacheConfigurator or ModelRunner
    """
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import dsa_layer_skips_topk

    info, hybrid = owner.layer_info, mambaish_config(owner.model_config)
    layer_ids = list(range(info.start_layer, info.end_layer))
    if hybrid is not None:  # the others are linear attention's
        layer_ids = [i for i in hybrid.full_attention_layer_ids if i in layer_ids]
    model = owner.model_config.hf_config
    return IndexGroups.of_layers([not dsa_layer_skips_topk(model, i) for i in layer_ids])


def elides_index_keys(original: Any, *, is_draft_worker: bool) -> bool:
    """Body of the AROUND hook on _should_elide_dsa_index_k: as without a linker if it is ours."""
    from sglang.srt.runtime_context import get_memory

    memory = get_memory()
    if memory.enable_unified_cache_external_linker and not is_draft_worker:
        options = memory.unified_cache_external_linker_config or {}
        if options.get("linker_module_path") == LINKER_MODULE:
            return not memory.enable_hisparse
    return bool(original(is_draft_worker=is_draft_worker))
