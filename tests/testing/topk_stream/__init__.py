"""--ess-topk-stream. A small table of the profile, for all of these tests."""

PROFILE = "deepseek-v3.2"
TOPK, CONTEXTS, STEPS = 32, (160, 512), 12
PAGE = 64
UNSAFE = "--ess-unsafe"


def stream_flags(text):
    """The flags of a server that plays it."""
    return ("--ess-topk-stream", text, UNSAFE)
