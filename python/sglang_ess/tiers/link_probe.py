"""How fast scattered host rows reach the device, measured beside a running server."""

from __future__ import annotations

import torch

from ess_kernels.fetch import fetch
from sglang_ess.tiers.throttled_link import PROBE_ROWS, measure
from sglang_ess.tiers.transfer_stream import TransferStream


class LinkProbe:
    """Times the fetch kernel on the transfer stream. Only the first call waits for its result.

    host_rows [slots, ...] of one layer; each call gives the last finished figure and sets off
    another probe, of PROBE_ROWS rows that no serving touches.
    """

    def __init__(self, host_rows: torch.Tensor, device, transfer: TransferStream):
        generator = torch.Generator().manual_seed(0)
        slots = torch.randint(len(host_rows), (PROBE_ROWS,), generator=generator)
        self._host_rows, self._transfer = host_rows, transfer
        self._slots = slots.to(torch.int32).to(device)
        self._places = torch.arange(PROBE_ROWS, dtype=torch.int32, device=device)
        self._count = torch.tensor([PROBE_ROWS], dtype=torch.int32, device=device)
        self._target = torch.empty(
            PROBE_ROWS, *host_rows.shape[1:], dtype=host_rows.dtype, device=device
        )
        self._is_cuda = torch.device(device).type == "cuda"
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._rate: float | None = None

    @property
    def nbytes(self) -> int:
        """Device bytes: link.probe_bytes()."""
        tensors = (self._slots, self._places, self._count, self._target)
        return sum(tensor.nbytes for tensor in tensors)

    def bytes_per_second(self) -> float:
        if not self._is_cuda:
            return measure(self._fetch)
        if self._rate is None:
            self._fetch()  # compiles
            self._time_one()
            self._events[1].synchronize()
        start, end = self._events
        if end.query():
            self._rate = self._target.nbytes / (start.elapsed_time(end) / 1000)
            self._time_one()
        return self._rate

    def _time_one(self) -> None:
        with self._transfer.on_transfer_stream():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._fetch()
            end.record()
        self._events = start, end

    def _fetch(self) -> int:
        """Returns the bytes it moves."""
        fetch(self._host_rows, self._target, self._slots, self._places, self._count)
        return self._target.nbytes
