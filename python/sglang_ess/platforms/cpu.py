"""SGLang platform for hosts without an accelerator.

Upstream has no CPU path for DeepSeek sparse attention. This out-of-tree platform makes every layer
take its torch-native path and supplies what has none: the indexer, the sparse MLA backend and the
KV pool's writes.
"""

import os

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_ess.config import EssConfig
from sglang_ess.errors import Refusal
from sglang_ess.mem_cache.host_share import NodeRanks
from sglang_ess.platforms.cpu_threads import (
    chosen_threads,
    share_cores,
    use_own_threads,
    use_threads,
)

DISPATCH_KEY = "ess_cpu"
DEFAULT_CONTEXTS = 8  # the default number of slots holds this many requests of full length
# States of linear attention layers. A running request has about five, the radix cache the others.
DEFAULT_STATES = 256


class CpuDsaPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU as an out-of-tree platform. Chosen by sglang_ess.plugin, not by SGLang."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        """The device as a string: SGLang's argument resolution splits "cuda:0".

        Effect: SGLang's plugins are loaded. Its benchmark clients resolve a server's arguments
        without them, and the arguments of a sparse model need our hooks.
        """
        from sglang.srt.plugins import load_plugins

        load_plugins()
        return "cpu"

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def get_kv_pool_cls(self, *, kind):
        if kind != "dsa":
            return None
        from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool
        from sglang_ess.mem_cache.capacity import serves_two_tiers
        from sglang_ess.mem_cache.pool_cpu import CpuEssTokenToKVPool

        return CpuEssTokenToKVPool if serves_two_tiers(_config()) else CpuDsaTokenToKVPool

    def get_paged_allocator_cls(self):
        from sglang_ess.mem_cache.allocator import EssPagedAllocator, RefusingPagedAllocator
        from sglang_ess.mem_cache.capacity import serves_two_tiers

        return EssPagedAllocator if serves_two_tiers(_config()) else RefusingPagedAllocator

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """The launcher refuses trees of drafts: launch/speculation_rules.py."""
        return algorithm in ("EAGLE", "NGRAM")

    def get_speculative_worker_cls(self, algorithm: str) -> None:
        """None: SGLang's own worker serves. Effect: its kernels have torch forms from now on."""
        from sglang_ess.cpu.speculation import use_torch_kernels

        use_torch_kernels()

    def get_speculative_cache_locs_fn(self):
        from sglang_ess.cpu.speculation import verify_slots

        return verify_slots

    def apply_server_args_defaults(self, server_args) -> None:
        """Replace SGLang's choices for an Intel AMX host. A backend that the user named stays."""
        from sglang.srt.arg_groups.model_override_base import model_config_of
        from sglang.srt.configs.hybrid_arch import mambaish_config
        from sglang.srt.configs.model_config import is_deepseek_dsa

        model = model_config_of(server_args)
        if server_args.attention_backend in (None, "intel_amx"):
            is_sparse = is_deepseek_dsa(model.hf_config)
            server_args.attention_backend = "dsa" if is_sparse else "torch_native"
        sized = (server_args.max_total_tokens, server_args.mem_fraction_static)
        if sized == (None, None) and _config().device_gib is None:
            # SGLang's default is 72% of the device memory, which is the machine's here. Filling
            # that takes a minute.
            server_args.max_total_tokens = DEFAULT_CONTEXTS * model.context_len
        if mambaish_config(model) is not None:
            if server_args.max_mamba_cache_size is None:  # or half of the machine's memory
                server_args.max_mamba_cache_size = DEFAULT_STATES
            if server_args.dtype in ("float32", "float"):  # SGLang rounds them to bfloat16
                os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", "float32")
        # The other reductions of experts' outputs need NCCL.
        server_args.boundary_reduction = "ar"
        # An idle scheduler polls at full speed and would keep a core from the computation.
        server_args.sleep_on_idle = True
        share_cores(NodeRanks.of(server_args).total, server_args.nnodes)

    def init_backend(self) -> None:
        """Register the sparse path. Runs once in each worker, before the model is built."""
        import torch._dynamo
        from sglang.kernels.fused_op import BaseFusedOp
        from sglang.srt.environ import envs
        from sglang.srt.layers.attention.attention_registry import (
            register_attention_backend,
        )
        from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
        from sglang.srt.layers.attention.dsa.dsa_indexer_kpool import IndexerKPool

        from sglang_ess.cpu.indexer import indexer_forward
        from sglang_ess.cpu.kpool_indexer import kpool_indexer_forward
        from sglang_ess.platforms.cpu_transfer import use_host_transport

        # SGLang compiles small functions (MoE top-k, samplers) by inductor, which needs a C++
        # compiler on the host and 10 s at the first request. Eager mode costs microseconds.
        torch._dynamo.config.disable = True
        use_threads(chosen_threads())
        # Hyper-connections (GLM-5.3-Flash): SGLang has them in torch, too.
        envs.SGLANG_OPT_USE_TILELANG_MHC_PRE.set(False)
        envs.SGLANG_OPT_USE_TILELANG_MHC_POST.set(False)
        BaseFusedOp.register_oot_forward(Indexer, indexer_forward, DISPATCH_KEY)
        BaseFusedOp.register_oot_forward(IndexerKPool, kpool_indexer_forward, DISPATCH_KEY)
        use_host_transport()
        # Under the same name, so that every "dsa" rule of the model code applies.
        register_attention_backend("dsa")(_attention_backend)

    def get_group_coordinator_device(self, local_rank: int) -> torch.device:
        """The CPU. SGLang asks in each rank, before the model is built.

        Effect: the rank has its share of threads from now on.
        """
        use_own_threads(local_rank)
        return torch.device("cpu")

    def support_mamba_cache_extra_buffer(self) -> bool:
        """Whether linear attention layers leave snapshots for the radix cache: CpuKdaBackend."""
        return True


def _attention_backend(runner):
    """The backend of the sparse layers, by the pool that the runner has."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_ess.attention.backend_cpu import CpuTwoTierBackend
    from sglang_ess.cpu.attention_backend import CpuSparseMlaBackend
    from sglang_ess.cpu.hybrid_backend import over_own_layers
    from sglang_ess.mem_cache.pool import EssTokenToKVPool

    _check_stage(runner)
    if get_parallel().attn_dp_enabled:
        _use_attention_ranks()

    def build(view):
        if isinstance(view.token_to_kv_pool, EssTokenToKVPool):
            return CpuTwoTierBackend(view)
        return CpuSparseMlaBackend(view, *_one_tier_observers(runner))

    return over_own_layers(runner, build)


def _check_stage(runner) -> None:
    """Raises: Refusal for a pipeline stage whose first layer reads a top-k of the stage before.

    SGLang would send it, but slots are the same in two stages only as long as both free alike.
    """
    from sglang.srt.configs.model_config import dsa_layer_skips_topk

    first = runner.layer_info.start_layer
    if first > 0 and dsa_layer_skips_topk(runner.model_config.hf_config, first):
        raise Refusal(
            "--pp-size must cut the model between index groups: got a stage that begins with layer "
            f"{first}, which reads the top-k of a layer before it. Name the layers of each stage "
            "in SGLANG_PP_LAYER_PARTITION or drop --pp-size."
        )


def _use_attention_ranks() -> None:
    """Register what data-parallel attention needs, before the first pass.

    Raises: Refusal where SGLang is not as the contract has it.
    """
    from ess_patches import attention_ranks, contract

    contract.register_late(attention_ranks.HOOKS, "cpu")


def _one_tier_observers(runner) -> tuple:
    """The recorder of prompt ends and the index groups it records, on a prefill node that sends
    warm-up ids; else nothing.
    """
    from sglang.srt.runtime_context import get_disagg

    config = _config()
    if not (config.enabled and config.pd_warmup == "on"):
        return ()
    if get_disagg().disaggregation_mode != "prefill":
        return ()
    from sglang_ess.disagg import prefill_side
    from sglang_ess.mem_cache.capacity import index_groups

    pool, groups = runner.token_to_kv_pool, index_groups(runner)
    recorder = prefill_side.PromptEndRecorder(len(groups), pool.size + pool.page_size)
    prefill_side.active = recorder
    return [recorder], groups


def _config() -> EssConfig:
    """The launcher's config; one tier where only SGLANG_PLATFORM named this platform."""
    return EssConfig.from_env() or EssConfig(enabled=False)
