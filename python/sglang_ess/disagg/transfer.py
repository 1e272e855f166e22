"""Tells the transfer engine which memory holds a two-tier pool's rows."""

from __future__ import annotations

from typing import Any

from sglang_ess.mem_cache.pool import EssTokenToKVPool


def name_memory(
    result: None, kv_args: Any, token_to_kv_pool: Any, *args: Any, **kwargs: Any
) -> None:
    """Body of the AFTER hook on setup_state_kv_args: declare latent rows as host memory.

    Effect: kv_args.kv_data_mem_kinds is set where NIXL reads it. Mooncake finds the kind of memory
    by the pointer. Index keys are state, and stay on the device. The rows arrive where decode's
    fetch reads them, without a device buffer between and without a copy afterwards.
    """
    kinds = getattr(kv_args, "kv_data_mem_kinds", None)
    if kinds is not None and isinstance(token_to_kv_pool, EssTokenToKVPool):
        kv_args.kv_data_mem_kinds = ["DRAM"] * len(kinds)
