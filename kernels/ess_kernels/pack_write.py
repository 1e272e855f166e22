"""pack_write: pack the new latent rows of a pass and store each to both tiers, in one launch.

    row i = fp8: 512 e4m3 latents, 4 float32 scales, 64 bf16 rope keys; else latents, then rope keys
    host_rows[slots[i]] = row i                and hot_rows[slot_row[slots[i]]] = row i if it is hot

The fp8 arithmetic is that of SGLang's quantize_k_cache_separate (sglang 0.5.23,
kernels/ops/quantization/dsa_quant_k_cache.py), operation by operation: scale = max |x| / 448 of 128
latents, latent x (1 / scale), clamped to +-448, rounded to e4m3. Both divisions are Triton's, which
are not IEEE's on a GPU, so another order would give other bits. A group of zeros has scale 0, and
what its latents become is multiplied by that.

A row starts anywhere in a 128-byte line of the host tier, and every line that a warp touches is a
PCIe write of its own. So lanes begin at the start of a line, as in checks.copy_step, and a lane
makes the 16 bytes of the row that are there: a row is packed where it is stored, without a copy of
it in memory. Host stores are posted: no program waits for them, unless the rows are published to
other devices: checks.publish says why and what it costs.

Bytes moved a row: 1152 read (bf16); 656 (fp8) or 1152 (bf16) over PCIe, and as many into device
memory for a hot row and for `packed` each; 8 or 12 for its slot and its hot row.

Estimate, not measured: a step of a program (slots, then latents and slot_row, which need them, a
reduction, stores) takes about 2 us. A program has 8 rows in a step, so MAX_PROGRAMS = 32 take a
decode batch of up to 256 rows in one step: 160 rows of fp8 are 20 programs and 105 KB, 1.9 us at 55
GB/s of PCIe 5.0 x16. With a launch of about 2 us: 1 row 4 us, 160 rows 6 us. 32 programs issue
32 x 8 x 656 B / 2 us = 84 GB/s, more than the link takes: 8,192 rows take 5.4 MB / 55 GB/s = 98 us
(bf16: 9.4 MB, 172 us).
"""

from __future__ import annotations

import time
from typing import TypedDict, Unpack

import torch
import triton
import triton.language as tl

from ess_kernels.checks import (
    ACCESS_BYTES,
    LINE_BYTES,
    check_on_device,
    check_reachable,
    check_same_format,
    check_tensor,
    interpreted,
    publish,
    words,
)
from sglang_ess.layout import LATENT_DIM, SCALE_GROUP, fp8_row_bytes

MAX_PROGRAMS = 32  # by the arithmetic above, not by a sweep; each takes one SM at most
ROWS_PER_STEP = 8
WARPS = 16  # a thread has one piece of an fp8 row in a step, two of a bf16 one
LATENTS: tl.constexpr = tl.constexpr(LATENT_DIM)
GROUP: tl.constexpr = tl.constexpr(SCALE_GROUP)
FP8_MAX: tl.constexpr = tl.constexpr(448.0)
FP8_MIN: tl.constexpr = tl.constexpr(-448.0)
PIECE: tl.constexpr = tl.constexpr(ACCESS_BYTES)  # bytes of a row that a lane makes
LINE_PIECES: tl.constexpr = tl.constexpr(LINE_BYTES // ACCESS_BYTES)


class PackOptions(TypedDict, total=False):
    """What pack_write may be given besides: see there."""

    first_slot: int
    keeps_cold: bool
    hot_only: bool
    publishes: bool
    packed: torch.Tensor | None
    main_ready: torch.Tensor | None


@triton.jit
def _of_group(group, of_0, of_1, of_2, of_3):
    """The one of four values [r, 1] that belongs to each group [*, p]."""
    low = tl.where(group == 0, of_0, of_1)
    high = tl.where(group == 2, of_2, of_3)
    return tl.where(group < 2, low, high)


@triton.jit
def _fp8_pieces(nope_ptr, rope_ptr, row, piece, inside, NOPE_STRIDE, ROPE_STRIDE):
    """uint8 [r, p, 16]: pieces of rows, each quantised from the 16 latents that it holds."""
    NOPE_PIECES: tl.constexpr = LATENTS // PIECE
    unit = tl.arange(0, PIECE)[None, None, :]
    is_latent = inside & (piece < NOPE_PIECES)
    offset = (row * NOPE_STRIDE)[:, None, None] + (piece * PIECE)[:, :, None] + unit
    latents = tl.load(nope_ptr + offset, mask=is_latent[:, :, None], other=0).to(tl.float32)
    peak = tl.max(tl.abs(latents), axis=2)
    group = piece // (GROUP // PIECE)
    scale_0 = tl.max(tl.where(group == 0, peak, 0), axis=1)[:, None] / FP8_MAX
    scale_1 = tl.max(tl.where(group == 1, peak, 0), axis=1)[:, None] / FP8_MAX
    scale_2 = tl.max(tl.where(group == 2, peak, 0), axis=1)[:, None] / FP8_MAX
    scale_3 = tl.max(tl.where(group == 3, peak, 0), axis=1)[:, None] / FP8_MAX
    inverse = _of_group(group, 1.0 / scale_0, 1.0 / scale_1, 1.0 / scale_2, 1.0 / scale_3)
    rounded = tl.clamp(latents * inverse[:, :, None], FP8_MIN, FP8_MAX).to(tl.float8e4nv)

    byte = tl.arange(0, PIECE)[None, :]
    bits = _of_group(
        byte // 4,
        scale_0.to(tl.int32, bitcast=True),
        scale_1.to(tl.int32, bitcast=True),
        scale_2.to(tl.int32, bitcast=True),
        scale_3.to(tl.int32, bitcast=True),
    )
    scales = ((bits >> (byte % 4 * 8)) & 255).to(tl.uint8)

    is_rope = inside & (piece > NOPE_PIECES)
    offset = (row * ROPE_STRIDE)[:, None, None] + unit
    offset += ((piece - NOPE_PIECES - 1) * PIECE)[:, :, None]
    tail = tl.load(rope_ptr + offset, mask=is_rope[:, :, None], other=0)
    tail = tl.where((piece == NOPE_PIECES)[:, :, None], scales[:, None, :], tail)
    return tl.where(is_latent[:, :, None], rounded.to(tl.uint8, bitcast=True), tail)


@triton.jit
def _plain_pieces(
    nope_ptr, rope_ptr, row, piece, inside, NOPE_STRIDE, ROPE_STRIDE, NOPE_PIECES: tl.constexpr
):
    """int64 [r, p, 2]: pieces of rows as they are."""
    word = tl.arange(0, 2)[None, None, :]
    is_latent = inside & (piece < NOPE_PIECES)
    offset = (row * NOPE_STRIDE)[:, None, None] + (piece * 2)[:, :, None] + word
    latents = tl.load(nope_ptr + offset, mask=is_latent[:, :, None], other=0)
    is_rope = inside & (piece >= NOPE_PIECES)
    offset = (row * ROPE_STRIDE)[:, None, None] + ((piece - NOPE_PIECES) * 2)[:, :, None] + word
    rope = tl.load(rope_ptr + offset, mask=is_rope[:, :, None], other=0)
    return tl.where(is_latent[:, :, None], latents, rope)


@triton.jit
def _hot_row(slot_row_ptr, slot, saved):
    """int64 [r]: the hot rows of slots, -1 or less: not hot, or not saved.

    An atomic reads once. Triton repeats a load, a volatile one too, in each layout that needs it,
    and a slot that lost its row in between would pass the mask with row -1.
    """
    hot = tl.atomic_add(slot_row_ptr + slot, 0, mask=saved, sem="relaxed")
    return tl.where(saved, hot, -1).to(tl.int64)


@triton.jit
def _store(rows_ptr, row, piece, wanted, values, STRIDE: tl.constexpr, UNITS: tl.constexpr):
    """rows[row[i]] = the pieces [r, p, UNITS] that are wanted [r, p]."""
    offset = (row * STRIDE)[:, None, None] + (piece * UNITS)[:, :, None]
    offset += tl.arange(0, UNITS)[None, None, :]
    tl.store(rows_ptr + offset, values, mask=wanted[:, :, None])


# A unit is a byte of an fp8 row or an int64 word of another one. Strides are in units of what they
# belong to: of latents in the fp8 case.
@triton.jit(do_not_specialize=["num_rows", "first_slot", "lead"])
def _pack_write_kernel(
    nope_ptr,  # [num_rows, NOPE_STRIDE] bf16 or float32 latents, or int64 words
    rope_ptr,  # [num_rows, ROPE_STRIDE] units
    slots_ptr,  # [num_rows] int32 or int64
    slot_row_ptr,  # [num_slots] int32
    hot_ptr,  # [*, HOT_STRIDE] units
    host_ptr,  # [num_slots, HOST_STRIDE] units, host memory
    packed_ptr,  # [num_rows, PACKED_STRIDE] units, or None
    ready_ptr,  # [1] int64, or None
    num_rows,
    first_slot,
    lead,  # pieces from the start of the host tier's first line to its first row
    NOPE_STRIDE: tl.constexpr,
    ROPE_STRIDE: tl.constexpr,
    HOT_STRIDE: tl.constexpr,
    HOST_STRIDE: tl.constexpr,
    PACKED_STRIDE: tl.constexpr,
    NOPE_PIECES: tl.constexpr,  # of a row without scales
    ROW_PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,  # a power of two: a row's pieces and those before it in its line
    ROWS_PER_STEP: tl.constexpr,
    FP8: tl.constexpr,
    STORES_HOT: tl.constexpr,
    STORES_HOST: tl.constexpr,
    PUBLISHES: tl.constexpr,
):
    UNITS: tl.constexpr = 16 if FP8 else 2  # of a piece
    share = tl.cdiv(num_rows, tl.num_programs(0))
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, num_rows)
    for base in range(first, end, ROWS_PER_STEP):
        row = base + tl.arange(0, ROWS_PER_STEP)
        listed = row < end
        row = row.to(tl.int64)  # a row or slot times the units of a row exceeds 2^31
        slot = tl.load(slots_ptr + row, mask=listed, other=-1).to(tl.int64)
        saved = listed & (slot >= first_slot)
        slot = tl.where(saved, slot, 0)
        hot = _hot_row(slot_row_ptr, slot, saved)
        shift = (slot * (HOST_STRIDE // UNITS) + lead) % LINE_PIECES
        piece = tl.arange(0, BLOCK_PIECES)[None, :] - shift[:, None]
        inside = listed[:, None] & (piece >= 0) & (piece < ROW_PIECES)
        if FP8:
            values = _fp8_pieces(nope_ptr, rope_ptr, row, piece, inside, NOPE_STRIDE, ROPE_STRIDE)
        else:
            values = _plain_pieces(
                nope_ptr, rope_ptr, row, piece, inside, NOPE_STRIDE, ROPE_STRIDE, NOPE_PIECES
            )
        if STORES_HOST:
            _store(host_ptr, slot, piece, inside & saved[:, None], values, HOST_STRIDE, UNITS)
        if STORES_HOT:
            _store(hot_ptr, hot, piece, inside & (hot >= 0)[:, None], values, HOT_STRIDE, UNITS)
        if packed_ptr is not None:
            _store(packed_ptr, row, piece, inside, values, PACKED_STRIDE, UNITS)
    if PUBLISHES:
        publish()
    if ready_ptr is not None:
        tl.debug_barrier()  # every warp has issued its stores
        tl.atomic_max(ready_ptr, tl.extra.cuda.globaltimer(), sem="relaxed")


def _check(nope, rope, slots, slot_row, hot_rows, host_rows, options: PackOptions) -> None:
    check_on_device("hot_rows", hot_rows)
    check_reachable("host_rows", host_rows)
    check_same_format("host_rows", host_rows, "hot_rows", hot_rows)
    fp8, device = hot_rows.dtype == torch.uint8, hot_rows.device
    floats = (torch.bfloat16, torch.float32) if fp8 else hot_rows.dtype
    check_tensor("nope", nope, floats, (None, LATENT_DIM), device)
    check_tensor("rope", rope, torch.bfloat16 if fp8 else hot_rows.dtype, (len(nope), None), device)
    check_tensor("slots", slots, (torch.int32, torch.int64), (len(nope),), device)
    check_tensor("slot_row", slot_row, torch.int32, (len(host_rows),), device)
    width = fp8_row_bytes(rope.shape[1]) if fp8 else LATENT_DIM + rope.shape[1]
    if hot_rows.shape[1:].numel() != width:
        raise ValueError(
            f"a row of {LATENT_DIM} latents and {rope.shape[1]} rope keys must be {width} "
            f"{hot_rows.dtype}: got {list(hot_rows.shape[1:])}."
        )
    if (first_slot := options.get("first_slot", 0)) < 0:
        raise ValueError(f"first_slot must not be negative: got {first_slot}.")
    if (packed := options.get("packed")) is not None:
        check_tensor("packed", packed, hot_rows.dtype, (len(nope), *hot_rows.shape[1:]), device)
    if (ready := options.get("main_ready")) is not None:
        check_tensor("main_ready", ready, torch.int64, (1,), device)


def packable(
    latents: torch.Tensor, rope_keys: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtypes that pack_write takes for these rows. Models compute in them already."""
    fp8 = rows.dtype == torch.uint8
    latents = latents if fp8 else latents.to(rows.dtype)
    return latents, rope_keys.to(torch.bfloat16 if fp8 else rows.dtype)


def pack_write(
    nope: torch.Tensor,
    rope: torch.Tensor,
    slots: torch.Tensor,
    slot_row: torch.Tensor,
    hot_rows: torch.Tensor,
    host_rows: torch.Tensor,
    **options: Unpack[PackOptions],
) -> None:
    """Pack row i from nope[i] and rope[i]; store it at slots[i] in the host tier, and where hot.

    nope       [n, 512] or [n, 1, 512] latents, on the device: bf16 or float32 for fp8 rows, else
               of the rows' dtype
    rope       [n, r] or [n, 1, r] rope keys, r = 64 or 0: bf16 for fp8 rows, else of the rows'
               dtype
    slots      [n] int32 or int64, inside the host tier; distinct from first_slot on
    slot_row   [num_slots] int32: the hot row of a slot, negative: not hot. Other kernels may
               change the entries of slots that are not written here meanwhile
    hot_rows   [rows, ..., width] on the device; written
    host_rows  [num_slots, ..., width] pinned host memory (or device memory); written. Rows are
               uint8 (fp8: width 656, or 528 without rope) or of the latents' dtype (512 + r)
    first_slot  lower slots go to `packed` alone: SGLang points the padding of a batch at its first
               page, which nobody reads. Default 0
    keeps_cold  store no hot rows: a plan fetches them later. Default False
    hot_only   store no host rows: another rank of the node stores the same ones. Default False
    publishes  end when other devices, too, see these host rows and those of earlier launches of the
               stream. Default False; without effect under the interpreter
    packed     [n, ..., width] like hot_rows: gets all rows, in order. Default: None
    main_ready  [1] int64 on the device: becomes the larger of its value and the GPU's clock
               (%globaltimer, ns) when the last program ends; under the interpreter
               time.monotonic_ns(). It stays as it is for n = 0. Default: None

    Rows may lie apart; their sizes, strides and addresses must be multiples of 16 bytes.
    Effect: asynchronous on the current stream; one launch, or none for n = 0. A later kernel of
    this stream sees the rows in both tiers. A reader on the CPU must wait for an event first.
    Raises: ValueError for a wrong dtype, shape, device, width or alignment, or pageable memory.
    """
    nope, rope = nope.flatten(1), rope.flatten(1)
    _check(nope, rope, slots, slot_row, hot_rows, host_rows, options)
    rows = {"nope": nope, "hot_rows": hot_rows, "host_rows": host_rows}
    packed, ready = options.get("packed"), options.get("main_ready")
    if rope.numel():
        rows["rope"] = rope
    if packed is not None:
        rows["packed"] = packed
    viewed = {name: words(value, name) for name, value in rows.items()}
    if len(slots) == 0:
        return
    fp8 = hot_rows.dtype == torch.uint8
    if fp8:
        viewed = {name: value.view(torch.uint8) for name, value in viewed.items()}
        viewed["nope"] = nope
    strides = {name: value.stride(0) for name, value in viewed.items()}
    pieces = hot_rows.shape[1:].numel() * hot_rows.itemsize // ACCESS_BYTES
    with torch.cuda.device_of(hot_rows):
        _pack_write_kernel[(min(MAX_PROGRAMS, triton.cdiv(len(slots), ROWS_PER_STEP)),)](
            viewed["nope"],
            viewed.get("rope", viewed["hot_rows"]),  # never read without rope
            slots.contiguous(),
            slot_row,
            viewed["hot_rows"],
            viewed["host_rows"],
            viewed.get("packed"),
            None if interpreted() else ready,
            len(slots),
            options.get("first_slot", 0),
            host_rows.data_ptr() % LINE_BYTES // ACCESS_BYTES,
            NOPE_STRIDE=strides["nope"],
            ROPE_STRIDE=strides.get("rope", 0),
            HOT_STRIDE=strides["hot_rows"],
            HOST_STRIDE=strides["host_rows"],
            PACKED_STRIDE=strides.get("packed", 0),
            NOPE_PIECES=LATENT_DIM * hot_rows.itemsize // ACCESS_BYTES,
            ROW_PIECES=pieces,
            BLOCK_PIECES=triton.next_power_of_2(pieces + LINE_PIECES.value - 1),
            ROWS_PER_STEP=ROWS_PER_STEP,
            FP8=fp8,
            STORES_HOT=not options.get("keeps_cold", False),
            STORES_HOST=not options.get("hot_only", False),
            PUBLISHES=options.get("publishes", False) and not interpreted(),
            num_warps=WARPS,
        )
    if ready is not None and interpreted():
        ready.fill_(time.monotonic_ns())
