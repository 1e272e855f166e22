"""sparse_mla against its float64 definition and the CPU platform's kernel, every row format."""

from dataclasses import dataclass

import pytest
import torch

from ess_kernels import sparse_mla as module
from ess_kernels.sparse_mla import choose_splits, sparse_mla, sparse_mla_reference
from sglang_ess.cpu.ops.rows import pack_fp8_rows
from sglang_ess.cpu.ops.sparse_mla import sparse_mla as cpu_sparse_mla
from tests.support.triton_compile import compile_for_hopper

FORMATS = {
    "fp8": pack_fp8_rows,
    "bf16": lambda latent, rope: torch.cat([latent, rope], -1).bfloat16(),
    "fp32": lambda latent, rope: torch.cat([latent, rope], -1),
}
# (rows, dtype of q)
KINDS = [
    ("fp8", torch.bfloat16),
    ("bf16", torch.bfloat16),
    ("fp8", torch.float32),
    ("bf16", torch.float32),
    ("fp32", torch.float32),
]
HALF_BF16_STEP = 2.0**-9  # the largest relative error of one rounding to bfloat16


@dataclass(frozen=True)
class Case:
    queries: int
    heads: int
    columns: int
    lengths: tuple[int, ...] | None = None
    pads: float = 0.2
    scale: float = 0.05
    magnitude: float = 1.0


CASES = [
    Case(1, 1, 1, pads=0),
    Case(1, 128, 36, pads=0.1),  # V3.2's heads, one request: two blocks of heads
    Case(4, 16, 77),
    Case(5, 16, 67, lengths=(67, 0, 1, 33, 64)),
    Case(3, 20, 40, lengths=(45, 40, 39)),  # longer than the list; heads no power of two
    Case(2, 3, 33, pads=1.0),  # nothing but pads
    Case(2, 5, 50, magnitude=40.0),  # scores past exp's range, so the peak matters
]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill what the operation allocates with NaN, so that unwritten output cannot pass."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        empty = new_empty(self, *size, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def inputs(case, kind, device, num_rows=90, seed=0):
    """(q, rows, indices, lengths); row 0, which a pad might read, is NaN."""
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(num_rows, 512, generator=g) * case.magnitude
    rope = torch.randn(num_rows, 64, generator=g) * case.magnitude
    q = torch.randn(case.queries, case.heads, 576, generator=g).to(kind[1])
    indices = torch.randint(1, num_rows, (case.queries, case.columns), generator=g).int()
    indices[torch.rand(indices.shape, generator=g) < case.pads] = -1
    rows = FORMATS[kind[0]](latent, rope)
    rows[0] = 0xFF if kind[0] == "fp8" else float("nan")
    lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32)
    return tuple(x if x is None else x.to(device) for x in (q, rows, indices, lengths))


def tolerances(q, rows, expected_out, expected_lse):
    """Tolerances of (out, lse), from the arithmetic.

    float32: sums of 576 products and of the list, relative to the values. bfloat16: the products
    are exact in float32, so lse is off by no more than that; out has its weights rounded once
    (they sum to one, so at most a half step of the largest value) and itself once.
    """
    values = module.unpack_rows(rows[1:])[:, :512].abs().max()
    lse = 1e-5 * expected_lse.masked_fill(expected_lse.isinf(), 0).abs().max().clamp_min(1.0)
    out = 2 * values * lse + 1e-6
    if q.dtype == torch.bfloat16:
        out = out + HALF_BF16_STEP * (values + expected_out.abs())
    return out, lse


def assert_close(got, q, rows, expected):
    out, lse = got
    expected_out, expected_lse = expected
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert torch.equal(lse == float("-inf"), expected_lse == float("-inf"))
    assert not out.isnan().any() and not lse.isnan().any()
    out_tolerance, lse_tolerance = tolerances(q, rows, expected_out, expected_lse)
    finite = expected_lse.isfinite()
    assert ((out.double() - expected_out).abs() <= out_tolerance).all()
    assert ((lse - expected_lse)[finite].abs() <= lse_tolerance).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}".lower())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, kind, device):
    q, rows, indices, lengths = inputs(case, kind, device)
    splits = (1, 3)
    if case.lengths:  # 4 parts: more than there are blocks of columns
        splits = (1, 2, 3, 4) if kind[1] == torch.bfloat16 else (1, 4)
    got = [sparse_mla(q, rows, indices, case.scale, lengths, n) for n in splits]
    expected = sparse_mla_reference(q, rows, indices, case.scale, lengths)
    for one in got:
        assert_close(one, q, rows, expected)


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: f"{kind[0]}-{kind[1]}".lower())
def test_matches_the_cpu_platforms_kernel(kind, device):
    case = Case(4, 8, 60)
    q, rows, indices, _ = inputs(case, kind, device, seed=3)
    got = sparse_mla(q, rows, indices, case.scale, None, 2)
    expected = cpu_sparse_mla(
        *q.cpu().float().split([512, 64], -1), rows.cpu(), indices.cpu(), case.scale
    )
    assert_close(got, q, rows, tuple(x.double().to(device) for x in expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_e4m3_value_is_read_right(dtype, device):
    """Attention to a single row returns that row, for each finite e4m3 byte."""
    bytes_ = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    rows = pack_fp8_rows(torch.zeros(4, 512), torch.zeros(4, 64))
    rows[:, :512] = bytes_.repeat(3)[:512]
    rows[:, 512:528] = torch.tensor([0.5, 2.0, 1.0, 0.25]).view(torch.uint8)
    q = torch.zeros(4, 1, 576, dtype=dtype)
    indices = torch.arange(4, dtype=torch.int32)[:, None]
    out, lse = sparse_mla(*(x.to(device) for x in (q, rows, indices)), 1.0)
    expected = module.unpack_rows(rows)[:, None, :512]
    # Powers of two scale without rounding; the interpreter reads a zero byte as 2**-126.
    assert (out.cpu().double() - expected).abs().max() <= 2.0**-124
    assert (lse == 0).all()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}".lower())
def test_parts_merged_by_sglang_are_the_whole(kind, device):
    """Dual attention: SGLang's kernel merges the attention to hits with that to misses."""
    merge_state = pytest.importorskip("sglang.kernels.ops.attention.merge_state")
    merge_state_triton = merge_state.merge_state_triton
    case = Case(4, 8, 70, pads=0.3)
    q, rows, indices, _ = inputs(case, kind, device, seed=5)
    indices[2, :35] = -1  # one side without rows
    whole = sparse_mla_reference(q, rows, indices, case.scale)
    hits, misses = indices.clone(), indices.clone()
    hits[:, 35:], misses[:, :35] = -1, -1
    parts = [sparse_mla(q, rows, part, case.scale) for part in (hits, misses)]
    (out_a, lse_a), (out_b, lse_b) = parts
    # The interpreter has no bfloat16 arithmetic, so SGLang's kernel gets float32.
    out, lse = merge_state_triton(out_a.float(), lse_a, out_b.float(), lse_b)
    if q.dtype == torch.bfloat16:  # each part is rounded once more than the whole
        values = module.unpack_rows(rows[1:])[:, :512].abs().max()
        assert ((out - whole[0]).abs() <= 2.1 * HALF_BF16_STEP * values).all()
        assert ((lse - whole[1]).abs() <= 1e-5 * whole[1].abs().max()).all()
    else:
        assert_close((out, lse), q, rows, whole)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}".lower())
@pytest.mark.parametrize("change", ["row", "drop", "length"])
def test_one_wrong_row_exceeds_the_tolerance(change, kind, device):
    case = Case(2, 4, 40, pads=0, lengths=(40, 40))
    q, rows, indices, lengths = inputs(case, kind, device, seed=7)
    expected = sparse_mla_reference(q, rows, indices, case.scale, lengths)
    if change == "row":
        indices[1, 17] = indices[1, 17] % 80 + 1
    elif change == "drop":
        indices[1, 17] = -1
    else:
        lengths[1] = 39
    got = sparse_mla(q, rows, indices, case.scale, lengths, 2)
    with pytest.raises(AssertionError):
        assert_close(got, q, rows, expected)


def test_strided_queries_and_no_queries(device):
    case = Case(3, 4, 20)
    q, rows, indices, _ = inputs(case, ("bf16", torch.float32), device)
    strided = q.transpose(0, 1).contiguous().transpose(0, 1)
    got = sparse_mla(strided, rows, indices, case.scale)
    assert_close(got, q, rows, sparse_mla_reference(q, rows, indices, case.scale))
    out, lse = sparse_mla(q[:0], rows, indices[:0], case.scale)
    assert out.shape == (0, 4, 512) and lse.shape == (0, 4)
    out, lse = sparse_mla(q, rows, indices[:, :0], case.scale)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_splits_follow_from_shapes():
    sms = 132
    assert choose_splits(1, 128, 2048, sms) == 32  # 64 programs of 2 blocks
    assert choose_splits(16, 128, 2048, sms) == 4  # 128 programs, one wave
    assert choose_splits(160, 128, 2048, sms) == 2  # 5 half waves rather than 3 whole ones
    assert choose_splits(66, 128, 2048, sms) == 1  # one full wave as it is
    assert choose_splits(160, 16, 32, sms) == 1  # one block: nothing to split
    assert choose_splits(4, 16, 0, sms) == 1
    assert choose_splits(16, 128, 2048, 1) == 1


def test_refusals(device):
    q, rows, indices, _ = inputs(Case(2, 2, 8), ("fp8", torch.bfloat16), device)
    with pytest.raises(ValueError, match=r"rows must have shape \[any, 656\]: got \[90, 640\]"):
        sparse_mla(q, rows[:, :640].contiguous(), indices, 0.1)
    with pytest.raises(ValueError, match="rows must be torch.uint8 or torch.bfloat16"):
        sparse_mla(q, torch.zeros(4, 576, device=device), indices, 0.1)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        sparse_mla(q, rows[::2], indices, 0.1)
    with pytest.raises(ValueError, match="q must be"):
        sparse_mla(q.half(), rows, indices, 0.1)
    with pytest.raises(ValueError, match="last stride of 1"):
        sparse_mla(q.transpose(0, 2).contiguous().transpose(0, 2), rows, indices, 0.1)
    with pytest.raises(ValueError, match="indices must be torch.int32"):
        sparse_mla(q, rows, indices.long(), 0.1)
    with pytest.raises(ValueError, match="lengths must have shape"):
        sparse_mla(q, rows, indices, 0.1, torch.zeros(3, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="num_splits must be at least 1"):
        sparse_mla(q, rows, indices, 0.1, None, 0)


# Heads of a program, fp8 rows -> (spilled bytes, shared memory) as compiled by Triton 3.8; another
# compiler may spill a little more.
SPILLS_ALLOWED = {(64, True): 256, (64, False): 64}


@pytest.mark.parametrize(("block_h", "fp8"), SPILLS_ALLOWED, ids=str)
def test_fits_an_sm_of_hopper(block_h, fp8):
    rows = "*u8" if fp8 else "*bf16"
    signature = {
        "q_ptr": "*bf16",
        "latent_ptr": rows,
        "scale_ptr": "*fp32" if fp8 else rows,
        "rope_ptr": "*bf16",
        "indices_ptr": "*i32",
        "lengths_ptr": "*i32",
        "out_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "scale_log2": "fp32",
        "q_stride_t": "i32",
        "q_stride_h": "i32",
        "num_heads": "i32",
        "num_columns": "i32",
    }
    aligned = [name for name, kind in signature.items() if kind != "fp32"]
    asm = compile_for_hopper(
        module._sparse_mla_kernel,
        signature,
        {
            "HAS_LENGTHS": True,
            "FP8": fp8,
            "IEEE": False,
            "EMULATE": False,
            "SPLITS": 4,
            "BLOCK_H": block_h,
            "BLOCK_K": module.BLOCK_K,
        },
        aligned,
        num_warps=module.WARPS[block_h],
        num_stages=module.NUM_STAGES,
    )
    print(block_h, fp8, {k: asm[k] for k in ("registers", "spill_bytes", "shared_bytes")})
    assert asm["spill_bytes"] <= SPILLS_ALLOWED[block_h, fp8]
    assert asm["shared_bytes"] * module.PROGRAMS_PER_SM[block_h] <= 227 * 1024
    tensor_core = "wgmma.mma_async" if block_h == 64 else "mma.sync"
    assert tensor_core in asm["ptx"]
    assert ".v4" in asm["ptx"] or "cp.async.cg" in asm["ptx"]  # 16 bytes a thread
