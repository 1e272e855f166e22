"""Two-tier pools that break one invariant of tiers/contract.py, in an engine's process."""

import torch


def host_row_forgotten() -> None:
    """Host first: a decode step's row goes to the hot tier only; evicted, it is lost."""
    from sglang_ess.mem_cache.pool_cpu import CpuEssTokenToKVPool

    write_step = CpuEssTokenToKVPool.write_step

    def forgetful(pool, layer, loc, *args):
        write_step(pool, layer, loc, *args)
        pool.kv_buffer[layer.layer_id - pool.start_layer][loc] = 0

    CpuEssTokenToKVPool.write_step = forgetful


def stale_hot_row() -> None:
    """No stale copy: neither a write of the slot nor its being freed touches its hot row."""
    from sglang_ess.mem_cache.pool_cpu import CpuEssTokenToKVPool
    from sglang_ess.tiers import HotCache

    CpuEssTokenToKVPool.invalidate_slots = lambda *_: None
    CpuEssTokenToKVPool._written = lambda *_: None
    CpuEssTokenToKVPool.install = lambda *_: None
    HotCache.install = HotCache.refill = lambda *_: None


def one_row_for_two_slots() -> None:
    """One plan, one row each: a query's second slot also gets the first one's hot row."""
    from sglang_ess.tiers import HotCache

    plan = HotCache.plan

    def doubled(cache, topk, *args, **kwargs):
        found = plan(cache, topk, *args, **kwargs)
        rows = found.rows
        if rows.shape[1] > 1:
            rows[:, 1] = torch.where(rows[:, 1] >= 0, rows[:, 0], rows[:, 1])
        return found

    HotCache.plan = doubled


def no_fetch() -> None:
    """Missed rows are never copied: whatever was in the hot row is read."""
    from sglang_ess.tiers import HotCache

    HotCache.fetch = lambda *_: None
