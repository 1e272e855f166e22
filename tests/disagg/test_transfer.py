"""The kinds of memory that NIXL gets for the pool's buffers."""

from types import SimpleNamespace

import pytest

from sglang_ess.disagg import transfer


class Pool:
    pass


@pytest.fixture(autouse=True)
def two_tiers(monkeypatch):
    monkeypatch.setattr(transfer, "EssTokenToKVPool", Pool)


def test_latent_rows_are_in_host_memory():
    kv_args = SimpleNamespace(kv_data_mem_kinds=["VRAM"] * 3)
    transfer.name_memory(None, kv_args, Pool(), None, total_kv_layers=3)
    assert kv_args.kv_data_mem_kinds == ["DRAM"] * 3


@pytest.mark.parametrize("pool", [object(), Pool()])
def test_other_pools_and_transports_stay(pool):
    """One-tier rows are where upstream says; Mooncake gets no kinds."""
    kinds = None if isinstance(pool, Pool) else ["VRAM"]
    kv_args = SimpleNamespace(**({"kv_data_mem_kinds": kinds} if kinds else {}))
    transfer.name_memory(None, kv_args, pool)
    assert getattr(kv_args, "kv_data_mem_kinds", None) == kinds
