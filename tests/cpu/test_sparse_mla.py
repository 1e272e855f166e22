"""Sparse MLA against its float64 definition, over every row format."""

from dataclasses import dataclass

import pytest
import torch

from sglang_ess.cpu.ops.rows import pack_fp8_rows
from sglang_ess.cpu.ops.sparse_mla import (
    _sparse_mla_kernel,
    apply_sink,
    sparse_mla,
    sparse_mla_reference,
)

FORMATS = {
    "fp8": lambda latent, rope: pack_fp8_rows(latent, rope),
    "bf16": lambda latent, rope: torch.cat([latent, rope], -1).bfloat16(),
    "fp32": lambda latent, rope: torch.cat([latent, rope], -1),
}


@dataclass(frozen=True)
class Case:
    queries: int
    heads: int
    topk: int
    scale: float = 0.1
    magnitude: float = 1.0
    rope: int = 64


CASES = [
    Case(16, 8, 128),
    Case(1, 1, 1),
    Case(3, 5, 17),  # nothing a multiple of the blocking
    Case(2, 128, 64),  # V3.2's heads
    Case(4, 8, 33, magnitude=300.0),  # scores past exp's range, so the peak matters
    Case(2, 3, 31, scale=0.0),
    Case(5, 3, 40, rope=0),  # GLM-5.3-Flash
]


def inputs(case, fmt, num_slots=500, seed=0):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(num_slots, 512, generator=g) * case.magnitude
    rope = torch.randn(num_slots, case.rope, generator=g) * case.magnitude
    query = torch.randn(case.queries, case.heads, 512 + case.rope, generator=g)
    q_nope, q_rope = query.split([512, case.rope], -1)
    slots = torch.randint(0, num_slots, (case.queries, case.topk), generator=g).int()
    return (q_nope, q_rope), FORMATS[fmt](latent, rope), slots


def assert_close(got, expected, magnitude=1.0):
    """float32 accumulation: 576 products a score, then exp; relative to the values' size."""
    out, lse = got
    ref_out, ref_lse = expected
    assert torch.equal(torch.isinf(lse), torch.isinf(ref_lse))
    finite = torch.isfinite(ref_lse)
    tolerance = 2e-6 * max(1.0, float(ref_lse[finite].abs().max())) if finite.any() else 0
    assert (lse[finite] - ref_lse[finite]).abs().max().item() <= tolerance if finite.any() else True
    # A score off by e changes a weight by the factor exp(e); scores grow with magnitude**2.
    assert (out - ref_out).abs().max() <= 4e-6 * magnitude * max(1.0, magnitude * 20)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, fmt):
    q, rows, slots = inputs(case, fmt)
    got = sparse_mla(*q, rows, slots, case.scale)
    assert_close(got, sparse_mla_reference(*q, rows, slots, case.scale), case.magnitude)


def test_bfloat16_queries_round_only_the_result():
    """bf16 in and out is the float32 result of the same bf16 values, rounded once."""
    q, rows, slots = inputs(Case(7, 5, 40), "fp8")
    q = [part.bfloat16().transpose(0, 1).contiguous().transpose(0, 1) for part in q]
    out, lse = sparse_mla(*q, rows, slots, 0.1)
    wide, wide_lse = sparse_mla(*(part.float() for part in q), rows, slots, 0.1)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide.bfloat16())
    assert torch.equal(lse, wide_lse)


@pytest.mark.parametrize("fmt", FORMATS)
def test_pads_anywhere_and_queries_without_rows(fmt):
    case = Case(6, 4, 40)
    q, rows, slots = inputs(case, fmt)
    slots[0] = -1
    slots[1, ::2] = -1
    slots[2, 5:] = -1
    slots[3, :-1] = -1
    out, lse = sparse_mla(*q, rows, slots, 0.1)
    assert_close((out, lse), sparse_mla_reference(*q, rows, slots, 0.1))
    assert (out[0] == 0).all() and (lse[0] == float("-inf")).all()


def test_output_is_written_whole():
    """Poisoned output buffers, as memory recycled from a right answer would hide a hole."""
    q, rows, slots = inputs(Case(5, 3, 20), "fp32")
    slots[2] = -1
    out = torch.full((5, 3, 512), float("nan"))
    lse = torch.full((5, 3), float("nan"))
    u8 = rows.view(torch.uint8).numpy()
    queries = [part.numpy() for part in q]
    _sparse_mla_kernel(*queries, u8, 2, slots.numpy(), 0.1, out.numpy(), lse.numpy())
    assert not out.isnan().any() and not lse.isnan().any()


def test_merging_halves_by_lse_is_the_whole():
    """What makes attention in passes (a hot tier smaller than the union) possible."""
    q, rows, slots = inputs(Case(4, 8, 96), "bf16")
    whole, lse = sparse_mla(*q, rows, slots, 0.1)
    parts = [sparse_mla(*q, rows, half.contiguous(), 0.1) for half in slots.split(48, dim=1)]
    merged_lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(o * torch.exp(part_lse - merged_lse).unsqueeze(-1) for o, part_lse in parts)
    assert torch.allclose(merged, whole, atol=2e-6) and torch.allclose(merged_lse, lse, atol=2e-6)


def test_a_query_does_not_depend_on_its_batch():
    q, rows, slots = inputs(Case(9, 8, 50), "fp8")
    whole, _ = sparse_mla(*q, rows, slots, 0.1)
    for t in (0, 4, 8):
        alone, _ = sparse_mla(
            *(part[t : t + 1] for part in q), rows, slots[t : t + 1].contiguous(), 0.1
        )
        assert torch.equal(alone[0], whole[t])


def test_shapes_are_checked():
    q, rows, slots = inputs(Case(2, 2, 8), "fp8")
    with pytest.raises(ValueError, match=r"\(500, 600\) of torch.uint8"):
        sparse_mla(*q, rows[:, :600].contiguous(), slots, 0.1)
    with pytest.raises(TypeError, match="float16"):
        sparse_mla(*(part.half() for part in q), rows, slots, 0.1)
    with pytest.raises(ValueError, match="int64"):
        sparse_mla(*q, rows, slots.long(), 0.1)
    with pytest.raises(ValueError, match=r"slots \[2, K\]"):
        sparse_mla(*q, rows, slots[:1], 0.1)


def test_a_sink_is_one_more_logit_whose_value_is_zero():
    case = Case(3, 2, 8)
    queries, rows, slots = inputs(case, "fp32")
    slots[0, :] = -1  # of this query the sink takes all
    out, lse = sparse_mla(*queries, rows, slots, case.scale)
    sink = torch.tensor([0.5, -2.0])
    share = (lse.double().exp() / (lse.double().exp() + sink.double().exp())).unsqueeze(-1)
    torch.testing.assert_close(apply_sink(out, lse, sink).double(), out.double() * share)
    assert not apply_sink(out, lse, sink)[0].any()
