"""Verifications of drafts in EssDsaBackend: decode steps of several queries a request. No GPU.

Every answer is that of one tier that holds every row; tests/support/small_backend.py has it, and
the stand-ins.
"""

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.runner_utils import capture_mode

from sglang_ess.attention import two_tier_decode
from sglang_ess.attention.overlap import Mode
from sglang_ess.attention.two_tier_decode import TwoTierDecode
from sglang_ess.mem_cache import pool_cuda
from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache
from tests.support.small_backend import PAGE, TOPK, Run, serve_drafts

DRAFTS, LAYERS = 3, 2
HOT_ROWS = 81  # of three requests, padding included: 72 lookups and 9 new rows


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1)], ids=["layers", "groups"])
@pytest.mark.parametrize("overlap", ["off", "da", "dba"])
def test_drafts_are_verified_as_by_one_tier(build, late, overlap, sizes):
    backend = build(overlap, hot_rows=HOT_ROWS, drafts=DRAFTS, sizes=sizes, max_queries=12)
    run = serve_drafts(backend, exact=overlap == "off")
    assert ("verify" in backend.in_upstream) == (overlap == "off" or sizes == (2, 1))
    assert (run.halves_seen > 0) == (overlap == "dba")
    for i, cache in enumerate(backend.token_to_kv_pool.hot_caches):
        counters = cache.counters
        assert 0 < counters["misses"] < counters["lookups"] and counters["short"] == 0
        for layer in range(cache.num_layers):
            cache.check_rows(np.arange(HOT_ROWS), f"group {i}", first_slot=PAGE, layer=layer)


def test_without_a_stream(build):
    serve_drafts(build("dba", hot_rows=HOT_ROWS, drafts=DRAFTS, max_queries=12), seed=1)


@pytest.mark.parametrize(
    ("hot_rows", "max_queries", "shapes"),
    [
        (2 * DRAFTS * TOPK, 12, {(2 * DRAFTS, TOPK), (DRAFTS, TOPK), (1, TOPK)}),
        (2 * DRAFTS * TOPK - 1, 12, {(DRAFTS, TOPK), (1, TOPK)}),
        (HOT_ROWS, 5, {(DRAFTS, TOPK), (1, TOPK)}),
        (DRAFTS * TOPK - 1, 12, {(2, TOPK), (1, TOPK)}),
        (5, 12, {(1, 5), (1, 3)}),
    ],
    ids=["two requests", "one request", "queries of a plan", "two queries", "columns"],
)
def test_a_small_tier_takes_whole_requests_as_long_as_one_fits(
    build, late, monkeypatch, hot_rows, max_queries, shapes
):
    """(1, TOPK): a query that no request has, where a batch is padded by tokens."""
    plan, seen = DeviceHotCache.plan_and_fetch, set()

    def watched(cache, topk, warm=False, **options):
        if not warm:
            seen.add(tuple(topk.shape))
        return plan(cache, topk, warm, **options)

    monkeypatch.setattr(DeviceHotCache, "plan_and_fetch", watched)
    backend = build("off", hot_rows=hot_rows, drafts=DRAFTS, max_queries=max_queries, warmup="off")
    serve_drafts(backend, seed=3)
    assert seen == shapes
    assert all(cache.counters["short"] == 0 for cache in backend.token_to_kv_pool.hot_caches)


def test_with_a_hot_row_for_every_slot_one_plan_does(build, late):
    backend = build("off", hot_rows=120, drafts=DRAFTS, max_queries=30, warmup="off")
    run = Run(backend)
    run.prefill(dict.fromkeys(range(1, 7), 5))
    accepted = dict.fromkeys(range(1, 7), 1)  # 6 * DRAFTS * TOPK is more than there are rows
    for _ in range(3):
        run.verify(accepted, exact=True)
    for cache in backend.token_to_kv_pool.hot_caches:
        assert cache.steps == 3 and cache.counters["evictions"] == 0


def verify_three_times(build, overlap, hot_rows=HOT_ROWS):
    """Steps that the hot tier has counted, of three verifications."""
    backend = build(overlap, hot_rows=hot_rows, drafts=DRAFTS, max_queries=12, sizes=(1, 2))
    run = Run(backend)
    run.prefill({1: 9, 2: 5})
    for _ in range(3):
        run.verify({1: 2, 2: 1})
    return [cache.steps for cache in backend.token_to_kv_pool.hot_caches]


@pytest.mark.parametrize("hot_rows", [HOT_ROWS, DRAFTS * TOPK, 5], ids=["one", "two", "many"])
@pytest.mark.parametrize("overlap", ["off", "da", "dba"])
def test_a_verification_is_one_step_of_the_hot_tier_in_any_number_of_passes(
    build, overlap, hot_rows
):
    assert verify_three_times(build, overlap, hot_rows) == [3, 3]


def test_a_step_for_each_pass_is_noticed(build, monkeypatch):
    plan = DeviceHotCache.plan_and_fetch
    monkeypatch.setattr(
        DeviceHotCache,
        "plan_and_fetch",
        lambda cache, topk, warm=False, **_: plan(cache, topk, warm),
    )
    assert verify_three_times(build, "off", DRAFTS * TOPK) != [3, 3]


def test_a_step_for_each_half_is_noticed(build, monkeypatch):
    plan = DeviceHotCache.plan
    monkeypatch.setattr(
        DeviceHotCache, "plan", lambda *args, advance, lists: plan(*args, lists=lists)
    )
    assert verify_three_times(build, "dba") != [3, 3]


def test_a_step_for_each_draft_token_is_noticed(build, monkeypatch):
    plan = DeviceHotCache.plan_and_fetch

    def by_query(cache, topk, warm=False, **options):
        if not warm:
            for first in range(len(topk) - 1):
                cache.plan(topk[first : first + 1], first)
        return plan(cache, topk, warm, **options)

    monkeypatch.setattr(DeviceHotCache, "plan_and_fetch", by_query)
    assert verify_three_times(build, "off") != [3, 3]


def test_a_graph_of_verifications_has_the_order_it_is_captured_for(build, late, monkeypatch):
    backend = build("off", hot_rows=HOT_ROWS, drafts=DRAFTS, max_queries=12)
    run = Run(backend)
    run.prefill({1: 9, 2: 9})
    monkeypatch.setattr(capture_mode, "_capture_attention_variant", "dba")
    batch = run.verify_batch([1, 2])
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    assert backend.step.mode is Mode.DBA and backend.step.lists == DRAFTS
    for calls in (1, 2):  # the warm-up, and the capture after it
        run.verify({1: 1, 2: 2}, begin=False)
        assert run.halves_seen == 2 * calls * LAYERS
    steps = backend._steps
    backend.init_forward_metadata_out_graph(batch)  # a replay
    assert backend._steps == steps + 1


def test_the_mode_is_chosen_by_the_queries_of_a_step(build, monkeypatch):
    backend, asked = build("off", hot_rows=HOT_ROWS, drafts=DRAFTS, max_queries=12), []
    monkeypatch.setattr(backend, "next_step", asked.append)
    batch = Run(backend).verify_batch([])
    batch.batch_size = 4
    backend.init_forward_metadata(batch)
    backend.init_forward_metadata_out_graph(batch)
    assert asked == [4 * DRAFTS] * 2


# --- faults: each must show ---


def rejected_rows_stay(monkeypatch):
    """A slot that was hot before the step keeps its hot row, which only the host row follows."""
    reserve, write, before = TwoTierDecode.reserve, two_tier_decode.pack_write, {}

    def snapshot(decode, *args):
        for cache in decode.tier.caches:
            before[cache.state.slot_row.data_ptr()] = cache.state.slot_row.clone()
        return reserve(decode, *args)

    def stale(latents, rope, slots, slot_row, *args, **options):
        hot_before = before.get(slot_row.data_ptr(), torch.full_like(slot_row, -1)) >= 0
        write(latents, rope, slots, slot_row.masked_fill(hot_before, -1), *args, **options)

    monkeypatch.setattr(TwoTierDecode, "reserve", snapshot)
    monkeypatch.setattr(two_tier_decode, "pack_write", stale)


def a_new_owner_finds_rejected_rows_hot(monkeypatch):
    """A prompt writes host rows only: its slots keep the hot rows of who had them before."""
    monkeypatch.setattr(pool_cuda, "gather_rows", lambda slots, _: torch.full_like(slots, -1))
    monkeypatch.setattr(pool_cuda.CudaEssTokenToKVPool, "begin_prompts", begin_without_install)


def begin_without_install(pool, prefix_tokens, new_tokens, tables, slots):
    pool.staging.begin(prefix_tokens, new_tokens, tables, slots)
    pool.prompt_slots = slots.clone()


def only_the_first_row_is_written(monkeypatch):
    """A verification writes one row a request, as a decode step does."""
    write = two_tier_decode.pack_write

    def first(latents, rope, slots, *args, **options):
        write(latents[::DRAFTS], rope[::DRAFTS], slots[::DRAFTS], *args, **options)

    monkeypatch.setattr(two_tier_decode, "pack_write", first)


def no_invalidate(monkeypatch):
    monkeypatch.setattr(two_tier_decode.DeviceTier, "invalidate", lambda tier, slots: None)


@pytest.mark.parametrize(
    ("fault", "hot_rows"),
    [
        (rejected_rows_stay, HOT_ROWS),
        (a_new_owner_finds_rejected_rows_hot, HOT_ROWS),
        (only_the_first_row_is_written, HOT_ROWS),
        (no_invalidate, 2 * DRAFTS * TOPK),  # no room to reserve
    ],
)
@pytest.mark.parametrize("overlap", ["off", "da"])
def test_a_fault_is_noticed(build, monkeypatch, fault, hot_rows, overlap):
    options = dict(hot_rows=hot_rows, drafts=DRAFTS, max_queries=12, warmup="off")
    serve_drafts(build(overlap, **options))
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        serve_drafts(build(overlap, **options))
