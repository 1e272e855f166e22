"""--ess-topk-stream. A small table of the profile, for all of these tests."""

PROFILE = "deepseek-v3.2"
TOPK, CONTEXTS, STEPS = 32, (160, 512), 12
PAGE = 64
UNSAFE = "--ess-unsafe"


def stream_flags(text):
    """The flags of a server that plays it."""
    return ("--ess-topk-stream", text, UNSAFE)


def register_hooks():
    """Register the stream's hooks in an engine that is forked from a process without the switch.

    sglang_ess.plugin does it in a process that starts with the switch.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    from ess_patches import contract, topk_stream

    contract.register(topk_stream.HOOKS, "cpu")
    HookRegistry.apply_hooks()
