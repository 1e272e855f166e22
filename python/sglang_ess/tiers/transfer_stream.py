"""The CUDA stream that orders everything that touches the tiers."""

from __future__ import annotations

from collections import deque
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
        self._kept: deque[torch.Tensor] = deque()  # what a capture's launches on this stream read
        self._released = 0  # tensors that have left _kept

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

    def event(self) -> Point | None:
        """Record a point of this stream to wait for; call it inside on_transfer_stream()."""
        if self._stream is None:
            return None
        event = Point()  # type: ignore[no-untyped-call]  # of torch.cuda.Event
        event.record(self._stream)
        event.owner, event.kept = self, self._released + len(self._kept)
        return event

    def record_stream(self, *tensors: torch.Tensor) -> None:
        """Keep the tensors' memory from being reused before this stream's present work is done.

        PyTorch gives memory that was announced by Tensor.record_stream back only when no stream
        is captured any more, so that every layer's lists would have memory of their own in a
        captured step. In a capture the tensors are kept alive here instead, until the main stream
        has waited for a later point: what it launches then is behind their uses.
        """
        if self._stream is None:
            return
        if torch.cuda.is_current_stream_capturing():
            self._kept += tensors
            return
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def join(self) -> None:
        """Make the current stream wait for all work of this one; a graph capture must end so."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            self.release(self._released + len(self._kept))

    def release(self, number: int) -> None:
        """Let go of the first `number` tensors that were ever kept."""
        while self._released < number:
            self._kept.popleft()
            self._released += 1


class Point(torch.cuda.Event):
    """A point of the transfer stream `owner`.

    kept: how many tensors record_stream() had kept by then
    """

    owner: TransferStream
    kept: int


def wait(event: torch.cuda.Event | None) -> None:
    """Make the current stream, the main one, wait for this point of the transfer stream."""
    if event is None:
        return
    torch.cuda.current_stream().wait_event(event)
    if isinstance(event, Point):
        event.owner.release(event.kept)
