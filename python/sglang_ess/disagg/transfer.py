"""What a peer's transfer engine is told of a two-tier pool."""

from __future__ import annotations

from typing import Any

from sglang_ess.mem_cache.pool import EssTokenToKVPool


def name_memory(
    result: None, kv_args: Any, token_to_kv_pool: Any, *args: Any, **kwargs: Any
) -> None:
    """Body of the AFTER hook on setup_state_kv_args: latent rows are in host memory.

    Effect: kv_args.kv_data_mem_kinds, where NIXL asks for them; index keys are state, and stay
    on the device. Mooncake finds out by the pointer. Rows arrive where decode's fetch reads
    them: no device buffer between, and no copy after.
    """
    kinds = getattr(kv_args, "kv_data_mem_kinds", None)
    if kinds is not None and isinstance(token_to_kv_pool, EssTokenToKVPool):
        kv_args.kv_data_mem_kinds = ["DRAM"] * len(kinds)
