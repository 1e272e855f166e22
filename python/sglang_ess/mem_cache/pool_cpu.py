"""The two-tier pool on the CPU platform."""

from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool
from sglang_ess.mem_cache.pool import EssTokenToKVPool


class CpuEssTokenToKVPool(EssTokenToKVPool, CpuDsaTokenToKVPool):
    """Two tiers on the CPU platform: both are this machine's memory, the bytes are counted."""
