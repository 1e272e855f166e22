"""What the clients send: when requests arrive, and how many tokens each has.

A Workload is drawn as a whole before the simulation begins, so that one seed gives the same load
to every system that is compared.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sglang_ess.sim.inputs.files import NOT_NEGATIVE, POSITIVE, Checked, spec

MAX_TOKENS = 1 << 40  # of a request: no limit
CONSTANT, UNIFORM, LOGNORMAL, MIXTURE = "constant", "uniform", "lognormal", "mixture"
T = TypeVar("T")
POISSON, FIXED, CLOSED, BURST, TRACE = "poisson", "fixed", "closed", "burst", "trace"

# The fields of each kind other than "kind". True: the field is required.
LENGTH_FIELDS: dict[str, dict[str, bool]] = {
    CONSTANT: {"tokens": True},
    UNIFORM: {"low": True, "high": True},
    LOGNORMAL: {"median": True, "sigma": True, "low": False, "high": False},
    MIXTURE: {"parts": True},
}
ARRIVAL_FIELDS: dict[str, dict[str, bool]] = {
    POISSON: {"rate": True, "requests": True},
    FIXED: {"rate": True, "requests": True},
    CLOSED: {"clients": True, "requests": True},
    BURST: {"requests": True},
    TRACE: {"path": True, "requests": False},
}
TRACE_COLUMNS = ("time", "input_tokens", "output_tokens")
PREFIX_COLUMNS = ("prefix", "prefix_tokens")


def given(value: T | None) -> T:
    """Return a field that the kind requires, as check_kind has made sure."""
    assert value is not None
    return value


class WorkloadError(ValueError):
    """A trace file cannot be read. The text is one line that names file and line."""


def check_kind(value: Any, known: dict[str, bool]) -> None:
    """Check that a dataclass has the fields of its `kind` and no others.

    known: field -> whether it is required. Raises: ValueError.
    """
    for name, content in vars(value).items():
        given = content not in (None, ())
        if name == "kind":
            continue
        if given and name not in known:
            raise ValueError(f"{name} must not be given for kind {value.kind!r}: got {content!r}.")
        if not given and known.get(name):
            raise ValueError(f"{name} must be given for kind {value.kind!r}: got nothing.")


@dataclass(frozen=True)
class Lengths(Checked):
    """A distribution of token counts; every draw is at least 1.

    kind    constant (tokens), uniform (low to high, both included), lognormal (median, sigma of
            the logarithm, cut to low and high), mixture (parts, each with its weight)
    weight  share of this part in a mixture; the weights need not sum to 1
    Raises: ValueError for a field that is missing, out of range, or of another kind.
    """

    kind: str = spec(choices=tuple(LENGTH_FIELDS))
    tokens: int | None = spec(POSITIVE, default=None)
    low: int | None = spec(POSITIVE, default=None)
    high: int | None = spec(POSITIVE, default=None)
    median: float | None = spec(POSITIVE, default=None)
    sigma: float | None = spec(NOT_NEGATIVE, default=None)
    weight: float | None = spec(POSITIVE, default=None)
    parts: tuple[Lengths, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self, LENGTH_FIELDS[self.kind] | {"weight": False})
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"high must be low ({self.low}) or more: got {self.high}.")

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Draw `count` token counts [count] int64."""
        if self.kind == CONSTANT:
            return np.full(count, given(self.tokens), np.int64)
        if self.kind == UNIFORM:
            return rng.integers(given(self.low), given(self.high) + 1, count)
        if self.kind == LOGNORMAL:
            median, sigma = given(self.median), given(self.sigma)
            drawn = np.rint(rng.lognormal(math.log(median), sigma, count))
            return np.clip(drawn, self.low or 1, self.high or MAX_TOKENS).astype(np.int64)
        weights = np.array([part.weight or 1.0 for part in self.parts])
        which = rng.choice(len(weights), count, p=weights / weights.sum())
        # Each part draws for all requests, so that its weight changes no length of another part.
        parts = np.stack([part.draw(count, rng) for part in self.parts])
        chosen: np.ndarray = parts[which, np.arange(count)]
        return chosen

    @property
    def most(self) -> int:
        """Upper limit of a draw; MAX_TOKENS if there is none."""
        if self.kind == MIXTURE:
            return max(part.most for part in self.parts)
        return self.tokens or self.high or MAX_TOKENS


@dataclass(frozen=True)
class Arrivals(Checked):
    """When requests arrive.

    kind      poisson or fixed (rate, in requests a second), closed (clients, each of which sends
              a request when its last one is done), burst (all at once), trace (a file)
    requests  in all; for a trace, how many of its first requests to take
    path      of the trace: JSONL or CSV rows, see read_trace
    Raises: ValueError as Lengths.
    """

    kind: str = spec(choices=tuple(ARRIVAL_FIELDS))
    requests: int | None = spec(NOT_NEGATIVE, default=None)
    rate: float | None = spec(POSITIVE, default=None)
    clients: int | None = spec(POSITIVE, default=None)
    path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self, ARRIVAL_FIELDS[self.kind])


@dataclass(frozen=True)
class Workload:
    """All n requests, in the order of their arrival.

    seconds [n] float64: arrival since the start, ascending; inf for a request whose client waits
            for an earlier answer (closed)
    input_tokens, output_tokens [n] int64: at least 1
    prefix [n] int64: number of the prefix that a request shares with others, -1 for none
    prefix_tokens [n] int64: its length, which is less than input_tokens
    """

    seconds: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    prefix: np.ndarray
    prefix_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.seconds)


def draw(
    arrivals: Arrivals, inputs: Lengths | None, outputs: Lengths | None, seed: int
) -> Workload:
    """Draw the workload of a seed. inputs and outputs may be None only for a trace."""
    if arrivals.kind == TRACE:
        return read_trace(Path(given(arrivals.path)), arrivals.requests)
    # One random stream for each, so that another rate leaves the lengths unchanged.
    clock, of_inputs, of_outputs = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    count = given(arrivals.requests)
    if arrivals.kind == POISSON:
        seconds = np.cumsum(clock.exponential(1 / given(arrivals.rate), count))
    elif arrivals.kind == FIXED:
        seconds = np.arange(count) / given(arrivals.rate)
    elif arrivals.kind == CLOSED:
        seconds = np.where(np.arange(count) < given(arrivals.clients), 0.0, np.inf)
    else:
        seconds = np.zeros(count)
    none = np.full(count, -1, np.int64)
    lengths = given(inputs).draw(count, of_inputs), given(outputs).draw(count, of_outputs)
    return Workload(seconds, *lengths, none, np.zeros(count, np.int64))


# --- traces -----------------------------------------------------------------------------


@dataclass
class _Columns:
    seconds: list[float] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    prefix: list[int] = field(default_factory=list)
    prefix_tokens: list[int] = field(default_factory=list)


def read_trace(path: Path, requests: int | None = None) -> Workload:
    """Read a trace file and return the first `requests` of its requests by time.

    A row has time (seconds), input_tokens and output_tokens. It may have prefix (a name or
    number that requests with a common prefix share) and prefix_tokens (the prefix's length).
    A file that ends in .csv has a header line with these names; any other is JSONL, one object
    a line.
    Raises: WorkloadError with file and line.
    """
    columns = _Columns()
    names: dict[Any, int] = {}
    try:
        rows = _csv_rows if path.suffix == ".csv" else _jsonl_rows
        for line, row in rows(path):
            _add(columns, row, names, f"{path}:{line}")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"trace must be a readable text file: got {path} ({error}).") from None
    order = np.argsort(np.array(columns.seconds), kind="stable")[:requests]
    seconds = np.array(columns.seconds, float)[order]
    others = (columns.inputs, columns.outputs, columns.prefix, columns.prefix_tokens)
    return Workload(seconds, *(np.array(values, np.int64)[order] for values in others))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError:
                raise WorkloadError(f"{path}:{line}: a line must be a JSON object.") from None
            yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row or None in row.values():
                raise WorkloadError(
                    f"{path}:{reader.line_num}: a row must have a value for each of the "
                    f"{len(reader.fieldnames or ())} columns."
                )
            yield reader.line_num, {name: text for name, text in row.items() if text}


def _add(columns: _Columns, row: Any, names: dict[Any, int], where: str) -> None:
    known = TRACE_COLUMNS + PREFIX_COLUMNS
    if not isinstance(row, dict):
        raise WorkloadError(f"{where}: a line must be a JSON object.")
    if unknown := sorted(set(row) - set(known)):
        raise WorkloadError(f"{where}: {unknown[0]}: must be one of {', '.join(known)}.")
    seconds, inputs, outputs = (
        _number(row, name, where, least, whole)
        for name, least, whole in zip(TRACE_COLUMNS, (0, 1, 1), (False, True, True), strict=True)
    )
    shared = int(_number(row, "prefix_tokens", where, 0, True)) if "prefix_tokens" in row else 0
    if shared and "prefix" not in row:
        raise WorkloadError(f"{where}: prefix: must name the prefix that prefix_tokens counts.")
    if shared >= inputs:
        raise WorkloadError(
            f"{where}: prefix_tokens: must be fewer than input_tokens ({inputs}): got {shared}."
        )
    columns.seconds.append(seconds)
    columns.inputs.append(int(inputs))
    columns.outputs.append(int(outputs))
    columns.prefix.append(names.setdefault(str(row["prefix"]), len(names)) if shared else -1)
    columns.prefix_tokens.append(shared)


def _number(row: Mapping[str, Any], name: str, where: str, least: int, whole: bool) -> float:
    value = row.get(name)
    if value is None:
        raise WorkloadError(f"{where}: {name}: must be given.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    good = math.isfinite(number) and number >= least and (not whole or number == int(number))
    if not good or isinstance(value, bool):
        kind = "a whole number" if whole else "a number"
        raise WorkloadError(f"{where}: {name}: must be {kind} of {least} or more: got {value!r}.")
    return number
