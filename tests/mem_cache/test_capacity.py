"""The byte budget: what is decided, at its limits, and that a real pool takes just that."""

import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.config import EssConfig
from sglang_ess.launch import startup
from sglang_ess.mem_cache import capacity
from sglang_ess.mem_cache.capacity import (
    Capacity,
    CapacityError,
    Geometry,
    TierBytes,
    choose_capacity,
    max_slots,
)
from sglang_ess.mem_cache.host_share import NodeTiers, host_limit_bytes
from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from sglang_ess.tiers.index_groups import IndexGroups
from tests.support.drafts import eagle
from tests.support.engine import EngineProcess, in_fork

PAGE, GIB = 64, 1 << 30
# A layer's row, its index key; what DeepSeek-V3.2 has of them.
V32 = Geometry(
    layers=61, row_bytes=656, index_bytes=61 * 132, topk=2048, context_tokens=32768, page_slots=PAGE
)
SMALL = Geometry(
    layers=3, row_bytes=656, index_bytes=3 * 132, topk=8, context_tokens=1000, page_slots=PAGE
)
PLENTY = 1 << 50
AUTO = EssConfig()


def min_bytes(config, geometry, slots):
    """Device bytes of these slots with no more hot rows than the options ask for."""
    rows = round((config.hot_ratio or capacity.AUTO_HOT_RATIO) * slots)
    if config.hot_gib is not None:
        rows = min(int(config.hot_gib * GIB) // geometry.hot_row_bytes, slots + PAGE)
    return geometry.device_bytes(slots, rows)


@pytest.mark.parametrize("config", [AUTO, EssConfig(hot_ratio=0.5), EssConfig(hot_gib=0.001)])
@pytest.mark.parametrize("device_bytes", [1 << 21, 10_000_000, 33_333_333, GIB])
def test_device_memory_is_used_to_the_last_page(config, device_bytes):
    slots = max_slots(config, SMALL, device_bytes, PLENTY)
    assert slots % PAGE == 0
    assert min_bytes(config, SMALL, slots) <= device_bytes
    assert min_bytes(config, SMALL, slots + PAGE) > device_bytes
    assert choose_capacity(config, SMALL, slots, device_bytes, PLENTY).device_bytes <= device_bytes


@pytest.mark.parametrize("pages", [1, 2, 77])
@pytest.mark.parametrize("spare", [0, 1, PAGE * 3 * 656 - 1])
def test_host_memory_bounds_the_slots(pages, spare):
    """One page more than the slots: SGLang's padding has rows too."""
    host_bytes = (pages + 1) * PAGE * SMALL.layers * SMALL.row_bytes + spare
    assert max_slots(AUTO, SMALL, GIB, host_bytes) == pages * PAGE
    assert SMALL.host_bytes(pages * PAGE) == host_bytes - spare


def test_the_parts_of_the_sum():
    """By hand: 2 layers of 656 B rows, 100 slots and a page of 10, 20 hot rows."""
    geometry = Geometry(2, 656, 2 * 132, topk=8, context_tokens=50, page_slots=10)
    slots = 110 * (2 * 132 + 2 * 4 + 4)
    hot = 20 * 2 * (656 + 30) + 2 * (11 + 2) * 8
    staging = 2 * (50 + 10) * 656
    assert geometry.device_bytes(100, 20) == slots + hot + staging + 64 * 8 * 12
    assert geometry.host_bytes(100) == 110 * 2 * 656
    assert geometry.staging_rows(30) == 40  # no request is longer than the slots there are


def test_a_draft_model_takes_device_memory_alone():
    """Its row and key of every slot, and of the page that takes padding's writes."""
    drafts = replace(SMALL, draft_bytes=656 + 132)
    for slots, rows in ((PAGE, 8), (640, 128)):
        more = drafts.device_bytes(slots, rows) - SMALL.device_bytes(slots, rows)
        assert more == (slots + PAGE) * (656 + 132)
        assert drafts.host_bytes(slots) == SMALL.host_bytes(slots)
    assert max_slots(AUTO, drafts, GIB, PLENTY) < max_slots(AUTO, SMALL, GIB, PLENTY)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("name", ["v32", "glm52"])
def test_the_draft_models_pool_is_what_the_formula_says(name, dtype):
    """SGLang's own pool, on torch's meta device; GLM-5.2's layers share index keys, its MTP layer
    has some all the same. Without a draft model (n-grams, too) nothing is counted.
    """
    plain, drafts, exact, buffers = in_fork(geometries_of, name, getattr(torch, dtype))
    slots, pool_bytes = buffers
    assert plain.draft_bytes == 0 and plain.queries == 4
    assert replace(drafts, draft_bytes=0) == plain
    assert (slots + PAGE) * drafts.draft_bytes == pool_bytes
    key = drafts.draft_bytes - plain.row_bytes
    assert key == 132 and exact.draft_bytes == plain.row_bytes + 512
    assert exact.index_bytes * 132 == plain.index_bytes * 512


def geometries_of(name, dtype):
    """(geometries without a draft model, with it, with exact keys; slots and bytes of its pool)"""
    from sglang.srt.model_executor.model_runner_components.layer_setup import ModelLayerInfo
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from benchmarks.serving.capacity import MetaConfigurator, Point, published

    os.environ |= EssConfig(enabled=False).to_env()  # SGLang's own sizes

    def made(mtp_layers):
        found = MetaConfigurator(Point(name, 32768, GIB, mtp_layers))
        found.kv_cache_dtype = dtype
        return found

    with published(speculative_num_draft_tokens=4):
        ngram, target, draft = made(0), made(1), made(1)
        ngram.spec_algorithm = SpeculativeAlgorithm.NGRAM
        plain = capacity._geometry(ngram, AUTO)[1]
        drafts, exact = (
            capacity._geometry(target, config)[1]
            for config in (AUTO, EssConfig(index_dtype="float32"))
        )
        draft.is_draft_worker = True
        draft.layer_info = ModelLayerInfo(start_layer=0, end_layer=1, num_effective_layers=1)
        _, pools = target.build()
        sizes = draft._derive_pool_sizes(config=target._resolve_memory_pool_config(0))
        shared = pools.req_to_token_pool, pools.token_to_kv_pool_allocator
        names = "req_to_token_pool", "token_to_kv_pool_allocator"
        given = dict(zip(names, shared, strict=True))
        pool = draft._init_pools(sizes=sizes, **given).token_to_kv_pool
    buffers = *pool.kv_buffer, *pool.index_k_with_scale_buffer
    return plain, drafts, exact, (pool.size, sum(buffer.nbytes for buffer in buffers))


def test_a_cap_of_the_users_goes_to_the_automatic_hot_tier():
    device_bytes = 10_000_000
    most = max_slots(AUTO, SMALL, device_bytes, PLENTY)
    before = choose_capacity(AUTO, SMALL, most, device_bytes, PLENTY)
    assert before.hot_rows == pytest.approx(capacity.AUTO_HOT_RATIO * most, rel=0.05)
    fewer = choose_capacity(AUTO, SMALL, most // 2 // PAGE * PAGE, device_bytes, PLENTY)
    freed = (before.slots - fewer.slots) * SMALL.slot_device_bytes // SMALL.hot_row_bytes
    assert fewer.hot_rows == pytest.approx(before.hot_rows + freed, abs=2) and freed > 1000
    assert 0 <= device_bytes - fewer.device_bytes < SMALL.hot_row_bytes
    few = choose_capacity(AUTO, SMALL, 10 * PAGE, device_bytes, PLENTY)
    assert few.hot_rows == 11 * PAGE  # all there are, the padding's too
    explicit = choose_capacity(EssConfig(hot_ratio=0.5), SMALL, 10 * PAGE, device_bytes, PLENTY)
    assert explicit.hot_rows == 5 * PAGE
    gib = choose_capacity(EssConfig(hot_gib=0.001), SMALL, 20 * PAGE, device_bytes, PLENTY)
    assert gib.hot_rows == GIB // 1000 // SMALL.hot_row_bytes


@pytest.mark.parametrize(
    ("ratio", "slots", "rows"),
    [(1.0, 640, 704), (0.999, 640, 639), (0.5, 640, 320), (0.21, 640, 134), (1e-9, 640, 1)],
)
def test_hot_rows_at_a_ratio(ratio, slots, rows):
    assert capacity.hot_rows_at(ratio, SMALL, slots) == rows


def test_hot_gib_is_bytes_of_all_layers_and_no_more_than_the_slots():
    config = EssConfig(hot_gib=0.5)
    slots = max_slots(config, V32, 40 * GIB, PLENTY)
    decided = choose_capacity(config, V32, slots, 40 * GIB, PLENTY)
    taken = V32.device_bytes(slots, decided.hot_rows) - V32.device_bytes(slots, 0)
    assert 0 <= GIB // 2 - taken < V32.hot_row_bytes
    assert choose_capacity(EssConfig(hot_gib=100), SMALL, 640, GIB, PLENTY).hot_rows == 640 + PAGE


def refusal(call, *args):
    with pytest.raises(CapacityError) as caught:
        call(*args)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_not_one_page():
    need = min_bytes(AUTO, SMALL, PAGE)
    assert max_slots(AUTO, SMALL, need, PLENTY) == PAGE
    line = refusal(max_slots, AUTO, SMALL, need - 1, SMALL.host_bytes(PAGE))
    for part in (
        f"one page of {PAGE} slots", capacity.size(need - 1), capacity.size(need),
        "3 layers x 656 B", "Raise the device memory (", "--ess-device-gib",
    ):  # fmt: skip
        assert part in line
    host = SMALL.host_bytes(PAGE)
    assert max_slots(AUTO, SMALL, GIB, host) == PAGE
    assert capacity.size(host) in refusal(max_slots, AUTO, SMALL, GIB, host - 1)


@pytest.mark.parametrize(
    ("device_is_short", "host_is_short"), [(True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize(
    ("config", "host_advice", "hot_advice"),
    [
        (AUTO, "free host memory or set --ess-host-gib", ""),
        (EssConfig(host_gib=1, hot_ratio=0.5), "raise --ess-host-gib", ""),
        (EssConfig(hot_gib=0.1), "free host memory or set --ess-host-gib", "lower --ess-hot-gib"),
    ],
)
def test_the_memory_that_is_short_is_the_one_to_raise(
    config, host_advice, hot_advice, device_is_short, host_is_short
):
    line = refusal(
        max_slots, config, SMALL, 1 if device_is_short else GIB, 1 if host_is_short else GIB
    )
    _, _, advice = line.rpartition("of staging). ")
    assert ("raise the device memory" in advice.lower()) == device_is_short
    assert (host_advice in advice[0].lower() + advice[1:]) == host_is_short
    assert ("--ess-host-gib" in advice) == host_is_short
    assert ("--ess-hot-gib" in advice) == bool(device_is_short and hot_advice)
    assert hot_advice in advice or not device_is_short


def test_a_hot_tier_below_the_minimum_names_what_would_do():
    line = refusal(choose_capacity, EssConfig(hot_ratio=0.09), SMALL, 640, GIB, PLENTY)
    assert "must hold 64 rows a layer: got 58 for 640 slots" in line
    line = refusal(choose_capacity, EssConfig(hot_gib=1e-5), SMALL, 640, GIB, PLENTY)
    assert f"got {int(1e-5 * GIB) // SMALL.hot_row_bytes} for 640 slots" in line
    assert refusal(choose_capacity, EssConfig(hot_ratio=0.5), SMALL, 64, GIB, PLENTY).count(
        "1.0000"
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(64, 10**7), st.integers(1, 61))
def test_the_remedy_is_enough(slots, layers):
    """Printed with four digits it is accepted, together with the flags that were given."""
    geometry = replace(SMALL, layers=layers)
    for flags in ({"hot_ratio": 1e-9}, {"hot_gib": 1e-12}):
        line = refusal(choose_capacity, EssConfig(**flags), geometry, slots, GIB, PLENTY)
        ((flag, value),) = re.findall(r"Raise --ess-(hot-\w+) to ([\d.]*\d)", line)
        config = EssConfig(**flags | {flag.replace("-", "_"): float(value)})
        assert choose_capacity(config, geometry, slots, GIB, PLENTY).hot_rows >= 64


def test_with_neither_flag_one_is_to_be_set():
    line = refusal(choose_capacity, AUTO, SMALL, 64, 1, PLENTY)
    ratio = float(re.search(r"Set --ess-hot-ratio to ([\d.]*\d)", line)[1])
    assert choose_capacity(EssConfig(hot_ratio=ratio), SMALL, 64, 1, PLENTY).hot_rows >= 64


def test_slots_that_the_host_cannot_hold():
    host = SMALL.host_bytes(640)
    line = refusal(choose_capacity, AUTO, SMALL, 704, GIB, host)
    for part in (capacity.size(SMALL.host_bytes(704)), capacity.size(host), "704 slots"):
        assert part in line
    assert choose_capacity(AUTO, SMALL, 640, GIB, host).slots == 640


def test_the_host_limit():
    one = NodeTiers()
    assert host_limit_bytes(AUTO, 10 * GIB, one) == 6 * GIB
    assert host_limit_bytes(EssConfig(host_gib=9.5), 10 * GIB, one) == 9.5 * GIB
    line = refusal(host_limit_bytes, EssConfig(host_gib=10.5), 10 * GIB, one)
    assert "--ess-host-gib" in line and "got 10.5 GiB, limit 10.00 GiB" in line


def test_nothing_is_decided_before_sglang_asks(monkeypatch):
    monkeypatch.setattr(capacity, "_decided", None)
    with pytest.raises(RuntimeError, match="before the pool is built"):
        capacity.decided()


@pytest.mark.parametrize(
    ("batch", "context", "ratio"),
    [(64, 32768, 0.82), (96, 32768, 0.48), (128, 32768, 0.31), (160, 32768, 0.21),
     (40, 131072, 0.2), (54, 131072, 0.1)],
)  # fmt: skip
def test_the_batches_of_ess_table_2(batch, context, ratio):
    """ESS's memory equation: batch x context x 61 x (ratio x 656 + 132) fits 85.7e9 B within 2 %.

    Beyond that sum we count maps, queues and staging: for 160 x 32K, 62 x 4 B of maps and
    0.21 x 61 x 30 B of queue make 3.7 % of a slot's bytes.
    """
    geometry = replace(V32, context_tokens=context)
    slots = max_slots(EssConfig(hot_ratio=ratio), geometry, int(85.7e9), PLENTY)
    assert slots / context == pytest.approx(batch, rel=0.06)
    per_slot = 62 * 4 + ratio * 61 * 30
    paper = int(85.7e9) / (61 * (ratio * 656 + 132))
    ours = int(85.7e9) / (61 * (ratio * 656 + 132) + per_slot)
    assert slots == pytest.approx(ours, rel=0.004) and slots < paper
    if (batch, context) == (160, 32768):
        assert geometry.host_bytes(batch * context) / GIB == pytest.approx(195, abs=1)


configs = st.one_of(
    st.just(AUTO),
    st.builds(EssConfig, hot_ratio=st.floats(0.001, 1)),
    st.builds(EssConfig, hot_gib=st.floats(1e-4, 0.1)),
)
geometries = st.builds(
    lambda layers, row, keys, draft, *rest: Geometry(
        layers, row, min(keys, layers) * 132, *rest, draft_bytes=draft * (row + 132)
    ),
    st.integers(1, 61), st.sampled_from((656, 1152, 2304)), st.integers(1, 61), st.integers(0, 1),
    st.integers(1, 2048), st.integers(1, 200_000), st.sampled_from((1, 64)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(configs, geometries, st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.01, 1))
def test_neither_memory_is_ever_exceeded(config, geometry, on_device, on_host, share):
    device_bytes, host_bytes = geometry.device_bytes(on_device, 64), geometry.host_bytes(on_host)
    page = geometry.page_slots
    try:
        most = max_slots(config, geometry, device_bytes, host_bytes)
        slots = max(page, int(most * share) // page * page)  # the user's cap
        decided = choose_capacity(config, geometry, slots, device_bytes, host_bytes)
    except CapacityError as error:
        assert re.search("hot tier must hold|must hold one page", str(error))
        return
    assert decided.device_bytes <= device_bytes
    assert geometry.host_bytes(slots) <= host_bytes
    assert min(capacity.MIN_HOT_ROWS, slots) <= decided.hot_rows <= slots + page


# --- the real pool ----------------------------------------------------------------------


def expose_sizes() -> None:
    """Patch of an EngineProcess: its facts hold what was decided and what really is there."""
    from sglang_ess.launch import startup

    original = startup.serving_facts

    def with_sizes(scheduler):
        pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
        found = {"buffers": buffer_bytes(pool), "draft_buffers": {}}
        if scheduler.spec_algorithm.is_eagle():
            draft = scheduler.draft_worker.draft_worker.draft_runner.token_to_kv_pool
            found["draft_buffers"] = buffer_bytes(draft)
        if hasattr(pool, "capacity"):
            found["decided"] = vars(capacity.decided())
            # After this, a buffer that grew would show in device_bytes.
            pool.install(0, torch.arange(PAGE, PAGE + 2000), 0)
            pool.hot_caches[0].warm(torch.arange(32 * 8).view(32, 8).int())
        return original(scheduler) | found

    startup.serving_facts = with_sizes


def buffer_bytes(pool) -> dict[str, int]:
    """Bytes of every tensor and array that hangs from the pool, by owner; each memory once.

    Host tier, what is counted per request, and SGLang's table of addresses are no part of
    the sum.
    """
    found: dict[str, int] = {}
    tier = getattr(pool, "host_tier", None)
    addresses = {rows.data_ptr() for rows in tier.rows} if tier else set()
    seen = {id(pool)}

    def visit(value, name):
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor | np.ndarray):
            tensor = torch.as_tensor(value)
            if tensor.numel() and tensor.data_ptr() not in addresses:
                addresses.add(tensor.data_ptr())
                found[name] = found.get(name, 0) + tensor.nbytes
        elif isinstance(value, list | tuple | dict):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item, name)
        elif type(value).__module__.startswith(("sglang_ess", "sglang.srt.mem_cache")):
            for key, item in vars(value).items() if hasattr(value, "__dict__") else ():
                visit(item, f"{name}.{key}")

    for key, item in vars(pool).items():
        if key not in ("request_misses", "data_ptrs", "data_strides", "sample"):  # on the host
            visit(item, key)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """16 slots a query: so few that a prompt's chunk is longer than a plan."""
    config = TinyModelConfig(arch="glm", index_topk=16)
    return write_tiny_model(tmp_path_factory.mktemp("model") / "glm", config)


def test_batches_beyond_the_decode_graphs_are_said():
    """Slots for 10 whole requests: one tier's graphs may end before."""
    geometry = Geometry(2, 656, 264, 64, 1000, PAGE)
    decided = Capacity(geometry, 10_240, 100, 1 << 30)
    assert "--cuda-graph-max-bs-decode 10." in capacity.graph_advice(decided, 8)
    assert capacity.graph_advice(decided, 10) is capacity.graph_advice(decided, None) is None


def facts_of(model, ess, **server_args):
    args = {"max_total_tokens": None, "context_length": 2048} | server_args
    patch = "tests.mem_cache.test_capacity:expose_sizes"
    with EngineProcess(model, ess, patches=[patch], **args) as engine:
        return engine.call("_server_info")["ess"]


@pytest.mark.slow
@pytest.mark.parametrize("ess", [{"index_dtype": "float32", "hot_ratio": 0.3}, {"hot_gib": 0.002}])
def test_more_real_pools(model, ess):
    check_two_tier(facts_of(model, ess | {"device_gib": 0.02}), 0.02)


def all_bytes(facts):
    """Of the pool's buffers and those of the draft model's pool."""
    return sum(facts["buffers"].values()) + sum(facts["draft_buffers"].values())


def check_two_tier(facts, device_gib):
    geometry = facts["decided"]["geometry"]
    geometry["groups"] = IndexGroups(tuple(geometry["groups"]["sizes"]))
    geometry = Geometry(**{**geometry, "tier": TierBytes(**geometry["tier"])})
    decided = Capacity(**{**facts["decided"], "geometry": geometry})
    assert all_bytes(facts) == facts["device_bytes"] == decided.device_bytes
    assert facts["device_bytes"] <= int(device_gib * GIB) == decided.device_limit_bytes
    assert facts["host_bytes"] == decided.geometry.host_bytes(facts["slots"])
    assert (facts["slots"], facts["hot_rows"]) == (decided.slots, decided.hot_rows)
    assert facts["staging_rows"] == decided.staging_rows
    assert {name.split(".")[0] for name in facts["buffers"]} == {
        "index_key_cache", "tier", "rebalancers", "staging", "plan_buffers",
    }  # fmt: skip


def test_a_real_two_tier_pool_takes_what_was_decided(model):
    facts = facts_of(model, {"device_gib": 0.02}, kv_cache_dtype="fp8_e4m3")
    check_two_tier(facts, 0.02)
    assert facts["device_bytes"] > 0.99 * 0.02 * GIB
    assert facts["hot_ratio"] == pytest.approx(capacity.AUTO_HOT_RATIO, abs=0.03)


def test_one_tier_takes_the_same_limit_for_its_device_memory(model):
    """SGLang does not count its padding page: we take it off what SGLang divides."""
    facts = facts_of(model, {"device_gib": 0.02, "enabled": False})
    page = PAGE * facts["kv_bytes_per_token"]
    assert facts["kv_total_bytes"] == facts["device_bytes"] == sum(facts["buffers"].values())
    assert facts["kv_total_bytes"] <= 0.02 * GIB < facts["kv_total_bytes"] + page
    assert facts["kv_total_bytes"] == (facts["slots"] + PAGE) * facts["kv_bytes_per_token"]


# --- and its draft model's --------------------------------------------------------------


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """`model` with an MTP layer. Layers share their top-k; the MTP layer has index keys."""
    config = TinyModelConfig(arch="glm", index_topk=16, mtp_layers=1)
    return write_tiny_model(tmp_path_factory.mktemp("drafting") / "glm", config)


def block_of(facts):
    """{name: value} of the ready block."""
    args = SimpleNamespace(model_path="m", url=lambda: "http://h:1")
    rows = startup.block(args, facts, 0).splitlines()[1:]
    return {row[4:19].strip(): row[20:] for row in rows}


EAGLE = eagle(4)


@pytest.mark.parametrize(
    ("more", "key_bytes", "dtype"),
    [({}, 132, "bfloat16"), ({"index_dtype": "float32"}, 512, "fp8_e4m3")],
)
def test_two_tiers_and_a_draft_model_take_what_was_decided(drafting, more, key_bytes, dtype):
    facts = facts_of(drafting, {"device_gib": 0.02} | more, kv_cache_dtype=dtype, **EAGLE)
    check_two_tier(facts, 0.02)
    assert facts["device_bytes"] > 0.99 * 0.02 * GIB
    row = facts["latent_row_bytes"] + key_bytes
    assert facts["decided"]["geometry"]["draft_bytes"] == row
    assert sum(facts["draft_buffers"].values()) == facts["draft_bytes"]
    assert facts["draft_bytes"] == (facts["slots"] + PAGE) * row
    mib = facts["draft_bytes"] / (1 << 20)
    assert block_of(facts)["speculation"] == (
        "a step verifies 4 tokens of a request: up to 64 rows of a layer; 1 draft layer, "
        f"{mib:.0f} MiB on the device"
    )


def test_one_tier_and_a_draft_model_keep_the_limit(drafting):
    """The padding page of both is off what SGLang divides."""
    facts = facts_of(drafting, {"device_gib": 0.02, "enabled": False}, **EAGLE)
    token = facts["kv_bytes_per_token"] + facts["latent_row_bytes"] + facts["index_key_bytes"]
    assert facts["device_bytes"] == all_bytes(facts) == (facts["slots"] + PAGE) * token
    assert facts["device_bytes"] <= 0.02 * GIB < facts["device_bytes"] + PAGE * token


def test_drafts_of_n_grams_take_no_memory(drafting):
    ngram = dict(speculative_algorithm="NGRAM", speculative_ngram_max_bfs_breadth=1)
    facts = facts_of(drafting, {"device_gib": 0.02}, speculative_num_draft_tokens=4, **ngram)
    check_two_tier(facts, 0.02)
    assert facts["draft_bytes"] == facts["decided"]["geometry"]["draft_bytes"] == 0
    assert block_of(facts)["speculation"].endswith(": up to 64 rows of a layer")
