"""Slots, largest batches and host memory of one tier, HiSparse and ESS at equal device bytes.

Nothing is timed; each system's own code decides, for one rank and fp8 rows. One tier and
HiSparse: SGLang's KVCacheConfigurator chooses slots and running requests, and builds pool,
allocator and request table; ModelRunner.maybe_init_hisparse_coordinator builds coordinator and host
pool; bytes are those of their tensors. ESS: sglang_ess.mem_cache.capacity for a CUDA device, with
the bytes of a row and of index keys read from SGLang's one-tier pool.

Not real: tensors are on torch's meta device, which has shapes and no memory; the bytes for KV are
given; host memory has no limit; the coordinator's process group is empty; a checkpoint is its
config.json. Settings: "hot ratio 0.1" (host_to_device_ratio 10, --ess-hot-ratio 0.1) and "defaults"
(2; 0.2). The summary, for each model at 32K and, unless it says so, hot ratio 0.1:

    vs_hisparse           ESS's slots / HiSparse's slots; vs_hisparse_default: at the defaults
    batch_vs_hisparse     ESS's largest batch / HiSparse's, which ends by its rows a request;
                          batch_vs_best_hisparse: at the host_to_device_ratio that is best for it
    vs_one_tier           ESS's slots / one tier's; hisparse_vs_one_tier: HiSparse's
    mtp_vs_one_tier       the same with an MTP layer, whose rows and index keys of every slot both
                          keep on the device; mtp_batch_vs_one_tier: the largest batches
    maps_states           ESS's bytes of maps and row states for a token; maps_states_before: with a
                          map for each layer instead of each index group
    hisparse_beyond_gib   what HiSparse takes outside the bytes for KV at SGLang's default
                          --max-running-requests. No ratio charges HiSparse for it.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.model_runner_components.layer_setup import ModelLayerInfo
from sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state import (
    SpecAuxHiddenStateConfig,
)
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from transformers import DeepseekV32Config, GlmMoeDsaConfig, HYV4Config

from benchmarks import harness
from sglang_ess.config import EssConfig
from sglang_ess.layout import GIB, INDEX_KEY_BYTES, KIB, PAGE_SLOTS
from sglang_ess.mem_cache import capacity

CONTEXTS, HEADLINE = (8 * KIB, 32 * KIB, 128 * KIB, 1024 * KIB), 32 * KIB
# transformers' defaults, but for the longest context. GLM-5.2: layers 0 to 2 and every fourth after
# them have an indexer, 21 of 78.
GLM, GLM_52 = "GlmMoeDsaForCausalLM", {"index_topk_freq": 4, "index_skip_topk_offset": 3}
MODELS = {  # name in the summary: (name, configuration, architecture, fields)
    "v32": ("DeepSeek-V3.2", DeepseekV32Config, "DeepseekV32ForCausalLM", {}),
    "glm51": ("GLM-5.1", GlmMoeDsaConfig, GLM, {}),
    "glm52": ("GLM-5.2", GlmMoeDsaConfig, GLM, GLM_52),
    "hy4": ("Hy4", HYV4Config, "HYV4ForCausalLM", {}),
}
RATIO, SAME, DEFAULTS = 0.1, "hot ratio 0.1", "defaults"
HISPARSE_RATIOS = range(2, 17)  # host_to_device_ratio that are tried for the largest batch
NO_LIMIT = 1 << 60  # bytes of host memory
UNITS = {"slots": "tokens", "requests": "requests", "prompt": "tokens", "rows": "rows/request",
         "host": "GiB", "beyond": "GiB"}  # fmt: skip

# How SGLang allocates host memory for pools on this device type.
ALLOC_MEMORY_FUNCS["meta"] = lambda dims, dtype, **_: torch.empty(dims, dtype=dtype, device="meta")


class Point(NamedTuple):
    model: str  # of MODELS
    context: int  # tokens of a request
    device_bytes: int  # for KV
    mtp_layers: int = 0  # that draft


class MetaConfigurator(KVCacheConfigurator):
    """SGLang's configurator of a Point, on the meta device. Needs published server arguments."""

    def __init__(self, point: Point):
        _, config_class, architecture, more = MODELS[point.model]
        more = {"architectures": [architecture], "max_position_embeddings": CONTEXTS[-1]} | more
        with tempfile.TemporaryDirectory() as directory:
            config_class(**more).save_pretrained(directory)
            model = ModelConfig(directory, context_length=point.context, dtype="bfloat16")
        layers, algorithm = model.num_hidden_layers, SpeculativeAlgorithm
        info = ModelLayerInfo(start_layer=0, end_layer=layers, num_effective_layers=layers)
        given = dict(
            device="meta", gpu_id=0, attn_dp_size=1, pp_size=1, model_config=model,
            server_args=get_context().server_args, kv_cache_dtype=torch.float8_e4m3fn,
            model_dtype=torch.bfloat16, page_size=PAGE_SLOTS, layer_info=info,
            spec_algorithm=algorithm.EAGLE if point.mtp_layers else algorithm.NONE,
            spec_aux_config=SpecAuxHiddenStateConfig(eagle_draft_num_layers=point.mtp_layers),
            use_mla_backend=True,
        )  # fmt: skip
        # The rest is None: no weights, no streams, no draft, no sliding window.
        rest = [field.name for field in fields(KVCacheConfigurator) if field.init]
        super().__init__(**dict.fromkeys(rest) | given)
        self.device_bytes = point.device_bytes

    def build(self) -> tuple[int, Any]:
        """(limit of running requests, pools) as `configure` makes them."""
        sizes = self._derive_pool_sizes(config=self._resolve_memory_pool_config(0))
        given = {"req_to_token_pool": None, "token_to_kv_pool_allocator": None}
        return sizes.max_running_requests, self._init_pools(sizes=sizes, **given)

    def _profile_available_bytes(self, pre_model_load_memory: int) -> int:
        return self.device_bytes


def published(**options: Any) -> Any:
    """A context with the server arguments of a GPU server."""
    return get_context().override_server_args(page_size=PAGE_SLOTS, **options)


def figures(slots: int, requests: int, prompt: int, rows: int, host: int, beyond: int = 0) -> dict:
    """slots: tokens of all requests; prompt: tokens of the longest prompt that the server computes
    itself; rows: latent rows of a request on the device; host: bytes; beyond: device bytes outside
    those for KV, without the request table that each system has
    """
    return dict(zip(UNITS, (slots, requests, prompt, rows, host / GIB, beyond / GIB), strict=True))


def one_tier(point: Point) -> dict:
    with published():
        limit, pools = MetaConfigurator(point).build()
    allocator = pools.token_to_kv_pool_allocator
    requests = min(limit, allocator.size // point.context)
    return figures(allocator.size, requests, allocator.available_size(), point.context, 0)


def coordinator_of(point: Point, ratio: int | None, limit: int | None) -> tuple[int, Any]:
    """(limit of running requests, SGLang's HiSparseCoordinator).

    ratio: host_to_device_ratio; limit: --max-running-requests; None: SGLang's defaults
    """
    config = None if ratio is None else json.dumps({"host_to_device_ratio": ratio})
    nobody = SimpleNamespace(cpu_group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    with (
        published(enable_hisparse=True, hisparse_config=config, max_running_requests=limit),
        get_parallel().override(tp_group=nobody),
        host_memory_budget_scope(NO_LIMIT),
    ):
        configurator = MetaConfigurator(point)
        limit, pools = configurator.build()
        runner = SimpleNamespace(
            enable_hisparse=True, device="meta", model_config=configurator.model_config,
            spec_algorithm=configurator.spec_algorithm, req_to_token_pool=pools.req_to_token_pool,
            token_to_kv_pool_allocator=pools.token_to_kv_pool_allocator,
        )  # fmt: skip
        ModelRunner.maybe_init_hisparse_coordinator(runner)
    return limit, runner.hisparse_coordinator


def hisparse(point: Point, ratio: int | None = None, default_limit: bool = False) -> dict:
    """Rows on the device and tokens on the host both bound the batch; no prompt is under way.

    default_limit: `beyond` is that of SGLang's default --max-running-requests; else of the largest
    batch, which is the least
    """
    limit, coordinator = coordinator_of(point, ratio, None)
    allocator, rows = coordinator.token_to_kv_pool_allocator, coordinator.padded_buffer_size
    device_rows = allocator.hisparse_attn_allocator.size
    requests = min(limit, allocator.size_full // point.context, device_rows // rows)
    if not default_limit:
        _, coordinator = coordinator_of(point, ratio, max(1, requests))
    tensors = (*vars(coordinator).values(), *vars(allocator).values())
    beyond = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor) and x.is_meta)
    host, prompt = coordinator.mem_pool_host.kv_buffer.nbytes, allocator.available_size()
    return figures(allocator.size_full, requests, prompt, rows, host, beyond)


def geometry_of(configurator: MetaConfigurator) -> capacity.Geometry:
    """ESS's geometry on a CUDA device."""
    pool, model = configurator.build()[1].token_to_kv_pool, configurator.model_config
    rows, groups = pool.kv_buffer[0].shape[0], capacity.index_groups(configurator)
    row_bytes = pool.kv_buffer[0].nbytes // rows
    drafts = configurator.spec_aux_config.eagle_draft_num_layers
    return capacity.Geometry(
        layers=groups.layers, row_bytes=row_bytes,
        index_bytes=sum(keys.nbytes for keys in pool.index_k_with_scale_buffer) // rows,
        topk=model.hf_config.index_topk, context_tokens=model.context_len, page_slots=PAGE_SLOTS,
        tier=capacity.GPU_TIER, groups=groups, draft_bytes=drafts * (row_bytes + INDEX_KEY_BYTES),
    )  # fmt: skip


def ess(point: Point, hot_ratio: float | None = None) -> dict:
    """hot_ratio: --ess-hot-ratio; None: ESS's default"""
    config, limits = EssConfig(hot_ratio=hot_ratio), (point.device_bytes, NO_LIMIT)
    with published():
        configurator = MetaConfigurator(point)
        geometry = geometry_of(configurator)
        slots = capacity.max_slots(config, geometry, *limits)
        requests = min(configurator.resolve_max_num_reqs(slots), slots // point.context)
    hot_rows = capacity.choose_capacity(config, geometry, slots, *limits).hot_rows
    rows = round(hot_rows / slots * point.context)
    return figures(slots, requests, slots, rows, geometry.host_bytes(slots))


def maps_and_states(geometry: capacity.Geometry) -> float:
    """Bytes of ESS's maps and row states for a token at RATIO."""
    states = geometry.hot_row_bytes - geometry.layers * geometry.row_bytes
    return geometry.slot_device_bytes - geometry.index_bytes + RATIO * states


SYSTEMS = {
    SAME: {"one tier": one_tier, "HiSparse": lambda point: hisparse(point, round(1 / RATIO)),
           "ESS": lambda point: ess(point, RATIO)},
    DEFAULTS: {"one tier": one_tier, "HiSparse": hisparse, "ESS": ess},
}  # fmt: skip


def compare(report: harness.Report, point: Point) -> None:
    """Add the rows of a point, and at HEADLINE the summary. gain: slots / one tier's"""
    model, found = MODELS[point.model][0], {}
    for setting, systems in SYSTEMS.items():
        found[setting] = sizes = {name: size(point) for name, size in systems.items()}
        for system, metric in itertools.product(sizes, UNITS):
            at = {"model": model, "setting": setting, "system": system, "context": point.context}
            value, one = sizes[system][metric], sizes["one tier"]["slots"]
            gain = {"gain": value / one} if metric == "slots" else {}
            name = f"{model}, {setting}"
            report.add(harness.computed(name, at, metric, UNITS[metric], value, **gain))
    if point.context == HEADLINE:
        summarise(report, point, found)


def summarise(report: harness.Report, point: Point, found: dict) -> None:
    one, theirs, ours = (found[SAME][name] for name in ("one tier", "HiSparse", "ESS"))
    defaults, mtp = found[DEFAULTS], Point(*point[:3], mtp_layers=1)
    drafting = {"one tier": one_tier(mtp), "ESS": ess(mtp, RATIO)}
    best = max(hisparse(point, n, default_limit=True)["requests"] for n in HISPARSE_RATIOS)
    for key, above, below in (
        ("vs_hisparse", ours["slots"], theirs["slots"]),
        ("vs_hisparse_default", defaults["ESS"]["slots"], defaults["HiSparse"]["slots"]),
        ("batch_vs_hisparse", ours["requests"], theirs["requests"]),
        ("batch_vs_best_hisparse", ours["requests"], best),
        ("vs_one_tier", ours["slots"], one["slots"]),
        ("hisparse_vs_one_tier", theirs["slots"], one["slots"]),
        ("mtp_vs_one_tier", drafting["ESS"]["slots"], drafting["one tier"]["slots"]),
        ("mtp_batch_vs_one_tier", drafting["ESS"]["requests"], drafting["one tier"]["requests"]),
    ):
        report.summarise(f"{point.model}_{key}", above / below if below else None)
    with published():
        geometry = geometry_of(MetaConfigurator(point))
    before = maps_and_states(replace(geometry, groups=None))
    beyond = hisparse(point, round(1 / RATIO), default_limit=True)["beyond"]
    report.summarise(f"{point.model}_maps_states", maps_and_states(geometry))
    report.summarise(f"{point.model}_maps_states_before", before)
    report.summarise(f"{point.model}_hisparse_beyond_gib", beyond)


def main(argv: list[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    # About what 8 H200s leave each beside the 0.7 TB of GLM-5.2's fp8 weights.
    parser.add_argument("--device-gib", type=float, default=40, help="for KV, of one GPU [40]")
    args, report = parser.parse_args(argv), harness.Report()
    for model, context in itertools.product(MODELS, (HEADLINE,) if args.quick else CONTEXTS):
        compare(report, Point(model, context, int(args.device_gib * GIB)))
    keys = ("setting", "model", "context", "system")
    columns = {key: f"{key}:,.{2 * (key == 'beyond')}f" for key in UNITS}
    harness.print_table(harness.pivot(report.rows, keys), {key: key for key in keys} | columns)
    gains = report.select(metric="slots", setting=SAME, context=HEADLINE)
    batches = report.select(metric="requests", setting=SAME, model="GLM-5.2")
    bars = {"title": f"slots / one tier's, {SAME}, computed"}
    lines = {"title": f"largest batch of GLM-5.2, {SAME}, computed", "xlabel": "context",
             "xscale": "log", "yscale": "symlog", "ylim": (0, None)}  # fmt: skip
    panels = (harness.Panel(gains, "model", "gain", "system", "bar", axes=bars),
              harness.Panel(batches, "context", series="system", axes=lines))  # fmt: skip
    harness.finish(report, args, *panels, device_gib=args.device_gib)


if __name__ == "__main__":
    main()
