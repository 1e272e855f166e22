"""Measures how fast scattered host rows reach the device while the server runs."""

from __future__ import annotations

import torch

from ess_kernels.plan_fetch import fetch
from sglang_ess.tiers.contract import Device
from sglang_ess.tiers.throttled_link import PROBE_ROWS, measure
from sglang_ess.tiers.transfer_stream import TransferStream


class LinkProbe:
    """Times the fetch kernel on the transfer stream.

    host_rows: [slots, ...] of one layer
    A probe copies PROBE_ROWS rows into a buffer of its own. Each call of bytes_per_second returns
    the last finished probe and starts another; only the first call waits.
    """

    def __init__(self, host_rows: torch.Tensor, device: Device, transfer: TransferStream):
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
        """Device bytes, equal to throttled_link.probe_bytes."""
        tensors = (self._slots, self._places, self._count, self._target)
        return sum(tensor.nbytes for tensor in tensors)

    def bytes_per_second(self) -> float:
        """Return the rate of the last finished probe, and start another."""
        if not self._is_cuda:
            return measure(self._fetch)
        if self._events is None:
            self._fetch()  # compiles
            self._events = self._time_one()
            self._events[1].synchronize()
        start, end = self._events
        if self._rate is None or end.query():
            self._rate = self._target.nbytes / (start.elapsed_time(end) / 1000)
            self._events = self._time_one()
        return self._rate

    def _time_one(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Start a probe. Returns its first and last event."""
        with self._transfer.on_transfer_stream():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._fetch()
            end.record()
        return start, end

    def _fetch(self) -> int:
        """Copy the probe's rows. Returns their bytes."""
        fetch(self._host_rows, self._target, self._slots, self._places, self._count)
        return self._target.nbytes
