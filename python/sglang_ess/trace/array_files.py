"""Arrays by layer in .npy, .npz and .safetensors files, read a block of rows at a time."""

from __future__ import annotations

import re
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

SUFFIXES = (".npy", ".npz", ".safetensors")
LAYER = "{layer}"
# The formats of safetensors that this reads; torch gives the other floats as bfloat16 is: float32.
INTEGERS = ("I8", "I16", "I32", "I64", "U8")
FLOATS = ("F16", "BF16", "F32", "F64")
NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class ArrayRows(ABC):
    """An array whose rows are read in order, once.

    where: its file and name, for messages
    shape: of the array; kind: "i" integers, "f" floats, "?" others
    """

    def __init__(self, where: str, shape: tuple[int, ...], kind: str):
        self.where, self.shape, self.kind = where, shape, kind

    @abstractmethod
    def read(self, count: int) -> np.ndarray:
        """Return the next rows [count, columns]; floats as float32, float64 as it is.

        Raises: ValueError, one line, if the file ends before.
        """


class MappedRows(ArrayRows):
    """Rows of something that has been mapped into memory: reading copies the rows asked for."""

    def __init__(self, where: str, array: Any, shape: tuple[int, ...], kind: str):
        super().__init__(where, shape, kind)
        self._array, self._next = array, 0

    def read(self, count: int) -> np.ndarray:
        part = self._array[self._next : self._next + count]
        self._next += count
        if isinstance(part, np.ndarray):
            return np.array(part)
        rows: np.ndarray = (part.float() if part.element_size() == 2 else part).numpy()
        return rows


class ZippedRows(ArrayRows):
    """Rows of a member of a .npz file, which is decompressed as it is read."""

    def __init__(self, where: str, member: IO[bytes]):
        version = np.lib.format.read_magic(member)  # type: ignore[no-untyped-call]
        if version not in NPY_HEADERS:
            raise ValueError(f"its .npy version must be 1.0 or 2.0: got {version}")
        shape, by_columns, dtype = NPY_HEADERS[version](member)  # type: ignore[no-untyped-call]
        if by_columns and len(shape) > 1:
            raise ValueError("its rows must lie one after another: got Fortran order")
        super().__init__(where, shape, _kind(dtype))
        self._member, self._dtype = member, dtype

    def read(self, count: int) -> np.ndarray:
        columns = self.shape[1]
        size = count * columns * self._dtype.itemsize
        try:
            data = self._member.read(size)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise ValueError(f"{self.where} must be whole: {error}.") from None
        if len(data) < size:
            raise ValueError(f"{self.where} must be whole: it ends {size - len(data)} bytes early.")
        return np.frombuffer(data, self._dtype).reshape(count, columns)


def open_arrays(path: Path, pattern: str) -> dict[int, ArrayRows]:
    """Open the arrays of every layer: {layer: rows}, by layer.

    path     a .npz or .safetensors file, or a directory of files of the three kinds
    pattern  an array's name with {layer} in it. A .npy file's name is its path in the directory
             without the suffix. Folders before the name do not count
    Raises: OSError; ValueError, one line, for a file that is not whole, a pattern without {layer}
    and two arrays of one layer.
    """
    if pattern.count(LAYER) != 1:
        raise ValueError(f"a pattern must have {LAYER} once: got {pattern!r}.")
    wanted = re.compile("(?:.*/)?" + re.escape(pattern).replace(re.escape(LAYER), r"(\d+)"))
    found: dict[int, ArrayRows] = {}
    for name, opens in _named(path):
        if match := wanted.fullmatch(name):
            layer = int(match[1])
            if layer in found:
                both = f"{found[layer].where} and {path}: {name}"
                raise ValueError(f"a layer must have one array {pattern!r}: got {both}.")
            found[layer] = opens()
    return dict(sorted(found.items()))


def _named(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name of each array and the function that opens it."""
    if not path.is_dir():
        path.stat()  # a missing one is an OSError
        if path.suffix not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"arrays must be in {known} files or a directory: got {path}.")
        yield from _of_file(path, path.stem)
        return
    for file in sorted(path.rglob("*")):
        if file.suffix in SUFFIXES and file.is_file():
            yield from _of_file(file, file.relative_to(path).with_suffix("").as_posix())


def _of_file(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".npy":
        yield name, lambda: _whole(file, _map_npy)
        return
    opened = _whole(file, _open_npz if file.suffix == ".npz" else _open_safetensors)
    yield from opened.items()


def _whole(file: Path, opens: Any) -> Any:
    """opens(file). Raises: ValueError, one line, for what the file's format does not allow."""
    from safetensors import SafetensorError

    wrong = ValueError, EOFError, zipfile.BadZipFile, SafetensorError, struct.error
    try:
        return opens(file)
    except wrong as error:
        got = f"got {file.stat().st_size} bytes ({' '.join(str(error).split())})"
        raise ValueError(f"{file} must be a whole {file.suffix} file: {got}.") from None


def _kind(dtype: np.dtype[Any]) -> str:
    return {"i": "i", "u": "i", "f": "f"}.get(dtype.kind, "?")


def _map_npy(file: Path) -> ArrayRows:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return MappedRows(str(file), array, array.shape, _kind(array.dtype))


def _open_npz(file: Path) -> dict[str, Any]:
    zipped = zipfile.ZipFile(file)
    members = [member for member in zipped.namelist() if member.endswith(".npy")]

    def opening(member: str) -> Any:
        where = f"{file}: {member.removesuffix('.npy')}"
        return lambda: _whole(file, lambda _: ZippedRows(where, zipped.open(member)))

    return {member.removesuffix(".npy"): opening(member) for member in members}


def _open_safetensors(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    tensors: Any = safe_open(file, framework="pt")

    def opening(name: str) -> Any:
        rows = tensors.get_slice(name)
        dtype = rows.get_dtype()
        kind = "i" if dtype in INTEGERS else "f" if dtype in FLOATS else "?"
        return lambda: MappedRows(f"{file}: {name}", rows, tuple(rows.get_shape()), kind)

    return {name: opening(name) for name in tensors.keys()}
