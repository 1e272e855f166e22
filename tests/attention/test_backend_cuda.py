"""EssDsaBackend without a GPU: every answer is that of one tier that holds every row.

tests/support/small_backend.py has the stand-ins. On a LateStream a copy happens when somebody waits
for it, so that a missing wait shows; with no stream it happens when it is issued.
"""

from functools import partial

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner_utils import capture_mode
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

from ess_kernels import plan_fetch
from sglang_ess.attention import backend_cuda, half_batch, two_tier_decode
from sglang_ess.attention.overlap import CostTable, Mode, OverlapPolicy
from sglang_ess.attention.two_tier_decode import TwoTierDecode
from sglang_ess.tiers.contract import RowCorruption
from sglang_ess.tiers.hot_cache_cuda import DeviceTier
from tests.support.device_tier import launches_are_late
from tests.support.small_backend import (
    HEADS,
    HOT_ROWS,
    NOPE,
    PAGE,
    ROPE,
    TOLERANCE,
    TOPK,
    WARMUP_QUERIES,
    Run,
    Upstream,
    serve,
)

LAYERS = 2


@pytest.mark.parametrize("overlap", ["off", "da", "dba"])
def test_requests_come_and_go(build, late, overlap):
    backend = build(overlap)
    run = serve(backend)
    assert (run.halves_seen > 0) == (overlap == "dba")
    assert ("decode" in backend.in_upstream) == (overlap == "off")
    assert set(backend._kernels) == (set() if overlap == "off" else {False, True})
    for i, cache in enumerate(backend.token_to_kv_pool.hot_caches):
        counters = cache.counters
        assert 0 < counters["misses"] < counters["lookups"] and counters["short"] == 0
        cache.check_rows(np.arange(HOT_ROWS), f"layer {i}", first_slot=PAGE)


def test_without_a_stream(build):
    serve(build("dba"), seed=1)


@pytest.mark.parametrize(
    ("overlap", "hot_rows", "max_queries"),
    [("dba", 16, 6), ("off", 12, 6), ("da", 5, 6), ("dba", HOT_ROWS, 1)],
    ids=["no room to reserve", "two plans", "by columns", "queries of a plan"],
)
def test_a_tier_that_is_too_small_is_slower_never_wrong(
    build, late, overlap, hot_rows, max_queries
):
    backend = build(overlap, hot_rows=hot_rows, max_queries=max_queries, warmup="off")
    serve(backend, seed=3)
    for cache in backend.token_to_kv_pool.hot_caches:
        assert cache.counters["short"] == 0


def test_prompts_in_several_staging_groups_and_warmup(build, late):
    backend = build("da", staging_rows=20)
    run = Run(backend)
    run.prefill({1: 12, 2: 4, 3: 6})
    run.prefill({1: 5, 2: 1})
    assert backend.in_upstream == ["extend"] * LAYERS * (2 + 2)
    assert backend.step.warm_spans == [(2, 5), (5, 6)]
    run.decode([1, 2, 3])
    assert (
        backend.token_to_kv_pool.tier.parts[0][1].state.slot_row[:, :PAGE] < 0
    ).all()  # padding's


def test_a_chunk_in_the_middle_of_a_prompt_warms_nothing(build):
    backend = build("off")
    batch = Run(backend).batch(ForwardMode.EXTEND, {1: 40})
    for last, spans in ((False, []), (True, [(40 - WARMUP_QUERIES, 40)])):
        batch.contains_last_prefill_chunk = last
        backend.init_forward_metadata(batch)
        assert backend.step.warm_spans == spans


def test_dense_mha_of_a_prompt_takes_no_staging(build):
    backend = build("da")
    backend.use_mha = True
    q = torch.randn(3, 5)
    assert backend.forward_extend(q, None, None, Run(backend).layers[0], None) is q


def test_an_empty_batch_and_an_idle_one(build):
    backend = build("da")
    run = Run(backend)
    batch = run.batch(ForwardMode.DECODE, {})
    backend.init_forward_metadata(batch)
    q, k, topk = torch.zeros(0, HEADS * NOPE), torch.zeros(0, 1, NOPE), torch.zeros(0, TOPK).int()
    assert run.select(batch, 0, topk).shape == (0, TOPK)
    out = backend.forward_decode(
        q, k, k, run.layers[0], batch, q_rope=torch.zeros(0, HEADS, ROPE), topk_indices=topk
    )
    assert out.shape == (0, HEADS, NOPE)
    steps = backend._steps
    backend.init_forward_metadata(run.batch(ForwardMode.IDLE, {}))
    assert backend._steps == steps and run.select(batch, 0, topk).shape == (0, TOPK)


def test_padding_that_the_metadata_lacks_is_not_cut(build, late):
    backend = build("dba")
    run = Run(backend)
    run.prefill({1: 9, 2: 9})
    run.decode([1, 2], padding=2)
    assert run.halves_seen == 2 * LAYERS
    run.decode([1, 2], padding=2, unpadded=2)
    assert run.halves_seen == 2 * LAYERS


# --- faults: each must show ---


def the_map_is_read_before_the_plan(monkeypatch):
    """pack_write may run beside the plan: here it sees which slots were hot before it."""
    reserve, pack_write, maps = DeviceTier.reserve, two_tier_decode.pack_write, {}

    def snapshot(tier, *args):
        reserve(tier, *args)
        maps.update(
            (one.state.slot_row.data_ptr(), one.state.slot_row.clone()) for one in tier.caches
        )

    def early(latents, rope, slots, slot_row, *args, **options):
        slot_row = maps.get(slot_row.data_ptr(), slot_row)
        pack_write(latents, rope, slots, slot_row, *args, **options)

    monkeypatch.setattr(DeviceTier, "reserve", snapshot)
    monkeypatch.setattr(two_tier_decode, "pack_write", early)


def no_reserve(monkeypatch):
    monkeypatch.setattr(plan_fetch, "install", lambda *_, **options: None)
    the_map_is_read_before_the_plan(monkeypatch)


def no_invalidate(monkeypatch):
    monkeypatch.setattr(DeviceTier, "invalidate", lambda tier, slots: None)


def new_rows_reach_the_host_only(monkeypatch):
    pack_write = two_tier_decode.pack_write

    def cold(latents, rope, slots, slot_row, *args, **options):
        pack_write(latents, rope, slots, torch.full_like(slot_row, -1), *args, **options)

    monkeypatch.setattr(two_tier_decode, "pack_write", cold)


def no_wait(monkeypatch):
    monkeypatch.setattr(TwoTierDecode, "wait", lambda *_: None)


@pytest.mark.parametrize(
    ("fault", "overlap", "hot_rows", "needs_late"),
    [
        (no_reserve, "off", HOT_ROWS, False),
        (no_reserve, "da", HOT_ROWS, False),
        (no_invalidate, "off", 14, False),
        (new_rows_reach_the_host_only, "off", HOT_ROWS, False),
        (new_rows_reach_the_host_only, "dba", HOT_ROWS, True),
        (no_wait, "da", 18, True),
        (no_wait, "off", HOT_ROWS, True),
    ],
)
def test_a_fault_is_noticed(build, monkeypatch, fault, overlap, hot_rows, needs_late):
    if needs_late:
        launches_are_late(monkeypatch.setattr)
    fault(monkeypatch)
    # Out of bounds: rows of a plan that has not run yet.
    with pytest.raises((AssertionError, IndexError), match="not close|out of bounds"):
        serve(build(overlap, hot_rows=hot_rows, warmup="off", sizes=(1, 2)))


@pytest.mark.parametrize("overlap", ["off", "da", "dba"])
def test_new_rows_may_be_written_beside_the_plan(build, monkeypatch, overlap):
    the_map_is_read_before_the_plan(monkeypatch)
    serve(build(overlap))


# --- a captured step ---


class NothingIsAsked(TorchFunctionMode):
    """The device is not asked for a value; kernels under the interpreter may be."""

    HOST = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "masked_select"}
    in_kernel = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        masks = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        assert self.in_kernel or not (name in self.HOST or masks), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("overlap", "sizes", "hot_rows"),
    # 14 rows: each of the three queries is a pass.
    [("da", (1, 1), HOT_ROWS), ("dba", (1, 3), HOT_ROWS), ("off", (2,), 14)],
)
def test_a_decode_step_asks_the_device_nothing(build, monkeypatch, overlap, sizes, hot_rows):
    backend, mode = build(overlap, hot_rows, sizes=sizes), NothingIsAsked()
    run = Run(backend)
    run.prefill({1: 12, 2: 12, 3: 12})

    def kernel(owner, name):
        run_kernel = getattr(owner, name)

        def launch(*args, **kwargs):
            mode.in_kernel = True
            out = run_kernel(*args, **kwargs)
            mode.in_kernel = False
            return out

        monkeypatch.setattr(owner, name, launch)

    kernel(interpreter.GridExecutor, "__call__")
    kernel(Upstream, "_attend")
    batch = run.batch(ForwardMode.DECODE, {1: 1, 2: 1, 3: 1})
    backend.init_forward_metadata(batch)
    topk = torch.from_numpy(np.array([run.pick(run.slots[r]) for r in (1, 2, 3)])).int()
    metadata, queries = backend.get_indexer_metadata(0, batch), torch.arange(3)
    for i, (_, position) in enumerate(run.places):
        args, given, wanted = run.layer(batch, i, topk)
        with mode:
            if position == 0:
                given["topk_indices"] = backend.select(
                    lambda q, weights, metadata: topk[q], batch, i, queries, queries, metadata
                )
            out = backend.forward_decode(*args, **given)
        torch.testing.assert_close(out, wanted, **TOLERANCE)


def test_a_graph_has_the_order_it_is_captured_for(build, monkeypatch):
    backend = build("off")
    run = Run(backend)
    run.prefill({1: 9, 2: 9})
    batch = run.batch(ForwardMode.DECODE, {})
    monkeypatch.setattr(capture_mode, "_capture_attention_variant", "dba")
    steps = backend._steps
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    assert backend.step.mode is Mode.DBA and backend.chosen is Mode.OFF
    assert backend._steps == steps
    cut, calls = half_batch.slice_metadata, []
    monkeypatch.setattr(
        half_batch, "slice_metadata", lambda *args: calls.append(args) or cut(*args)
    )
    run.decode([1, 2], begin=False)  # the warm-up
    run.decode([1, 2], begin=False)  # the capture: what it reads it must have made
    assert len(calls) == 4 and run.halves_seen == 4 * LAYERS
    backend.init_forward_metadata_out_graph(batch)  # a replay
    assert backend._steps == steps + 1


def test_a_step_takes_the_mode_chosen_in_the_step_before(build, monkeypatch):
    monkeypatch.setattr(backend_cuda, "MIRROR_STEPS", 2)
    backend = build("off", warmup="off")
    table = CostTable((1, 8), (0, 8), {mode: ((1.0,) * 2,) * 2 for mode in Mode}, 0.0, 0.0, "t")
    backend.policy = OverlapPolicy(LAYERS, table)
    run = Run(backend)
    run.prefill({1: 9, 2: 9})
    table.us[Mode.DBA] = ((0.5, 0.1),) * 2
    modes = []
    for _ in range(3):
        run.decode([1, 2])
        modes.append(backend.step.mode)
    assert modes == [Mode.OFF, Mode.OFF, Mode.DBA]


def test_the_canary_stops_a_hot_row_that_differs(build):
    backend = build("da", canary_rate=1.0)
    run = Run(backend)
    run.prefill({1: 30})
    run.decode([1])
    for rows in backend.token_to_kv_pool.tier.rows:
        rows += 1
    with pytest.raises(RowCorruption, match="hot row must equal its host row"):
        run.decode([1])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"overlap": "da"}, "Add --ess-overlap off, or"),
        ({"overlap": "da", "hot_rows": TOPK - 2}, "Add a larger hot tier"),
        ({"overlap": "off", "hot_rows": TOPK - 2}, "Add a larger hot tier"),
    ],
)
def test_a_sink_is_refused_with_advice_by_what_split_the_attention(build, options, advice):
    backend = build(**options)
    run = Run(backend)
    run.prefill({1: 9})
    backend.forward_decode = partial(backend.forward_decode, attn_sink=torch.zeros(HEADS))
    with pytest.raises(RuntimeError, match=f"no sink: got one. {advice}"):
        run.decode([1])
