"""Strict TOML files: `read` makes a frozen dataclass of a file, or raises with file and line.

A table becomes a dataclass and a key a field, whose rule is in its metadata (see `spec`). All
simulator files are read so: models, GPUs, links, deployments, localities, scenarios.
"""

from __future__ import annotations

import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar


class _Dataclass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=_Dataclass)
Limit = tuple[str, Callable[[Any], bool]]

POSITIVE: Limit = ("more than 0", lambda value: 0 < value < float("inf"))
NOT_NEGATIVE: Limit = ("0 or more", lambda value: 0 <= value < float("inf"))
SHARE: Limit = ("more than 0 and at most 1", lambda value: 0 < value <= 1)
FRACTION: Limit = ("0 to 1", lambda value: 0 <= value <= 1)

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_NAME = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_KEY = re.compile(rf"^\s*({_NAME}(?:\s*\.\s*{_NAME})*)\s*=")
_AT_LINE = re.compile(r"\s*\(at line (\d+), column \d+\)")
_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class SpecError(ValueError):
    """A simulator file cannot be used. The text is one line for the operator."""


def spec(
    limit: Limit | None = None, *, choices: tuple[str, ...] | None = None, default: Any = MISSING
) -> Any:
    """Return a dataclass field with its rule. Without a default the file must give it.

    limit: (rule in words, check) for each number; choices: the allowed texts
    """
    return field(default=default, metadata={"limit": limit, "choices": choices})


@dataclass(frozen=True)
class Checked:
    """Base of a frozen dataclass that checks its fields' rules when it is made.

    Raises: ValueError, one line with every broken rule.
    """

    def __post_init__(self) -> None:
        reasons = [
            f"{f.name} must be {rule}: got {getattr(self, f.name)!r}."
            for f in fields(self)
            if (rule := _broken(f, getattr(self, f.name)))
        ]
        if reasons:
            raise ValueError(" ".join(reasons))


def names(folder: str) -> list[str]:
    """Names of the files in sim/data/<folder>, sorted, without their suffix."""
    files = (resources.files("sglang_ess.sim") / "data" / folder).iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".toml"))


def find(folder: str, name_or_path: str | Path) -> Path:
    """Return the path of a name in sim/data/<folder>, or the given path if it ends in .toml.

    Raises: SpecError for a name that sim/data/<folder> does not have.
    """
    if str(name_or_path).endswith(".toml"):
        return Path(name_or_path)
    if name_or_path not in names(folder):
        raise SpecError(
            f"{folder} must hold {name_or_path}: got {', '.join(names(folder))}. Name one of "
            "them, or a file that ends in .toml."
        )
    return Path(str(resources.files("sglang_ess.sim") / "data" / folder / f"{name_or_path}.toml"))


def read(path: Path | str, cls: type[T]) -> T:
    """Read the file as a `cls`. Tables become nested dataclasses, lists become tuples.

    Raises: SpecError, one line with file, line and field, for a missing file, for text that is
    not TOML, for unknown, missing or wrongly typed fields, and for values outside their rules.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise SpecError(f"{path} must be a readable TOML file: got {reason}.") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = _AT_LINE.search(str(error))
        line = at.group(1) if at else max(1, len(text.splitlines()))
        reason = _AT_LINE.sub("", str(error))
        raise SpecError(f"{path}:{line}: file must be TOML: got {reason!r}.") from None
    return _Reader(path, _lines(text)).build(table, cls, ())


Place = tuple[str | int, ...]


def _lines(text: str) -> dict[Place, int]:
    """Return {place of a table or key: its line}. A place has an index for an array's table."""
    found: dict[Place, int] = {(): 1}
    counts: dict[Place, int] = {}
    table: Place = ()
    quoted: str | None = None  # delimiter of the multi-line text in which the line begins
    for number, line in enumerate(text.splitlines(), 1):
        began_inside = quoted
        for mark in re.findall(r"\"\"\"|'''", line):
            quoted = mark if quoted is None else None if mark == quoted else quoted
        if began_inside:
            continue
        if header := _HEADER.match(line):
            table = _resolved(_split(header[2]), counts)
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table += (counts[table],)
            for end in range(1, len(table) + 1):
                found.setdefault(table[:end], number)
        elif key := _KEY.match(line):
            place = table + _split(key[1])
            for end in range(len(table) + 1, len(place) + 1):
                found.setdefault(place[:end], number)
    return found


def _split(dotted: str) -> Place:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))


def _resolved(names: Place, counts: dict[Place, int]) -> Place:
    """Return names with the index of its last table after each array of tables on the way."""
    place: Place = ()
    for i, name in enumerate(names):
        place += (name,)
        if place in counts and i < len(names) - 1:
            place += (counts[place],)
    return place


class _Reader:
    """Makes dataclasses of one file's tables. lines: as from _lines."""

    def __init__(self, path: Path, lines: dict[Place, int]):
        self._path, self._lines = path, lines

    def _error(self, place: Place, rule: str) -> SpecError:
        known = place
        while known not in self._lines:
            known = known[:-1]
        name = ""
        for part in place:
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
        return SpecError(f"{self._path}:{self._lines[known]}: {name or 'file'} {rule}")

    def build(self, table: Any, cls: type[T], place: Place) -> T:
        if not isinstance(table, Mapping):
            raise self._error(place, f"must be a table: got {table!r}.")
        known = {f.name: f for f in fields(cls)}
        hints = typing.get_type_hints(cls)
        for key in table:
            if key not in known:
                raise self._error(
                    (*place, key), f"must be a known field: got {key!r}. Known: {', '.join(known)}."
                )
        values = {}
        for name, f in known.items():
            if name in table:
                values[name] = self._value(table[name], f, hints[name], (*place, name))
            elif f.default is MISSING and f.default_factory is MISSING:
                raise self._error((*place, name), "must be given: got nothing.")
        try:
            return cls(**values)
        except ValueError as error:  # a rule between fields
            raise self._error(place, f"is refused: {error}") from None

    def _value(self, value: Any, f: Field[Any], hint: Any, place: Place) -> Any:
        value = self._typed(value, hint, place)
        if rule := _broken(f, value):
            raise self._error(place, f"must be {rule}: got {value!r}.")
        return value

    def _typed(self, value: Any, hint: Any, place: Place) -> Any:
        """Return value as `hint`: a dataclass, tuple[X, ...], X | None, or a plain type."""
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
        if isinstance(hint, type) and is_dataclass(hint):
            return self.build(value, hint, place)
        if typing.get_origin(hint) is tuple:
            if not isinstance(value, list):
                raise self._error(place, f"must be a list: got {value!r}.")
            item = typing.get_args(hint)[0]
            return tuple(self._typed(each, item, (*place, i)) for i, each in enumerate(value))
        allowed = (int, float) if hint is float else (hint,)
        if type(value) not in allowed:
            raise self._error(place, f"must be {_NOUNS.get(hint, hint)}: got {value!r}.")
        return hint(value)


def _broken(f: Field[Any], value: Any) -> str | None:
    """Return the rule that a field's value breaks, or None. Each item of a list is checked."""
    if value is None and f.default is None:
        return None
    choices, limit = f.metadata.get("choices"), f.metadata.get("limit")
    items = value if isinstance(value, tuple) else (value,)
    if choices and any(item not in choices for item in items):
        return f"one of {', '.join(choices)}"
    return limit[0] if limit and not all(limit[1](item) for item in items) else None
