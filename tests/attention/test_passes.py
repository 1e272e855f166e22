"""Attention in passes over a hot tier of any size, against one softmax over the whole top-k."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_ess.attention import passes
from sglang_ess.cpu.ops.rows import pack_fp8_rows
from sglang_ess.cpu.ops.sparse_mla import sparse_mla, sparse_mla_reference
from sglang_ess.tiers import HotCache

SLOTS, HEADS, SCALE = 60, 3, 0.1
FETCHES = passes.EarlyFetch()
LAYER = SimpleNamespace(layer_id=0, scaling=SCALE)  # of SGLang's, what attention reads
FORMATS = {
    "fp8": lambda latent, rope: pack_fp8_rows(latent, rope),
    "bf16": lambda latent, rope: torch.cat([latent, rope], -1).bfloat16(),
    "fp32": lambda latent, rope: torch.cat([latent, rope], -1),
}


def host_rows(fmt="fp32", seed=0):
    g = torch.Generator().manual_seed(seed)
    latent, rope = torch.randn(SLOTS, 576, generator=g).split([512, 64], -1)
    return FORMATS[fmt](latent, rope)


def queries(count, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEADS, 576, generator=g).to(dtype).split([512, 64], -1)


def hot_tier(rows, num_rows):
    """A hot tier whose unfilled rows are poison where the format has a NaN."""
    cache = HotCache(rows, num_rows)
    if rows.is_floating_point():
        cache.rows.fill_(float("nan"))
    return cache


@dataclass
class Run:
    """attend_passes; `plans` holds (query, column, queries, stop) of each pass."""

    cache: HotCache
    plans: list

    def __call__(self, q, topk):
        self.plans.clear()
        step = passes.GroupStep(self.cache, [topk], FETCHES, canary=self)
        return passes.attend_passes(step.passes(0, 0, 0), self.cache.rows, LAYER, *q)

    def check(self, cache, plan, layer_id, layer):
        """As a canary would: the rows are there, and they are those of the host."""
        cache.check_integrity()
        self.plans.append((plan.first, plan.column, len(plan.rows), plan.stop))


def one_pass(q, rows, topk):
    return sparse_mla(*q, rows, topk, SCALE)[0]


def greedy_passes(topk, num_rows):
    """What GroupStep does, in sets: [(query, column, queries)].

    A pass goes on query by query while their distinct slots fit; a query that alone does
    not fit is cut where the rows end.
    """
    found, query, column = [], 0, 0
    while query < len(topk):
        first, start, used, count = query, column, set(), 0
        while query < len(topk):
            whole = used | {slot for slot in topk[query][column:] if slot >= 0}
            if len(whole) > num_rows:
                break
            used, count, query, column = whole, count + 1, query + 1, 0
        if not count:
            while topk[query][column] < 0 or len(used | {topk[query][column]}) <= num_rows:
                used |= {topk[query][column]} - {-1}
                column += 1
            count = 1
        found.append((first, start, count))
    return found


def tolerance(rows, q, topk, num_parts):
    """How far a merged float32 result may be from float64, per element.

    Each part: 4e-6, as tests/cpu/test_sparse_mla.py derives it for values of size 1. A merge
    multiplies by exp(lse - total): the subtraction rounds at |lse| x 2^-24 and its operands
    were rounded twice (the part's sum, logaddexp), so three such errors and one each of exp,
    the products and the sum, relative to the largest latent; one merge per further part.
    """
    _, lse = sparse_mla_reference(*q, rows, topk, SCALE)
    largest = max([1.0, *lse[torch.isfinite(lse)].abs().tolist()])
    values = 6.0 if rows.dtype == torch.uint8 else float(rows.float().abs().max())
    return 4e-6 * max(1.0, values) + (num_parts - 1) * 6 * 2**-24 * largest * values


def assert_whole_softmax(out, q, rows, topk, num_parts):
    expected, _ = sparse_mla_reference(*q, rows, topk, SCALE)
    assert not out.isnan().any()
    assert (out.double() - expected).abs().max() <= tolerance(rows, q, topk, num_parts)


def topk_of(num_queries, width, seed=0, distinct=SLOTS):
    g = np.random.default_rng(seed)
    rows = [g.permutation(distinct)[:width] for _ in range(num_queries)]
    return torch.from_numpy(np.array(rows, np.int32).reshape(num_queries, width))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("num_rows", [1, 7, 16, 17, SLOTS])
@pytest.mark.parametrize("width", [1, 16, 40])
def test_matches_the_whole_softmax(fmt, num_rows, width):
    rows, q, topk = host_rows(fmt), queries(5), topk_of(5, width)
    topk[1] = -1  # a query with nothing to read
    topk[2, ::3] = -1
    topk[3] = topk[4]
    run = Run(hot_tier(rows, num_rows), [])
    for _ in range(2):  # the second step finds what the first left hot
        out = run(q, topk)
        assert [plan[:3] for plan in run.plans] == greedy_passes(topk.tolist(), num_rows)
        assert_whole_softmax(out, q, rows, topk, -(-width // num_rows))
        assert (out[1] == 0).all()
        if num_rows >= width:
            assert torch.equal(out, one_pass(q, rows, topk))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_one_tier_bit_for_bit_where_a_query_fits(dtype):
    """Whatever was hot before, in whatever rows, and however many passes a step takes."""
    rows, run = host_rows("fp8"), None
    several = 0
    for seed in range(30):
        run = run or Run(hot_tier(rows, 16), [])
        q, topk = queries(6, dtype, seed), topk_of(6, 16, seed)
        topk[seed % 6, seed % 16 :] = -1
        assert torch.equal(run(q, topk), one_pass(q, rows, topk))
        several += len(run.plans) > 1
    assert several > 20
    run.cache.check_integrity()


def test_a_hot_tier_that_holds_the_batch_takes_one_pass():
    rows, q, topk = host_rows(), queries(6), topk_of(6, 20, distinct=24)
    run = Run(hot_tier(rows, 24), [])
    assert torch.equal(run(q, topk), one_pass(q, rows, topk))
    assert run.plans == [(0, 0, 6, None)]
    run.cache = hot_tier(rows, 23)
    run(q, topk)
    assert len(run.plans) == len(greedy_passes(topk.tolist(), 23)) > 1


def test_one_query_of_one_row_at_a_time():
    rows, q, topk = host_rows(), queries(1), topk_of(1, 40)
    run = Run(hot_tier(rows, 1), [])
    assert_whole_softmax(run(q, topk), q, rows, topk, 40)
    assert [plan[1] for plan in run.plans] == list(range(40))


def test_duplicates_within_a_query_count_twice_as_in_one_pass():
    """top-k has none, but the answer is then still that of one pass."""
    rows, q = host_rows(), queries(2)
    topk = torch.tensor([[3, 3, 5, -1, 3, 9, 5, 5]] * 2).int()
    for num_rows in (1, 2, 3):
        run = Run(hot_tier(rows, num_rows), [])
        assert_whole_softmax(run(q, topk), q, rows, topk, 8)


@pytest.mark.parametrize("shape", [(0, 8), (3, 8), (3, 0)])
def test_nothing_to_read(shape):
    rows, q = host_rows(), queries(shape[0])
    run = Run(hot_tier(rows, 4), [])
    out = run(q, torch.full(shape, -1, dtype=torch.int32))
    assert torch.equal(out, torch.zeros(shape[0], HEADS, 512)) and len(run.plans) == 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(-1, 14), min_size=9, max_size=9), min_size=1, max_size=5).flatmap(
        lambda topk: st.tuples(st.just(topk), st.permutations(topk))
    ),
    st.integers(1, 15),
)
def test_any_steps_in_any_hot_tier(steps, num_rows):
    rows = host_rows("bf16")
    run = Run(hot_tier(rows, num_rows), [])
    for step in steps:
        q, topk = queries(len(step)), torch.tensor(step).int()
        out = run(q, topk)
        assert [plan[:3] for plan in run.plans] == greedy_passes(step, num_rows)
        if num_rows >= max(len(set(row) - {-1}) for row in step):
            assert torch.equal(out, one_pass(q, rows, topk))
        else:
            assert_whole_softmax(out, q, rows, topk, 9)


@pytest.mark.parametrize("fmt", ["fp8", "bf16"])
@pytest.mark.parametrize("num_parts", [1, 8, 32])
def test_bfloat16_results_are_rounded_once_in_however_many_parts(fmt, num_parts):
    """Before it is rounded, a result in parts is within the float32 tolerance of float64, as that
    of one part is. Where both round alike their errors differ by that; where they do not, the
    value lies between two bf16 numbers, from whose middle it is no farther.
    """
    rows, q, topk = host_rows(fmt), queries(6, torch.bfloat16), topk_of(6, 32)
    run = Run(hot_tier(rows, 32 // num_parts), [])
    out = run(q, topk)
    assert len(run.plans) >= num_parts and out.dtype == torch.bfloat16
    expected, _ = sparse_mla_reference(*q, rows, topk, SCALE)
    of_one = (one_pass(q, rows, topk).double() - expected).abs()
    excess = (out.double() - expected).abs() - of_one
    assert excess.max() <= 3 * tolerance(rows, q, topk, num_parts)
    assert of_one.max() > 5 * tolerance(rows, q, topk, 32), "a rounding more would show"


@pytest.mark.parametrize("empty", ["this", "other", "both"])
def test_merging_with_nothing_is_exact(empty):
    g = torch.Generator().manual_seed(0)
    out, lse = torch.randn(2, HEADS, 512, generator=g), torch.randn(2, HEADS, generator=g) * 30
    parts = {"this": (out, lse), "other": (out.clone(), lse.clone())}
    for name in ("this", "other"):
        if empty in (name, "both"):
            parts[name] = (torch.zeros_like(out), torch.full_like(lse, float("-inf")))
    expected = parts["other" if empty == "this" else "this"]
    wanted = [part.clone() for part in expected]
    passes.merge_into(*parts["this"], *parts["other"])
    assert torch.equal(parts["this"][0], wanted[0]) and torch.equal(parts["this"][1], wanted[1])


def test_merging_parts_of_far_apart_weight():
    """exp(lse) of the parts overflows float32 on its own."""
    ones = torch.ones(1, 1, 4)
    out, lse = ones * 3, torch.tensor([[200.0]])
    passes.merge_into(out, lse, ones, torch.tensor([[200.0 - np.log(3)]]))
    assert torch.allclose(out, ones * 2.5)
    assert lse.item() == pytest.approx(200 + np.log(4 / 3), abs=200 * 2**-22)
    passes.merge_into(out, lse, ones * 7, torch.tensor([[-200.0]]))
    assert torch.allclose(out, ones * 2.5)


def skip_a_fetch(monkeypatch, cache):
    fetch, plans = cache.fetch, []

    def short(plan, layer):
        plans.append(plan)
        if len(plans) == 1:
            plan = replace(plan, miss_slots=plan.miss_slots[:-1], miss_rows=plan.miss_rows[:-1])
        fetch(plan, layer)

    monkeypatch.setattr(cache, "fetch", short)


def forget_to_merge(monkeypatch, cache):
    monkeypatch.setattr(passes, "merge_into", lambda *parts: None)


def merge_by_halves(monkeypatch, cache):
    def average(out, lse, other_out, other_lse):
        out.copy_((out + other_out) / 2)

    monkeypatch.setattr(passes, "merge_into", average)


def merge_into_the_wrong_query(monkeypatch, cache):
    merge = passes.merge_into

    def first(out, lse, other_out, other_lse):
        merge(out, lse, other_out.flip(1), other_lse)

    monkeypatch.setattr(passes, "merge_into", first)


def fetch_the_wrong_row(monkeypatch, cache):
    fetch = cache.fetch

    def swapped(plan, layer):
        fetch(replace(plan, miss_slots=plan.miss_slots[::-1].copy()), layer)

    monkeypatch.setattr(cache, "fetch", swapped)


@pytest.mark.parametrize(
    "fault",
    [
        skip_a_fetch, forget_to_merge, merge_by_halves, merge_into_the_wrong_query,
        fetch_the_wrong_row,
    ],
    ids=lambda fault: fault.__name__,
)  # fmt: skip
@pytest.mark.parametrize("fmt", FORMATS)
def test_faults_are_noticed(monkeypatch, fmt, fault):
    """The tolerance above tells a right answer from each of these."""
    rows, q, topk = host_rows(fmt), queries(3), topk_of(3, 24)
    run = Run(hot_tier(rows, 8), [])
    run.check = lambda *_: None  # or the integrity check would notice first
    fault(monkeypatch, run.cache)
    out = run(q, topk)
    with pytest.raises(AssertionError):
        assert_whole_softmax(out, q, rows, topk, 3)
