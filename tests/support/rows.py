"""Rows of random bits and their bytes, for tests of copies."""

import torch

FP8 = ((656,), torch.uint8)
BF16 = ((576,), torch.bfloat16)


def random_rows(num: int, row: tuple, generator) -> torch.Tensor:
    """num rows of (shape, dtype): random bits, so that bf16 rows hold NaN patterns."""
    shape, dtype = row
    width = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (num, width), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(num, *shape)


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """rows [n, ...] as [n, row bytes] uint8 on the host."""
    return rows.cpu().flatten(1).view(torch.uint8)


def sparse_rows(path, num: int, width: int, device) -> torch.Tensor:
    """Rows of zeros; on a CPU only those that are touched take memory."""
    if device.type == "cuda":
        return torch.zeros((num, width), dtype=torch.uint8, device=device)
    mapped = torch.from_file(str(path), shared=True, size=num * width, dtype=torch.uint8)
    return mapped.view(num, width)
