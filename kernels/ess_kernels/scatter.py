"""scatter_rows: out[targets[i]] = rows[i] for every i with targets[i] >= 0.

It writes new rows to either tier. With `out` in device memory it fills hot rows. With `out` in
pinned host memory, GPU threads store over PCIe; neither a copy engine nor a CPU thread takes part.
Such stores are posted: programs do not wait for them. A later fetch by the same device, in stream
order, sees them. A reader on the CPU must wait for an event first, another device for publish().

Bytes moved: n x row bytes read and as many written; 4 or 8 bytes of targets per row.
"""

import torch
import triton
import triton.language as tl

from ess_kernels.checks import (
    COPY_WARPS,
    LINE_WORDS,
    check_on_device,
    check_programs,
    check_reachable,
    check_same_format,
    check_tensor,
    copy_step,
    copy_tile,
    interpreted,
    line_lead,
    publish,
    words,
)

MAX_PROGRAMS = 24  # as in fetch.py, whose arithmetic says what the link needs; not by a sweep


@triton.jit(do_not_specialize=["num_rows", "lead"])
def _scatter_kernel(
    rows_ptr,  # [num_rows, ROWS_STRIDE] int64
    targets_ptr,  # [num_rows] int32 or int64
    out_ptr,  # [m, OUT_STRIDE] int64, device or host memory
    num_rows,
    lead,  # line_lead(out)
    ROWS_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    ROWS_PER_STEP: tl.constexpr,
    PUBLISHES: tl.constexpr,
):
    share = tl.cdiv(num_rows, tl.num_programs(0))
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, num_rows)
    for base in range(first, end, ROWS_PER_STEP):
        source = base + tl.arange(0, ROWS_PER_STEP)
        # int64: a target times the words of a row exceeds 2^31
        target = tl.load(targets_ptr + source, mask=source < end, other=-1).to(tl.int64)
        shift = (target * OUT_STRIDE + lead) % LINE_WORDS
        copy_step(
            rows_ptr, source.to(tl.int64), out_ptr, target, target >= 0, shift,
            ROWS_STRIDE, OUT_STRIDE, ROW_WORDS, BLOCK_WORDS,
        )  # fmt: skip
    if PUBLISHES:
        publish()


def scatter_rows_reference(rows: torch.Tensor, targets: torch.Tensor, out: torch.Tensor) -> None:
    """The same in torch."""
    kept = targets >= 0
    shape = (-1, *out.shape[1:])
    out[targets[kept].long().to(out.device)] = rows[kept].reshape(shape).to(out.device)


def _check(rows: torch.Tensor, targets: torch.Tensor, out: torch.Tensor, max_programs: int) -> None:
    check_on_device("rows", rows)
    check_reachable("out", out)
    check_same_format("out", out, "rows", rows)
    check_tensor("targets", targets, (torch.int32, torch.int64), (len(rows),), rows.device)
    check_programs(max_programs)


def scatter_rows(
    rows: torch.Tensor,
    targets: torch.Tensor,
    out: torch.Tensor,
    max_programs: int = MAX_PROGRAMS,
    publishes: bool = False,
) -> None:
    """out[targets[i]] = rows[i] for every i with targets[i] >= 0.

    rows     [n, ...] any dtype, on the device
    targets  [n] int32 or int64, on the device; distinct and inside out, negative: skipped
    out      [m, ...] same row format, on the device or in pinned host memory; written
    max_programs  programs of the grid: the most SMs that it takes from other kernels
    publishes  end when other devices, too, see the rows; without effect under the interpreter

    The size and the address of a row must be multiples of 16 bytes. Rows may lie apart in either
    tensor.
    Effect: asynchronous on the current stream; one launch, or none for n = 0.
    Raises: ValueError for a wrong dtype, shape, device or row format, or pageable host memory.
    """
    _check(rows, targets, out, max_programs)
    row_words, out_words = words(rows, "rows"), words(out, "out")
    num_rows = len(rows)
    if num_rows == 0:
        return
    with torch.cuda.device_of(rows):
        _scatter_kernel[(min(max_programs, num_rows),)](
            row_words,
            targets,
            out_words,
            num_rows,
            line_lead(out_words),
            ROWS_STRIDE=row_words.stride(0),
            OUT_STRIDE=out_words.stride(0),
            **copy_tile(row_words.shape[1]),
            PUBLISHES=publishes and not interpreted(),
            num_warps=COPY_WARPS,
        )
