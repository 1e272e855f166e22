"""SGLang's paged allocator over a two-tier pool.

SGLang asks the allocator whether the next decode step fits, and tells it which slots are owned
by nobody any more. Both questions have a second half under ESS: whether the hot tier can serve
the step, and which hot rows are of no use.
"""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from sglang_ess.mem_cache.pool import EssTokenToKVPool


class RefusingPagedAllocator(PagedTokenToKVPoolAllocator):
    """PagedTokenToKVPoolAllocator that refuses a prompt which leaves no slot for its output."""

    def max_new_tokens_for_memory(self, input_tokens, max_new_tokens, **limits) -> int | None:
        """Upstream's; None, which is refused with status 400, for a prompt that leaves no token.

        Upstream serves such a prompt with nothing, or has it wait for ever.
        """
        fits = super().max_new_tokens_for_memory(input_tokens, max_new_tokens, **limits)
        return fits or (0 if max_new_tokens == 0 else None)


class EssPagedAllocator(RefusingPagedAllocator):
    """RefusingPagedAllocator that keeps the hot tier to slots in use.

    A slot that is freed is not hot any more. So whoever gets it finds it cold, whatever path
    writes its rows: a peer's transfer engine tells nobody when it does (invariant 3).

    is_idle: nobody else holds a slot that an eviction would not free, so that the next request
    needs no room beside its own; set by the scheduler's round in disaggregated decode
    keep_running: requests that the next decode step may have at most, None for any number;
    admission sets it where the hot tier thrashes, and SGLang's own retraction does the rest.
    """

    is_idle = False
    keep_running: int | None = None

    def prealloc_fits(self, tree_cache, full_tokens, swa_tokens, **budgets) -> bool:
        """Upstream's, but alone a request fits.

        Upstream keeps room for 512 tokens more of each request, and so waits for ever, with all
        that queue behind it, for a prompt within that of all the slots.
        """
        fits = super().prealloc_fits(tree_cache, full_tokens, swa_tokens, **budgets)
        alone, self.is_idle = self.is_idle, False  # the next one is not alone
        return fits or alone

    def check_decode_capacity(self, *, num_tokens, tree_cache, requests=None, **kwargs) -> bool:
        """Upstream's, and no more requests than may go on."""
        if self.keep_running is not None and requests is not None:
            if len(requests) > self.keep_running:
                return False
            self.keep_running = None
        return super().check_decode_capacity(
            num_tokens=num_tokens, tree_cache=tree_cache, requests=requests, **kwargs
        )

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        """Every way of freeing ends here, in whole pages."""
        super()._release_page_ids(*page_ids)
        pool = self.get_kvcache()
        if isinstance(pool, EssTokenToKVPool):
            pages = torch.cat(page_ids)
            offsets = torch.arange(self.page_size, device=pages.device)
            pool.invalidate_slots(pages[:, None] * self.page_size + offsets)

    def clear(self) -> None:
        super().clear()
        pool = self.get_kvcache()
        if isinstance(pool, EssTokenToKVPool):
            pool.empty_hot_tier()
