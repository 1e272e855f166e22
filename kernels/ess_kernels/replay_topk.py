"""replay_topk: overwrite decode's top-k with that of a table, to measure with dummy weights.

    step = hash + L - n;  positions = seam^(step // steps) (steps[step % steps])

L is the length of a query, and n the largest nominal context of the table with n <= L. A query
shorter than every nominal context keeps its own top-k. The first page of the query's request
hashes to one of the table's streams, and to an offset in it, so that requests are at different
steps. The seam is the permutation of positions that continues a stream after its last step. The
table has its powers 2^0, 2^1, ..., so that each step costs one read and a few lookups. At the end
the newest position, L - 1, takes one column, because no nominal context contains it.

Bytes moved per query: K x (4 read, 4 gathered per power, 4 gathered from the pages, 4 written).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ess_kernels.checks import check_tensor

# MurmurHash3's finaliser. The first pages of a batch are often evenly spaced, and a multiplication
# alone would map them to few steps.
HASH_1 = tl.constexpr(0x85EBCA6B)
HASH_2 = tl.constexpr(0xC2B2AE35)
HASH_MASK = tl.constexpr(0xFFFFFFFF)


@dataclass(frozen=True)
class ReplayTable:
    """A table of top-k streams on a device.

    contexts     [C] int32: the nominal contexts, ascending
    steps        [C, streams, layers, steps, K] int32: positions below contexts[c] - 1, distinct
                 within a row of K
    seams        [n] int32: for each context a block [streams, layers, powers, contexts[c] - 1] of
                 the permutations seam^(2^power); the blocks follow one another
    seam_starts  [C] int64: where in seams a context's block begins
    powers       number of powers of each seam
    """

    contexts: torch.Tensor
    steps: torch.Tensor
    seams: torch.Tensor
    seam_starts: torch.Tensor
    powers: int

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.contexts, self.steps, self.seams, self.seam_starts)
        return sum(tensor.nbytes for tensor in tensors)


@triton.jit(do_not_specialize=["layer", "page_stride"])
def _replay_topk_kernel(
    topk,  # [queries, TOPK] int32, rows TOPK apart
    lengths,  # [queries] int32
    page_table,  # [queries, *] int32, rows page_stride apart
    contexts,  # this and the next three: as in ReplayTable
    steps,
    seams,
    seam_starts,
    layer,
    page_stride,
    NUM_CONTEXTS: tl.constexpr,
    STREAMS: tl.constexpr,
    LAYERS: tl.constexpr,
    STEPS: tl.constexpr,
    TOPK: tl.constexpr,
    POWERS: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    AS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + query)
    chosen = -1
    context = 0
    for i in tl.static_range(NUM_CONTEXTS):
        nominal = tl.load(contexts + i)
        chosen = tl.where(length >= nominal, i, chosen)
        context = tl.where(length >= nominal, nominal, context)
    if chosen >= 0:
        pages = page_table + query * page_stride
        hashed = tl.load(pages).to(tl.int64)
        hashed = ((hashed ^ (hashed >> 16)) * HASH_1) & HASH_MASK
        hashed = ((hashed ^ (hashed >> 13)) * HASH_2) & HASH_MASK
        hashed = hashed ^ (hashed >> 16)
        stream = hashed % STREAMS
        step = hashed // STREAMS + length - context

        j = tl.arange(0, BLOCK)
        inside = j < TOPK
        place = stream * LAYERS + layer
        row = (chosen * STREAMS * LAYERS + place) * STEPS + step % STEPS
        position = tl.load(steps + row * TOPK + j, mask=inside, other=0)
        cycle = step // STEPS
        last = context - 1  # positions in the table, which leaves out the newest
        seam = seams + tl.load(seam_starts + chosen) + place * POWERS * last
        for power in tl.static_range(POWERS):
            if ((cycle >> power) & 1) != 0:
                position = tl.load(seam + power * last + position, mask=inside, other=0)
        position = tl.where(j == length % TOPK, length - 1, position)
        out = position
        if AS_SLOTS:
            page = tl.load(pages + position // PAGE_SLOTS, mask=inside, other=0)
            out = page * PAGE_SLOTS + position % PAGE_SLOTS
        tl.store(topk + query * TOPK + j, out, mask=inside)


def replay_topk(
    topk: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    table: ReplayTable,
    layer: int,
    page_slots: int,
    as_slots: bool,
) -> None:
    """Overwrite topk [q, K] int32 with the table's top-k of one layer.

    lengths     [queries] int32: positions that each query sees, the newest included; further rows
                of topk are padding and stay unchanged
    page_table  [queries, pages] int32: the pages of each query's request; page p holds the slots
                from p * page_slots on
    layer       layer index from 0
    as_slots    write slots; else positions in the request
    Raises: ValueError for other shapes or dtypes, or a layer that the table lacks.
    """
    _check(topk, lengths, page_table, table, layer)
    if not len(lengths):
        return
    _, streams, layers, steps, width = table.steps.shape
    _replay_topk_kernel[(len(lengths),)](
        topk, lengths, page_table, table.contexts, table.steps, table.seams, table.seam_starts,
        layer, page_table.stride(0),
        NUM_CONTEXTS=len(table.contexts), STREAMS=streams, LAYERS=layers, STEPS=steps, TOPK=width,
        POWERS=table.powers, PAGE_SLOTS=page_slots, AS_SLOTS=as_slots,
        BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


def replay_topk_reference(
    topk: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    table: ReplayTable,
    layer: int,
    page_slots: int,
    as_slots: bool,
) -> None:
    """The same in torch, query by query. The CPU platform runs it."""
    _check(topk, lengths, page_table, table, layer)
    _, streams, layers, steps, width = table.steps.shape
    contexts = table.contexts.tolist()
    for query, length in enumerate(lengths.tolist()):
        chosen = sum(length >= context for context in contexts) - 1
        if chosen < 0:
            continue
        hashed = int(page_table[query, 0])
        hashed = (hashed ^ hashed >> 16) * HASH_1.value & HASH_MASK.value
        hashed = (hashed ^ hashed >> 13) * HASH_2.value & HASH_MASK.value
        hashed ^= hashed >> 16
        stream, step = hashed % streams, hashed // streams + length - contexts[chosen]
        positions = table.steps[chosen, stream, layer, step % steps].long()
        last, cycle = contexts[chosen] - 1, step // steps
        seam = int(table.seam_starts[chosen]) + (stream * layers + layer) * table.powers * last
        for power in range(table.powers):
            if cycle >> power & 1:
                positions = table.seams[seam + power * last :][positions].long()
        positions[length % width] = length - 1
        if as_slots:
            pages = page_table[query, positions // page_slots]
            positions = pages * page_slots + positions % page_slots
        topk[query] = positions.int()


def _check(
    topk: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    table: ReplayTable,
    layer: int,
) -> None:
    check_tensor("lengths", lengths, torch.int32, (None,))
    check_tensor("page_table", page_table, torch.int32, (len(lengths), None), lengths.device)
    check_tensor("topk", topk, torch.int32, (None, table.steps.shape[-1]), lengths.device)
    if len(topk) < len(lengths) or not topk.is_contiguous() or page_table.stride(-1) != 1:
        raise ValueError(
            "topk must be contiguous with a row per length, and page_table must have dense rows: "
            f"got topk {list(topk.shape)}, {len(lengths)} lengths, strides {topk.stride()} and "
            f"{page_table.stride()}."
        )
    if not 0 <= layer < table.steps.shape[2]:
        raise ValueError(f"layer must be 0 to {table.steps.shape[2] - 1}: got {layer}.")
