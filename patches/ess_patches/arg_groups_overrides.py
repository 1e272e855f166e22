"""sglang.srt.arg_groups.overrides: argument resolution for DeepSeek sparse attention."""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="sglang.srt.arg_groups.overrides._dsa_kv_cache_dtype_default",
        kind="around",
        signature="(view)",
        body="sglang_ess.platforms.cpu_hooks:dsa_kv_cache_dtype",
        reason="Upstream forces bfloat16 KV rows before Blackwell; on the CPU they follow "
        "the model, so that a float32 model can be compared exactly.",
        when="cpu",
        test="tests/serving/test_parity.py",
    ),
)
