"""torch.cuda, as SGLang's argument resolution for DeepSeek sparse attention calls it."""

from ess_patches.contract import Hook

HOOKS = (
    Hook(
        target="torch.cuda.get_device_capability",
        kind="around",
        signature="(device=None)",
        body="sglang_ess.platforms.cpu_hooks:device_capability",
        reason="arg_groups/model_hook.py and overrides.py ask it for any DSA model that is "
        "not on NPU or XPU, and it raises where there is no CUDA.",
        when="cpu",
        test="tests/serving/test_parity.py",
    ),
)
