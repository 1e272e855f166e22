"""SGLang's paged allocator over a two-tier pool.

SGLang asks the allocator whether the next decode step fits, and returns slots to it. Under ESS the
allocator also asks whether the hot tier can serve the step, and drops the hot rows of freed slots.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from sglang_ess.mem_cache.pool import EssTokenToKVPool


class RefusingPagedAllocator(PagedTokenToKVPoolAllocator):
    """PagedTokenToKVPoolAllocator that refuses a prompt which leaves no slot for its output."""

    def max_new_tokens_for_memory(
        self, input_tokens, max_new_tokens, *, token_capacity, **limits
    ) -> int | None:
        """Limit the output to the slots that the prompt leaves.

        Returns upstream's number, or None for a prompt that leaves no slot; SGLang refuses such a
        request with status 400. Upstream returns an empty output for it, or lets it wait for ever.
        Where drafts are verified, each step has slots beyond the request's end, and upstream leaves
        a page and a token for them. Where that is too little, the output is shorter here, and
        upstream would abort the request near its end.
        """
        beyond = max(0, get_alloc_reserve_per_decode() - self.page_size - 1)
        fits = super().max_new_tokens_for_memory(
            input_tokens, max_new_tokens, token_capacity=token_capacity - beyond, **limits
        )
        return fits or (0 if max_new_tokens == 0 else None)


class EssPagedAllocator(RefusingPagedAllocator):
    """RefusingPagedAllocator that drops the hot rows of freed slots.

    The next owner of a slot therefore finds it cold, whatever path writes its rows. A peer's
    transfer engine, for one, does not report its writes.

    is_idle: no other request holds slots, so the next one needs only its own. The scheduler's
        round in disaggregated decode sets it.
    keep_running: how many requests the next decode step may have; None for any number. Admission
        sets it where the hot tier thrashes, and SGLang then retracts the others.
    """

    is_idle = False
    keep_running: int | None = None

    def prealloc_fits(self, tree_cache, full_tokens, swa_tokens, **budgets) -> bool:
        """Whether a request's slots may be allocated now. A request that is alone always fits.

        Upstream reserves 512 further tokens for each request. A prompt that leaves fewer slots
        than that would wait for ever, and so would every request behind it.
        """
        fits = super().prealloc_fits(tree_cache, full_tokens, swa_tokens, **budgets)
        alone, self.is_idle = self.is_idle, False  # the next request is not alone any more
        return fits or alone

    def check_decode_capacity(self, *, num_tokens, tree_cache, requests=None, **kwargs) -> bool:
        """Whether the next decode step fits: into the slots, and into keep_running requests."""
        if self.keep_running is not None and requests is not None:
            if len(requests) > self.keep_running:
                return False
            self.keep_running = None
        return super().check_decode_capacity(
            num_tokens=num_tokens, tree_cache=tree_cache, requests=requests, **kwargs
        )

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        """Drop the pages' hot rows. Every way of freeing slots ends here, in whole pages."""
        super()._release_page_ids(*page_ids)
        pool = sparse_pool(self)
        if isinstance(pool, EssTokenToKVPool):
            pages = torch.cat(page_ids)
            offsets = torch.arange(self.page_size, device=pages.device)
            pool.invalidate_slots(pages[:, None] * self.page_size + offsets)

    def clear(self) -> None:
        super().clear()
        pool = sparse_pool(self)
        if isinstance(pool, EssTokenToKVPool):
            pool.empty_hot_tier()


def sparse_pool(allocator: Any) -> Any:
    """The pool of an allocator's slots; of a model with other layers, too, its sparse layers'.

    SGLang wraps that one then (HybridLinearKVPool, SWAKVPool).
    """
    pool = allocator.get_kvcache()
    return getattr(pool, "full_kv_pool", pool)
