"""Prefill-decode disaggregation on a host without an accelerator.

Mooncake's build without CUDA moves host memory over TCP. Three of SGLang's defaults for it assume a
CUDA device.
"""

import os


def use_host_transport() -> None:
    """Change the three defaults. Call before a worker sets up its transfer engine.

    Effect: environment variables, and an attribute of Mooncake's sender.
    """
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_disagg

    try:
        disagg = get_disagg()
    except ValueError:  # not a server's process: no options are published
        return
    if disagg.disaggregation_mode == "null":
        return
    # SGLang would send a cached prefix early, once a CUDA event has passed.
    envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.set(False)
    if disagg.disaggregation_transfer_backend != "mooncake":
        return
    os.environ.setdefault("MOONCAKE_PROTOCOL", "tcp")
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    # SGLang would copy page indices to pinned memory and wait for an event. They are on the host.
    MooncakeKVSender.supports_host_tensor_indices = False
