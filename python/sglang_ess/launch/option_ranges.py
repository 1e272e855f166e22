"""Values of options that SGLang accepts although they end its server, now or at a request.

SGLang checks many of its options itself. These are the ones it does not check.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from typing import Any

# SGLang makes a list with an entry for each size up to this one; a longer list fills the memory.
MAX_GRAPH_SIZE = 1 << 20
MAX_PROCESSES = 256

_COUNT = ("at least 1", lambda value: value >= 1)
_PORT = ("1 to 65535", lambda value: 1 <= value <= 65535)
_SIZE = (f"at most {MAX_GRAPH_SIZE}", lambda value: value <= MAX_GRAPH_SIZE)
_PROCESSES = (f"1 to {MAX_PROCESSES}", lambda value: 1 <= value <= MAX_PROCESSES)

# (ServerArgs field, flag, rule in words, check); None is always allowed.
RANGES: tuple[tuple[str, str, str, Callable[[Any], bool]], ...] = (
    ("max_running_requests", "--max-running-requests", *_COUNT),
    ("max_queued_requests", "--max-queued-requests", *_COUNT),
    ("max_total_tokens", "--max-total-tokens", *_COUNT),
    ("max_prefill_tokens", "--max-prefill-tokens", *_COUNT),
    ("context_length", "--context-length", *_COUNT),
    ("prefill_max_requests", "--prefill-max-requests", *_COUNT),
    ("decode_log_interval", "--decode-log-interval", *_COUNT),
    ("watchdog_timeout", "--watchdog-timeout", "other than 0", lambda value: value != 0),
    ("soft_watchdog_timeout", "--soft-watchdog-timeout", "0 or more", lambda value: value >= 0),
    ("nccl_port", "--nccl-port", *_PORT),
    ("disaggregation_bootstrap_port", "--disaggregation-bootstrap-port", *_PORT),
    (
        "disaggregation_decode_polling_interval",
        "--disaggregation-decode-polling-interval",
        *_COUNT,
    ),
    # Each process seeds NumPy, which has these limits.
    ("random_seed", "--random-seed", "0 to 4294967295", lambda value: 0 <= value < 1 << 32),
    ("tokenizer_worker_num", "--tokenizer-worker-num", *_PROCESSES),
    ("detokenizer_worker_num", "--detokenizer-worker-num", *_PROCESSES),
    ("cuda_graph_max_bs_decode", "--cuda-graph-max-bs-decode", *_SIZE),
    ("cuda_graph_max_bs_prefill", "--cuda-graph-max-bs-prefill", *_SIZE),
    ("torch_compile_max_bs", "--torch-compile-max-bs", *_SIZE),
)
# Options whose text a scheduler parses as JSON. (ServerArgs field, flag)
JSON = (
    ("kv_events_config", "--kv-events-config"),
    ("model_loader_extra_config", "--model-loader-extra-config"),
)


def range_reasons(server_args: Any) -> list[str]:
    """One line for each value outside RANGES, each NaN and each text that is not a JSON object."""
    reasons = [
        f"{flag} must be {words}: got {value}. Change it or leave it out."
        for name, flag, words, holds in RANGES
        if (value := getattr(server_args, name)) is not None and value == value and not holds(value)
    ]
    for name in server_args.__struct_fields__:
        value = getattr(server_args, name)
        if isinstance(value, float) and math.isnan(value):
            flag = "--" + name.replace("_", "-")
            reasons.append(f"{flag} must be a number: got {value}. Change it or leave it out.")
    if min(server_args.numa_node or [0]) < 0:
        reasons.append(f"--numa-node must be 0 or more: got {server_args.numa_node}. Correct it.")
    if not 0 <= server_args.node_rank < max(server_args.nnodes, 1):
        reasons.append(
            f"--node-rank must be below --nnodes: got {server_args.node_rank} of "
            f"{server_args.nnodes}. Correct them."
        )
    if server_args.enable_trace and importlib.util.find_spec("opentelemetry") is None:
        reasons.append(
            "--enable-trace must have the package opentelemetry: got none. "
            'Run pip install "sglang[tracing]" or drop it.'
        )
    return reasons + [
        f"{flag} must be a JSON object: got {text!r}. Correct it."
        for name, flag in JSON
        if isinstance(text := getattr(server_args, name), str) and text and not _is_object(text)
    ]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
