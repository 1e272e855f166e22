"""The CUDA stream on which everything that touches the tiers runs, in order."""

from __future__ import annotations

from contextlib import nullcontext

import torch


class TransferStream:
    """The stream of the tiers; without a GPU there is one stream and nothing to wait for."""

    def __init__(self, device):
        self._stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
        self._steps: torch.cuda.Stream | None = None  # the main stream of forward passes

    def begin_step(self) -> None:
        """A forward pass begins on the current stream, perhaps the replay of a graph."""
        if self._stream is not None:
            self._steps = torch.cuda.current_stream()

    def on_transfer_stream(self):
        """Context: what is launched in it runs here, after the main stream's work so far.

        And after the step under way, where another stream forks (the scheduler's, which frees
        slots): a replayed graph touches the tiers without this stream knowing of it.
        """
        if self._stream is None:
            return nullcontext()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        if self._steps not in (None, current) and not torch.cuda.is_current_stream_capturing():
            self._stream.wait_stream(self._steps)
        return torch.cuda.stream(self._stream)

    def event(self) -> torch.cuda.Event | None:
        """A point in this stream to join at; call it inside on_transfer_stream()."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def record_stream(self, *tensors: torch.Tensor) -> None:
        """The allocator may give their memory away only after what is in this stream now."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    def join(self) -> None:
        """The main stream goes on after all that is here: a capture must end like this."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def wait(event: torch.cuda.Event | None) -> None:
    """The main stream goes on after this point of the transfer stream."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
