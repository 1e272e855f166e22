"""Moves pages between a store and the pool: by the pool's own memory, or over pinned buffers."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from sglang_ess.mem_cache.page_parts import PageParts
from sglang_ess.mem_cache.store_identity import identity
from sglang_ess.store.page_store import PageStore, StoreDamage, StoreMiss

WORKERS = 8  # threads that read and write: what an NVMe disk needs in flight, and few cores
REASONS = ((StoreMiss, "missing"), (StoreDamage, "damaged"))


def reason(error: BaseException) -> str:
    """What the metrics call a failure."""
    return next((name for kind, name in REASONS if isinstance(error, kind)), "error")


class HostTransfer:
    """All parts are host memory: the store reads into it and writes from it."""

    def __init__(self, store: PageStore, parts: PageParts):
        self.store, self.parts = store, parts
        self._all = range(len(parts))
        # Not the store's own queue, which refuses what it cannot take at once.
        self._writers = ThreadPoolExecutor(WORKERS // 2, "ess-write")

    def read(self, key: str, page: int, numbers: Sequence[int]) -> Future:
        """Fill these parts of a page. The future raises StoreMiss, StoreDamage or OSError."""
        return self.store.submit_read(key, numbers, self.parts.buffers(page, numbers))

    def write(self, key: str, page: int) -> Future:
        """Save a page. The future says whether the store has taken it."""
        return self._writers.submit(self.store.write, key, self.parts.buffers(page, self._all))

    def close(self) -> None:
        self._writers.shutdown()
        self.store.close()


class StagedTransfer(HostTransfer):
    """Some parts are on the device: index keys and draft rows go over pinned buffers.

    Latent rows of a host tier, 94 % of the bytes of a page and more, are read and written in place.
    """

    def __init__(self, store: PageStore, parts: PageParts):
        super().__init__(store, parts)
        self._staged = [i for i, part in enumerate(parts.parts) if part.pages.is_cuda]
        self._device = parts.parts[self._staged[0]].pages.device
        self._threads = ThreadPoolExecutor(WORKERS, "ess-stage")
        self._buffers: queue.Queue[dict[int, torch.Tensor]] = queue.Queue()
        for _ in range(WORKERS):
            self._buffers.put(
                {i: torch.empty(parts.sizes[i], dtype=torch.uint8).pin_memory()
                 for i in self._staged}
            )  # fmt: skip
        self._streams = {copy: torch.cuda.Stream(self._device) for copy in ("to device", "to host")}

    def read(self, key: str, page: int, numbers: Sequence[int]) -> Future:
        return self._threads.submit(self._read, key, page, numbers)

    def write(self, key: str, page: int) -> Future:
        return self._threads.submit(self._write, key, page)

    def _read(self, key: str, page: int, numbers: Sequence[int]) -> None:
        staging = self._buffers.get()
        try:
            self.store.read(key, numbers, self._views(page, numbers, staging))
            with torch.cuda.stream(self._streams["to device"]) as stream:
                for i in set(numbers).intersection(self._staged):
                    self.parts.parts[i].pages[page].copy_(staging[i], non_blocking=True)
            stream.synchronize()
        finally:
            self._buffers.put(staging)

    def _write(self, key: str, page: int) -> bool:
        staging = self._buffers.get()
        try:
            with torch.cuda.stream(self._streams["to host"]) as stream:
                for i in self._staged:
                    staging[i].copy_(self.parts.parts[i].pages[page], non_blocking=True)
            stream.synchronize()
            return self.store.write(key, self._views(page, self._all, staging))
        finally:
            self._buffers.put(staging)

    def _views(
        self, page: int, numbers: Sequence[int], staging: dict[int, torch.Tensor]
    ) -> list[memoryview]:
        return [
            (staging[i] if i in staging else self.parts.parts[i].pages[page]).numpy().data
            for i in numbers
        ]

    def close(self) -> None:
        self._threads.shutdown()
        super().close()


def open_transfer(
    options: dict[str, Any], server_args: Any, parts: PageParts, pool: Any
) -> HostTransfer:
    """Open the store of this server's model.

    options: "path" of the store, "limit_bytes" of its size
    Raises: Refusal for a model whose weights are not at hand; whatever PageStore raises for a
    directory that it cannot take.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of

    model = model_config_of(server_args)
    store = PageStore(
        Path(options["path"]),
        int(options["limit_bytes"]),
        identity(model, server_args, parts, pool.start_layer),
        parts.sizes,
        workers=WORKERS,
    )
    return HostTransfer(store, parts) if parts.on_host else StagedTransfer(store, parts)
