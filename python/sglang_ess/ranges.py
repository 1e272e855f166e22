"""Values that SGLang takes and that end its server, at once or at the first request.

SGLang checks many of its options itself; here are those it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# Above this a list with one entry for each size up to it, as SGLang makes, fills the memory.
MOST_GRAPH_SIZE = 1 << 20
MOST_PROCESSES = 256

_COUNT = ("at least 1", lambda value: value >= 1)
_PORT = ("1 to 65535", lambda value: 1 <= value <= 65535)
_SIZE = (f"at most {MOST_GRAPH_SIZE}", lambda value: value <= MOST_GRAPH_SIZE)
_PROCESSES = (f"1 to {MOST_PROCESSES}", lambda value: 1 <= value <= MOST_PROCESSES)

# (ServerArgs field, flag, what a value that is not None must be, check)
RANGES: tuple[tuple[str, str, str, Callable[[Any], bool]], ...] = (
    ("max_running_requests", "--max-running-requests", *_COUNT),
    ("max_total_tokens", "--max-total-tokens", *_COUNT),
    ("max_prefill_tokens", "--max-prefill-tokens", *_COUNT),
    ("context_length", "--context-length", *_COUNT),
    ("decode_log_interval", "--decode-log-interval", *_COUNT),
    ("nccl_port", "--nccl-port", *_PORT),
    # NumPy's limits; each process seeds it.
    ("random_seed", "--random-seed", "0 to 4294967295", lambda value: 0 <= value < 1 << 32),
    ("tokenizer_worker_num", "--tokenizer-worker-num", *_PROCESSES),
    ("detokenizer_worker_num", "--detokenizer-worker-num", *_PROCESSES),
    ("cuda_graph_max_bs_decode", "--cuda-graph-max-bs-decode", *_SIZE),
    ("cuda_graph_max_bs_prefill", "--cuda-graph-max-bs-prefill", *_SIZE),
    ("torch_compile_max_bs", "--torch-compile-max-bs", *_SIZE),
)


def range_reasons(server_args: Any) -> list[str]:
    """Every value outside RANGES, and every NaN."""
    reasons = [
        f"{flag} must be {words}: got {value}. Change it or leave it out."
        for name, flag, words, holds in RANGES
        if (value := getattr(server_args, name)) is not None and not holds(value)
    ]
    for name in server_args.__struct_fields__:
        value = getattr(server_args, name)
        if isinstance(value, float) and math.isnan(value):
            flag = "--" + name.replace("_", "-")
            reasons.append(f"{flag} must be a number: got {value}. Change it or leave it out.")
    return reasons
