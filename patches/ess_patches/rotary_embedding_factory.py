"""sglang.srt.layers.rotary_embedding.factory: rope on the CPU."""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="sglang.srt.layers.rotary_embedding.factory.get_rope_cpu",
        kind="around",
        signature="(head_size, rotary_dim, max_position, base, is_neox_style=True, "
        "rope_scaling=None, dtype=None, partial_rotary_factor=1.0, device=None)",
        body="sglang_ess.platforms.cpu_hooks:rope_without_scaling",
        reason="Upstream asserts a deepseek_yarn scaling on the CPU; GLM-5 has none.",
        when="cpu",
        test="tests/serving/test_parity.py",
    ),
)
