"""Tells SGLang's transfer engines about a two-tier pool: its kind of memory, and who shares it."""

from __future__ import annotations

from typing import Any

from sglang_ess.mem_cache.pool import EssTokenToKVPool


def describe_pool(
    result: None, kv_args: Any, token_to_kv_pool: Any, *args: Any, **kwargs: Any
) -> None:
    """Body of the AFTER hook on setup_state_kv_args, before a transfer manager reads kv_args.

    Effect: sets kv_args.kv_data_mem_kinds, where NIXL reads that latent rows are host memory (a
    draft model's, at the end, are not); and kv_args.host_tier_share (part, parts), from which
    disagg/mooncake.py tells this rank's share of the layers. Mooncake finds the kind of memory by
    the pointer. Index keys are state, and stay on the device. The rows arrive where decode's fetch
    reads them, without a device buffer between and without a copy afterwards.
    """
    if not isinstance(token_to_kv_pool, EssTokenToKVPool):
        return
    kinds = getattr(kv_args, "kv_data_mem_kinds", None)
    if kinds is not None:
        latent = len(kinds) - kv_args.num_draft_entries
        kv_args.kv_data_mem_kinds = ["DRAM"] * latent + kinds[latent:]
    group = token_to_kv_pool.host_tier.group
    kv_args.host_tier_share = group.rank, group.size


def manager_class(found: type | None, *args: Any) -> type | None:
    """Body of the AFTER hook on get_kv_class: our manager in the place of Mooncake's.

    Raises: Refusal where SGLang's is not as ess_patches.transfers has it.
    """
    if found is None or found.__name__ != "MooncakeKVManager":
        return found
    from ess_patches import contract, transfers
    from sglang_ess.disagg.mooncake import EssMooncakeKVManager

    contract.register_late(transfers.TOUCHED, "cpu")  # only checks them
    return EssMooncakeKVManager
