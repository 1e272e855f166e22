"""sglang.srt.mem_cache.kv_cache_configurator: how many slots the device's memory gives."""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget",
        kind="around",
        signature="(self, budget_bytes, *, cap_tokens=None)",
        body="sglang_ess.capacity:config_from_budget",
        reason="Upstream divides device bytes by what a token costs with its latent rows on the "
        "device; under ESS they buy index keys and hot rows, and host memory is a second limit. "
        "One-tier on the CPU platform takes --ess-device-gib for its device memory.",
        when="cpu",
        test="tests/test_capacity.py",
    ),
)
