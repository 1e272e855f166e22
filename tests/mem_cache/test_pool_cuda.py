"""CudaEssTokenToKVPool on CPU tensors: its bytes, its write paths, what leaves a slot cold."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.runtime_context import get_parallel

from ess_kernels.checks import interpreted
from sglang_ess.config import EssConfig
from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.allocator import EssPagedAllocator
from sglang_ess.mem_cache.capacity import GPU_TIER, Capacity, Geometry
from sglang_ess.tiers.index_groups import IndexGroups
from tests.support import device_tier
from tests.support.hot_state import check_state

pytestmark = pytest.mark.skipif(not interpreted(), reason="the CPU is the device of these tests")

PAGE, LAYERS, TOPK = 64, 2, 8
WIDTHS = {torch.float8_e4m3fn: 656, torch.bfloat16: 576, torch.float32: 576}


@pytest.fixture(params=["early", "late"])
def schedule(request, monkeypatch):
    """Copies of the transfer stream at their earliest, or at their latest."""
    if request.param == "late":
        device_tier.launches_are_late(monkeypatch.setattr)


@pytest.fixture
def build(monkeypatch):
    """build(slots, hot_rows, dtype): a pool as SGLang makes it, but for the platform."""
    for name, value in EssConfig().to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # SGLang's, without asking

    def make(slots=256, hot_rows=100, dtype=torch.float8_e4m3fn, context=200, start_layer=0,
             sizes=(1,) * LAYERS):  # fmt: skip
        width, groups = WIDTHS[dtype], IndexGroups(sizes)
        geometry = Geometry(
            groups.layers, width * dtype.itemsize, len(sizes) * 132, TOPK, context, PAGE, GPU_TIER,
            groups=groups,
        )  # fmt: skip
        decided = Capacity(geometry, slots, hot_rows, device_limit_bytes=1 << 40)
        monkeypatch.setattr(capacity, "_decided", decided)
        return device_tier.interpreted_pool_class()(
            size=slots, page_size=PAGE, kv_lora_rank=512, dtype=dtype, qk_rope_head_dim=64,
            layer_num=groups.layers, device="cpu", index_head_dim=128, enable_memory_saver=False,
            kv_cache_dim=width, start_layer=start_layer, end_layer=start_layer + groups.layers,
            skip_topk_layers=[position > 0 for _, position in groups.places],
        )  # fmt: skip

    with get_parallel().override(attn_tp_size=1, attn_dcp_size=1, attn_dcp_rank=0):
        yield make


def latents(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 512, generator=g), torch.randn(n, 1, 64, generator=g)


def write(pool, slots, seed, layers=None):
    """SGLang's setter in a prefill pass, a row of its own in each layer. Returns them by layer.

    layers: in these alone, and not in a pass
    """
    rows, loc = {}, torch.tensor(slots)
    if layers is None:
        pool.begin_prompts([0], [len(loc)], torch.zeros(1, 0, dtype=torch.int32), loc)
    for layer in range(pool.layer_num) if layers is None else layers:
        k, rope = latents(len(slots), seed * 10 + layer)
        pool.set_mla_kv_buffer(SimpleNamespace(layer_id=pool.start_layer + layer), loc, k, rope)
        rows[layer] = pool.pack(k, rope, loc)
    return rows


def hot(pool, group) -> set[int]:
    pool.transfer.join()
    state = pool.hot_caches[group].state
    check_state(state)
    return set((state.slot_row >= 0).nonzero().flatten().tolist())


def check(pool, layer, slots, rows) -> None:
    """Rows of slots in the host tier, and in the hot tier where they are there."""
    pool.synchronize()
    assert torch.equal(pool.kv_buffer[layer][slots], rows)
    group, position = pool.place(pool.start_layer + layer)
    cache = pool.hot_caches[group]
    cache.check_rows(np.arange(cache.num_rows), "all", PAGE, position)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize(
    ("slots", "hot_rows", "context"), [(256, 100, 200), (640, 704, 4000), (128, 64, 65), (64, 1, 9)]
)
def test_device_bytes_are_those_that_were_decided(build, dtype, slots, hot_rows, context):
    pool = build(slots, hot_rows, dtype, context)
    assert pool.device_bytes == capacity.decided().device_bytes
    assert pool.host_tier.nbytes == capacity.decided().geometry.host_bytes(slots)


@pytest.mark.parametrize("sizes", [(1, 1, 4, 4), (1, 2, 2), (3,)])
@pytest.mark.parametrize(("slots", "hot_rows"), [(256, 100), (640, 704)])
def test_device_bytes_with_index_groups_are_those_that_were_decided(build, sizes, slots, hot_rows):
    pool = build(slots, hot_rows, sizes=sizes)
    assert pool.device_bytes == capacity.decided().device_bytes
    assert pool.host_tier.nbytes == capacity.decided().geometry.host_bytes(slots)
    held = [len(buffer) > 0 for buffer in pool.index_k_with_scale_buffer]
    assert held == [position == 0 for _, position in pool.groups.places]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 2, 2)])
def test_device_bytes_is_what_the_tensors_have(build, sizes):
    """Each tensor that the tiers keep, found by walking their objects."""
    pool = build(sizes=sizes)
    seen, objects = {}, [pool.tier, pool.staging]
    known = set()
    while objects:
        one = objects.pop()
        if id(one) in known or any(one is rows for rows in pool.kv_buffer):
            continue
        known.add(id(one))
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, list | tuple):
            objects += one
        elif isinstance(one, dict):
            objects += one.values()
        elif type(one).__module__.startswith(("sglang_ess", "ess_kernels")):
            objects += vars(one).values()
    assert sum(seen.values()) == pool.tier.nbytes + pool.staging.nbytes


@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_prompts_rows_are_saved_and_hot_while_there_is_room(build, schedule, dtype):
    pool = build(hot_rows=90, dtype=dtype, start_layer=3)
    first, then = list(range(64, 134)), list(range(140, 180))
    rows = write(pool, first, 1)
    for layer in range(LAYERS):
        check(pool, layer, first, rows[layer])
        assert hot(pool, layer) == set(first)
    more = write(pool, then, 2)
    for layer in range(LAYERS):
        check(pool, layer, then, more[layer])
        check(pool, layer, first, rows[layer])
        assert len(hot(pool, layer)) == 90 and hot(pool, layer) > set(first)  # none is evicted


def test_rows_that_are_written_outside_of_a_pass_are_saved_and_refreshed(build, schedule):
    pool = build(hot_rows=90)
    write(pool, range(64, 84), 1)
    rows = write(pool, range(74, 94), 2, layers=[1])
    check(pool, 1, list(range(74, 94)), rows[1])
    assert hot(pool, 0) == hot(pool, 1) == set(range(64, 84))


def test_a_reused_slot_has_its_new_row(build, schedule):
    pool = build(hot_rows=90)
    write(pool, range(64, 104), 1)
    rows = write(pool, range(90, 110), 2)
    for layer in range(LAYERS):
        check(pool, layer, list(range(90, 110)), rows[layer])
        assert hot(pool, layer) == set(range(64, 110))


def test_the_padding_of_a_batch_is_never_hot(build, schedule):
    pool = build()
    write(pool, [0, 64, 0, 65, 0], 1)
    pool.synchronize()
    assert hot(pool, 0) == {64, 65}


def test_slots_that_sglang_overwrites_after_the_call(build, schedule):
    """Its tensor of slots is the next pass's too."""
    pool, loc = build(), torch.arange(64, 74)
    k, rope = latents(10)
    pool.begin_prompts([0], [10], torch.zeros(1, 0, dtype=torch.int32), loc)
    rows = pool.pack(k, rope, loc)
    pool.write_prompt(0, pool.prompt_slots, rows)
    pool.set_mla_kv_buffer(SimpleNamespace(layer_id=1), loc, k, rope)
    loc += 50
    for layer in range(LAYERS):
        check(pool, layer, list(range(64, 74)), rows)
        assert hot(pool, layer) == set(range(64, 74))


def test_every_layer_of_a_group_has_its_rows_of_a_prompt(build, schedule):
    """A layer that is written alone updates its own copies of what is hot."""
    pool = build(hot_rows=90, sizes=(1, 3), start_layer=3)
    first, then = list(range(64, 134)), list(range(120, 160))
    write(pool, first, 1)
    rows = write(pool, then, 2)
    for layer in range(4):
        check(pool, layer, then, rows[layer])
    assert len(hot(pool, 0)) == len(hot(pool, 1)) == 90 and hot(pool, 1) > set(first)
    alone = write(pool, [*range(64, 74), 200], 3, layers=[2])
    for layer in range(4):
        check(pool, layer, then, rows[layer])
    check(pool, 2, [*range(64, 74), 200], alone[2])
    assert 200 not in hot(pool, 1)
    pool.invalidate_slots(torch.arange(64, 160))
    pool.synchronize()
    assert not hot(pool, 0) and not hot(pool, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_setter_of_whole_rows(build, schedule, dtype):
    pool, loc = build(dtype=dtype), torch.arange(64, 70)
    k, rope = latents(6)
    whole = torch.cat([k, rope], dim=-1)
    pool.set_kv_buffer(SimpleNamespace(layer_id=7), loc, whole, whole, layer_id_override=1)
    check(pool, 1, loc.tolist(), whole.to(dtype))
    assert not hot(pool, 0)


def test_reading_gives_the_rows_it_was_given_and_ends(build):
    pool = build()
    staged = torch.zeros(5, 1, 656, dtype=torch.uint8)
    with pool.reading(staged):
        assert pool.get_key_buffer(0).data_ptr() == staged.data_ptr()
        assert pool.get_key_buffer(0).dtype == pool.dtype
    with pytest.raises(KeyError), pool.reading(staged):
        raise KeyError
    with pytest.raises(RuntimeError, match="layer 0 must be read inside reading"):
        pool.get_key_buffer(0)


def test_a_group_answers_for_its_own_queries(build, schedule):
    """Two requests that one buffer cannot hold: each group's places, 0 for the other's."""
    pool = build(slots=512, hot_rows=64, context=100)  # buffers of 164 rows
    tables = torch.zeros(2, 100, dtype=torch.int32)
    tables[0], tables[1] = torch.arange(64, 164), torch.arange(192, 292)
    rows = {s: write(pool, s, i) for i, s in enumerate([range(64, 160), range(192, 290)])}
    new = torch.tensor([160, 161, 290])
    pool.staging.begin([96, 98], [2, 1], tables, new)
    topk = torch.tensor([[64, 160, -1], [161, 159, 65], [290, 192, 289]], dtype=torch.int32)
    for layer in range(LAYERS):
        k, rope = latents(3, 77 + layer)
        packed = pool.pack(k, rope, new)
        expected = torch.zeros(len(pool.kv_buffer[0]), 1, 656, dtype=torch.uint8)
        for slots, saved in rows.items():
            expected[list(slots)] = saved[layer]
        expected[new] = packed
        groups = []
        for queries, staged in pool.staged(layer, packed):
            groups.append(queries)
            places = pool.translate_loc_to_hisparse_device(topk)
            others = torch.ones(3, dtype=torch.bool)
            others[queries] = False
            assert (places[others] == 0).all()
            real = topk[queries] >= 0
            assert torch.equal(places[queries] >= 0, real)
            got = staged[places[queries][real].long()]
            assert torch.equal(got, expected[topk[queries][real].long()])
        assert groups == [slice(0, 2), slice(2, 3)]


def test_a_dense_prefill_over_a_prefix_is_refused(build):
    with pytest.raises(NotImplementedError, match="got a dense MHA prefill of 3 slots.*--disable"):
        build().get_mla_kv_buffer(None, torch.arange(64, 67))


def test_moved_slots_take_latents_and_index_keys_along(build, schedule):
    pool = build()
    rows = write(pool, range(64, 74), 1)
    write(pool, range(100, 110), 2)
    for layer in range(LAYERS):
        keys = torch.randn(10, 128, generator=torch.Generator().manual_seed(layer))
        pool.store_index_k(layer, torch.arange(64, 74), keys)
    pool.move_kv_cache(torch.arange(100, 110), torch.arange(64, 74))
    for layer in range(LAYERS):
        check(pool, layer, list(range(100, 110)), rows[layer])
        check(pool, layer, list(range(64, 74)), rows[layer])
        assert hot(pool, layer) == set(range(64, 74))
        page = pool.index_k_with_scale_buffer[layer]
        keys = page[:, : PAGE * 128].reshape(-1, 128)
        scales = page[:, PAGE * 128 :].reshape(-1, 4)
        for part in (keys, scales):
            assert part[64:74].any() and torch.equal(part[100:110], part[64:74])


def test_a_copy_on_the_host_and_back(build, schedule):
    """Retraction: two pages leave, others take their slots, they come back elsewhere."""
    pool = build(slots=512)
    away, back = torch.arange(64, 192), torch.arange(320, 448)
    rows = write(pool, away.tolist(), 1)
    keys = torch.randn(128, 128)
    pool.store_index_k(0, away, keys)
    kept = pool.index_k_with_scale_buffer[0][1:3].clone()
    copy = pool.get_cpu_copy(away)
    write(pool, away.tolist(), 2)
    write(pool, back.tolist(), 3)
    assert hot(pool, 0) & set(back.tolist() + away.tolist())
    pool.load_cpu_copy(copy, back)
    for layer in range(LAYERS):
        check(pool, layer, back.tolist(), rows[layer])
        assert not hot(pool, layer) & set(back.tolist())
    assert torch.equal(pool.index_k_with_scale_buffer[0][5:7], kept)


def test_after_a_flush_no_slot_is_hot(build, schedule):
    pool = build()
    write(pool, range(64, 164), 1)
    pool.synchronize()
    assert len(hot(pool, 0)) == len(hot(pool, 1)) == 100
    before = pool.hot_caches[0].counters
    pool.empty_hot_tier()
    pool.synchronize()
    assert not hot(pool, 0) and not hot(pool, 1)
    assert pool.hot_caches[0].counters == before


def test_freed_pages_are_not_hot_and_the_link_is_measured(build, schedule):
    """What the allocator and admission ask of a pool."""
    pool = build()
    allocator = EssPagedAllocator(256, PAGE, torch.uint8, "cpu", pool, need_sort=False)
    slots = allocator.alloc(2 * PAGE)
    write(pool, slots[:100].tolist(), 1)
    pool.synchronize()
    assert len(hot(pool, 0)) == 100
    allocator.free(slots[:PAGE])
    pool.synchronize()
    assert hot(pool, 0) == hot(pool, 1) == set(slots[PAGE:100].tolist())
    assert pool.measure_link() > 0
    assert pool.device_bytes == pool.capacity.device_bytes
    pool.tier.mirror()
    assert pool.totals() == (0, 0, 0)
    positions = torch.arange(PAGE, dtype=torch.int32).view(-1, TOPK)
    pool.warm_request(slots.int(), [positions[:0], positions])
    pool.synchronize()
    assert hot(pool, 1) >= set(slots[:PAGE].tolist()) and not hot(pool, 0) & {*slots[:9].tolist()}


@pytest.mark.parametrize("dtype", WIDTHS)
def test_rows_are_packed_as_the_platform_packs_them(build, dtype):
    """All of them: SGLang's own kernels never write row 0 of their target."""
    pool = build(dtype=dtype)
    k, rope = latents(5)
    rows = pool.pack(k, rope, torch.arange(5))
    wanted = torch.zeros(6, *rows.shape[1:], dtype=rows.dtype)
    pool._write_mla_kv_buffer(wanted, torch.arange(1, 6), k, rope)
    assert torch.equal(rows, wanted[1:])


def test_a_step_is_behind_what_prompts_left_under_way(build, schedule):
    """A graph is replayed on the main stream: it cannot know of saves issued since its capture."""
    pool = build()
    write(pool, range(64, 134), 1)
    pool.before_decode_step()
    assert not getattr(pool.transfer, "pending", 0)
    assert len(hot(pool, 0)) == len(hot(pool, 1)) == 70
    assert not pool.rebalancers
