"""The linker between SGLang's radix tree and the store, over a real pool and a real store."""

import threading
from concurrent.futures import wait as wait_for
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from sglang_ess.errors import Refusal
from sglang_ess.mem_cache import linker, page_transfer
from sglang_ess.mem_cache.linker_metrics import StoreMetrics
from sglang_ess.mem_cache.store_identity import weights_digest
from sglang_ess.store.page_store import PageStore
from tests.mem_cache.test_shared_pool import LAYERS, PAGE, latents, new_pool

KEYS = ["one", "two"]
SLOTS = torch.arange(PAGE, 3 * PAGE)
OTHERS = torch.cat([torch.arange(3 * PAGE, 4 * PAGE), torch.arange(2 * PAGE, 3 * PAGE)])


@pytest.fixture
def pool(monkeypatch):
    from sglang.srt.runtime_context import get_parallel

    from sglang_ess.mem_cache import host_share, pool

    alone = host_share.TierGroup()
    monkeypatch.setattr(pool, "tier_group", lambda: alone)
    with get_parallel().override(attn_dcp_size=1, attn_dcp_rank=0):
        yield new_pool(torch.bfloat16)


@pytest.fixture
def linked(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(page_transfer, "identity", lambda *facts: "a model")
    monkeypatch.setattr(
        "sglang.srt.arg_groups.model_override_base.model_config_of", lambda args: None
    )
    made = make(pool, tmp_path)
    yield made
    made.close()


def make(pool, tmp_path, **changes):
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    params = dict(
        page_size=PAGE,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        attn_tp_cache_group=group,
        tp_cache_group=group,
        mtp_draft_device_pools=(),
        sidecar_draft_device_pools=(),
    )
    return linker.EssLinker(
        None,
        SimpleNamespace(**params | changes),
        components={ComponentType.FULL},
        extra_config={"path": str(tmp_path / "store"), "limit_bytes": 1 << 26},
    )


def transfer(slots=None, keys=KEYS):
    return [PoolTransfer(name=PoolName.KV, device_indices=slots, keys=list(keys))]


def fill(pool, slots, seed):
    """Write rows and keys of every layer. Returns all bytes of their pages."""
    for layer in range(LAYERS):
        nope, rope = latents(len(slots), seed + layer)
        pool.set_mla_kv_buffer(SimpleNamespace(layer_id=layer), slots, nope, rope)
        g = torch.Generator().manual_seed(seed + layer)
        pool.store_index_k(layer, slots, torch.randn(len(slots), 128, generator=g))
    return held(pool, slots)


def held(pool, slots):
    pages = slots[::PAGE] // PAGE
    rows = [rows[slots].flatten().view(torch.uint8) for rows in pool.kv_buffer]
    return torch.cat(rows + [keys[pages].flatten() for keys in pool.index_k_with_scale_buffer])


def save(linked, slots=SLOTS, keys=KEYS):
    assert linked.offload(transfer(slots, keys))
    linked._saver.submit(lambda: None).result()
    assert linked.num_completed_offloads() == 1
    return linked.pop_completed_offload()


def test_a_page_comes_back_into_other_slots(pool, linked):
    rows = fill(pool, SLOTS, 1)
    assert linked.lookup("r", transfer()) == []
    assert save(linked)
    assert linked.lookup("r", transfer()) == [1, 2]
    assert linked.lookup("r", transfer(keys=["one", "none", "two"])) == [1]
    fill(pool, OTHERS, 7)
    assert linked.load("r", transfer(OTHERS))
    assert torch.equal(held(pool, OTHERS), rows)
    assert linked.start_layer_wise_loading() == -1 and linked.finish_layer_wise_loading(-1)


def test_the_store_moves_the_pools_own_bytes(pool, linked, monkeypatch):
    """Zero copy: what the store is given is the memory of the host tier and of the index keys."""
    seen = []
    monkeypatch.setattr(
        PageStore, "write", lambda store, key, buffers: seen.extend(buffers) or True
    )
    linked.offload(transfer(SLOTS))
    linked._saver.submit(lambda: None).result()
    addresses = [torch.frombuffer(buffer, dtype=torch.uint8).data_ptr() for buffer in seen]
    owned = [*pool.kv_buffer, *pool.index_k_with_scale_buffer]
    assert len(addresses) == 2 * len(owned)
    for address in addresses:
        assert any(rows.data_ptr() <= address < rows.data_ptr() + rows.nbytes for rows in owned)


def test_loaded_slots_are_cold_before_their_rows_change(pool, linked, monkeypatch):
    fill(pool, SLOTS, 1)
    save(linked)
    fill(pool, OTHERS, 7)
    topk = OTHERS[:8].int()[None]
    pool.warm(0, topk)
    pool.warm(1, topk)
    hot_when_read = []
    read = PageStore.read

    def observed(store, *args):
        hot_when_read.append([cache.occupied for cache in pool.hot_caches])
        read(store, *args)

    monkeypatch.setattr(PageStore, "read", observed)
    assert [cache.occupied for cache in pool.hot_caches] == [8, 8]
    assert linked.load("r", transfer(OTHERS))
    assert hot_when_read == [[0, 0]] * 2
    assert [cache.occupied for cache in pool.hot_caches] == [0, 0]


def break_file(tmp_path, change):
    for file in (tmp_path / "store" / "objects").rglob("*"):
        if file.is_file():
            change(file)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "reason"), [(flip, "damaged"), (lambda file: file.unlink(), "missing")]
)
def test_a_load_that_fails_says_so_once(pool, linked, tmp_path, caplog, change, reason):
    fill(pool, SLOTS, 1)
    save(linked)
    break_file(tmp_path, change)
    for _ in range(3):
        assert not linked.load("r", transfer(OTHERS))
    assert linked.figures.failures[reason] >= 1
    assert sum(f"computed: {reason}" in line for line in caplog.messages) == 1
    assert linked.lookup("r", transfer()) == []


def test_a_slow_load_ends_before_it_returns_and_the_store_rests(pool, linked, monkeypatch):
    fill(pool, SLOTS, 1)
    save(linked)
    running, read = [], PageStore.read

    def slow(store, *args):
        running.append(1)
        linker.time.sleep(0.3)
        read(store, *args)
        running.pop()

    monkeypatch.setattr(PageStore, "read", slow)
    monkeypatch.setattr(linker, "GRACE_SECONDS", 0.05)
    assert not linked.load("r", transfer(OTHERS))
    assert running == []
    assert linked.figures.failures == {"slow": 1}
    assert linked.lookup("r", transfer()) == []


def test_an_error_in_the_middle_of_a_check_is_not_an_end_without_one(pool, linked, monkeypatch):
    """A page's error comes in once has_ended() has looked for one, and before it returns."""
    is_read = threading.Event()
    monkeypatch.setattr(PageStore, "read", lambda *args: is_read.wait(30) and fail())
    reading = linked.begin(transfer(OTHERS)[0])
    ended, calls = reading.ended, []

    class Ended:
        def done(self):
            calls.append(1)
            if len(calls) == 2:
                reading.ended = ended
                is_read.set()
                wait_for([ended], 30)
            return ended.done()

    reading.ended = Ended()
    while not reading.has_ended():
        pass
    assert len(calls) == 2 and reading.failure == "error"
    reading.wait()


def fail():
    raise OSError(5, "Input/output error")


def test_a_store_that_fails_to_write_lets_the_node_go(pool, linked, monkeypatch):
    fill(pool, SLOTS, 1)

    def broken(store, key, buffers):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PageStore, "write", broken)
    assert save(linked) is False
    assert linked.figures.failures == {"error": 1}


def test_too_many_waiting_pages_are_not_saved(pool, linked):
    """A quarter of the slots may wait, here one page; a node alone may be larger."""
    for slots, keys in ((SLOTS, KEYS), (OTHERS, ["three", "four"])):
        assert linked.offload(transfer(slots, keys))
    linked._saver.submit(lambda: None).result()
    assert linked.num_completed_offloads() == 2
    assert [linked.pop_completed_offload() for _ in range(2)] == [True, False]
    assert linked.figures.skipped_pages == 2


def test_other_ranks_neither_ask_nor_save(pool, tmp_path, linked):
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    other = make(pool, tmp_path, attn_tp_cache_group=group)
    assert other.lookup("r", transfer()) == [1, 2]  # the leader's answer decides
    assert other.offload(transfer(SLOTS)) and other.pop_completed_offload()
    assert other.figures.saved_pages == 0
    other.close()


def test_reset_keeps_the_store(pool, linked):
    rows = fill(pool, SLOTS, 1)
    linked.offload(transfer(SLOTS))
    linked.reset()
    assert linked.num_completed_offloads() == 0
    assert linked.load("r", transfer(OTHERS)) and torch.equal(held(pool, OTHERS), rows)


def test_metrics(pool, linked):
    fill(pool, SLOTS, 1)
    save(linked)
    linked.lookup("r", transfer())
    linked.load("r", transfer(OTHERS))
    registry = CollectorRegistry()
    metrics = StoreMetrics(linked, {"model_name": "m"}, registry)
    for _ in range(2):
        metrics.update()
    text = generate_latest(registry).decode()
    page_bytes = linked.parts.page_bytes
    for name, value in (
        ("loaded_pages_total", 2), ("loaded_bytes_total", 2 * page_bytes), ("hit_pages_total", 2),
        ("lookup_pages_total", 2), ("saved_pages_total", 2), ("load_seconds_count", 1),
    ):  # fmt: skip
        assert f'sglang:ess_store_{name}{{model_name="m"}} {float(value)}' in text, name


def test_what_it_refuses(pool, tmp_path, linked):
    with pytest.raises(Refusal, match="the model's own draft layer"):
        make(pool, tmp_path, sidecar_draft_device_pools=(pool,))


def test_the_digest_of_weights_sees_their_bytes(tmp_path):
    for name, byte in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        data = bytearray(100_000)
        data[-1] = byte
        (tmp_path / name / "model.safetensors").write_bytes(data)
    same = weights_digest(tmp_path / "a")
    assert same == weights_digest(tmp_path / "a") != weights_digest(tmp_path / "b")
