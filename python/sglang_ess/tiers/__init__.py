"""The two tiers of latent rows: HostTier has every slot's row, hot tiers have copies of some.

contract.py lists what a hot tier promises.
"""

from sglang_ess.tiers.contract import RowCorruption
from sglang_ess.tiers.host_memory import free_host_bytes
from sglang_ess.tiers.host_tier import HostTier
from sglang_ess.tiers.hot_cache import HotCache, Plan, PlanBuffers
from sglang_ess.tiers.hot_groups import HotGroups
from sglang_ess.tiers.tier_group import TierGroup

__all__ = [
    "HostTier", "HotCache", "HotGroups", "Plan", "PlanBuffers", "RowCorruption", "TierGroup",
    "free_host_bytes",
]  # fmt: skip
