"""Pack and unpack latent rows and index keys. sglang_ess/layout.py has their byte formats."""

import torch

from sglang_ess.layout import (
    INDEX_DIM,
    LATENT_DIM,
    PAGE_SLOTS,
    SCALE_GROUP,
    fp8_row_bytes,
    index_page_bytes,
)

FP8_MAX = 448.0
# SGLang's fused index-key store clamps the group's maximum here before dividing
# (kernels/jit/csrc: fused_store_indexer_cache); act_quant does the same for queries.
MIN_AMAX = 1e-4

# Row formats as the numba kernels know them.
FORMAT_FP8, FORMAT_BF16, FORMAT_FP32 = 0, 1, 2
_FORMAT_OF_DTYPE = {
    torch.uint8: FORMAT_FP8,
    torch.bfloat16: FORMAT_BF16,
    torch.float32: FORMAT_FP32,
}


def row_format(rows: torch.Tensor) -> int:
    """The format code of a latent row tensor. Raises: TypeError for a dtype without a format."""
    try:
        return _FORMAT_OF_DTYPE[rows.dtype]
    except KeyError:
        raise TypeError(
            f"latent rows must be uint8 (fp8), bfloat16 or float32: got {rows.dtype}."
        ) from None


def pack_fp8_rows(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Quantise latent rows: latent [T, 512], rope [T, 64] -> [T, 656] uint8.

    Without rope ([T, 0]) a row is its first 528 bytes.

    Scale of a group = its largest magnitude / 448; a group of zeros keeps scale 0 and
    bytes 0 (upstream divides by zero there; the NaN is clamped to 448 or -448, times scale 0).
    Source: SGLang's dsa_quant_k_cache.
    """
    num_tokens = latent.shape[0]
    groups = latent.float().view(num_tokens, -1, SCALE_GROUP)
    scales = groups.abs().amax(dim=-1) / FP8_MAX
    inverse = torch.where(scales > 0, 1.0 / scales, torch.zeros_like(scales))
    packed = torch.empty(num_tokens, fp8_row_bytes(rope.shape[1]), dtype=torch.uint8)
    packed[:, :LATENT_DIM] = (
        (groups * inverse.unsqueeze(-1))
        .clamp(-FP8_MAX, FP8_MAX)
        .to(torch.float8_e4m3fn)
        .view(num_tokens, LATENT_DIM)
        .view(torch.uint8)
    )
    packed[:, LATENT_DIM : LATENT_DIM + 16] = scales.contiguous().view(torch.uint8)
    packed[:, LATENT_DIM + 16 :] = rope.to(torch.bfloat16).contiguous().view(torch.uint8)
    return packed


def unpack_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows of any format as [T, 576] float32, exactly; [T, 512] without rope.

    The reference for the kernels.
    """
    if row_format(rows) != FORMAT_FP8:
        return rows.float()
    num_tokens = rows.shape[0]
    latent = rows[:, :LATENT_DIM].contiguous().view(torch.float8_e4m3fn).float()
    scales = rows[:, LATENT_DIM : LATENT_DIM + 16].contiguous().view(torch.float32)
    rope = rows[:, LATENT_DIM + 16 :].contiguous().view(torch.bfloat16).float()
    latent = latent.view(num_tokens, -1, SCALE_GROUP) * scales.unsqueeze(-1)
    return torch.cat([latent.view(num_tokens, LATENT_DIM), rope], dim=-1)


def quantize_index(x: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Index keys or queries [..., 128] -> (e4m3 of the same shape, fp32 scale [...]).

    power_of_two: round the scale up to a power of two (DeepSeek's ue8m0). SGLang on CUDA does so
    for queries (act_quant) and not for keys (fused_store_indexer_cache).
    """
    values = x.float()
    scale = values.abs().amax(dim=-1).clamp_min(MIN_AMAX) / FP8_MAX
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    quantised = (values / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return quantised.to(torch.float8_e4m3fn), scale


def store_index_keys(
    pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, power_of_two: bool = False
) -> None:
    """Write index keys into their pages.

    pages [num_pages, page bytes] uint8, written; the page size tells the format
    slots [T] int64; keys [T, 128] floating point
    power_of_two: of the fp8 scales; SGLang's pooled keys have such
    """
    page, offset = slots // PAGE_SLOTS, slots % PAGE_SLOTS
    if pages.shape[1] == index_page_bytes(fp32=True):
        pages.view(torch.float32).view(-1, PAGE_SLOTS, INDEX_DIM)[page, offset] = keys.float()
        return
    quantised, scale = quantize_index(keys, power_of_two)
    key_bytes = PAGE_SLOTS * INDEX_DIM
    pages[:, :key_bytes].view(-1, PAGE_SLOTS, INDEX_DIM)[page, offset] = quantised.view(torch.uint8)
    pages[:, key_bytes:].view(torch.float32)[page, offset] = scale


def load_index_keys(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Index keys of the slots [T] -> [T, 128] float32, scale applied."""
    page, offset = slots // PAGE_SLOTS, slots % PAGE_SLOTS
    if pages.shape[1] == index_page_bytes(fp32=True):
        return pages.view(torch.float32).view(-1, PAGE_SLOTS, INDEX_DIM)[page, offset]
    key_bytes = PAGE_SLOTS * INDEX_DIM
    keys = pages[:, :key_bytes].view(-1, PAGE_SLOTS, INDEX_DIM)[page, offset]
    scale = pages[:, key_bytes:].view(torch.float32)[page, offset]
    return keys.view(torch.float8_e4m3fn).float() * scale.unsqueeze(-1)
