"""host_rows[layer][slots[i]] = rows[i] once per decode step for all layers: SparseServe's FlashD2H.

The new rows of a step gather in a device stage, go to pinned memory by one copy on a side stream,
and a CPU thread scatters them to the host tier: no SMs, and the next step computes meanwhile.

Bytes moved per step: rows x layers x row bytes over PCIe, as many read and written by the thread:
160 rows x 61 layers x 656 B = 6.4 MB, 0.12 ms at 55 GB/s.

The rule this lays on the caller: a row may not be fetched before its step is saved (invariant 1 of
the design: a row is in the host tier before its hot copy may be evicted). `saved` says up to which
step that holds; keep younger rows hot, or wait(step). scatter_rows into pinned host memory is the
direct-store variant: it takes SMs and has no such rule, because a later fetch by the same device
comes after its posted stores in stream order.

Source: SparseServe section 3 (FlashD2H: one copy to staging, then CPU threads; > 23 GB/s).
"""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import torch

from ess_kernels.checks import check_tensor, words


@numba.njit(cache=True, nogil=True)
def _scatter_words(staged, layer, num_layers, slots, host):
    """host[slots[i]] = staged[i * num_layers + layer] where slots[i] >= 0; rows of int64 words."""
    for i in range(slots.shape[0]):
        slot = slots[i]
        if slot >= 0:
            row = i * num_layers + layer
            for w in range(host.shape[1]):
                host[slot, w] = staged[row, w]


def save_reference(
    host_rows: Sequence[torch.Tensor], slots: torch.Tensor, rows: Sequence[torch.Tensor]
) -> None:
    """host_rows[layer][slots[i]] = rows[layer][i] where slots[i] >= 0, in torch."""
    kept = slots >= 0
    for host, new in zip(host_rows, rows, strict=True):
        host[slots[kept].to(host.device)] = new[kept].to(host.device)


@dataclass
class _Stage:
    """The memory of one step in flight: a header with its slots, then its rows, token first.

    Token first ([max_rows][layers]), so that what a step of any size has to copy is one prefix.
    """

    device: torch.Tensor  # [header_rows + max_rows * layers, row bytes] uint8
    host: torch.Tensor  # the same, pinned
    done: "torch.cuda.Event | None"  # the copy has ended; None where the device is the CPU
    num_rows: int = 0


class SaveRing:
    """Saves the new rows of decode steps, in order, at most `depth` steps at once.

    A step is begun, filled, submitted, saved. Between begin() and submit() its rows are written on
    the current stream; submit() returns its number, counted from 1; when `saved` reaches the number
    the step's rows are in the host tier. One thread calls begin, rows, submit; any may wait.

    In a CUDA graph: begin() and submit() stay outside it, rows are written inside it through
    addresses that never change: scatter_rows(new, ring.targets[:n], ring.ring_rows(layer)), where
    `targets` is refilled by begin().
    """

    def __init__(
        self,
        host_rows: Sequence[torch.Tensor],
        max_rows: int,
        depth: int,
        device: torch.device | str = "cuda",
    ):
        """host_rows  per layer [slots, ...], one row format, host memory (need not be pinned)
        max_rows   most rows of a step, padding included
        depth      steps in flight before begin() blocks; 2 let saving overlap the next step
        device     where rows are produced; "cpu" for tests

        Allocates depth x (max_rows x (layers x row bytes + 8)) bytes on the device and in pinned
        memory. Raises: ValueError for no layers, mixed row formats, a size below 1.
        """
        for name, size in (("max_rows", max_rows), ("depth", depth), ("layers", len(host_rows))):
            if size < 1:
                raise ValueError(f"{name} must be at least 1: got {size}.")
        formats = {(rows.dtype, rows.shape[1:]) for rows in host_rows}
        if len(formats) > 1:
            raise ValueError(f"all layers must have one row format: got {formats}.")
        self._host_words = [words(rows, "host_rows").numpy() for rows in host_rows]
        self._row_dtype, self._row_shape = formats.pop()
        self._row_bytes = self._host_words[0].shape[1] * 8
        self._num_slots = min(len(rows) for rows in host_rows)
        self._num_layers, self._max_rows = len(host_rows), max_rows
        self._device = torch.device(device)
        self._allocate(depth)
        self._save(self._stages[0])  # of no rows yet: compiles the scatter before the first step
        self._begun: _Stage | None = None
        self._submitted = self._saved = 0
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._to_save: queue.SimpleQueue[_Stage | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._save_all, name="ess-save", daemon=True)
        self._worker.start()

    def _allocate(self, depth: int) -> None:
        on_cuda = self._device.type == "cuda"
        self._header_rows = -(-self._max_rows * 8 // self._row_bytes)
        stage_rows = self._header_rows + self._max_rows * self._num_layers
        shape = (depth, stage_rows, self._row_bytes)
        self._ring = torch.empty(shape, dtype=torch.uint8, device=self._device)
        mirror = torch.empty(shape, dtype=torch.uint8, pin_memory=on_cuda)
        self._side = torch.cuda.Stream(self._device) if on_cuda else None
        self._stages = [
            _Stage(device, host, torch.cuda.Event(blocking=True) if on_cuda else None)
            for device, host in zip(self._ring, mirror, strict=True)
        ]
        row = torch.arange(self._max_rows, device=self._device) * self._num_layers
        first = torch.arange(depth, device=self._device)[:, None] * stage_rows
        self._targets_of_stage = first + self._header_rows + row
        self.targets = torch.empty_like(row)  # [max_rows] int64: row i's place in ring_rows()

    @property
    def submitted(self) -> int:
        """Number of the last step that was submitted, 0 before the first."""
        return self._submitted

    @property
    def saved(self) -> int:
        """Number of the last step of which every row is in the host tier."""
        return self._saved

    def begin(self, slots: torch.Tensor) -> None:
        """Start a step; blocks while `depth` steps are in flight (back-pressure).

        slots  [n] int64, on the device, n <= max_rows; -1: padding, not saved; of a slot given
               twice the later row stays

        Raises: ValueError for wrong slots or a step already begun; RuntimeError if a save failed.
        """
        check_tensor("slots", slots, torch.int64, (None,), self._ring.device)
        if len(slots) > self._max_rows:
            raise ValueError(
                f"the rows of a step must fit a stage: got {len(slots)}, limit {self._max_rows}."
            )
        if self._begun is not None:
            raise ValueError("a step must be submitted before the next begins: call submit().")
        self._check_running()
        self._wait_until(lambda: self._submitted - self._saved < len(self._stages))
        index = self._submitted % len(self._stages)
        stage = self._stages[index]
        stage.num_rows = len(slots)
        self._slots_of(stage.device, stage).copy_(slots)
        self.targets.copy_(self._targets_of_stage[index])
        self._begun = stage

    def rows(self, layer: int, n: int) -> torch.Tensor:
        """Where the begun step's first n rows of a layer go: [n, ...], rows a stride apart.

        Raises: ValueError if no step is begun, or it has fewer rows.
        """
        if self._begun is None or n > self._begun.num_rows:
            begun = self._begun and self._begun.num_rows
            raise ValueError(f"rows must be of the step begun: got n={n}, its rows {begun}.")
        staged = self._rows_of(self._begun.device)[:n, layer]
        return staged.view(self._row_dtype).view(n, *self._row_shape)

    def ring_rows(self, layer: int) -> torch.Tensor:
        """The whole ring as rows [*, ...], in which targets[i] is row i of `layer` in this step."""
        flat = self._ring.view(-1, self._row_bytes)[layer:]
        return flat.view(self._row_dtype).view(len(flat), *self._row_shape)

    def submit(self) -> int:
        """Hand over the step begun: one copy after the current stream's work, then the thread.

        Returns the step's number. Does not block. Raises: ValueError if no step is begun;
        RuntimeError if a save failed.
        """
        self._check_running()
        if self._begun is None:
            raise ValueError("a step must be begun before it is submitted: call begin(slots).")
        stage, self._begun = self._begun, None
        used = self._header_rows + stage.num_rows * self._num_layers
        if self._side is None:
            stage.host[:used].copy_(stage.device[:used])
        else:
            self._side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._side):
                stage.host[:used].copy_(stage.device[:used], non_blocking=True)
                stage.done.record(self._side)
        self._submitted += 1
        self._to_save.put(stage)
        return self._submitted

    def wait(self, step: int) -> None:
        """Block until every step up to `step` is saved.

        Raises: ValueError for a step not submitted; RuntimeError if a save failed.
        """
        if step > self._submitted:
            raise ValueError(f"step must be submitted: got {step}, limit {self._submitted}.")
        self._wait_until(lambda: self._saved >= step)

    def drain(self) -> None:
        """Block until every submitted step is saved. Raises: RuntimeError if a save failed."""
        self.wait(self._submitted)

    def close(self) -> None:
        """Save what was submitted and end the thread. Raises: RuntimeError if a save failed."""
        self._to_save.put(None)
        self._worker.join()
        self._raise_failure()

    def _wait_until(self, holds) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or holds())
        self._raise_failure()

    def _check_running(self) -> None:
        self._raise_failure()
        if not self._worker.is_alive():
            raise ValueError("a ring must be open: it was closed.")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"step {self._saved + 1} could not be saved to the host tier: {self._failure}"
            ) from self._failure

    def _save_all(self) -> None:
        while (stage := self._to_save.get()) is not None:
            try:
                self._save(stage)
            except Exception as failure:
                with self._changed:
                    self._failure = failure
                    self._changed.notify_all()
                return
            with self._changed:
                self._saved += 1
                self._changed.notify_all()

    def _save(self, stage: _Stage) -> None:
        if stage.done is not None:
            stage.done.synchronize()
        slots = self._slots_of(stage.host, stage).numpy()
        if slots.max(initial=-1) >= self._num_slots:
            limit = self._num_slots - 1
            raise ValueError(f"a slot must be in the host tier: got {slots.max()}, limit {limit}.")
        staged = stage.host[self._header_rows :].view(torch.int64).numpy()
        for layer, host in enumerate(self._host_words):
            _scatter_words(staged, layer, self._num_layers, slots, host)

    def _slots_of(self, memory: torch.Tensor, stage: _Stage) -> torch.Tensor:
        return memory[: self._header_rows].view(-1).view(torch.int64)[: stage.num_rows]

    def _rows_of(self, memory: torch.Tensor) -> torch.Tensor:
        """A stage's rows: [max_rows, layers, row bytes] uint8."""
        rows = memory[self._header_rows :]
        return rows.view(self._max_rows, self._num_layers, self._row_bytes)
