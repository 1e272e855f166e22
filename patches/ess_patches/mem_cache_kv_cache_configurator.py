"""sglang.srt.mem_cache.kv_cache_configurator: how many slots the device's memory gives."""

from ess_patches.contract import Hook

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"

_FROM_BUDGET = {
    "target": f"{_CONFIGURATOR}.config_from_budget",
    "kind": "around",
    "signature": "(self, budget_bytes, *, cap_tokens=None)",
    "body": "sglang_ess.mem_cache.capacity:config_from_budget",
    "reason": "Upstream divides device bytes by what a token costs with its latent rows on the "
    "device; under ESS they buy index keys and hot rows, and host memory is a second limit. "
    "One-tier on the CPU platform takes --ess-device-gib for its device memory.",
    "test": "tests/mem_cache/test_capacity.py",
}

HOOKS = (
    Hook(**_FROM_BUDGET, when="cpu"),
    Hook(**_FROM_BUDGET, when="cuda"),
    Hook(
        target=f"{_CONFIGURATOR}._resolve_kv_pool_class",
        kind="after",
        signature="(self, *, kind, default)",
        body="sglang_ess.platforms.cuda:kv_pool_class",
        reason="Upstream asks the platform for a pool class, but CUDA's own platform cannot be "
        "told to name another.",
        when="cuda",
        test="tests/platforms/test_cuda.py",
    ),
)
