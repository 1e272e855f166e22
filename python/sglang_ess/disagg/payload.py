"""Wire format of the warm-up payload: the positions that the end of a prompt selected.

For each index group a payload holds the positions of the prompt that its last 32 queries selected,
and roughly when each was last used. The decode node warms its hot tier with them. "Layers", below,
are index groups; in DeepSeek-V3.2 each layer is one.

A payload travels in a fixed-size item of SGLang's metadata buffers. The decode node computes the
items' addresses from the prefill node's item size, so ITEM_BYTES must never change. An item that a
plain prefill node did not write is zero: no payload.

All integers are little-endian. Varints are LEB128 of at most 5 bytes. Header, 32 bytes:

    offset  bytes  field
    0       4      magic, "ESSW"; all zero: no payload
    4       2      version, 1
    6       2      layers
    8       4      tokens of the prompt
    12      8      bootstrap room of the request
    20      4      bytes of the body
    24      4      crc32 (zlib's) of the body
    28      4      zero
    32      -      body; what follows it in the item has no meaning

The body is one record per layer, first layer first, each of at most
(ITEM_BYTES - 32) // layers bytes, its budget:

    1 byte  number of groups, 0 to 6; they follow newest first, each a class of ages:
            0, 1, 2 to 3, 4 to 7, 8 to 15, 16 to 31
    group   varint: number of positions; then the positions, ascending, each as the varint
            position - previous - 1, where the first one's previous is -1

An age counts queries back from the prompt's last one. A position is only in the group of its
newest use, so no position occurs twice in a layer. What exceeds the budget is omitted from the
oldest end: the lowest positions of the first group that does not fit (the end of a prompt is
selected again most often), and all older groups.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numba
import numpy as np

from sglang_ess.tiers.warmup_window import WARMUP_QUERIES

ITEM_BYTES = 256 * 1024
MAGIC = b"ESSW"
VERSION = 1
HEADER = struct.Struct("<4sHHIQIII")
CLASS_ENDS = (1, 2, 4, 8, 16, 32)  # the first age beyond each class
NUM_CLASSES = len(CLASS_ENDS)
assert CLASS_ENDS[-1] == WARMUP_QUERIES

VARINT_BYTES = 5
MIN_LAYER_BYTES = 2 + VARINT_BYTES  # a number of groups, a count and any one position
MAX_LAYERS = (ITEM_BYTES - HEADER.size) // MIN_LAYER_BYTES
MAX_TOKENS = 2**31 - 1  # positions are int32

# The faults that _parse finds in a layer.
SOUND, TOO_MANY_GROUPS, PAST_END, TOO_LARGE, REPEATED, TRAILING = 0, 1, 2, 3, 4, 5
RULES = {
    TOO_MANY_GROUPS: f"have at most {NUM_CLASSES} groups",
    PAST_END: "end within its budget and the body",
    TOO_LARGE: "hold positions of the prompt only",
    REPEATED: "hold each position once",
    TRAILING: "be the last thing in the body",
}

jit = numba.njit(cache=True, nogil=True)


class PayloadError(ValueError):
    """An item that was written, but holds no payload for this request."""


def layer_budget(layers: int) -> int:
    """Bytes of the body that one layer may take."""
    return (ITEM_BYTES - HEADER.size) // layers


def encode(topk: Sequence[np.ndarray], tokens: int, room: int, out: np.ndarray) -> int:
    """Write the payload of one prompt into its item. Returns the bytes used, header included.

    topk    per layer [queries <= 32, K] int32 positions in the prompt, oldest query first;
            negative ones are pads. An array of size 0, of any shape, is an empty layer
    tokens  length of the prompt, to which the positions refer
    room    the request's bootstrap room
    out     [ITEM_BYTES] uint8, contiguous; written. After an error its header is zero: no payload
    Raises: ValueError for arrays of another dtype or shape, positions outside the prompt, more
    than 32 queries, more than MAX_LAYERS layers, tokens or a room that the header cannot hold.
    """
    _check_item(out)
    out[: HEADER.size] = 0
    _check_numbers(len(topk), tokens, room)
    for layer, selected in enumerate(topk):
        _check_topk(layer, selected, tokens)
    budget = layer_budget(len(topk))
    seen, fresh = np.zeros((2, tokens // 64 + 1), np.uint64)
    kept = np.empty(budget, np.int32)
    end = HEADER.size
    for selected in topk:
        if selected.size:  # numba compiles for one type, whatever the caller's array is
            positions = np.require(selected, np.int32, ["C", "W"])
            end = _write_layer(positions, seen, fresh, kept, out, end, end + budget)
        else:
            out[end] = 0
            end += 1
    body = out[HEADER.size : end]
    crc = zlib.crc32(body.data)
    HEADER.pack_into(out.data, 0, MAGIC, VERSION, len(topk), tokens, room, len(body), crc, 0)
    return end


def decode(item: np.ndarray, layers: int, tokens: int, room: int) -> list[list[np.ndarray]] | None:
    """The positions to warm, per layer; None if the item holds no payload.

    item    [bytes] uint8, as it arrived. Nothing in it is trusted.
    layers, tokens, room  those of the request that the item belongs to
    Returns per layer the groups that are not empty, each [n] int32 ascending and in [0, tokens),
    the OLDEST group first: warmed in this order, the newest use ends up most recent. No position
    occurs twice in a layer. The arrays are views of one buffer, which is not the item.
    Raises: PayloadError for an item that breaks the format or belongs to another request; nothing
    else, whatever its bytes are. The item's bytes bound the time, and with tokens the memory.
    """
    body = _checked_body(item, layers, tokens, room)
    if body is None:
        return None
    last_use = np.zeros(tokens, np.uint16)
    positions = np.empty(len(body), np.int32)  # each takes at least a byte
    group_ends = np.empty((layers, NUM_CLASSES), np.int64)
    fault, layer, place = _parse(
        body, layer_budget(layers), int(tokens), last_use, positions, group_ends
    )
    if fault != SOUND:
        raise PayloadError(
            f"layer {layer} of a warm-up payload must {RULES[fault]}: broken before byte {place} "
            f"of its body of {len(body)}. The request starts cold."
        )
    return _oldest_first(positions, group_ends)


def _check_item(out: np.ndarray) -> None:
    if out.dtype != np.uint8 or out.shape != (ITEM_BYTES,) or not out.flags.carray:
        raise ValueError(
            f"a warm-up item must be {ITEM_BYTES} contiguous writable uint8: "
            f"got {out.dtype} {out.shape}, strides {out.strides}."
        )


def _check_numbers(layers: int, tokens: int, room: int) -> None:
    """Raises: PayloadError for a number that the header cannot hold."""
    for what, value, least, most in (
        ("layers", layers, 1, MAX_LAYERS),
        ("tokens", tokens, 0, MAX_TOKENS),
        ("room", room, 0, 2**64 - 1),
    ):
        if not least <= value <= most:
            raise PayloadError(
                f"a warm-up payload's {what} must be {least} to {most}: got {value}."
            )


def _check_topk(layer: int, selected: np.ndarray, tokens: int) -> None:
    if selected.dtype != np.int32:
        raise ValueError(f"top-k of layer {layer} must be int32: got {selected.dtype}.")
    if selected.size == 0:
        return
    if selected.ndim != 2 or len(selected) > WARMUP_QUERIES:
        raise ValueError(
            f"top-k of layer {layer} must be [queries, K] of at most {WARMUP_QUERIES} queries: "
            f"got shape {selected.shape}. Pass the prompt's last queries only."
        )
    if selected.max() >= tokens:
        raise ValueError(
            f"top-k of layer {layer} must be positions in the prompt: "
            f"got {selected.max()}, limit {tokens - 1}."
        )


def _checked_body(item: np.ndarray, layers: int, tokens: int, room: int) -> np.ndarray | None:
    """A copy of the body after checking its header and crc; None if the item holds no payload."""
    if item.dtype != np.uint8 or item.ndim != 1 or len(item) < HEADER.size:
        raise PayloadError(
            f"a warm-up item must be uint8 of at least {HEADER.size} bytes: "
            f"got {item.dtype} {item.shape}. The request starts cold."
        )
    header = HEADER.unpack(item[: HEADER.size].tobytes())
    magic, size, crc = header[0], header[5], header[6]
    if magic == bytes(len(MAGIC)):
        return None
    _check_numbers(layers, tokens, room)
    wanted = (MAGIC, VERSION, layers, tokens, room, size, crc, 0)
    names = ("magic", "version", "layers", "tokens", "room", "body", "crc32", "reserved word")
    for name, got, want in zip(names, header, wanted, strict=True):
        if got != want:
            raise PayloadError(
                f"{name} of a warm-up payload must be {want}: got {got}. The request starts cold."
            )
    limit = min(len(item) - HEADER.size, layers * layer_budget(layers))
    if size > limit:
        raise PayloadError(
            f"body of a warm-up payload must fit its item and the layers' budgets: "
            f"got {size} bytes, limit {limit}. The request starts cold."
        )
    body = item[HEADER.size : HEADER.size + size].copy()
    if zlib.crc32(body.data) != crc:
        raise PayloadError(
            f"crc32 of a warm-up payload's body must be {crc:#010x}: "
            f"got {zlib.crc32(body.data):#010x}. The request starts cold."
        )
    return body


def _oldest_first(positions: np.ndarray, group_ends: np.ndarray) -> list[list[np.ndarray]]:
    """Views of positions; group_ends [layers, classes] where each group ends, newest first."""
    start, layers = 0, []
    for ends in group_ends.tolist():
        groups = []
        for end in ends:
            if end > start:
                groups.append(positions[start:end])
            start = end
        layers.append(groups[::-1])
    return layers


# --- kernels --------------------------------------------------------------------------------


@jit
def _varint_bytes(value):
    size = 1
    while value >= 0x80:
        value >>= 7
        size += 1
    return size


@jit
def _write_varint(value, out, place):
    """Returns the place after it."""
    while value >= 0x80:
        out[place] = (value & 0x7F) | 0x80
        value >>= 7
        place += 1
    out[place] = value
    return place + 1


@jit
def _read_varint(body, place, limit):
    """(value, the place after it); value -1 if it goes past limit or takes too many bytes."""
    value = 0
    for i in range(VARINT_BYTES):
        if place >= limit:
            break
        byte = np.int64(body[place])
        place += 1
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, place
    return -1, place


@jit
def _mark(topk, first_age, end_age, fresh):
    """Set the bits of the positions selected at ages [first_age, end_age)."""
    newest = topk.shape[0] - 1
    for age in range(first_age, min(end_age, topk.shape[0])):
        for column in range(topk.shape[1]):
            position = topk[newest - age, column]
            if position >= 0:
                fresh[position >> 6] |= np.uint64(1) << np.uint64(position & 63)


@jit
def _take_highest(seen, fresh, kept, room_bytes):
    """Move the fresh positions that were not seen into kept, highest first, while they fit.

    Returns (their number, whether all fitted). Adding a lower position never makes a group
    shorter (two varints are no shorter than that of their sum plus one), so the first that
    does not fit ends the group. Effect: fresh's bits move to seen.
    """
    count, gap_bytes, lowest = 0, 0, 0
    for word in range(len(fresh) - 1, -1, -1):
        bits = fresh[word] & ~seen[word]
        seen[word] |= fresh[word]
        fresh[word] = 0
        bit = 63
        while bits:
            if bits >> np.uint64(bit) & np.uint64(1):
                bits ^= np.uint64(1) << np.uint64(bit)
                position = word * 64 + bit
                more = _varint_bytes(lowest - position - 1) if count else 0
                needed = gap_bytes + more + _varint_bytes(position) + _varint_bytes(count + 1)
                if needed > room_bytes:
                    return count, False
                kept[count] = position
                count, gap_bytes, lowest = count + 1, gap_bytes + more, position
            bit -= 1
    return count, True


@jit
def _write_layer(topk, seen, fresh, kept, out, start, limit):
    """Write one layer's record to out[start:limit]. Returns its end.

    seen, fresh  bits of the prompt's positions; kept [limit - start]; all three are scratch
    """
    seen[:] = 0
    fresh[:] = 0
    place = end = start + 1
    num_groups, first_age = 0, 0
    for group in range(NUM_CLASSES):
        _mark(topk, first_age, CLASS_ENDS[group], fresh)
        first_age = CLASS_ENDS[group]
        count, complete = _take_highest(seen, fresh, kept, limit - place)
        if count == 0 and (not complete or place == limit):
            break
        place = _write_varint(count, out, place)
        previous = -1
        for i in range(count - 1, -1, -1):
            place = _write_varint(kept[i] - previous - 1, out, place)
            previous = kept[i]
        if count:
            num_groups, end = group + 1, place
        if not complete:
            break
    out[start] = num_groups
    return end


@jit
def _read_group(body, place, limit, tokens, layer, last_use, positions, used):
    """Append one group to positions[used:]. Returns (fault, place, used) after it.

    last_use  [tokens] uint16: 1 + the last layer that had the position
    """
    count, place = _read_varint(body, place, limit)
    if count < 0 or count > limit - place:
        return PAST_END, place, used
    position = -1
    for _ in range(count):
        gap, place = _read_varint(body, place, limit)
        if gap < 0:
            return PAST_END, place, used
        position += gap + 1
        if position >= tokens:
            return TOO_LARGE, place, used
        if last_use[position] == layer + 1:
            return REPEATED, place, used
        last_use[position] = layer + 1
        positions[used] = position
        used += 1
    return SOUND, place, used


@jit
def _parse(body, budget, tokens, last_use, positions, group_ends):
    """Read every layer. Returns (fault, layer, place): where it stopped and why.

    Every read is below `limit`, and each position takes at least one byte of the body.
    """
    place, used = 0, 0
    for layer in range(group_ends.shape[0]):
        limit = min(len(body), place + budget)
        if place >= limit:
            return PAST_END, layer, place
        num_groups = body[place]
        place += 1
        if num_groups > NUM_CLASSES:
            return TOO_MANY_GROUPS, layer, place
        for group in range(NUM_CLASSES):
            if group < num_groups:
                fault, place, used = _read_group(
                    body, place, limit, tokens, layer, last_use, positions, used
                )
                if fault != SOUND:
                    return fault, layer, place
            group_ends[layer, group] = used
    if place < len(body):
        return TRAILING, group_ends.shape[0] - 1, place
    return SOUND, group_ends.shape[0], place
