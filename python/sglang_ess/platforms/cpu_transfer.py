"""What prefill-decode disaggregation needs on a host with no accelerator.

Mooncake's build without CUDA moves host memory over TCP. Three of SGLang's defaults around it
take a CUDA device for granted.
"""

import os


def use_host_transport() -> None:
    """Before a worker sets up its transfer engine. Effect: environment, Mooncake's sender."""
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_disagg

    try:
        disagg = get_disagg()
    except ValueError:  # no server's process: its options are not published
        return
    if disagg.disaggregation_mode == "null":
        return
    # Sends a cached prefix before the rest is computed, behind a CUDA event.
    envs.SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX.set(False)
    if disagg.disaggregation_transfer_backend != "mooncake":
        return
    os.environ.setdefault("MOONCAKE_PROTOCOL", "tcp")
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    # Page indices in pinned memory and an event to wait for: they are on the host already.
    MooncakeKVSender.supports_host_tensor_indices = False
