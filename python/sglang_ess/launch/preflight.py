"""What the launcher refuses before anything slow: every function returns all its reasons.

A reason is one line: what was wrong, with the value, and what to do.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_ess.config import EssConfig
from sglang_ess.errors import Refusal, in_one_line
from sglang_ess.launch.option_ranges import range_reasons
from sglang_ess.plugin import PLUGIN_NAMES, active_platform

NOT_LOADED = (
    "sglang-ess must be among SGLang's plugins: got no entry point of that name. "
    "Run pip install -e . in its repository."
)
# What the CPU platform serves. (ServerArgs field, flag, allowed values)
CPU_RULES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("device", "--device", (None, "cpu")),
    ("tp_size", "--tp-size", (1,)),
    ("pp_size", "--pp-size", (1,)),
    ("dp_size", "--dp-size", (1,)),
    ("ep_size", "--ep-size", (1,)),
    ("attn_dp_size", "--attn-dp-size", (1,)),
    ("attn_cp_size", "--attn-cp-size", (1,)),
    ("dcp_size", "--dcp-size", (1,)),
    ("moe_dp_size", "--moe-dp-size", (1,)),
    ("nnodes", "--nnodes", (1,)),
    ("enable_dp_attention", "--enable-dp-attention", (False,)),
    ("speculative_algorithm", "--speculative-algorithm", (None,)),
    ("quantization", "--quantization", (None, "unquant")),
    ("enable_hierarchical_cache", "--enable-hierarchical-cache", (False,)),
    ("enable_lmcache", "--enable-lmcache", (False,)),
    ("enable_flexkv", "--enable-flexkv", (False,)),
    ("enable_lora", "--enable-lora", (None, False)),
    ("lora_paths", "--lora-paths", (None, [])),
    ("enable_two_batch_overlap", "--enable-two-batch-overlap", (False,)),
    ("enable_single_batch_overlap", "--enable-single-batch-overlap", (False,)),
    ("cpu_offload_gb", "--cpu-offload-gb", (0,)),
    ("weight_cache_mode", "--weight-cache-mode", ("off",)),
)
# The same, for models with sparse attention only: others take SGLang's own paths.
CPU_SPARSE_RULES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("kv_cache_dtype", "--kv-cache-dtype", ("auto", "bf16", "bfloat16", "fp8_e4m3")),
    ("page_size", "--page-size", (None, 64)),
    ("attention_backend", "--attention-backend", (None, "dsa", "nsa")),
    ("prefill_attention_backend", "--prefill-attention-backend", (None, "dsa", "nsa")),
    ("decode_attention_backend", "--decode-attention-backend", (None, "dsa", "nsa")),
    ("dtype", "--dtype", ("auto", "bfloat16", "float32", "float")),
    ("is_embedding", "--is-embedding", (False,)),
)
# What a two-tier pool does not serve, and why.
ESS_RULES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    # Rows that are loaded back bypass the pool's setters, so that a stale hot row could stay
    # (invariant 3).
    ("enable_memory_saver", "--enable-memory-saver", (False,)),
    ("enable_unified_memory", "--enable-unified-memory", (False,)),
    ("enable_hisparse", "--enable-hisparse", (False,)),
    ("enable_hierarchical_cache", "--enable-hierarchical-cache", (False,)),
    ("enable_lmcache", "--enable-lmcache", (False,)),
    ("enable_flexkv", "--enable-flexkv", (False,)),
    # The transports that write into host memory; the others go by the device's pointers.
    (
        "disaggregation_transfer_backend",
        "--disaggregation-transfer-backend",
        ("mooncake", "nixl", "fake"),
    ),
    # The host tier is the place for what these would copy to the host.
    (
        "disaggregation_decode_enable_offload_kvcache",
        "--disaggregation-decode-enable-offload-kvcache",
        (False,),
    ),
    (
        "disaggregation_decode_host_receive_threshold",
        "--disaggregation-decode-host-receive-threshold",
        (1, 1.0),
    ),
    (
        "disaggregation_decode_retraction_backup",
        "--disaggregation-decode-retraction-backup",
        (None, "cpu_tensor", "none"),
    ),
    # A server's pool is of one kind for good.
    ("enable_pd_role_switch", "--enable-pd-role-switch", (False,)),
    # A draft model has a pool of its own, and verifies several queries a request.
    ("speculative_algorithm", "--speculative-algorithm", (None,)),
    ("pp_size", "--pp-size", (1,)),
    ("dcp_size", "--dcp-size", (1,)),
    ("attn_cp_size", "--attn-cp-size", (1,)),
)
# The same on a GPU alone.
CUDA_RULES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    # Both take a batch apart inside a layer, and the plan of one part would see the other's.
    ("enable_two_batch_overlap", "--enable-two-batch-overlap", (False,)),
    ("enable_single_batch_overlap", "--enable-single-batch-overlap", (False,)),
    ("enable_pdmux", "--enable-pdmux", (False,)),
    ("attention_backend", "--attention-backend", (None, "dsa", "nsa")),
    ("prefill_attention_backend", "--prefill-attention-backend", (None, "dsa", "nsa")),
    ("decode_attention_backend", "--decode-attention-backend", (None, "dsa", "nsa")),
)
# What has another number of queries a request in decode, or another page table.
STREAM_RULES = tuple(
    rule for rule in ESS_RULES if rule[0] in ("speculative_algorithm", "dcp_size", "attn_cp_size")
)


def environment_reasons(config: EssConfig, environ: Mapping[str, str]) -> list[str]:
    """SGLang's own plugin selectors that would leave ESS out without a word."""
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
    """A model path or port on the command line that is wrong whatever else was given.

    Known before `import sglang`, which takes seconds; server_reasons sees the whole.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (("--model-path", "--model"), ("--host",), ("--port",)):
        parser.add_argument(*flags, nargs="?")  # SGLang's parser refuses a missing value
    args = parser.parse_known_args(rest)[0]
    reasons = []
    if args.model_path:
        try:
            _model_source(args.model_path)
        except Refusal as refusal:
            reasons.append(str(refusal))
    if args.port and re.fullmatch(r"-?\d+", args.port):
        reasons += port_reasons(args.host or "127.0.0.1", int(args.port))  # SGLang's default
    return reasons


def server_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """engine_reasons, and those of a server. Effect: binds the port briefly."""
    reasons = engine_reasons(server_args, config, on_cpu)
    return reasons + port_reasons(server_args.host, server_args.port)


def engine_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """Every reason to refuse a ServerArgs (raw, not resolved yet) and its checkpoint.

    Effect: reads config.json (fetched from the Hub for an org/name).
    """
    reasons = []
    try:
        model = read_model_config(server_args)
    except Refusal as refusal:
        reasons.append(str(refusal))
    else:
        if model is not None:
            reasons += model_reasons(server_args, model, config, on_cpu)
    return reasons + option_reasons(server_args, config, on_cpu) + range_reasons(server_args)


def resolve(server_args: Any) -> None:
    """SGLang's own checks of the options and of the tokenizer, before any process is started.

    Every process loads the tokenizer: each would fail on it with a traceback of its own.
    Raises: whatever SGLang raises.
    """
    if server_args.grpc_mode or server_args.smg_grpc_mode:  # run_server still writes to it
        return
    server_args.resolve_once()
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    settled = resolving_view(server_args)
    SamplingParams(**(settled.preferred_sampling_params or {}))
    if settled.skip_tokenizer_init or settled.encoder_only:
        return
    try:
        get_tokenizer(
            settled.tokenizer_path,
            tokenizer_mode=settled.tokenizer_mode,
            trust_remote_code=settled.trust_remote_code,
            revision=settled.revision,
            tokenizer_backend=settled.tokenizer_backend,
        )
    except Exception as error:
        raise Refusal(
            "--tokenizer-path must name a directory or a Hugging Face name with a tokenizer: got "
            f"{settled.tokenizer_path!r} ({in_one_line(error)}). Correct it or add "
            "--skip-tokenizer-init."
        ) from error


def option_reasons(server_args: Any, config: EssConfig, on_cpu: bool) -> list[str]:
    """Options, SGLang's and ESS's, that do not go together here."""
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
            "Drop it: a GPU's link is what it is."
        )
    if on_cpu:
        reasons += _rule_reasons(server_args, CPU_RULES)
    if config.enabled and server_args.disaggregation_mode != "prefill":  # which has one tier
        known = {rule[0] for rule in CPU_RULES} if on_cpu else set()
        rules = ESS_RULES if on_cpu else ESS_RULES + CUDA_RULES
        rules = tuple(rule for rule in rules if rule[0] not in known | {"enable_hisparse"})
        reasons += _rule_reasons(server_args, rules, "with ESS", "Drop it or add --disable-ess")
        reasons += host_reasons(config) + trace_reasons(config, on_cpu)
        reasons += overlap_reasons(config, on_cpu)
    return reasons


def overlap_reasons(config: EssConfig, on_cpu: bool) -> list[str]:
    """Whether the overlap that was asked for can be had."""
    if on_cpu and (config.overlap, config.overlap_costs) != ("auto", ""):
        return [
            "--ess-overlap and --ess-overlap-costs must be left out on the CPU platform: got "
            f"{config.overlap} and {config.overlap_costs!r}. Drop them: it has one stream."
        ]
    if not config.overlap_costs:
        return []
    from sglang_ess.attention.overlap import CostTable

    try:
        CostTable.read(config.overlap_costs)
    except ValueError as error:
        return [f"--ess-overlap-costs: {error}"]
    return []


def host_reasons(config: EssConfig) -> list[str]:
    """Whether --ess-host-gib is there to take."""
    from sglang_ess.mem_cache.capacity import CapacityError, host_limit_bytes

    try:
        host_limit_bytes(config)
    except CapacityError as error:
        return [str(error)]
    return []


def trace_reasons(config: EssConfig, on_cpu: bool = True) -> list[str]:
    """Whether --ess-trace could be written."""
    if config.trace and not on_cpu:
        return [
            f"--ess-trace must be left out off the CPU platform: got {config.trace!r}. Record on "
            "that platform (--ess-platform cpu): a GPU's top-k does not reach the host."
        ]
    path = Path(config.trace)
    if not config.trace or (path.parent.is_dir() and not path.is_dir()):
        return []
    return [
        f"--ess-trace must name a file in a directory that exists: got {config.trace!r}. "
        "Create the directory or correct the path."
    ]


def read_model_config(server_args: Any) -> dict[str, Any] | None:
    """config.json of --model-path with --json-model-override-args applied.

    None where only SGLang can tell: see _model_source.
    Raises: Refusal if there is no such model or its config.json cannot be read.
    """
    file = _model_source(str(server_args.model_path))
    if isinstance(file, str):
        file = _fetch_config(file, server_args)
    if file is None:
        return None
    model = _json_object(_text(file), str(file))
    override = _json_object(server_args.json_model_override_args, "--json-model-override-args")
    return {**_mapping(model.get("text_config")), **model, **override}


def _model_source(path: str) -> Path | str | None:
    """The config.json of a local model, a Hub name, or None for what only SGLang can tell:
    remote URLs, GGUF files, "dummy" and ModelScope names.

    Raises: Refusal for anything else.
    """
    if path.lower() in ("none", "dummy") or "://" in path or ".gguf" in path.lower():
        return None
    if os.path.exists(path):
        file = Path(path) / "config.json"
        if not file.is_file():
            raise Refusal(
                f"--model-path must be a directory with config.json: got {path!r} without one. "
                "Name the checkpoint's own directory."
            )
        return file
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path):
        raise Refusal(
            f"--model-path must be a directory or a Hugging Face name org/name: got {path!r}, "
            "which does not exist. Correct the path."
        )
    in_modelscope = os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true", "yes")
    return None if in_modelscope else path


def model_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool
) -> list[str]:
    """Why this checkpoint cannot be served in this way."""
    from sglang.srt.configs.model_config import is_deepseek_dsa

    reasons = []
    sparse = is_deepseek_dsa(dict(model))
    if config.enabled and not sparse:
        reasons.append(
            "--model-path must name a model with DeepSeek sparse attention: got architectures "
            f"{model.get('architectures')}, index_topk {model.get('index_topk')}. "
            "Add --disable-ess to serve it one-tier."
        )
    latent, rope = model.get("kv_lora_rank"), model.get("qk_rope_head_dim")
    if sparse and server_args.kv_cache_dtype == "fp8_e4m3" and (latent, rope) != (512, 64):
        reasons.append(
            "--kv-cache-dtype fp8_e4m3 must have kv_lora_rank 512 and qk_rope_head_dim 64 "
            f"(the 656-byte row): got {latent} and {rope}. Use --kv-cache-dtype bfloat16."
        )
    if on_cpu and sparse:
        reasons += _rule_reasons(server_args, CPU_SPARSE_RULES)
    if config.topk_stream:
        reasons += stream_reasons(server_args, model, config, on_cpu, sparse)
    stored = _mapping(model.get("quantization_config")).get("quant_method")
    if on_cpu and stored:
        reasons.append(
            f"--model-path must not be quantized on the CPU platform: got quant_method {stored!r} "
            "in config.json. Use a bfloat16 checkpoint."
        )
    return reasons


def stream_reasons(
    server_args: Any, model: Mapping[str, Any], config: EssConfig, on_cpu: bool, sparse: bool
) -> list[str]:
    """Why --ess-topk-stream could not play in this model's decode."""
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

    others = () if config.enabled or on_cpu else STREAM_RULES  # refused without a stream too
    return spec.reasons(config.topk_stream, model) + _rule_reasons(
        server_args, others, "with --ess-topk-stream"
    )


def port_reasons(host: str, port: int) -> list[str]:
    """Whether uvicorn could bind host:port now."""
    if not 1 <= port <= 65535:
        return [f"--port must be 1 to 65535: got {port}. Choose a free port."]
    try:
        _bind(host, port)
    except (socket.gaierror, UnicodeError) as error:
        return [f"--host must be a name or address: got {host!r} ({error}). Correct it."]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _free_port(host, port)
            return [f"--port must be free on {host}: got {port}, in use. Try --port {free}."]
        got = f"{host}:{port} ({error.strerror})"
        return [f"--host and --port must be open to this process: got {got}. Choose others."]
    return []


def _bind(host: str, port: int) -> None:
    """Bind every address of host for a moment, with the socket options asyncio uses.

    Raises: OSError if one cannot be bound, socket.gaierror if host has none.
    """
    for family, kind, proto, _, address in socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        try:
            listener = socket.socket(family, kind, proto)
        except OSError:  # a family this kernel lacks; asyncio passes over it too
            continue
        with listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)


def _free_port(host: str, taken: int) -> int:
    for port in range(taken + 1, min(taken + 100, 65536)):
        try:
            _bind(host, port)
        except OSError:
            continue
        return port
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _fetch_config(name: str, server_args: Any) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(
            name, "config.json", revision=server_args.revision, cache_dir=server_args.download_dir
        )
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise Refusal(
            f"--model-path must name a model on the Hugging Face Hub or a directory: got {name!r} "
            f"({type(error).__name__}: {line}). Check the name, HF_TOKEN and the network."
        ) from None
    return Path(file)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"{file} must be readable text: got {error}. Correct the file.") from None


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refusal(f"{where} must be JSON: got {error}. Correct the file or flag.") from None
    if not isinstance(value, dict):
        raise Refusal(f"{where} must be a JSON object: got {type(value).__name__}. Correct it.")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _rule_reasons(
    server_args: Any,
    rules: tuple[tuple[str, str, tuple[Any, ...]], ...],
    where: str = "on the CPU platform",
    remedy: str = "Drop or change it",
) -> list[str]:
    return [
        f"{flag} must be {_shown(allowed)} {where}: got {_shown((value,))}. {remedy}."
        for name, flag, allowed in rules
        if (value := getattr(server_args, name)) not in allowed
    ]


def _shown(values: tuple[Any, ...]) -> str:
    words = {None: "unset", True: "on", False: "off"}
    return " or ".join(
        words[value] if value is None or isinstance(value, bool) else str(value)
        for value in values
        if value != []
    )
