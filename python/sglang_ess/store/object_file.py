"""The bytes of one object's file: a header of whole blocks, then the parts with nothing between.

    magic 8 B, version u32, number of parts u32, digest of the identity 32 B, of the key 32 B,
    bytes of each part u64[n], checksum of each part u64[n], checksum of the header u64, zeros

All integers are little-endian. A checksum is XXH3-64 of the part's bytes, with a seed of key, model
identity and part number: the bytes of another page, or of another part, never pass.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import xxhash

from sglang_ess.layout import KIB

MAGIC, VERSION = b"ESS-PAGE", 1
BLOCK_BYTES = 4 * KIB
MAX_VECTORS = 1024  # Linux's IOV_MAX: buffers of one preadv or pwritev
DIGEST_BYTES = 32
FAN_OUT_CHARS, NAME_CHARS = 2, 32  # hexadecimal characters of a key's digest in its path
MASK, ODD = (1 << 64) - 1, 0x9E3779B97F4A7C15

Buffer = Any  # memoryview, NumPy array, bytes: collections.abc.Buffer from Python 3.12 on
Part = Buffer | Sequence[Buffer]  # one buffer, or the chunks that make it up in their order


class DamagedObject(Exception):
    """A file that is not the object it should be: what is wrong with it."""


class ObjectFormat:
    """Writes and reads the files of objects with one identity and one list of parts.

    identity: whatever makes bytes unfit for another server: model, weights, format, page, dtype
    parts: bytes of each part of an object, each at least 1
    """

    def __init__(self, identity: str, parts: Sequence[int]):
        self.parts = tuple(parts)
        fixed = struct.pack(f"<II{len(parts)}Q", VERSION, len(parts), *parts)
        self._identity = hashlib.blake2b(fixed + identity.encode(), digest_size=DIGEST_BYTES)
        self._head = struct.Struct(f"<8sII{DIGEST_BYTES}s{DIGEST_BYTES}s{2 * len(parts)}Q")
        self.header_bytes = _rounded(self._head.size + 8)
        self._starts = [self.header_bytes]
        for size in parts:
            self._starts.append(self._starts[-1] + size)
        self.file_bytes = self._starts[-1]
        # One more block covers the inode and the object's share of its directory.
        self.charged_bytes = _rounded(self.file_bytes) + BLOCK_BYTES
        self.folder = f"{self._identity.hexdigest()[:NAME_CHARS]}-{self.charged_bytes}"

    def digest(self, key: str) -> bytes:
        """The digest of a key under this identity."""
        secret = self._identity.digest()
        return hashlib.blake2b(key.encode(), digest_size=DIGEST_BYTES, key=secret).digest()

    def path(self, digest: bytes) -> str:
        """Where the object of a key's digest lies, below the folder of all objects."""
        name = digest.hex()[:NAME_CHARS]
        return f"{self.folder}/{name[:FAN_OUT_CHARS]}/{name[FAN_OUT_CHARS:]}"

    def chunks(self, number: int, part: Part, writable: bool = False) -> list[memoryview]:
        """The flat views of a part's buffer or buffers.

        Raises: ValueError for a part that does not exist, a wrong size, or a buffer that is not
        contiguous or (with writable) read-only.
        """
        if not 0 <= number < len(self.parts):
            raise ValueError(f"Parts are numbered 0 to {len(self.parts) - 1}: got {number}.")
        views = [_flat(b) for b in (part if isinstance(part, list | tuple) else (part,))]
        if (size := sum(view.nbytes for view in views)) != self.parts[number]:
            raise ValueError(f"Part {number} has {self.parts[number]} bytes: got {size}.")
        if writable and any(view.readonly for view in views):
            raise ValueError(f"The buffer of part {number} must be writable.")
        return views

    def write(self, file: int, digest: bytes, parts: Sequence[list[memoryview]]) -> None:
        """Write a whole object. file: a descriptor of an empty file; parts: chunks of each part.

        Raises: OSError.
        """
        checksums = [_checksum(chunks, digest, i) for i, chunks in enumerate(parts)]
        identity = self._identity.digest()
        fields = (MAGIC, VERSION, len(parts), identity, digest, *self.parts, *checksums)
        head = self._head.pack(*fields)
        head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
        vectors = [memoryview(head.ljust(self.header_bytes, b"\0"))]
        _move(os.pwritev, file, vectors + [view for chunks in parts for view in chunks], 0)

    def read(
        self,
        file: int,
        digest: bytes,
        numbers: Sequence[int],
        parts: Sequence[list[memoryview]],
    ) -> None:
        """Fill the chunks of some parts.

        Raises: DamagedObject for anything but the very bytes that were written under this key;
        OSError.
        """
        checksums = self._checksums(file, digest)
        run: list[memoryview] = []
        for place, number in enumerate(numbers):
            run += parts[place]
            if place + 1 == len(numbers) or numbers[place + 1] != number + 1:
                end = self._starts[number + 1]
                if not _move(os.preadv, file, run, end - sum(view.nbytes for view in run)):
                    raise DamagedObject(f"ends within part {number}")
                run = []
        for number, chunks in zip(numbers, parts, strict=True):
            if _checksum(chunks, digest, number) != checksums[number]:
                raise DamagedObject(f"wrong checksum of part {number}")

    def _checksums(self, file: int, digest: bytes) -> tuple[int, ...]:
        """The checksum of each part, from a header that is sound and this object's."""
        head = os.pread(file, self._head.size + 8, 0)
        if len(head) < self._head.size + 8:
            raise DamagedObject(f"ends within its header, after {len(head)} bytes")
        if xxhash.xxh3_64_intdigest(head[:-8]) != int.from_bytes(head[-8:], "little"):
            raise DamagedObject("wrong checksum of the header")
        magic, version, _, identity, found, *numbers = self._head.unpack(head[:-8])
        if (magic, version, identity) != (MAGIC, VERSION, self._identity.digest()):
            raise DamagedObject("another format or model")
        if found != digest:
            raise DamagedObject("another key")
        return tuple(numbers[len(self.parts) :])


def _rounded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError(f"A chunk must be contiguous: got strides {view.strides}.")
    return view if view.ndim == 1 and view.format == "B" else view.cast("B")


def _checksum(chunks: list[memoryview], digest: bytes, number: int) -> int:
    """XXH3-64 of a part's bytes, seeded by the key's digest and the part's number."""
    seed = (int.from_bytes(digest[:8], "little") + number * ODD) & MASK
    if len(chunks) == 1:  # eight times as fast as the streaming form, for 40 KB
        return xxhash.xxh3_64_intdigest(chunks[0], seed)
    state = xxhash.xxh3_64(seed=seed)
    for chunk in chunks:
        state.update(chunk)
    return state.intdigest()


def _move(
    call: Callable[[int, list[memoryview], int], int],
    file: int,
    views: list[memoryview],
    offset: int,
) -> bool:
    """Read or write the views in their order from an offset on; False at the end of the file."""
    place = 0
    while place < len(views):
        moved = call(file, views[place : place + MAX_VECTORS], offset)
        if not moved:
            return False
        offset += moved
        while place < len(views) and moved >= views[place].nbytes:
            moved -= views[place].nbytes
            place += 1
        if moved:  # the kernel stopped within a view: a signal, or more than 2 GiB
            views[place] = views[place][moved:]
    return True
