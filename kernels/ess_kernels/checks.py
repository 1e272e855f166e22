"""Shared by the kernel files: rows as int64 words, checks of tensors, a copy of several rows."""

import torch
import triton
import triton.language as tl

ACCESS_BYTES = 16  # the widest load or store of a thread
LINE_BYTES = 128  # an L2 line: the most that a warp reads over PCIe in one request
WORD_BYTES = 8
LINE_WORDS: tl.constexpr = tl.constexpr(LINE_BYTES // WORD_BYTES)
ACCESS_WORDS: tl.constexpr = tl.constexpr(ACCESS_BYTES // WORD_BYTES)
COPY_WARPS = 8
STEP_WORDS = 2048  # copied by a program at once: a thread has four 16-byte accesses in flight


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on CPU tensors.

    Triton reads TRITON_INTERPRET when a kernel is defined, so it must be set before the import.
    """
    return bool(triton.knobs.runtime.interpret)


def words(rows: torch.Tensor, name: str) -> torch.Tensor:
    """View rows [n, ...] of any dtype as [n, row bytes // 8] int64.

    Each row must be dense. Rows may lie apart, by a multiple of 16 bytes.
    Raises: ValueError, naming `name`, if a row's size, address or stride is not a multiple of 16
    bytes, or if a row is not dense.
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
    """Check dtype, shape (None: any size) and, if given, device of a tensor.

    Raises: ValueError with the name, the rule and the value.
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
    """Check that a kernel can run on this tensor's device; the interpreter runs on the CPU too.

    Raises: ValueError if it cannot.
    """
    if not (tensor.is_cuda or interpreted()):
        raise ValueError(
            f"{name} must be a CUDA tensor: got {tensor.device}. Without a GPU, set "
            "TRITON_INTERPRET=1 before the import."
        )


def check_reachable(name: str, tensor: torch.Tensor) -> None:
    """Check that a kernel can read and write this tensor by address.

    A GPU reaches CUDA memory and pinned host memory, which share one virtual address space (UVA).
    The interpreter reaches all CPU memory.
    Raises: ValueError if it cannot.
    """
    if not (tensor.is_cuda or interpreted() or tensor.is_pinned()):
        raise ValueError(
            f"{name} must be CUDA memory or pinned host memory: got pageable {tensor.device} "
            "memory. Allocate it with pin_memory=True."
        )


def check_same_format(name: str, rows: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Check that rows have the dtype and the row size of `like`. Raises: ValueError if not."""
    ours, theirs = (f"{list(t.shape[1:])} {t.dtype}" for t in (rows, like))
    if rows.dtype != like.dtype or rows.shape[1:].numel() != like.shape[1:].numel():
        raise ValueError(f"rows of {name} must be like those of {like_name}, {theirs}: got {ours}.")


def check_programs(max_programs: int) -> None:
    """Check that a grid has a program. Raises: ValueError if not."""
    if max_programs < 1:
        raise ValueError(f"max_programs must be at least 1: got {max_programs}.")


def copy_tile(row_words: int) -> dict[str, int]:
    """The constexprs of a kernel that calls copy_step for rows of `row_words` int64 words."""
    block_words = triton.next_power_of_2(row_words + LINE_WORDS.value - ACCESS_WORDS.value)
    return {
        "ROW_WORDS": row_words,
        "BLOCK_WORDS": block_words,
        "ROWS_PER_STEP": max(1, STEP_WORDS // block_words),
    }


def line_lead(rows: torch.Tensor) -> int:
    """Words from the start of the 128-byte line that holds the first row to that row."""
    return int(rows.data_ptr()) % LINE_BYTES // WORD_BYTES


@triton.jit
def publish():
    """Wait until other devices see the host rows that were stored so far.

    fence.acq_rel.sys in each thread, behind its stores. It also covers the stores of earlier
    launches of the stream (PTX ISA, memory consistency model: causality order is transitive).
    Without it the end of a kernel orders its stores for this device alone. The collective that
    other ranks wait for adds nothing: NCCL's LL protocols (src/device/prims_ll.h) and SGLang's
    one-shot all-reduce (sglang 0.5.23, kernels/jit/csrc/distributed/custom_all_reduce.cuh) send
    data that is its own flag by relaxed stores, with no fence, over NVLink. They may overtake
    posted writes on PCIe.
    Costs the round trip of a posted write, some 1 to 2 us; an estimate, not measured.
    """
    # Its result is not used: Triton's inline assembly must have one, and an argument.
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.b32 $0, $1;",
        "=r,r,~{memory}",
        [tl.program_id(0)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def copy_step(
    source_ptr,  # [*, SOURCE_STRIDE] int64
    source_rows,  # [r] int64
    target_ptr,  # [*, TARGET_STRIDE] int64
    target_rows,  # [r] int64
    wanted,  # [r] bool: rows to copy
    shift,  # [r] int64: words from the start of the line to the row's first word
    SOURCE_STRIDE: tl.constexpr,
    TARGET_STRIDE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """target[target_rows[i]] = source[source_rows[i]] where wanted[i]; all loads before any store.

    Lane 0 of a warp reads from the start of a line, not of the row. A 656-byte row starts anywhere
    in a line, and a warp whose accesses straddle lines sends one PCIe request for each of them.
    """
    lane = tl.arange(0, BLOCK_WORDS)[None, :]
    word = lane - shift[:, None]
    # Triton's analysis does not see through the shift: words come in aligned pairs of 16 bytes.
    inside = wanted[:, None] & (word >= 0) & (word < ROW_WORDS)
    inside = tl.max_constancy(inside, [1, ACCESS_WORDS])
    source = source_rows[:, None] * SOURCE_STRIDE + word
    source = tl.max_contiguous(tl.multiple_of(source, [1, ACCESS_WORDS]), [1, ACCESS_WORDS])
    target = target_rows[:, None] * TARGET_STRIDE + word
    target = tl.max_contiguous(tl.multiple_of(target, [1, ACCESS_WORDS]), [1, ACCESS_WORDS])
    # .cg skips L1: a row is read once.
    values = tl.load(source_ptr + source, mask=inside, other=0, cache_modifier=".cg")
    tl.store(target_ptr + target, values, mask=inside)
