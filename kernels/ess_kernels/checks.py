"""What the kernel files share: who can run a kernel, rows as words, checks, the copy of a step."""

import torch
import triton
import triton.language as tl

ACCESS_BYTES = 16  # the widest load or store of a thread
LINE_BYTES = 128  # what a warp reads over PCIe in one request at most (L2 line)
WORD_BYTES = 8
LINE_WORDS: tl.constexpr = tl.constexpr(LINE_BYTES // WORD_BYTES)
ACCESS_WORDS: tl.constexpr = tl.constexpr(ACCESS_BYTES // WORD_BYTES)
COPY_WARPS = 8
STEP_WORDS = 2048  # of all rows a program copies at once: four 16-byte accesses a thread in flight


def interpreted() -> bool:
    """Is Triton's interpreter on, so that kernels run on CPU tensors?

    Triton reads the setting when a kernel is defined: it has to be set before the import.
    """
    return bool(triton.knobs.runtime.interpret)


def words(rows: torch.Tensor, name: str) -> torch.Tensor:
    """rows [n, ...] of any dtype as [n, row bytes // 8] int64, the same memory.

    Each row must be dense; rows may lie apart (stride a multiple of 16 bytes).

    Raises: ValueError, naming `name`, if a row is not a multiple of 16 bytes, is not dense, or does
    not start at a multiple of 16 bytes.
    """
    row_bytes = rows.shape[1:].numel() * rows.itemsize
    if row_bytes == 0 or row_bytes % ACCESS_BYTES:
        raise ValueError(
            f"a row of {name} must be a multiple of {ACCESS_BYTES} bytes: got {row_bytes}."
        )
    if not rows[:1].is_contiguous():
        raise ValueError(
            f"a row of {name} must be dense: got shape {list(rows.shape)}, "
            f"strides {list(rows.stride())}."
        )
    for what, got in (("address", rows.data_ptr()), ("stride", rows.stride(0) * rows.itemsize)):
        if got % ACCESS_BYTES:
            raise ValueError(
                f"the {what} of {name} must be a multiple of {ACCESS_BYTES} bytes: got {got:#x}."
            )
    return rows.flatten(1).view(torch.int64)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
) -> None:
    """Refuse a tensor that is not of one of `dtypes`, of `shape` (None: any size), on `device`.

    Raises: ValueError with the name, what was expected and what was given.
    """
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(str, allowed))}: got {tensor.dtype}.")
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}]: got {list(tensor.shape)}.")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}: got {tensor.device}.")


def check_on_device(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that is not a CUDA tensor; under the interpreter the CPU is the device.

    Raises: ValueError.
    """
    if not (tensor.is_cuda or interpreted()):
        raise ValueError(
            f"{name} must be a CUDA tensor: got {tensor.device}. Without a GPU, set "
            "TRITON_INTERPRET=1 before the import."
        )


def check_reachable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that a kernel cannot read or write by address.

    CUDA memory and pinned host memory (one virtual address space, UVA) are reachable; under the
    interpreter all CPU memory is.

    Raises: ValueError.
    """
    if not (tensor.is_cuda or interpreted() or tensor.is_pinned()):
        raise ValueError(
            f"{name} must be CUDA memory or pinned host memory: got pageable {tensor.device} "
            "memory. Allocate it with pin_memory=True."
        )


def check_same_format(name: str, rows: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Refuse rows whose dtype or row size is not that of `like`.

    Raises: ValueError.
    """
    ours, theirs = (f"{list(t.shape[1:])} {t.dtype}" for t in (rows, like))
    if rows.dtype != like.dtype or rows.shape[1:].numel() != like.shape[1:].numel():
        raise ValueError(f"rows of {name} must be like those of {like_name}, {theirs}: got {ours}.")


def check_programs(max_programs: int) -> None:
    """Refuse a grid of no programs. Raises: ValueError."""
    if max_programs < 1:
        raise ValueError(f"max_programs must be at least 1: got {max_programs}.")


def copy_tile(row_words: int) -> dict:
    """Constexprs of a kernel that calls copy_step: row and block in words, rows at once."""
    block_words = triton.next_power_of_2(row_words + LINE_WORDS.value - ACCESS_WORDS.value)
    return {
        "ROW_WORDS": row_words,
        "BLOCK_WORDS": block_words,
        "ROWS_PER_STEP": max(1, STEP_WORDS // block_words),
    }


def line_lead(rows: torch.Tensor) -> int:
    """Words from the line in which `rows` starts to its first row."""
    return rows.data_ptr() % LINE_BYTES // WORD_BYTES


@triton.jit
def copy_step(
    source_ptr,  # [*, SOURCE_STRIDE] int64
    source_rows,  # [r] int64
    target_ptr,  # [*, TARGET_STRIDE] int64
    target_rows,  # [r] int64
    wanted,  # [r] bool: rows to copy
    shift,  # [r] int64: words by which the row's first word trails the start of a line
    SOURCE_STRIDE: tl.constexpr,
    TARGET_STRIDE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """target[target_rows[i]] = source[source_rows[i]] where wanted[i]; all loads precede a store.

    Lane 0 of a warp takes the start of a line rather than of the row: a 656-byte row starts
    anywhere in a line, and a warp that straddles lines asks PCIe for each line's part.
    """
    lane = tl.arange(0, BLOCK_WORDS)[None, :]
    word = lane - shift[:, None]
    # Hints for what the analysis cannot see through the shift: words in pairs of 16 aligned bytes.
    inside = wanted[:, None] & (word >= 0) & (word < ROW_WORDS)
    inside = tl.max_constancy(inside, [1, ACCESS_WORDS])
    source = source_rows[:, None] * SOURCE_STRIDE + word
    source = tl.max_contiguous(tl.multiple_of(source, [1, ACCESS_WORDS]), [1, ACCESS_WORDS])
    target = target_rows[:, None] * TARGET_STRIDE + word
    target = tl.max_contiguous(tl.multiple_of(target, [1, ACCESS_WORDS]), [1, ACCESS_WORDS])
    # .cg: a row is read once, so it need not pass through L1.
    values = tl.load(source_ptr + source, mask=inside, other=0, cache_modifier=".cg")
    tl.store(target_ptr + target, values, mask=inside)
