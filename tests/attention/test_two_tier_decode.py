"""TwoTierDecode: every order of transfer and attention gives the answer of one tier.

Without a GPU there are no streams. So that a missing wait still shows, fetches are held back
here until somebody waits for them: attention before that sees what was in the row before.
"""

import dataclasses

import numpy as np
import pytest
import torch
from sglang.kernels.ops.attention.merge_state import merge_state_triton

from ess_kernels.hot_state import SPLIT
from ess_kernels.sparse_mla import sparse_mla, sparse_mla_reference
from sglang_ess.attention import two_tier_decode
from sglang_ess.attention.overlap import Mode
from sglang_ess.attention.two_tier_decode import TwoTierDecode
from sglang_ess.tiers.hot_cache_cuda import DeviceTier
from sglang_ess.tiers.transfer_stream import TransferStream

HEADS, SCALE, SLOTS = 4, 0.07, 220


class HeldBack(TransferStream):
    """Fetches run when their event is waited for, or when later work of the stream needs them."""

    def __init__(self):
        super().__init__("cpu")
        self.queue = []

    def event(self):
        return len(self.queue)

    def wait(self, event):
        done, self.queue = self.queue[:event], self.queue[event:]
        for run in done:
            run()


@pytest.fixture
def decode(monkeypatch):
    def build(rows, topk, max_queries=4, hold=True):
        random = torch.Generator().manual_seed(rows + topk)
        host = [torch.randn(SLOTS, 1, 576, generator=random) for _ in range(2)]
        tier = DeviceTier(host, rows, topk, max_queries, "cpu")
        for row in tier.rows:
            row.fill_(float("nan"))  # reading an unfilled row must show
        transfer = HeldBack()

        def attend(q, rows, indices, lengths):
            return sparse_mla(q, rows, indices, SCALE, lengths)

        monkeypatch.setattr(two_tier_decode, "wait", lambda event: transfer.wait(event))
        if hold:
            for cache in tier.caches:
                cache.fetch = hold_back(transfer, cache.fetch)
                cache.plan_and_fetch = in_two(cache)
        return TwoTierDecode(tier, transfer, attend, merge_state_triton), host

    return build


def hold_back(transfer, copy_rows):
    def fetch(planned, layer=0):
        kept = dataclasses.replace(
            planned,
            miss_slots=planned.miss_slots.clone(),
            miss_rows=planned.miss_rows.clone(),
            num_misses=planned.num_misses.clone(),
        )
        transfer.queue.append(lambda: copy_rows(kept, layer))

    return fetch


def in_two(cache):
    """plan_and_fetch whose copies can be held back."""

    def plan_and_fetch(topk, step_pass=(0, 1)):
        planned = cache.plan(topk)
        cache.fetch(planned)
        return planned

    return plan_and_fetch


def draw(random, queries, width, universe=SLOTS):
    topk = np.stack([random.permutation(universe)[:width] for _ in range(queries)])
    topk[random.random(topk.shape) < 0.15] = -1
    return torch.from_numpy(topk).int()


def expected(q, host, topk):
    return sparse_mla_reference(q, host.squeeze(1), topk, SCALE)[0].float()


def run(decode, layer, q, topk, mode):
    step = decode.layer(layer)
    if mode is Mode.DBA and decode.can_halve(layer, *topk.shape):
        half = len(topk) // 2
        decode.plan_half(step, topk[:half], 0, len(topk))
        decode.plan_half(step, topk[half:], half, len(topk))
    if not decode.start(step, topk, mode):
        return decode.in_passes(step, q, topk)
    return decode.finish(q, step, mode)


@pytest.mark.parametrize("mode", Mode)
def test_every_mode_gives_one_tiers_answer(decode, mode):
    two_tier, host = decode(rows=90, topk=12)
    random = np.random.default_rng(1)
    for step in range(6):
        layer, q = step % 2, torch.randn(4, HEADS, 576)
        topk = draw(random, 4, 12, 130)
        if step == 3:
            topk[2] = -1  # the padding of a batch
        two_tier.tier.state.words[layer, SPLIT] = step != 4
        out = run(two_tier, layer, q, topk, mode)
        torch.testing.assert_close(out, expected(q, host[layer], topk), atol=2e-6, rtol=1e-5)
    counters = two_tier.tier.caches[0].counters
    assert 0 < counters["misses"] < counters["lookups"] and counters["short"] == 0


@pytest.mark.parametrize(("rows", "width"), [(20, 12), (9, 12)], ids=["two passes", "by columns"])
def test_a_tier_smaller_than_the_batchs_union(decode, rows, width):
    two_tier, host = decode(rows=rows, topk=width)
    random = np.random.default_rng(2)
    for _ in range(2):
        q, topk = torch.randn(3, HEADS, 576), draw(random, 3, width, 60)
        step = two_tier.layer(0)
        assert not two_tier.start(step, topk, Mode.OFF)
        out = two_tier.in_passes(step, q, topk)
        torch.testing.assert_close(out, expected(q, host[0], topk), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_parts", [1, 8, 32])
def test_bfloat16_parts_are_merged_in_float32(decode, num_parts):
    """Of n parts of one row each part's rounding has weight 1 / n, as the result has 1 / sqrt(n)
    of a row's size: together they err as one rounding does, and the result's own comes on top.
    So the errors' root mean square is sqrt(2) of that of one part; merged in bfloat16, whose n
    roundings come on top, several times as much.
    """
    two_tier, host = decode(rows=32 // num_parts, topk=32, max_queries=1)
    host[0].copy_(host[0].bfloat16())  # as float32: what the kernel multiplies with bfloat16 q
    rows, q = host[0].squeeze(1), 0.1 * torch.randn(2, HEADS, 576).bfloat16()

    def attend(q, rows, indices, lengths):
        return sparse_mla(q, rows.bfloat16(), indices, SCALE, lengths)

    two_tier.attend = attend
    topk = torch.stack([torch.arange(32), torch.arange(100, 132)]).int()
    out = two_tier.in_passes(two_tier.layer(0), q, topk)
    exact = sparse_mla_reference(q, rows, topk, SCALE)[0]
    of_one = sparse_mla(q, rows.bfloat16(), topk, SCALE)[0]

    def error(given):
        return float((given.double() - exact).square().mean().sqrt())

    assert out.dtype == torch.bfloat16
    assert error(out) <= 1.2 * 2**0.5 * error(of_one)


@pytest.mark.parametrize("mode", [Mode.DA, Mode.OFF])
def test_attention_that_does_not_wait_is_noticed(decode, mode, monkeypatch):
    two_tier, host = decode(rows=90, topk=12)
    monkeypatch.setattr(two_tier_decode, "wait", lambda event: None)
    q, topk = torch.randn(4, HEADS, 576), draw(np.random.default_rng(3), 4, 12)
    assert run(two_tier, 0, q, topk, mode).isnan().any()


def test_hits_are_attended_before_the_fetch(decode, monkeypatch):
    """What DA is for: the first attention runs while the misses are still on their way."""
    two_tier, host = decode(rows=90, topk=12)
    random, seen = np.random.default_rng(4), []
    q, topk = torch.randn(4, HEADS, 576), draw(random, 4, 12, 40)
    run(two_tier, 0, q, topk, Mode.DA)
    attend = two_tier.attend

    def watched(*args):
        seen.append(len(two_tier.transfer.queue))
        return attend(*args)

    two_tier.attend = watched
    topk[:, :3] = torch.arange(100, 112).view(4, 3)
    out = run(two_tier, 0, q, topk, Mode.DA)
    assert seen == [1, 0]
    torch.testing.assert_close(out, expected(q, host[0], topk), atol=2e-6, rtol=1e-5)


def test_dba_waits_for_the_first_half_before_it_attends_to_hits(decode):
    """A slot that the first half fetched is a hit of the second: its row must be in."""
    two_tier, host = decode(rows=90, topk=12)
    q = torch.randn(4, HEADS, 576)
    topk = torch.arange(12, dtype=torch.int32).repeat(4, 1)
    out = run(two_tier, 0, q, topk, Mode.DBA)
    torch.testing.assert_close(out, expected(q, host[0], topk), atol=2e-6, rtol=1e-5)
    assert two_tier.tier.caches[0].counters["misses"] == 12


def test_halves_of_a_pass_that_failed_are_not_taken_for_the_next_ones(decode):
    """It planned the whole batch, and ended before attention did."""
    two_tier, host = decode(rows=90, topk=12)
    random, q = np.random.default_rng(6), torch.randn(4, HEADS, 576)
    failed, topk = draw(random, 4, 12), draw(random, 4, 12)
    step = two_tier.layer(0)
    two_tier.plan_half(step, failed[:2], 0, 4)
    two_tier.plan_half(step, failed[2:], 2, 4)
    step = two_tier.layer(0)
    assert two_tier.start(step, topk, Mode.DA)
    out = two_tier.finish(q, step, Mode.DA)
    torch.testing.assert_close(out, expected(q, host[0], topk), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", [Mode.OFF, Mode.DA])
@pytest.mark.parametrize("rows", [90, 32, 20], ids=["reserved", "no room: fetched", "passes"])
def test_a_row_written_in_this_step_is_read(decode, rows, mode):
    two_tier, host = decode(rows=rows, topk=10, hold=False)
    random = np.random.default_rng(5)
    for _ in range(4):
        written = torch.from_numpy(random.permutation(SLOTS)[:3])
        values = torch.randn(3, 1, 576)
        topk = draw(random, 3, 10)
        topk[:, 0] = written.int()
        topk[:, 1:][torch.isin(topk[:, 1:], written.int())] = -1
        early = two_tier.reserve(written, topk.shape[1])
        step = two_tier.layer(0, early)
        planned = early and two_tier.start(step, topk, mode)
        two_tier.write(step, values[..., :512], values[..., 512:], written)
        assert torch.equal(host[0][written], values)
        q = torch.randn(3, HEADS, 576)
        planned = planned or two_tier.start(step, topk, mode)
        out = two_tier.finish(q, step, mode) if planned else two_tier.in_passes(step, q, topk)
        torch.testing.assert_close(out, expected(q, host[0], topk), atol=2e-6, rtol=1e-5)
    two_tier.tier.caches[0].check_rows(np.arange(rows), "layer 0")


class FakeStream:
    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


@pytest.mark.parametrize("capturing", [False, True])
def test_what_the_scheduler_forks_comes_after_the_step_under_way(monkeypatch, capturing):
    steps, scheduler = FakeStream(), FakeStream()
    transfer = TransferStream("cpu")
    transfer._stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: steps)
    transfer.begin_step()
    assert transfer.on_transfer_stream() is transfer._stream and transfer._stream.waited == [steps]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: scheduler)
    transfer._stream.waited.clear()
    transfer.on_transfer_stream()
    # A capture must not wait for what is outside of it.
    assert transfer._stream.waited == ([scheduler] if capturing else [scheduler, steps])
