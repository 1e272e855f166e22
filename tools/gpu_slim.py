"""`python tools/gpu_slim.py OUT WHEEL...`: wheels without what a Hopper GPU cannot use.

Each WHEEL is written to OUT under its own name and version, stored, so that a compressor
afterwards sees all of it. Left out: the files of DROPPED, and in every shared library the device
code for other architectures than sm_90. RECORD tells what is there.

Device code lies in fat binaries: a header of 16 bytes (magic, version, its own size as uint16, then
the size of what follows as uint64) and entries, each with a header of its own: kind (1 PTX, 2 SASS)
uint16, version uint16, header size uint32, size uint64, and at byte 28 the architecture as uint32.
A driver looks for entries that its device can run: SASS of the device's major version, at most its
minor one, or PTX of at most its version. sm_90 is the only SASS that compute capability 9.0 runs.
So a fat binary is packed anew with the SASS of sm_90 and PTX up to 90, and the rest is zeros. If
nothing of it could run, the smallest entry stays, and the driver says what it would have said.
"""

from __future__ import annotations

import base64
import csv
import fnmatch
import hashlib
import io
import struct
import sys
import zipfile
from pathlib import Path

ARCHITECTURE = 90
PTX, SASS = 1, 2
MAGIC = struct.pack("<I", 0xBA55ED50)
BINARY_HEADER = struct.Struct("<4sHHQ")
ENTRY_HEADER = struct.Struct("<HHIQ12xI")

# By distribution. sglang-kernel: FlashAttention 3 (1.1 GB; gpu_site.py keeps DSA's prefill from
# it), the library for Blackwell, and InfLLM's. torch and triton: a compiler of protocols, a
# profiler's libraries, an assembler for Blackwell, disassemblers, tests of their own.
DROPPED = {
    "sglang_kernel": (
        "sgl_kernel/flash_ops.*",
        "sgl_kernel/infllm_ops.*",
        "sgl_kernel/sm100/*",
    ),
    "torch": ("torch/bin/protoc*",),
    "triton": (
        "triton/FileCheck",
        "triton/backends/nvidia/bin/cuobjdump",
        "triton/backends/nvidia/bin/nvdisasm",
        "triton/backends/nvidia/bin/ptxas-blackwell",
        "triton/backends/nvidia/lib/cupti*",
        "triton/instrumentation/*.so",
    ),
}


def keep_one_architecture(library: bytearray) -> int:
    """Packs every fat binary in `library` anew, in place; returns how many bytes became zeros.

    Raises: ValueError if a fat binary's entries do not fill it.
    """
    freed = 0
    start = library.find(MAGIC)
    while start >= 0:
        _, version, header, size = BINARY_HEADER.unpack_from(library, start)
        end = start + header + size
        if version != 1 or header != BINARY_HEADER.size or end > len(library):
            end = start + len(MAGIC)  # the four bytes, but no fat binary
        else:
            kept = _kept(library, start + header, end)
            left = b"".join(library[at : at + length] for at, length in kept)
            library[start + header : end] = left.ljust(size, b"\0")
            BINARY_HEADER.pack_into(library, start, MAGIC, version, header, len(left))
            freed += size - len(left)
        start = library.find(MAGIC, end)
    return freed


def _kept(library: bytearray, at: int, end: int) -> list[tuple[int, int]]:
    """(place, length) of a fat binary's entries that the device can run, or of its smallest."""
    kept, others = [], []
    while at < end:
        kind, _, header, size, architecture = ENTRY_HEADER.unpack_from(library, at)
        length = header + size
        if kind not in (PTX, SASS) or header < ENTRY_HEADER.size or at + length > end:
            raise ValueError(
                "a fat binary's entry must be PTX (1) or SASS (2) and end inside it: got kind "
                f"{kind}, {length} of {end - at} bytes. Look at the format at the top of this file."
            )
        runs = architecture == ARCHITECTURE if kind == SASS else architecture <= ARCHITECTURE
        (kept if runs else others).append((at, length))
        at += length
    return kept or [min(others, key=lambda entry: entry[1])]


def slim(wheel: Path, out: Path) -> Path:
    """Writes out/<wheel's name>; returns its path. RECORD has the changed files' new checksums."""
    target = out / wheel.name
    dropped = DROPPED.get(wheel.name.split("-")[0], ())
    changed: dict[str, tuple[str, int]] = {}
    gone = set()
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(target, "w") as result:
        # Files that resemble each other side by side; RECORD last, as in every wheel.
        files = sorted(
            (info for info in source.infolist() if not info.is_dir()),
            key=lambda info: (_is_record(info.filename), Path(info.filename).suffix, info.filename),
        )
        for info in files:
            name = info.filename
            if any(fnmatch.fnmatch(name, pattern) for pattern in dropped):
                gone.add(name)
                continue
            content = bytearray(source.read(info))
            if name.endswith(".so") or ".so." in name:
                if keep_one_architecture(content):
                    changed[name] = _checksum(content), len(content)
            elif _is_record(name):
                content = _renew_record(content.decode(), changed, gone).encode()
            stored = zipfile.ZipInfo(name, info.date_time)
            stored.external_attr = info.external_attr
            result.writestr(stored, content, zipfile.ZIP_STORED)
    return target


def _is_record(name: str) -> bool:
    return name.endswith(".dist-info/RECORD")


def _checksum(content: bytearray) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return f"sha256={digest.rstrip(b'=').decode()}"


def _renew_record(record: str, changed: dict[str, tuple[str, int]], gone: set[str]) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    for name, *rest in csv.reader(record.splitlines()):
        if name not in gone:
            rows.writerow([name, *changed.get(name, rest)])
    return out.getvalue()


def main(arguments: list[str]) -> None:
    out = Path(arguments[0])
    for wheel in map(Path, arguments[1:]):
        before = wheel.stat().st_size
        unpacked = slim(wheel, out).stat().st_size
        print(f"{wheel.name}: {before >> 10} KiB, to {unpacked >> 10} unpacked", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
