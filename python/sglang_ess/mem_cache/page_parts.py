"""The bytes of a page: which rows of which buffers one object of the store holds.

An object has all parts of a page of slots, and none is restored without the others: the latent
rows of every layer, the index keys of the layers that have some, and both of a draft model's
layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class PagePart(NamedTuple):
    """A buffer of the pool, page by page.

    name: for messages and the store's identity, for example "latents 3"
    pages: [pages, bytes of a page] uint8, the buffer itself under another shape
    is_shared: rows of a host tier that all ranks of a node have in common: its writer loads them
    """

    name: str
    pages: torch.Tensor
    is_shared: bool


class PageParts:
    """The parts of a DSA pool's pages: latent rows by layer, then index keys, then a draft's.

    pool: a DSATokenToKVPool; drafts: the pools of a draft model's layers with the same slots
    Layers without index keys of their own have no part for them.
    Raises: ValueError for buffers whose pages are not contiguous.
    """

    def __init__(self, pool: Any, drafts: Sequence[Any] = ()):
        is_shared = hasattr(pool, "host_tier")
        self.parts = [*_parts_of(pool, "", is_shared)]
        for number, draft in enumerate(drafts):
            self.parts += _parts_of(draft, f"draft {number} ", False)
        self.on_host = all(part.pages.device.type == "cpu" for part in self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part of a page."""
        return [part.pages.shape[1] for part in self.parts]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: of one object without its header."""
        return sum(self.sizes)

    @property
    def shared(self) -> list[int]:
        """The numbers of the parts that all ranks of a node have in common."""
        return [i for i, part in enumerate(self.parts) if part.is_shared]

    def buffers(self, page: int, numbers: Sequence[int]) -> list[memoryview]:
        """The bytes of a page's parts, on the host: the pool's own memory."""
        return [self.parts[i].pages[page].numpy().data for i in numbers]


def _parts_of(pool: Any, prefix: str, is_shared: bool) -> list[PagePart]:
    latents = [
        PagePart(f"{prefix}latents {layer}", _paged(rows, pool.page_size), is_shared)
        for layer, rows in enumerate(pool.kv_buffer)
    ]
    keys = [
        PagePart(f"{prefix}index keys {layer}", _paged(rows, 1), False)
        for layer, rows in enumerate(pool.index_k_with_scale_buffer)
        if len(rows)  # a layer that reads another's top-k has none
    ]
    return latents + keys


def _paged(rows: torch.Tensor, page_rows: int) -> torch.Tensor:
    """rows [n, ...] as [n / page_rows, bytes] uint8, the same memory."""
    if not rows.is_contiguous():
        raise ValueError(f"rows of a page must be contiguous: got strides {rows.stride()}.")
    return rows.view(torch.uint8).view(len(rows) // page_rows, -1)
