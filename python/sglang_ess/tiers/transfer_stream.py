"""The CUDA stream that orders everything that touches the tiers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from sglang_ess.tiers.contract import Device


class TransferStream:
    """The transfer stream. Without a GPU there is one stream, and nothing waits."""

    def __init__(self, device: Device):
        self._stream: torch.cuda.Stream | None = None
        if torch.device(device).type == "cuda":
            # Of high priority: torch has a pool of its own for these, so none of SGLang's streams
            # is the same one, and the tiers' small kernels go ahead of queued matrix kernels.
            self._stream = torch.cuda.Stream(device, priority=-1)
        self._steps: torch.cuda.Stream | None = None  # the main stream of forward passes

    def begin_step(self) -> None:
        """Note that a forward pass, or the replay of a graph, begins on the current stream."""
        if self._stream is not None:
            self._steps = torch.cuda.current_stream()

    def on_transfer_stream(self) -> AbstractContextManager[object]:
        """Run what is launched inside on this stream, after the current stream's work.

        If another stream than the forward pass's enters it (the scheduler's, to free slots), the
        work also runs after the forward pass under way. A replayed graph touches the tiers without
        using this stream.
        """
        if self._stream is None:
            return nullcontext()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        if self._steps not in (None, current) and not torch.cuda.is_current_stream_capturing():
            self._stream.wait_stream(self._steps)
        return torch.cuda.stream(self._stream)

    def event(self) -> torch.cuda.Event | None:
        """Record a point of this stream to wait for; call it inside on_transfer_stream()."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def record_stream(self, *tensors: torch.Tensor) -> None:
        """Keep the tensors' memory from being reused before this stream's present work is done."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    def join(self) -> None:
        """Make the current stream wait for all work of this one; a graph capture must end so."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def wait(event: torch.cuda.Event | None) -> None:
    """Make the current stream wait for this point of the transfer stream."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
