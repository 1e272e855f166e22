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


def wrong_row_ahead() -> None:
    """Rows fetched ahead are those of the neighbouring slots."""
    from sglang_ess.tiers.early_rows import EarlyRows

    fetch = EarlyRows.fetch

    def shifted(early, *args):
        slots, rows = fetch(early, *args)
        return slots + 1, rows

    EarlyRows.fetch = shifted


def rejected_row_stays_hot() -> None:
    """A decode step's row is refreshed only where its slot is not hot: a rejected draft's is."""
    from sglang_ess.tiers import HotCache

    install = HotCache.install

    def without_refresh(cache, slots, rows, *args):
        cold = cache.slot_row[slots.numpy()] < 0
        values = [rows] if not isinstance(rows, list) else rows
        return install(cache, slots[cold], [value[cold] for value in values], *args)

    HotCache.install = without_refresh


def drafts_write_the_targets_rows() -> None:
    """The draft layer writes its rows where the target's first layer has its own."""
    from sglang_ess.cpu.dsa_pool import CpuDsaTokenToKVPool
    from sglang_ess.mem_cache.pool_cpu import CpuEssTokenToKVPool

    targets, make, write = [], CpuEssTokenToKVPool._create_tiers, CpuDsaTokenToKVPool

    def remember(pool):
        targets.append(pool)
        make(pool)

    original = write._write_mla_kv_buffer

    def doubled(pool, dst_buffer, loc, *rows):
        original(pool, dst_buffer, loc, *rows)
        if not isinstance(pool, CpuEssTokenToKVPool):
            original(pool, targets[0].kv_buffer[0], loc, *rows)

    CpuEssTokenToKVPool._create_tiers = remember
    write._write_mla_kv_buffer = doubled


def on_one_rank() -> None:
    """Asleep until EngineProcess.switched(fault="last_rank_fetches_nothing"): see no_fetch."""
    from sglang.srt.runtime_context import get_parallel

    from sglang_ess.tiers import HotCache
    from tests.support import switches

    fetch = HotCache.fetch

    def forgetful(cache, plan, layer=0):
        parallel = get_parallel()
        is_last = parallel.tp_rank == parallel.tp_size - 1
        if not (is_last and switches.value("fault") == "last_rank_fetches_nothing"):
            fetch(cache, plan, layer)

    HotCache.fetch = forgetful
