"""The two tiers of latent rows and the policy between them. No SGLang here.

HostTier holds every slot's row; one HotCache a layer holds copies of the rows in use.
"""

from sglang_ess.tiers.host_tier import HostTier, free_host_bytes
from sglang_ess.tiers.hot_cache import HotCache, Plan, PlanBuffers, RowCorruption

__all__ = ["HostTier", "HotCache", "Plan", "PlanBuffers", "RowCorruption", "free_host_bytes"]
