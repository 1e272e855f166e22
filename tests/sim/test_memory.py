"""ESS's memory equation gives its own batches; ours is the one that the pool allocates by."""

import pytest

from benchmarks.sim.published import DEVICE_BYTES, ESS_ROWS
from ess_kernels import hot_state
from ess_kernels.plan_fetch import PlanBuffers
from sglang_ess import layout
from sglang_ess.layout import GIB
from sglang_ess.mem_cache import capacity
from sglang_ess.sim.inputs.specs import changed, load
from sglang_ess.sim.model import memory
from sglang_ess.sim.model.memory import Charges, Memory, kv_bytes, weight_bytes

MODEL = load("model", "deepseek-v3.2")
PAIRS = sorted({(row.context, row.batch, row.ratio) for row in ESS_ROWS})


@pytest.mark.parametrize(("context", "batch", "ratio"), PAIRS)
def test_the_equation_gives_each_printed_ratio(context, batch, ratio):
    found = Memory(MODEL, DEVICE_BYTES, charges=Charges.paper(MODEL)).ratio(batch, context)
    digits = 2 if context == 32768 else 1
    assert round(found, digits) == ratio


def test_six_pairs_were_checked():
    assert len(PAIRS) == 6


def test_the_most_requests_are_those_that_fit():
    paper = Memory(MODEL, DEVICE_BYTES, charges=Charges.paper(MODEL))
    assert paper.max_batch(32768) == int(DEVICE_BYTES / (32768 * 61 * 132)) == 324
    assert paper.resident_batch(32768) == 54  # the paper has 52
    ours = Memory(MODEL, DEVICE_BYTES)
    for context in (1000, 32768, 131072):
        for ratio in (0.0, 0.1, 0.5):
            most = ours.max_batch(context, ratio)
            rows = ratio * context
            assert ours.device_used(most, context, most * rows) <= DEVICE_BYTES
            assert ours.device_used(most + 1, context, (most + 1) * rows) > DEVICE_BYTES


def test_host_memory_limits_the_batch_too():
    small = Memory(MODEL, DEVICE_BYTES, host_bytes=10.5 * 32768 * 61 * 656)
    assert small.max_batch(32768) == 10
    assert small.host_used(160, 32768) / GIB == pytest.approx(195.4, abs=0.1)  # papers.md 1.8


def test_hot_rows_fill_what_slots_leave_and_no_more_than_there_are():
    ours = Memory(MODEL, DEVICE_BYTES)
    rows = ours.hot_rows(100, 32768)
    assert ours.device_used(100, 32768, rows) <= DEVICE_BYTES
    assert ours.device_used(100, 32768, rows + 1) > DEVICE_BYTES
    assert ours.hot_rows(2, 1000) == 2000
    assert ours.hot_rows(10_000, 32768) == 0
    paper = Memory(MODEL, DEVICE_BYTES, charges=Charges.paper(MODEL))
    assert rows < paper.hot_rows(100, 32768)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5.2", "hy4"])
def test_ours_charges_what_the_gpu_pool_allocates(name, drafts):
    """Where layers share a top-k: index keys, map and row states once an index group."""
    context, batch, rows, model = 32768, 40, 64 * 1000, load("model", name)
    geometry = capacity.Geometry(
        layers=model.layers, row_bytes=656, index_bytes=len(model.groups) * 132, topk=2048,
        context_tokens=context, page_slots=64, tier=capacity.GPU_TIER, groups=model.groups,
        draft_bytes=drafts * (656 + 132),
    )  # fmt: skip
    rank = Memory(model, DEVICE_BYTES, charges=Charges.ours(model, drafts))
    found = rank.device_used(batch, context, rows)
    # Left out: pages of staging rows, layers' counters, reserved rows. Kilobytes.
    assert found == pytest.approx(geometry.device_bytes(batch * context, rows), abs=200e3)
    assert geometry.host_bytes(batch * context) == pytest.approx(
        rank.host_used(batch, context), rel=1e-4
    )


def test_one_tier_of_glm_5_2_is_elided():
    """51,168 B of rows and 2,772 B of index keys a token; at hot ratio 0.1 ESS holds 6.8 times."""
    model = load("model", "glm-5.2")
    plain = Memory(model, 32768 * 53940 * 10, charges=Charges.paper(model))
    assert plain.resident_batch(32768) == 10
    assert plain.max_batch(32768, 0.1) == 68  # 53940 / (2772 + 5117) = 6.84
    ours = Charges.ours(model)
    assert (ours.slot_bytes, ours.hot_row_bytes) == (2772 + 22 * 4, 51168 + 21 * 8)


def test_the_mtp_layer_is_paid_for_where_it_drafts():
    """788 B of a slot in V3.2 and GLM-5.2, in either tier; ESS's equation leaves them out."""
    node, gpu = load("deployment", "node-8"), load("gpu", "h200")
    alone = changed(node, queries=1, accepted_tokens=1.0)
    for name in ("deepseek-v3.2", "glm-5.2"):
        model = load("model", name)
        plain, drafts = (Memory.of(model, gpu, deployment) for deployment in (alone, node))
        assert drafts.charges.slot_bytes - plain.charges.slot_bytes == 656 + 132
        assert drafts.resident_bytes - plain.resident_bytes == 656 + 132
        assert drafts.charges.hot_row_bytes == plain.charges.hot_row_bytes
        assert drafts.host_used(8, 32768) == plain.host_used(8, 32768)
        paper = Memory.of(model, gpu, node, Charges.paper(model))
        assert paper.resident_bytes == plain.resident_bytes
        four = changed(node, queries=4, accepted_tokens=2.8)  # the layer runs three times
        assert Memory.of(model, gpu, four).charges == drafts.charges


@pytest.mark.parametrize(
    ("size", "per_node", "gpus", "tiers"),
    [(1, 8, 1, 8), (2, 8, 2, 4), (8, 8, 8, 1), (16, 8, 8, 1)],
)
def test_the_ranks_of_a_tensor_parallel_group_share_one_host_tier_a_node(
    size, per_node, gpus, tiers
):
    """200 GiB a GPU: TP8 has 1600 GiB in one tier, and a request's rows are there once."""
    node = changed(load("deployment", "node-8"), gpus_per_node=per_node, tensor_parallel=size)
    rank = Memory.of(MODEL, load("gpu", "h200"), node)
    assert (node.rank_gpus, node.host_tiers) == (gpus, tiers)
    assert rank.host_bytes == gpus * 200 * GIB
    assert rank.host_used(10, 32768) == 10 * 32768 * 61 * 656
    assert node.host_tiers * rank.host_bytes == 1600 * GIB


def test_weights_of_the_mtp_layer():
    """DeepSeek-V3's README_WEIGHTS: 11.5B, without the embedding and head that it shares. V3.2's
    has an indexer besides.
    """
    node = load("deployment", "node-8")
    whole = changed(node, expert_gpus=1)
    alone = changed(whole, queries=1, accepted_tokens=1.0)
    found = weight_bytes(MODEL, whole) - weight_bytes(MODEL, alone)
    joins = 2 * MODEL.hidden**2  # in bfloat16, so counted twice
    assert found - joins - MODEL.indexer_weights == pytest.approx(11.5e9, rel=0.01)


def test_the_constants_are_the_kernels():
    assert memory.ROW_STATE_BYTES == hot_state.HOT_ROW_STATE_BYTES
    plans = layout.PLAN_QUERIES_CUDA * 2048 * memory.PLAN_BYTES_PER_LOOKUP
    assert PlanBuffers.bytes_for(layout.PLAN_QUERIES_CUDA, 2048) == pytest.approx(plans, rel=1e-3)


def test_weights_leave_room_on_h200_and_none_on_a_node_of_h100():
    node = load("deployment", "node-8")
    left = kv_bytes(MODEL, load("gpu", "h200"), node)
    assert left / GIB == pytest.approx(140.4 * 0.9 - 4 - weight_bytes(MODEL, node) / GIB)
    with pytest.raises(ValueError, match="weights must fit into a GPU: got 96.2 GiB, limit 67.6"):
        kv_bytes(MODEL, load("gpu", "h100"), node)
    alone = changed(node, queries=1, accepted_tokens=1.0)
    with pytest.raises(ValueError, match="got 94.5 GiB, limit 67.6"):
        kv_bytes(MODEL, load("gpu", "h100"), alone)
    assert kv_bytes(MODEL, load("gpu", "h100"), changed(node, expert_gpus=32)) > 0
    assert Memory.of(MODEL, load("gpu", "h200"), changed(node, kv_gib=7.0)).device_bytes == 7 * GIB
