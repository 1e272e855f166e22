"""Byte formats of latent rows and index keys, against arithmetic and SGLang's own kernels."""

import subprocess
import sys

import pytest
import torch

from sglang_ess.cpu.ops import rows
from sglang_ess.layout import PAGE_SLOTS, index_page_bytes


def spread(*shape, seed=0):
    """Values over six decades, so that every code and subnormal occurs."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.logspace(-4, 2, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )


def nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Nearest finite e4m3 value, ties to an even code: by search over all 256 codes."""
    codes = torch.arange(127, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    magnitude = values.double().abs().clamp(max=rows.FP8_MAX)
    distance = (magnitude.unsqueeze(-1) - table).abs()
    best = distance.min(dim=-1, keepdim=True).values
    tied = (distance == best).int() * (2 - codes.int() % 2)
    return table[tied.argmax(-1)] * values.sign()


def test_fp8_row_is_nearest_code_times_scale():
    latent, rope = spread(40, 512), spread(40, 64, seed=1)
    packed = rows.pack_fp8_rows(latent, rope)
    assert packed.shape == (40, 656) and packed.dtype == torch.uint8
    groups = latent.view(40, 4, 128)
    scale = groups.abs().amax(-1) / 448
    expected = nearest_e4m3(groups * (1 / scale).unsqueeze(-1)).float() * scale.unsqueeze(-1)
    unpacked = rows.unpack_rows(packed)
    assert torch.equal(unpacked[:, :512], expected.reshape(40, 512))
    assert torch.equal(unpacked[:, 512:], rope.bfloat16().float())
    error = (unpacked[:, :512] - latent).view(40, 4, 128).abs().amax(-1)
    assert (error <= scale * 16 * 1.0001).all()  # half of e4m3's largest step, 32


def test_a_row_without_rope_is_the_first_part_of_one_with():
    latent, rope = spread(40, 512), spread(40, 64, seed=1)
    packed, short = rows.pack_fp8_rows(latent, rope), rows.pack_fp8_rows(latent, rope[:, :0])
    assert torch.equal(short, packed[:, :528])
    assert torch.equal(rows.unpack_rows(short), rows.unpack_rows(packed)[:, :512])


def test_zero_group_stays_zero():
    latent = torch.zeros(2, 512)
    latent[1, 128:256] = 1.0
    unpacked = rows.unpack_rows(rows.pack_fp8_rows(latent, torch.zeros(2, 64)))
    assert torch.equal(unpacked[:, :512], latent)


def test_other_formats_unpack_exactly():
    values = spread(9, 576)
    assert torch.equal(rows.unpack_rows(values), values)
    assert torch.equal(rows.unpack_rows(values.bfloat16()), values.bfloat16().float())
    with pytest.raises(TypeError, match="float16"):
        rows.unpack_rows(values.half())


@pytest.mark.parametrize("fp32", [False, True])
def test_index_keys_land_in_their_page_and_nowhere_else(fp32):
    num_pages, keys = 7, spread(50, 128)
    pages = torch.full((num_pages, index_page_bytes(fp32)), 0x5A, dtype=torch.uint8)
    before = pages.clone()
    slots = torch.randperm(num_pages * PAGE_SLOTS, generator=torch.Generator().manual_seed(3))[:50]
    rows.store_index_keys(pages, slots, keys)
    loaded = rows.load_index_keys(pages, slots)
    if fp32:
        assert torch.equal(loaded, keys)
    else:
        codes, scale = rows.quantize_index(keys, power_of_two=False)
        assert torch.equal(loaded, codes.float() * scale.unsqueeze(-1))
    others = torch.ones(num_pages * PAGE_SLOTS, dtype=torch.bool)
    others[slots] = False
    others = others.nonzero().flatten()
    assert torch.equal(rows.load_index_keys(pages, others), rows.load_index_keys(before, others))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantize_index(power_of_two):
    x = spread(60, 128)
    codes, scale = rows.quantize_index(x, power_of_two)
    smallest = x.abs().amax(-1).clamp_min(1e-4) / 448
    if power_of_two:
        assert torch.equal(torch.frexp(scale).mantissa, torch.full((60,), 0.5))
        assert ((scale >= smallest) & (scale < smallest * 2)).all()
    else:
        assert torch.equal(scale, smallest)
    assert torch.equal(codes.double(), nearest_e4m3(x / scale.unsqueeze(-1)))


UPSTREAM = """
import torch
from sglang.kernels.ops.quantization.act_quant_triton import act_quant
from sglang.kernels.ops.quantization.dsa_quant_k_cache import quantize_k_cache
values, keys, path = *torch.load({inputs!r}), {outputs!r}
packed = quantize_k_cache(values.view(-1, 1, 1, 576)).view(-1, 656).view(torch.uint8)
codes, scale = act_quant(keys, 128, "ue8m0")
torch.save((packed, codes.view(torch.uint8), scale[:, 0]), path)
"""


@pytest.mark.slow
def test_matches_sglangs_triton_kernels(tmp_path):
    """SGLang's quantisers, run by Triton's interpreter. It rounds ties upwards and loses the
    carry into the next exponent (124 becomes 64), so codes are compared off those values."""
    values, keys = spread(64, 576).bfloat16(), spread(64, 128, seed=2).bfloat16()
    inputs, outputs = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save((values, keys), inputs)
    code = UPSTREAM.format(inputs=str(inputs), outputs=str(outputs))
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"TRITON_INTERPRET": "1"}, timeout=300
    )
    packed, codes, scale = torch.load(outputs)
    ours = rows.pack_fp8_rows(values[:, :512], values[:, 512:])
    assert torch.equal(ours[:, 512:], packed[:, 512:])  # scales and rope, bit for bit
    assert (ours[:, :512] == packed[:, :512]).float().mean() > 0.97
    our_codes, our_scale = rows.quantize_index(keys, power_of_two=True)
    assert torch.equal(our_scale, scale)
    assert (our_codes.view(torch.uint8) == codes).float().mean() > 0.93
