"""The launcher's checks of a command, before anything that takes long.

Each function returns every reason to refuse, one line each: the rule, the value, the remedy.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_ess.config import EssConfig
from sglang_ess.errors import Refusal, in_one_line
from sglang_ess.launch.architectures import architecture_reasons
from sglang_ess.launch.model_source import mapping, model_source, read_model_config
from sglang_ess.launch.option_ranges import range_reasons
from sglang_ess.launch.option_rules import (
    CPU_RULES,
    CPU_SPARSE_RULES,
    CUDA_RULES,
    ESS_RULES,
    STREAM_RULES,
    rule_reasons,
)
from sglang_ess.launch.ports import port_reasons
from sglang_ess.launch.speculation_rules import early_fetch_reasons, speculation_reasons
from sglang_ess.launch.store_option import store_reasons
from sglang_ess.plugin import PLUGIN_NAMES, active_platform

NOT_LOADED = (
    "sglang-ess must be among SGLang's plugins: got no entry point of that name. "
    "Run pip install sglang-ess, or pip install -e . in its repository."
)


def environment_reasons(config: EssConfig, environ: Mapping[str, str]) -> list[str]:
    """Values of SGLang's variables for plugins and platforms that would silently leave ESS out."""
    reasons = []
    allowed = {name.strip() for name in environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    if allowed and not allowed.issuperset(PLUGIN_NAMES):
        reasons.append(
            f"SGLANG_PLUGINS must list {' and '.join(PLUGIN_NAMES)}: got {sorted(allowed)}. "
            "Add them or unset it."
        )
    platform = environ.get("SGLANG_PLATFORM", "")
    if platform not in ("", "ess_cpu"):
        reasons.append(
            f"SGLANG_PLATFORM must be unset or ess_cpu: got {platform!r}, with which SGLang "
            "skips ESS's hooks. Unset it, or start python -m sglang.launch_server."
        )
    if platform == "ess_cpu" and config.platform == "native":
        reasons.append(
            "--ess-platform must not be native under SGLANG_PLATFORM=ess_cpu: got native. "
            "Drop one of the two."
        )
    return reasons


def early_reasons(rest: list[str]) -> list[str]:
    """What is wrong with the model path and the port on the command line.

    These need no `import sglang`, which takes seconds. server_reasons() checks everything.
    rest: the command line without ESS's options
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (("--model-path", "--model"), ("--host",), ("--port",)):
        parser.add_argument(*flags, nargs="?")  # SGLang's parser refuses a missing value
    args = parser.parse_known_args(rest)[0]
    reasons = []
    if args.model_path:
        try:
            model_source(args.model_path)
        except Refusal as refusal:
            reasons.append(str(refusal))
    if args.port and re.fullmatch(r"-?\d+", args.port):
        reasons += port_reasons(args.host or "127.0.0.1", int(args.port))  # SGLang's default
    return reasons


def server_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """engine_reasons(), and whether the port is free. Effect: binds the port briefly."""
    reasons = engine_reasons(server_args, config, on_cpu)
    return reasons + port_reasons(server_args.host, server_args.port)


def engine_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """Every reason to refuse SGLang's options and the checkpoint that they name.

    server_args: a ServerArgs whose resolve_once() has not run
    Effect: reads config.json, from the Hugging Face Hub for a name org/name.
    """
    reasons, model = [], None
    try:
        model = read_model_config(server_args)
    except Refusal as refusal:
        reasons.append(str(refusal))
    else:
        if model is not None:
            reasons += model_reasons(server_args, model, config, on_cpu)
    reasons += store_reasons(server_args, model, config, on_cpu)
    return reasons + option_reasons(server_args, config, on_cpu) + range_reasons(server_args)


def resolve(server_args: Any) -> None:
    """Run SGLang's own checks of the options and load the tokenizer, before any process starts.

    Every process of the server loads the tokenizer; each would fail with its own traceback.
    Raises: Refusal for the tokenizer; whatever SGLang's checks raise.
    """
    if server_args.grpc_mode or server_args.smg_grpc_mode:  # run_server still writes to server_args
        return
    server_args.resolve_once()
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    resolved = resolving_view(server_args)
    SamplingParams(**(resolved.preferred_sampling_params or {}))
    if resolved.skip_tokenizer_init or resolved.encoder_only:
        return
    try:
        get_tokenizer(
            resolved.tokenizer_path,
            tokenizer_mode=resolved.tokenizer_mode,
            trust_remote_code=resolved.trust_remote_code,
            revision=resolved.revision,
            tokenizer_backend=resolved.tokenizer_backend,
        )
    except Exception as error:
        raise Refusal(
            "--tokenizer-path must name a directory or a Hugging Face name with a tokenizer: got "
            f"{resolved.tokenizer_path!r} ({in_one_line(error)}). Correct it or add "
            "--skip-tokenizer-init."
        ) from error


def option_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """Options of SGLang and of ESS that cannot be combined on this platform."""
    reasons = []
    if server_args.enable_hisparse and (config.enabled or on_cpu):
        reasons.append(
            "--enable-hisparse must be off with ESS and on the CPU platform: got on. "
            "Drop it, or on a GPU add --disable-ess."
        )
    if config.index_dtype != "fp8" and not on_cpu:
        reasons.append(
            f"--ess-index-dtype must be fp8 off the CPU platform: got {config.index_dtype}. "
            "Drop the flag or add --ess-platform cpu."
        )
    if config.device_gib is not None and not on_cpu:
        reasons.append(
            f"--ess-device-gib must not be given off the CPU platform: got {config.device_gib:g}. "
            "Use --mem-fraction-static there."
        )
    if config.link_gib is not None and not on_cpu:
        reasons.append(
            f"--ess-link-gib must not be given off the CPU platform: got {config.link_gib:g}. "
            "Drop it: a GPU has a real link."
        )
    if config.layer_budgets == "auto" and not on_cpu:
        reasons.append(
            "--ess-layer-budgets must be uniform or left out off the CPU platform: got auto. Drop "
            "it: hot rows do not move between the layers of a GPU."
        )
    if on_cpu:
        reasons += rule_reasons(server_args, CPU_RULES)
        reasons += thread_reasons(server_args)
    # A prefill server has one tier.
    if config.enabled and server_args.disaggregation_mode != "prefill":
        known = {rule[0] for rule in CPU_RULES} if on_cpu else set()
        rules = ESS_RULES if on_cpu else ESS_RULES + CUDA_RULES
        rules = tuple(rule for rule in rules if rule[0] not in known | {"enable_hisparse"})
        reasons += rule_reasons(server_args, rules, "with ESS", "Drop it or add --disable-ess")
        reasons += host_reasons(server_args, config) + trace_reasons(config, on_cpu)
        reasons += overlap_reasons(config, on_cpu) + padding_reasons()
        reasons += share_reasons(server_args, config, on_cpu)
        reasons += attention_reasons(server_args, config, on_cpu)
        reasons += stage_reasons(server_args, config, on_cpu)
    return reasons


def share_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """Why --ess-fetch-share cannot be on."""
    if config.fetch_share == "off":
        return []
    if not on_cpu:
        return [
            "--ess-fetch-share must be off on a GPU: got on. Drop it: it is not written there yet "
            "(docs/simulator.md has the design)."
        ]
    from sglang_ess.mem_cache.host_share import NodeTiers

    if NodeTiers.of(server_args).ranks == 1:
        return [
            "--ess-fetch-share must be off unless several ranks of a node share a host tier: got "
            f"on with --tp-size {server_args.tp_size}. Drop it."
        ]
    return []


def stage_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """Why pipeline stages could not admit the same requests: each would decide by its own clock."""
    if server_args.pp_size == 1 or config.admission == "off" or not on_cpu:
        return []
    return [
        f"--ess-admission must be off with --pp-size {server_args.pp_size}: got on, with which "
        "each stage decides alone. Add --ess-admission off."
    ]


def thread_reasons(server_args: Any) -> list[str]:
    """Why the ranks of this node could not have the cores that the user names."""
    from sglang_ess.mem_cache.host_share import NodeRanks
    from sglang_ess.platforms.cpu_threads import bind_reasons

    return bind_reasons(NodeRanks.of(server_args).total, os.environ)


def overlap_reasons(config: EssConfig, on_cpu: bool) -> list[str]:
    """Why --ess-overlap or --ess-overlap-costs cannot be used."""
    if on_cpu and (config.overlap, config.overlap_costs) != ("auto", ""):
        return [
            "--ess-overlap and --ess-overlap-costs must be left out on the CPU platform: got "
            f"{config.overlap} and {config.overlap_costs!r}. Drop them: it has only one stream."
        ]
    if not config.overlap_costs:
        return []
    from sglang_ess.attention.overlap import CostTable

    try:
        CostTable.read(config.overlap_costs)
    except ValueError as error:
        return [f"--ess-overlap-costs: {error}"]
    return []


def attention_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """Why --ess-attention flashinfer cannot be used."""
    if config.attention == "sglang":
        return []
    if on_cpu:
        return [
            f"--ess-attention must be left out on the CPU platform: got {config.attention}. "
            "Drop it: that platform has its own kernels."
        ]
    reasons = []
    if config.overlap in ("da", "dba") or config.overlap_costs:
        reasons.append(
            f"--ess-overlap must be off with --ess-attention flashinfer: got {config.overlap} and "
            f"costs {config.overlap_costs!r}. Drop both, or --ess-attention."
        )
    if server_args.speculative_algorithm is not None:
        reasons.append(
            "--speculative-algorithm must be unset with --ess-attention flashinfer: got "
            f"{server_args.speculative_algorithm}. Drop one of the two."
        )
    if server_args.kv_cache_dtype not in ("auto", "bf16", "bfloat16"):
        reasons.append(
            "--kv-cache-dtype must be bfloat16 with --ess-attention flashinfer: got "
            f"{server_args.kv_cache_dtype}. Use --kv-cache-dtype bfloat16, or drop "
            "--ess-attention."
        )
    return reasons


def padding_reasons() -> list[str]:
    """Why SGLang would run decode batches as prefills (as pplx makes it, see option_rules)."""
    from sglang.srt.environ import envs

    if not envs.SGLANG_DEEPEP_V2_FORCE_MAX_LEN.get():
        return []
    return [
        "SGLANG_DEEPEP_V2_FORCE_MAX_LEN must be off with ESS: got on. Unset it or add "
        "--disable-ess."
    ]


def host_reasons(server_args: Any, config: EssConfig) -> list[str]:
    """Why this node does not have the memory that --ess-host-gib asks for."""
    from sglang_ess.mem_cache.host_share import CapacityError, NodeTiers, host_limit_bytes
    from sglang_ess.tiers import free_host_bytes

    tiers = NodeTiers.of(server_args).total
    try:
        host_limit_bytes(config, free_host_bytes(), NodeTiers(tiers, tiers))
    except CapacityError as error:
        return [str(error)]
    return []


def trace_reasons(config: EssConfig, on_cpu: bool = True) -> list[str]:
    """Why --ess-trace or --ess-trace-scores could not be obeyed."""
    if config.trace_scores and not on_cpu:
        return [
            "--ess-trace-scores must be left out off the CPU platform: got "
            f"{config.trace_scores}. Record with --ess-platform cpu: on a GPU, SGLang's fused "
            "top-k keeps no score, and no list reaches the host."
        ]
    if config.trace and not on_cpu:
        return [
            f"--ess-trace must be left out off the CPU platform: got {config.trace!r}. Record on "
            "that platform (--ess-platform cpu): on a GPU the top-k lists never reach the host."
        ]
    path = Path(config.trace)
    if not config.trace or (path.parent.is_dir() and not path.is_dir()):
        return []
    return [
        f"--ess-trace must name a file in a directory that exists: got {config.trace!r}. "
        "Create the directory or correct the path."
    ]


def model_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool
) -> list[str]:
    """Why this checkpoint cannot be served with these options."""
    from sglang.srt.configs.model_config import is_deepseek_dsa

    reasons = []
    sparse = is_deepseek_dsa(dict(model))
    if config.enabled and not sparse:
        reasons.append(
            "--model-path must name a model with DeepSeek sparse attention: got architectures "
            f"{model.get('architectures')}, index_topk {model.get('index_topk')}. "
            "Add --disable-ess to serve it one-tier."
        )
    if sparse:
        reasons += architecture_reasons(server_args, model, config, on_cpu)
        reasons += mixed_reasons(server_args, model, config, on_cpu)
    reasons += speculation_reasons(server_args, model, config, on_cpu, sparse)
    reasons += early_fetch_reasons(server_args, model, config, on_cpu)
    shape = model.get("kv_lora_rank"), model.get("qk_rope_head_dim")
    fp8 = sparse and not on_cpu and server_args.kv_cache_dtype == "fp8_e4m3"
    # On the CPU platform, no row has other sizes.
    if fp8 and shape not in ((512, 64), (512, 0)):
        reasons.append(
            "--kv-cache-dtype fp8_e4m3 must have kv_lora_rank 512 and qk_rope_head_dim 64 (the "
            f"656-byte row) or 0: got {shape[0]} and {shape[1]}. Use --kv-cache-dtype bfloat16."
        )
    if on_cpu and sparse:
        reasons += rule_reasons(server_args, CPU_SPARSE_RULES)
    if config.topk_stream:
        reasons += stream_reasons(server_args, model, config, on_cpu, sparse)
    stored = mapping(model.get("quantization_config")).get("quant_method")
    if on_cpu and stored:
        reasons.append(
            f"--model-path must not be quantized on the CPU platform: got quant_method {stored!r} "
            "in config.json. Use a bfloat16 checkpoint."
        )
    return reasons


def mixed_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool
) -> list[str]:
    """Why a model with pooled index keys or linear attention layers cannot be served so."""
    reasons, mode = [], server_args.disaggregation_mode
    pool = model.get("index_kpool") or 1
    if pool > 1 and config.enabled and not on_cpu and mode != "prefill":
        reasons.append(
            "--model-path must name a model with an index key for each token with ESS on a GPU: "
            f"got index_kpool {pool}. Add --disable-ess."
        )
    if pool > 1 and config.trace_scores:
        reasons.append(
            "--ess-trace-scores must be left out for a model whose index keys stand for several "
            f"tokens: got index_kpool {pool}. Drop it."
        )
    if on_cpu and model.get("linear_attn_config") and mode != "null":
        reasons.append(
            "--disaggregation-mode must be unset on the CPU platform for a model with linear "
            f"attention layers: got {mode}. Drop it."
        )
    if on_cpu and model.get("linear_attn_config") and server_args.enable_dp_attention:
        reasons.append(
            "--enable-dp-attention must be off on the CPU platform for a model with linear "
            "attention layers: got on. Drop it."
        )
    return reasons


def stream_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool, sparse: bool
) -> list[str]:
    """Why --ess-topk-stream cannot replace the top-k lists of this model's decode."""
    platform = "cpu" if on_cpu else active_platform()
    if platform not in ("cpu", "cuda"):
        return [
            "--ess-topk-stream must have the CPU platform or a CUDA device: got "
            f"{platform}. Drop it or --ess-platform native."
        ]
    if not sparse:
        return [
            "--ess-topk-stream must have a model with DeepSeek sparse attention: got "
            f"architectures {model.get('architectures')}. Drop it."
        ]
    from sglang_ess.testing.topk_stream import spec

    refused = config.enabled or on_cpu  # the other options, without a stream too
    return spec.reasons(config.topk_stream, model) + rule_reasons(
        server_args, STREAM_RULES[: 1 if refused else None], "with --ess-topk-stream"
    )
