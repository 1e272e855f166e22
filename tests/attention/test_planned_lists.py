"""--ess-attention flashinfer: a decode step attends through FlashInfer as one tier would.

FlashInfer's Python is the real one; tests/support/flashinfer_device.py stands in for its compiled
code. Rows are float32 here as in the other tests of the backend, where the real kernels take
bfloat16 alone: test_mla_kernels.py has those.
"""

from functools import partial

import numpy as np
import pytest
import torch
from flashinfer.mla._batch_mla._backends import _fa_common
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_ess.attention.mla_kernels import FlashInferMla, Need
from sglang_ess.attention.overlap import Mode
from sglang_ess.attention.planned_lists import PlannedLists
from tests.support.small_backend import HEADS, SCALE, TOPK, Run


class Packed(Run):
    """Top-k lists as SGLang's fused top-k makes them: min(seq_len, top-k) slots, then -1.

    captured: SGLang replays a decode graph, instead of an eager step
    """

    captured = False

    def pick(self, seen, own=None):
        picks = self.random.permutation(seen)[:TOPK].tolist()
        if own is not None and own not in picks:
            picks[-1] = own
        return np.array(picks + [-1] * (TOPK - len(picks)))

    def begin(self, batch):
        if self.captured:
            self.backend.init_forward_metadata_out_graph(batch)
        else:
            self.backend.init_forward_metadata(batch)


@pytest.fixture
def float_rows(flashinfer_module, monkeypatch):
    """FlashInfer takes float32, and what refuses a host without a GPU is off."""
    monkeypatch.setattr(FlashInferMla, "refusals", staticmethod(lambda need: []))
    monkeypatch.setattr(_fa_common, "_validate_generated_fa_plan", lambda **_: None)
    for name in ("fa2_backend", "fa3_backend"):
        backend = f"flashinfer.mla._batch_mla._backends.{name}._validate_generated_fa_plan"
        monkeypatch.setattr(backend, lambda **_: None)
    return flashinfer_module


@pytest.fixture
def made(build, float_rows):
    """made(...): small_backend's build() with FlashInfer."""
    return partial(build, "off", attention="flashinfer")


def serve(backend, captured=False):
    """Lists shorter than top-k and full ones, batches of several sizes, padding."""
    run = Packed(backend)
    run.captured = captured
    run.prefill({1: 3, 2: 12})
    for _ in range(TOPK - 2):  # request 1's list grows until it is full
        run.decode([1, 2], padding=1)
    run.finish(1)
    run.prefill({3: 1})
    run.decode([3])
    run.decode([2, 3], padding=2)
    run.decode([2, 3], shared=(1,))
    return run


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 3)])
def test_a_step_is_that_of_one_tier(made, late, float_rows, captured, sizes):
    backend = made(sizes=sizes)
    serve(backend, captured)
    assert "decode" not in backend.in_upstream and not backend._kernels
    assert backend.needs_cpu_seq_lens
    lists = backend.planned_lists
    assert set(lists._captured) == ({3, 1, 4, 2} if captured else set())
    steps = TOPK - 2 + 3
    assert len(float_rows.runs) == steps * sum(sizes)


def test_capture_then_replay_with_padding(made, late):
    """The runner's order: a plan of lengths 1, warm-up, capture; then a plan before each replay."""
    backend = made()
    run = Packed(backend)
    run.prefill({1: 3, 2: 12})
    empty = run.batch(ForwardMode.DECODE, {}, padding=4)
    backend.init_forward_metadata_out_graph(empty, in_capture=True)
    kernel = backend.planned_lists._captured[4]
    kept = kernel._wrapper, kernel._kv_indices.data_ptr(), kernel._places.data_ptr()
    for _ in range(2):
        run.decode([], padding=4, begin=False)
    run.captured = True
    for _ in range(3):
        run.decode([1, 2], padding=2)
        run.decode([2], padding=3)
    assert backend.planned_lists._captured == {4: kernel}
    assert kept == (kernel._wrapper, kernel._kv_indices.data_ptr(), kernel._places.data_ptr())


def test_several_passes_take_another_kernel(made, late, float_rows):
    backend = made(hot_rows=12, warmup="off")
    serve(backend)
    assert backend._kernels and "decode" not in backend.in_upstream
    assert float_rows.runs  # the steps of one request fit


# --- faults: each must show ---


def a_stale_plan(monkeypatch):
    """Only the first plan of each wrapper happens."""
    plan = FlashInferMla.plan

    def first(kernel, lengths, num_columns):
        if kernel._shape != (len(lengths), num_columns):
            plan(kernel, lengths, num_columns)

    monkeypatch.setattr(FlashInferMla, "plan", first)


def lengths_without_the_new_token(monkeypatch):
    plan = PlannedLists.plan
    monkeypatch.setattr(
        PlannedLists, "plan", lambda lists, seq_lens, *args: plan(lists, seq_lens - 1, *args)
    )


def lengths_one_too_long(monkeypatch):
    plan = PlannedLists.plan
    monkeypatch.setattr(
        PlannedLists, "plan", lambda lists, seq_lens, *args: plan(lists, seq_lens + 1, *args)
    )


def places_of_full_lists(monkeypatch):
    """The lists are not packed: each begins where it would if all were full."""

    def places(kernel, lengths, kv_indptr, num_columns, total):
        kernel._places[:total] = torch.arange(total)

    monkeypatch.setattr(FlashInferMla, "_set_places", places)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "fault",
    [a_stale_plan, lengths_without_the_new_token, lengths_one_too_long, places_of_full_lists],
)
def test_a_fault_is_noticed(made, monkeypatch, fault, captured):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        serve(made(), captured)


def attend_padding(rows_of_padding):
    """Attention of two queries, the second of which pads the batch and has these rows."""
    lists = PlannedLists(Need(torch.float32, None, HEADS), SCALE, torch.device("cpu"), TOPK)
    lists.plan(torch.tensor([2, 1]), 2, captured=False)
    indices = torch.full((2, TOPK), -1, dtype=torch.int32)
    indices[0, :2] = torch.tensor([3, 1])
    indices[1, :1] = rows_of_padding
    generator = torch.Generator().manual_seed(0)
    q, rows = (torch.randn(n, 576, generator=generator) for n in (2 * HEADS, 5))
    return lists.attend(q.view(2, HEADS, 576), rows, indices, SCALE)


def test_padding_without_a_row_is_not_read_out_of_bounds(float_rows, monkeypatch):
    assert torch.equal(attend_padding(-1)[0], attend_padding(4)[0])
    monkeypatch.setattr(torch.Tensor, "clamp_", lambda tensor, **_: tensor)
    with pytest.raises(IndexError, match="query 1 reads row -1"):
        attend_padding(-1)


# --- what is refused ---


def test_refusals_at_start(build, flashinfer_module):
    with pytest.raises(RuntimeError, match="reads bfloat16 rows only: got torch.float32 and needs"):
        build("off", attention="flashinfer")
    with pytest.raises(RuntimeError, match="must come with --ess-overlap off: got modes da"):
        build("da", attention="flashinfer")
    build("auto", attention="sglang")


def test_drafts_are_refused(build, float_rows):
    with pytest.raises(RuntimeError, match="got --speculative-num-draft-tokens 3. Add") as refused:
        build("off", attention="flashinfer", drafts=3)
    assert "\n" not in str(refused.value)
    build("off", attention="sglang", drafts=3)


def test_refusals_in_a_step(made):
    backend = made()
    run = Packed(backend)
    run.prefill({1: 9})
    batch = run.batch(ForwardMode.DECODE, {1: 1})
    batch.seq_lens_cpu = None
    with pytest.raises(RuntimeError, match="must have 1 lengths on the host: got none"):
        backend.init_forward_metadata(batch)
    with pytest.raises(RuntimeError, match="must be planned before its attention"):
        run.decode([1], begin=False)
    forward = backend.forward_decode
    backend.forward_decode = partial(forward, attn_sink=torch.zeros(HEADS))
    with pytest.raises(RuntimeError, match="no sink: got one. Add --ess-attention sglang"):
        run.decode([1])
    backend.forward_decode = forward
    for layer in run.layers:
        layer.scaling = 2 * SCALE
    with pytest.raises(RuntimeError, match="softmax scale 0.07 in every layer: got 0.14"):
        run.decode([1])


def test_auto_overlap_without_costs_is_off(build, float_rows):
    assert build("auto", attention="flashinfer").policy.modes == (Mode.OFF,)


def test_rows_without_rope_are_refused(build, float_rows, monkeypatch):
    monkeypatch.setattr("tests.support.small_backend.ROPE", 0)
    with pytest.raises(RuntimeError, match="rows of 576 values: got 512"):
        build("off", attention="flashinfer")
