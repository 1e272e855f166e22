"""The cost model: closed forms, what grows with what, and the published times it rests on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.sim.inputs.specs import Calibration, changed, load
from sglang_ess.sim.model.cost import CostModel
from sglang_ess.sim.model.overlap_time import (
    CHOICES,
    CONTENTION,
    HALVES,
    MODES,
    Window,
    beside_other_half,
    cheapest,
    exposed,
)

MODEL, GPU, LINK = load("model", "deepseek-v3.2"), load("gpu", "h200"), load("link", "pcie5")
CALIBRATION = load("calibration", "ess-paper")
K = 1024


def cost(name="ess-paper-32k", calibration=CALIBRATION, link=LINK, model=MODEL, **changes):
    deployment = changed(load("deployment", name), **changes)
    return CostModel(model, GPU, link, deployment, calibration)


# --- a step -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ess-paper-32k", "ess-paper-128k", "node-8"])
@pytest.mark.parametrize("misses", [0, 100, 4000])
@pytest.mark.parametrize("batch", [1, 2, 53])
def test_parts_sum_to_the_step(name, batch, misses):
    step = cost(name).step(batch, 32 * K, misses)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert min(step.parts.values()) >= 0


def test_all_resident_waits_for_nothing():
    model = cost()
    step = model.step(64, 32 * K)
    assert step.parts["transfer"] == 0
    assert step == model.step(64, 32 * K, np.zeros(61))


@pytest.mark.parametrize(("two_batch", "halves"), [(True, 2), (False, 1)])
def test_all_miss_without_overlap_is_the_link(two_batch, halves):
    model = cost(overlap="off", two_batch_overlap=two_batch)
    rows = 160 * 2 * 2048 * 61  # requests, queries, top-k, layers
    seconds = rows * 656 / 37e9 * CALIBRATION.transfer_ratio
    assert model.step(160, 32 * K, 2 * 2048).parts["transfer"] == pytest.approx(seconds)
    assert model.fetch_seconds(rows) == pytest.approx(seconds)


def test_without_two_batch_overlap_a_layer_is_compute_and_communication():
    model = cost(two_batch_overlap=False)
    dense, moe = (sum(model.compute(20, 2, 32 * K, kind).values()) for kind in (True, False))
    step = model.step(20, 32 * K)
    fixed = sum(step.parts[name] for name in ("draft", "head", "step"))
    layers = 3 * dense + 58 * (moe + model.communication(40))
    assert step.seconds == pytest.approx(fixed + layers)
    assert step.parts["communication"] == pytest.approx(58 * model.communication(40))


def test_two_batch_overlap_takes_the_longer_of_compute_and_communication():
    slow = cost(network_us=5000.0)
    step = slow.step(64, 32 * K)
    dense = 3 * 2 * sum(slow.compute(32, 2, 32 * K, True).values())
    fixed = sum(step.parts[name] for name in ("draft", "head", "step"))
    assert step.seconds == pytest.approx(fixed + dense + 58 * 2 * slow.communication(64))
    assert cost(network_us=1.0).step(64, 32 * K).parts["communication"] == 0


def test_one_request_has_no_halves():
    assert cost().step(1, 32 * K, 50) == cost(two_batch_overlap=False).step(1, 32 * K, 50)


def test_misses_of_layers_add_up_layer_by_layer():
    model, misses = cost(), np.zeros(61)
    misses[[3, 17]] = 500, 600
    alone = model.transfer(80, 32 * K, 600)[17]
    found = model.transfer(80, 32 * K, misses)
    assert found[17] == pytest.approx(alone)
    assert np.flatnonzero(found).tolist() == [3, 17]
    parts = model.step(160, 32 * K, misses).parts
    assert parts["transfer"] == pytest.approx(2 * found.sum())


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 300), context=st.integers(2048, 160 * K), misses=st.integers(0, 4000),
    name=st.sampled_from(["ess-paper-32k", "ess-paper-128k", "node-8"]),
    overlap=st.sampled_from([*CHOICES, HALVES]),
)  # fmt: skip
def test_more_of_anything_never_takes_less_time(batch, context, misses, name, overlap):
    model = cost(name, overlap=overlap)
    step = model.step(batch, context, misses).seconds
    tolerance = 1 + 1e-9
    if batch > 1:  # the second request turns two-batch overlap on
        assert step <= model.step(batch + 1, context, misses).seconds * tolerance
    assert step <= model.step(batch, context, misses + 10).seconds * tolerance
    faster = replace(LINK, gather_gb_s=60.0)
    assert cost(name, link=faster, overlap=overlap).step(batch, context, misses).seconds <= (
        step * tolerance
    )
    if overlap == "off":  # a longer indexer hides more of a fetch
        assert step <= model.step(batch, context + 1000, misses).seconds * tolerance
    assert model.step(batch, context).seconds <= (
        model.step(batch, context + 1000).seconds * tolerance
    )


def test_tensor_parallel_ranks_share_heads_and_experts_but_not_the_indexer():
    one, eight = (cost("node-8", tensor_parallel=size).compute(16, 2, 32 * K) for size in (1, 8))
    assert eight["attention"] == pytest.approx(one["attention"] / 2)  # 16 heads, padded to 64
    two = cost("node-8", tensor_parallel=2).compute(16, 2, 32 * K)
    assert two["attention"] == eight["attention"]
    assert eight["projections"] < one["projections"]
    assert eight["indexer"] == one["indexer"]
    rank = cost("node-8", tensor_parallel=8)
    assert rank.communication(32, dense=True) > 0  # the all-reduce
    assert cost("node-8").communication(32, dense=True) == 0
    assert rank.node_tokens_per_second(16, 0.05) == pytest.approx(16 * 1.7 / 0.05)


def test_dense_matrices_compute_whole_tiles():
    head = [cost()._head_seconds(tokens) for tokens in (1, 64, 65, 128, 129)]
    assert head[0] == head[1] < head[2] == head[3] < head[4]


def test_a_fetch_hides_behind_preattn_and_attention_to_the_hits():
    model, misses = cost(overlap="da"), 800
    merge = 160 * 128 * 512 * 2 * 3 / 4.8e12 / CALIBRATION.roofline_share
    hits = model.attention(160, 32 * K) * (1 - misses / (2 * 2048))
    late = model.fetch_seconds(80 * misses) - CALIBRATION.preattn_us * 1e-6 - hits
    expected = late + CALIBRATION.da_us * 1e-6 + merge
    assert model.transfer(80, 32 * K, misses)[0] == pytest.approx(expected)


def test_short_contexts_attend_to_what_there_is():
    model = cost()
    assert model.attention(10, 1024) == pytest.approx(model.attention(10, 64 * K) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1000), "batch must be 1 or more: got 0"),
        ((float("nan"), 1000), "batch must be 1 or more: got nan"),
        ((4, 1000, -1), "misses must be 0 or more: got -1"),
        ((4, 1000, float("nan")), "misses must be 0 or more: got nan"),
        ((4, 1000, [1, 2]), r"misses must be one figure or one a layer: got \(2,\), layers 61"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost().step(*arguments)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="tensor_parallel must divide heads: got 3, heads 128"):
        cost(tensor_parallel=3)


# --- overlap ----------------------------------------------------------------------------

WINDOW = Window(preattn=50.0, attention=200.0, indexer=300.0, da=10.0, dba=20.0)


@pytest.mark.parametrize(
    ("mode", "fetch", "missed", "expected"),
    [
        ("off", 100, 0.1, 100),
        ("da", 100, 0.0, 10),  # behind preattn and attention
        ("da", 300, 0.0, 10 + 300 - 250),
        ("da", 300, 0.5, 10 + 300 - 150),  # half of attention comes after the fetch
        ("dba", 300, 0.0, 20),
        ("dba", 600, 0.0, 20 + 600 - 150 - 250),  # the link never rests
        ("dba", 280, 1.0, 20 + 280 / 2 - 50),  # the second half waits for its indexer
        *((mode, 0, 0.0, 0) for mode in MODES),
    ],
)
def test_what_a_fetch_exposes(mode, fetch, missed, expected):
    found = exposed(mode, np.array([float(fetch)]), np.array([missed]), WINDOW)
    assert found.tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("compute", "talk", "fetch", "missed", "added"),
    [
        (1000.0, 100.0, 0.0, 0.0, 0.0),
        # Behind the other half whole: only what it slows both halves down.
        (1000.0, 100.0, 600.0, 0.5, 2 * CONTENTION * 600),
        # Longer than the other half's compute less the communication: split, behind 50 + 100 too.
        (1000.0, 500.0, 640.0, 0.5, 2 * (10 + CONTENTION * 640)),
        # A link that is busy all the time is what both halves take.
        (1000.0, 100.0, 1500.0, 0.0, 2 * 1500 - 2 * 1000),
        # And the network hides it as well as compute does.
        (1000.0, 1400.0, 300.0, 0.0, 0.0),
    ],
)
def test_a_fetch_beside_the_other_half(compute, talk, fetch, missed, added):
    found = beside_other_half(compute, talk, np.array([fetch]), np.array([missed]), WINDOW)
    assert found[0] == pytest.approx(added)


def test_the_other_half_never_hides_less_than_da():
    by_layer, halves = (cost(overlap=choice) for choice in ("da", HALVES))
    for misses in (10, 200, 600, 2000):
        assert halves.step(160, 32 * K, misses).seconds < by_layer.step(160, 32 * K, misses).seconds
    assert halves.step(160, 32 * K).seconds == by_layer.step(160, 32 * K).seconds


def test_without_halves_there_is_no_other_half():
    alone = cost(overlap=HALVES, two_batch_overlap=False).step(40, 32 * K, 300)
    assert alone == cost(overlap="layerwise", two_batch_overlap=False).step(40, 32 * K, 300)


def test_a_layer_takes_the_cheapest_mode_that_is_allowed():
    fetch, missed = np.linspace(0, 1000, 500), np.linspace(0, 0.5, 500)
    each = {mode: exposed(mode, fetch, missed, WINDOW) for mode in MODES}
    found = {choice: cheapest(choice, fetch, missed, WINDOW) for choice in CHOICES}
    for mode in MODES:
        assert (found[mode] == each[mode]).all()
    assert (found["layerwise"] == np.minimum(each["da"], each["dba"])).all()
    assert (found["auto"] == np.minimum(found["layerwise"], each["off"])).all()
    chosen = {mode for mode in MODES if (found["auto"] == each[mode])[1:].any()}
    assert chosen == set(MODES)


# --- prefill and hand-off ---------------------------------------------------------------


def test_prefill_in_chunks_is_prefill_at_once_but_for_launches():
    model = cost()
    launches = 61 * CALIBRATION.layer_us * 1e-6
    for chunks in ([1000, 3000, 28000], [16000, 16000]):
        done, seconds = 0, 0.0
        for tokens in chunks:
            seconds += model.prefill_seconds(tokens, done) - launches
            done += tokens
        assert seconds + launches == pytest.approx(model.prefill_seconds(32000))
    assert model.prefill_seconds(0) == 0
    quarter = cost(prefill_gpus=4).prefill_seconds(32000) - launches
    assert quarter == pytest.approx((model.prefill_seconds(32000) - launches) / 4)


def test_hand_off_is_a_latency_and_the_bytes():
    model = cost(hand_off_gb_s=50.0, hand_off_us=1000.0)
    assert model.hand_off_seconds(0) == pytest.approx(1e-3)
    assert model.hand_off_seconds(32 * K) == pytest.approx(1e-3 + 32 * K * 61 * 788 / 50e9)


# --- the sources ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "us"), [("ess-paper-32k", 155 + 273), ("node-8", 77 + 114)])
def test_communication_is_deepep_s_at_128_tokens(name, us):
    """docs/legacy.md of DeepEP: dispatch and combine of 128 tokens, EP32 and EP8."""
    assert cost(name).communication(128) * 1e6 == pytest.approx(us, abs=1)


@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "tflops"),
    [(128, 4096, 7168, 533), (128, 7168, 2048, 510), (64, 24576, 1536, 289)],
)
def test_the_roofline_is_deepgemm_s_published_times(tokens, outputs, inputs, tflops):
    """Of its first README, on an H800: HBM of an H100, the tensor cores of both."""
    model = CostModel(MODEL, load("gpu", "h100"), LINK, load("deployment", "node-8"), CALIBRATION)
    weights = outputs * inputs
    published = 2 * tokens * weights / (tflops * 1e12)
    assert model._matrices(weights, tokens) == pytest.approx(published, rel=0.05)


def test_prefill_without_attention_is_the_published_rate_of_a_node():
    """lmsys.org 2025-05-05: 50,302 tokens/s of 8 H100 at prompts of 4K, DeepSeek-V3.

    Its dense attention, 61 x 128 x 2048 keys x 640 flops, takes 16 of 159 us a token.
    """
    gpu = replace(load("gpu", "h100"), prefill_tflops=1e9)
    node = CostModel(MODEL, gpu, LINK, load("deployment", "node-8"), CALIBRATION)
    attention_us = 61 * 128 * 2048 * 640 / 640e12 * 1e6
    published_us = 8 / 50302 * 1e6 - attention_us
    assert node.prefill_seconds(4096) / 4096 * 1e6 == pytest.approx(published_us, rel=0.07)


def test_the_indexer_is_what_figure_7_says_dba_hides():
    """Half of it at 128K and 80 requests is what DBA hides beyond DA: 421 - 152 us."""
    assert cost("ess-paper-128k").indexer(80, 2, 128 * K) / 2 == pytest.approx(269e-6, rel=0.05)


def test_a_calibration_may_be_given():
    free = Calibration(1.0, 1.0, 0, 0, 0, 1.0, 0, 0, 0)
    model = cost(calibration=free)
    assert model.compute(8, 2, 32 * K)["latency"] == 0
    assert model.step(8, 32 * K).parts["step"] == 0
