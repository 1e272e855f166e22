"""EssDsaBackend where several layers read one top-k: each layer's answer is that of one tier.

The schedule is read from LateStream's queue: what has run there when a layer attends is what the
main stream had to wait for.
"""

from functools import partial

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_ess.attention import two_tier_decode
from sglang_ess.attention.two_tier_decode import TwoTierDecode
from sglang_ess.tiers.contract import RowCorruption
from sglang_ess.tiers.hot_cache_cuda import DeviceHotCache
from sglang_ess.tiers.topk_observer import TopkObserver
from tests.support import small_backend
from tests.support.device_tier import LateStream, launches_are_late
from tests.support.small_backend import PAGE, TOPK, Backend, Pool, Run, Upstream

ROOMY = 28  # three queries and their new rows
NO_ROOM, TWO_PLANS, COLUMNS = 16, 12, 5  # for two queries' new rows; for both; for one


serve = partial(small_backend.serve, tokens=(20, 12))  # more than hot rows


def check(backend):
    """The counters of each group, and the hot rows of each layer."""
    pool = backend.token_to_kv_pool
    pool.synchronize()
    for layer, (group, position) in enumerate(pool.groups.places):
        cache = pool.hot_caches[group]
        assert 0 < cache.counters["misses"] and cache.counters["short"] == 0
        cache.check_rows(np.arange(cache.num_rows), f"layer {layer}", PAGE, position)


@pytest.mark.parametrize(
    ("sizes", "overlap"), [((1, 2), "off"), ((3,), "da"), ((1, 4), "dba"), ((2, 1), "da")]
)
def test_every_layer_gets_one_tiers_answer(build, late, sizes, overlap):
    backend = build(overlap, hot_rows=ROOMY, sizes=sizes)
    run = serve(backend)
    check(backend)
    assert (run.halves_seen > 0) == (overlap == "dba")
    # Only a group's first layer overlaps its fetch; the others attend as upstream does.
    first = 3 * len(sizes) if overlap == "off" else 0
    later = 3 * (sum(sizes) - len(sizes))
    assert backend.in_upstream.count("decode") == first + later


def test_copies_that_are_as_early_as_can_be(build):
    backend = build("dba", hot_rows=ROOMY, sizes=(1, 3))
    serve(backend, seed=1)
    check(backend)


@pytest.mark.parametrize(
    ("sizes", "overlap", "rows", "max_queries", "is_late"),
    [((3,), "dba", NO_ROOM, 6, False), ((1, 2), "off", TWO_PLANS, 6, True),
     ((1, 2), "da", COLUMNS, 6, True), ((3,), "dba", ROOMY, 1, False)],
    ids=["no room to reserve", "two plans", "by columns", "queries of a plan"],
)  # fmt: skip
def test_a_tier_that_is_too_small(
    build, monkeypatch, sizes, overlap, rows, max_queries, is_late
):  # fmt: skip
    if is_late:
        launches_are_late(monkeypatch.setattr)
    backend = build(overlap, hot_rows=rows, max_queries=max_queries, sizes=sizes, warmup="off")
    serve(backend, seed=3)
    check(backend)


def test_a_group_is_observed_once_a_step(build):
    backend, seen = build("da", hot_rows=ROOMY, sizes=(1, 3)), []

    class Observer(TopkObserver):
        def decode_topk(self, group, topk):
            seen.append((group, tuple(topk.shape)))

    backend._observers = [Observer()]
    run = Run(backend)
    run.prefill({1: 9})
    run.decode([1])
    assert seen == [(0, (1, TOPK)), (1, (1, TOPK))]


def test_a_top_k_of_another_shape_is_planned_again(build, late, monkeypatch):
    """What select() started is dropped, fetches of later layers included."""
    backend = build("dba", hot_rows=ROOMY, sizes=(3,))
    run = Run(backend)
    pick, select = run.pick, run.select

    def padded(*args):
        picks = pick(*args)
        picks[-2:] = -1
        return picks

    monkeypatch.setattr(run, "pick", padded)
    monkeypatch.setattr(run, "select", lambda *args: select(*args)[:, :-2])
    run.prefill({1: 20, 2: 12})
    for _ in range(2):
        run.decode([1, 2])
    check(backend)


# --- the schedule -------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch, late):
    """What happened, in order: ("layer", id), ("issued", group, position of the layer) and
    ("ran", ...) for each fetch, ("attends",).
    """
    log, now = [], []
    fetch, launch = DeviceHotCache.fetch, LateStream.launch
    plan_and_fetch = DeviceHotCache.plan_and_fetch

    def labelled(cache, planned, layer=0):
        now.append((cache._tier.num_layers, layer))
        fetch(cache, planned, layer)
        now.pop()

    def labelled_first(cache, topk, **options):
        now.append((cache._tier.num_layers, 0))
        planned = plan_and_fetch(cache, topk, **options)
        now.pop()
        return planned

    def logged(stream, run):
        label = tuple(now)
        log.extend(("issued", *one) for one in label)
        launch(stream, lambda: (log.extend(("ran", *one) for one in label), run()))

    monkeypatch.setattr(DeviceHotCache, "fetch", labelled)
    monkeypatch.setattr(DeviceHotCache, "plan_and_fetch", labelled_first)
    monkeypatch.setattr(LateStream, "launch", logged)
    for owner, name, entry in (
        (Backend, "forward_decode", lambda args: ("layer", args[4].layer_id)),
        (Backend, "_attend_rows", lambda args: ("attends",)),
        (Upstream, "_attend", lambda args: ("attends",)),
    ):
        monkeypatch.setattr(owner, name, _logs(log, getattr(owner, name), entry))
    return log


def _logs(log, method, entry):
    def call(*args, **kwargs):
        log.append(entry(args))
        return method(*args, **kwargs)

    return call


def ran_at_attention(log, size):
    """For each attention: how often a fetch of each layer of the group of `size` had run."""
    ran, found = [0] * size, []
    for kind, *rest in log:
        if kind == "ran" and rest[0] == size:
            ran[rest[1]] += 1
        if kind == "attends":
            found.append(tuple(ran))
    return found


@pytest.mark.parametrize(
    ("overlap", "plans", "first"),
    # In DA the hits are attended before the fetch, in DBA behind that of the first half.
    [("off", 1, [(1, 0, 0, 0)]), ("da", 1, [(0, 0, 0, 0), (1, 0, 0, 0)]),
     ("dba", 2, [(1, 0, 0, 0), (2, 0, 0, 0)])],
)  # fmt: skip
def test_only_the_first_fetch_of_a_group_is_waited_for(build, log, overlap, plans, first):
    """One launch a layer (and plan), in order, all issued before the group's first layer attends.

    No layer's attention waits for the fetch of a layer after it, nor behind one: its own new rows
    are there without it.
    """
    backend = build(overlap, hot_rows=ROOMY, sizes=(4,), warmup="off")
    run = Run(backend)
    run.prefill({1: 20, 2: 12})
    for _ in range(2):
        backend.token_to_kv_pool.synchronize()
        log.clear()
        run.decode([1, 2])
        issued = [entry for entry in log if entry[0] == "issued"]
        assert issued == [("issued", 4, layer) for layer in range(4) for _ in range(plans)]
        assert log.index(("attends",)) > log.index(issued[-1]) and log.index(("layer", 0)) > 0
        later = [tuple(plans * (j <= layer) for j in range(4)) for layer in range(1, 4)]
        assert ran_at_attention(log, 4) == first + later


def test_without_reserved_rows_a_layers_new_rows_are_saved_before_its_fetch(build, log):
    backend = build("off", hot_rows=NO_ROOM, sizes=(3,), warmup="off")
    run = Run(backend)
    run.prefill({1: 20, 2: 12})
    log.clear()
    run.decode([1, 2])
    order = [entry for entry in log if entry[0] in ("layer", "issued")]
    assert order == [
        entry for layer in range(3) for entry in (("layer", layer), ("issued", 3, layer))
    ]
    assert ran_at_attention(log, 3) == [(1, 0, 0), (1, 1, 0), (1, 1, 1)]


# --- the coordinator ----------------------------------------------------------------------


def test_the_coordinators_coming_call_is_answered_and_no_other(build, monkeypatch):
    backend = build("off", hot_rows=ROOMY, sizes=(1, 2))
    monkeypatch.setattr(Upstream, "coming", True)
    run = Run(backend)
    run.prefill({1: 9})
    run.decode([1])
    monkeypatch.setattr(Upstream, "coming", False)
    run.decode([1])
    assert backend.in_upstream.count("decode") == 2 * 3
    ask, given = backend.hisparse_coordinator.swap_in_selected_pages, {"layer_id": 0}
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_k'"):
        ask(torch.zeros(1), compressed_seq_lens=torch.ones(1), top_k=torch.zeros(1), **given)


def test_the_coordinator_answers_for_the_layer_under_way_only(build, monkeypatch):
    backend = build("off", hot_rows=ROOMY, sizes=(1, 2))
    run = Run(backend)
    run.prefill({1: 9})
    attend = Upstream.forward_decode

    def of_the_next(upstream, q, k, v, layer, *args, **kwargs):
        return attend(upstream, q, k, v, run.layers[(layer.layer_id + 1) % 3], *args, **kwargs)

    monkeypatch.setattr(Upstream, "forward_decode", of_the_next)
    with pytest.raises(AssertionError, match="layer 1 is not under way"):
        run.decode([1])


# --- faults: each must show ---------------------------------------------------------------


def wrong_layer_of_the_group(monkeypatch):
    fetch, plan_and_fetch = DeviceHotCache.fetch, DeviceHotCache.plan_and_fetch

    def of_another(cache, planned, layer=0):
        hosts = cache.host_layers
        cache.host_layers = hosts[1:] + hosts[:1]
        fetch(cache, planned, layer)
        cache.host_layers = hosts

    def of_the_last(cache, topk, **options):
        host, cache.host_rows = cache.host_rows, cache.host_layers[-1]
        planned = plan_and_fetch(cache, topk, **options)
        cache.host_rows = host
        return planned

    monkeypatch.setattr(DeviceHotCache, "fetch", of_another)
    monkeypatch.setattr(DeviceHotCache, "plan_and_fetch", of_the_last)


def third_layer_is_not_fetched(monkeypatch):
    fetch = DeviceHotCache.fetch
    monkeypatch.setattr(
        DeviceHotCache, "fetch",
        lambda cache, planned, layer=0: fetch(cache, planned, layer) if layer != 2 else None,
    )  # fmt: skip


def third_layers_prompt_is_not_updated(monkeypatch):
    write = Pool.write_prompt

    def to_the_host_only(pool, layer_id, slots, rows):
        cache = pool.hot_caches[0]
        kept = cache.hot_layers
        cache.hot_layers = (*kept[:2], kept[2].clone())
        write(pool, layer_id, slots, rows)
        cache.hot_layers = kept

    monkeypatch.setattr(Pool, "write_prompt", to_the_host_only)


def third_layers_new_row_is_not_hot(monkeypatch):
    write, pack_write = TwoTierDecode.write, two_tier_decode.pack_write

    def cold(latents, rope, slots, slot_row, *args, **options):
        pack_write(latents, rope, slots, torch.full_like(slot_row, -1), *args, **options)

    def to_the_host_only(decode, step, *args):
        two_tier_decode.pack_write = cold if step.position == 2 else pack_write
        write(decode, step, *args)

    monkeypatch.setattr(two_tier_decode, "pack_write", pack_write)
    monkeypatch.setattr(TwoTierDecode, "write", to_the_host_only)


def early_fetch_is_missed(monkeypatch):
    monkeypatch.setattr(
        TwoTierDecode, "_fetch_layer",
        lambda decode, step, layer: step.fetched.append(decode.transfer.event()),
    )  # fmt: skip


def later_layers_do_not_wait(monkeypatch):
    wait = TwoTierDecode.wait
    monkeypatch.setattr(
        TwoTierDecode, "wait", lambda decode, step: None if step.position else wait(decode, step)
    )


def later_layers_wait_for_the_first_ones_fetch(monkeypatch):
    def too_short(decode, step):
        two_tier_decode.wait(step.fetched[0])

    monkeypatch.setattr(TwoTierDecode, "wait", too_short)


def rows_are_fetched_before_they_are_saved(monkeypatch):
    start = TwoTierDecode.start

    def as_if_they_were_reserved(decode, step, *args):
        reserved, step.reserved = step.reserved, True
        started = start(decode, step, *args)
        step.reserved = reserved
        return started

    monkeypatch.setattr(TwoTierDecode, "start", as_if_they_were_reserved)
    fetches_read_when_they_are_issued(monkeypatch)


def fetches_read_when_they_are_issued(monkeypatch):
    """As a fetch may that runs beside the main stream; it writes when somebody waits for it."""
    fetch, plan_and_fetch = DeviceHotCache.fetch, DeviceHotCache.plan_and_fetch

    def early(cache, planned, layer=0):
        hosts, cache.host_layers = cache.host_layers, tuple(h.clone() for h in cache.host_layers)
        fetch(cache, planned, layer)
        cache.host_layers = hosts

    def early_first(cache, topk, **options):
        host, cache.host_rows = cache.host_rows, cache.host_rows.clone()
        planned = plan_and_fetch(cache, topk, **options)
        cache.host_rows = host
        return planned

    monkeypatch.setattr(DeviceHotCache, "fetch", early)
    monkeypatch.setattr(DeviceHotCache, "plan_and_fetch", early_first)


@pytest.mark.parametrize("rows", [ROOMY, NO_ROOM, TWO_PLANS])
@pytest.mark.parametrize("overlap", ["off", "da"])
def test_fetches_may_read_as_soon_as_they_are_issued(build, late, monkeypatch, overlap, rows):
    fetches_read_when_they_are_issued(monkeypatch)
    serve(build(overlap, hot_rows=rows, sizes=(1, 3), warmup="off"))


def passes_are_not_kept(monkeypatch):
    monkeypatch.setattr(two_tier_decode, "_copy_of", lambda plan: plan)


def only_the_first_layer_is_warmed(monkeypatch):
    warm = DeviceHotCache.warm

    def of_one(cache, topk):
        layers, cache.num_layers = cache.num_layers, 1
        warm(cache, topk)
        cache.num_layers = layers

    monkeypatch.setattr(DeviceHotCache, "warm", of_one)


@pytest.mark.parametrize(
    ("fault", "overlap", "rows", "needs_late"),
    [
        (wrong_layer_of_the_group, "da", ROOMY, False),
        (wrong_layer_of_the_group, "off", TWO_PLANS, False),
        (third_layer_is_not_fetched, "da", ROOMY, False),
        (third_layer_is_not_fetched, "off", TWO_PLANS, False),
        (third_layers_prompt_is_not_updated, "off", ROOMY, False),
        (third_layers_new_row_is_not_hot, "dba", ROOMY, False),
        (early_fetch_is_missed, "off", ROOMY, False),
        (early_fetch_is_missed, "off", NO_ROOM, False),
        (later_layers_do_not_wait, "da", ROOMY, True),
        (later_layers_wait_for_the_first_ones_fetch, "off", ROOMY, True),
        (rows_are_fetched_before_they_are_saved, "off", NO_ROOM, True),
        (passes_are_not_kept, "off", TWO_PLANS, False),
    ],
)
def test_a_fault_is_noticed(build, monkeypatch, fault, overlap, rows, needs_late):
    if needs_late:
        launches_are_late(monkeypatch.setattr)
    fault(monkeypatch)
    run = Run(build(overlap, hot_rows=rows, sizes=(3,), warmup="off"), seed=3)
    run.prefill({1: 20, 2: 12})
    with pytest.raises(AssertionError, match="not close"):
        for _ in range(3):
            run.decode([1, 2])


@pytest.mark.parametrize("fault", [None, only_the_first_layer_is_warmed])
def test_warm_up_makes_the_rows_of_every_layer_hot(build, monkeypatch, fault):
    if fault is not None:
        fault(monkeypatch)
    backend = build("off", hot_rows=ROOMY, sizes=(3,))
    run = Run(backend)
    run.prefill({1: 40})  # its last rows find no room when they are saved
    cache = backend.token_to_kv_pool.hot_caches[0]
    for layer in range(3):
        if layer and fault is not None:
            with pytest.raises(RowCorruption, match="hot row must equal its host row: got third"):
                cache.check_rows(np.arange(ROOMY), "third", PAGE, layer)
        else:
            cache.check_rows(np.arange(ROOMY), "any", PAGE, layer)
    assert backend.step.warm_spans and cache.counters["misses"] == 0 < cache.counters["evictions"]


def test_the_canary_looks_at_each_layer_of_a_group(build):
    backend = build("off", hot_rows=ROOMY, sizes=(3,), canary_rate=1.0)
    run = Run(backend)
    run.prefill({1: 20})
    run.decode([1])
    backend.token_to_kv_pool.hot_caches[0].hot_layers[2].add_(1)
    batch = run.batch(ForwardMode.DECODE, {1: 1})
    with pytest.raises(RowCorruption, match="got layer 2, slot"):
        for _ in range(40):
            backend.init_forward_metadata(batch)
