"""A scenario file: the model, the machines, the server and the load of a simulation.

`read_scenario("ess-paper-32k")` reads sim/data/scenarios/ess-paper-32k.toml. A name that ends in
.toml is a path. sim/engine/simulation.py runs the scenario.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

from sglang_ess.sim.inputs import arrivals
from sglang_ess.sim.inputs.arrivals import Arrivals, Lengths
from sglang_ess.sim.inputs.files import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Checked,
    SpecError,
    find,
    names,
    read,
    spec,
)
from sglang_ess.sim.inputs.specs import OVERLAPS

FOLDER = "scenarios"
SYSTEMS = ESS, NO_ADMISSION, ONE_TIER = "ess", "no-admission", "one-tier"
MODES = PD, COLOCATED, DECODE = "pd", "colocated", "decode"
CHARGES = OURS, PAPER = "ours", "paper"
WHOLE: tuple[str, Callable[[Any], bool]] = ("1 or more", lambda value: value >= 1)


@dataclass(frozen=True)
class ServerSettings(Checked):
    """How the decode ranks serve. A field that is left out takes the deployment's value.

    mode            pd: prefill ranks, hand-off, decode ranks; colocated: decode ranks compute
                    the prompts too; decode: requests arrive with their rows
    decode_ranks    number of simulated ranks; they stand for all the deployment's
    prefill_ranks   that feed the simulated decode ranks
    lockstep        decode ranks step together, as they do when they share experts
    max_running     most requests of a decode batch
    reserved_tokens free tokens needed for each decoding request before another one gets its
                    slots: SGLang's --num-reserved-decode-tokens
    itl_ms          target of the admission
    warmup          prefill sends the ids of the rows that the prompt's end selected
    overlap         of fetches and compute
    early_fetch     fetch the rows of an index group's later layers behind the layers before
    """

    mode: str = spec(choices=MODES, default=PD)
    decode_ranks: int | None = spec(WHOLE, default=None)
    prefill_ranks: int | None = spec(WHOLE, default=None)
    lockstep: bool = True
    max_running: int = spec(WHOLE, default=256)
    reserved_tokens: int = spec(NOT_NEGATIVE, default=512)
    itl_ms: float | None = spec(POSITIVE, default=None)
    warmup: bool = True
    overlap: str | None = spec(choices=OVERLAPS, default=None)
    early_fetch: bool | None = spec(default=None)


@dataclass(frozen=True)
class Storage(Checked):
    """Memory and link of a decode rank. kv_gib and host_gib default to the deployment's.

    slots       of a rank; left out: as many as fit together with hot_ratio of them hot
    hot_ratio   as --ess-hot-ratio
    hot_rows    of a layer; left out: all that the device has room for
    charges     ours: with maps and row state, as our pool allocates; paper: as ESS counts
    link_share  of the link's rates that a rank gets: 0.5 if two GPUs share a switch
    """

    kv_gib: float | None = spec(POSITIVE, default=None)
    host_gib: float | None = spec(NOT_NEGATIVE, default=None)
    slots: int | None = spec(WHOLE, default=None)
    hot_rows: int | None = spec(WHOLE, default=None)
    hot_ratio: float = spec(SHARE, default=0.2)  # as AUTO_HOT_RATIO of mem_cache/capacity.py
    charges: str = spec(choices=CHARGES, default=OURS)
    link_share: float = spec(SHARE, default=1.0)


@dataclass(frozen=True)
class Run(Checked):
    """How long to simulate, and how closely.

    layers  whose hot tiers are simulated row by row; 0: all
    misses  rows per request, layer and step to assume, with no layer simulated
    steps   of a rank, seconds: of simulated time. The run ends there or with its last request.
    settle_steps  first steps that are not measured
    """

    layers: int = spec(NOT_NEGATIVE, default=4)
    misses: float | None = spec(NOT_NEGATIVE, default=None)
    steps: int | None = spec(WHOLE, default=None)
    seconds: float | None = spec(POSITIVE, default=None)
    settle_steps: int = spec(NOT_NEGATIVE, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.settle_steps >= self.steps:
            raise ValueError(f"settle_steps must be below steps: got {self.settle_steps}.")


@dataclass(frozen=True)
class Scenario(Checked):
    """One scenario file. systems: ess, no-admission (ESS without admission), one-tier."""

    title: str
    model: str
    gpu: str
    link: str
    deployment: str
    locality: str
    arrivals: Arrivals
    input_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    systems: tuple[str, ...] = spec(choices=SYSTEMS, default=(ESS, ONE_TIER))
    server: ServerSettings = field(default=ServerSettings())
    memory: Storage = field(default=Storage())
    run: Run = field(default=Run())

    def __post_init__(self) -> None:
        super().__post_init__()
        traced = self.arrivals.kind == arrivals.TRACE
        for name in ("input_tokens", "output_tokens"):
            if traced != (getattr(self, name) is None):
                rule = "not be given with a trace" if traced else "be given"
                raise ValueError(f"{name} must {rule}: got {getattr(self, name)}.")


def read_scenario(name_or_path: str | Path) -> Scenario:
    """Read a scenario. The path of a trace in it is relative to the scenario's file.

    Raises: SpecError, one line with file, line and field.
    """
    file = find(FOLDER, name_or_path)
    scenario = read(file, Scenario)
    trace = scenario.arrivals.path
    if trace is None:
        return scenario
    found = replace(scenario.arrivals, path=str(file.parent / trace))
    return replace(scenario, arrivals=found)


def scenario_names() -> list[str]:
    """Names of the scenarios in sim/data/scenarios."""
    return names(FOLDER)


def with_settings(scenario: Scenario, settings: Sequence[str]) -> Scenario:
    """Return the scenario with some fields changed, as "arrivals.rate=4" or "run.steps=50".

    Values are written as in TOML, but a text needs no quotes. The rules are checked when all
    fields are changed. Raises: SpecError, one line, for an unknown field or a refused value.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise SpecError(f"--set must be FIELD=VALUE: got {setting!r}.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        changes[name.strip()] = value
    try:
        return typing.cast(Scenario, _changed(scenario, changes))
    except ValueError as error:
        raise SpecError(f"--set {' '.join(settings)}: {error}") from None


def _changed(record: Any, changes: Mapping[str, Any]) -> Any:
    """Return record with the fields of dotted names replaced. Raises: ValueError."""
    hints = typing.get_type_hints(type(record))
    values: dict[str, Any] = {}
    tables: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        if name not in hints:
            raise ValueError(f"field must be one of {', '.join(hints)}: got {name!r}.")
        if rest:
            tables.setdefault(name, {})[rest] = value
        else:
            values[name] = _typed(name, value, hints[name])
    for name, inner in tables.items():
        table = getattr(record, name)
        if not is_dataclass(table):
            raise ValueError(f"{name} must be a table that the file has: got {table!r}.")
        values[name] = _changed(table, inner)
    return replace(record, **values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return value as a field's type: plain, optional, or a tuple of plain ones."""
    if isinstance(hint, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_typed(name, item, typing.get_args(hint)[0]) for item in value)
    allowed = (int, float) if hint is float else (hint,)
    if type(value) not in allowed or is_dataclass(hint):
        raise ValueError(f"{name} must be {getattr(hint, '__name__', hint)}: got {value!r}.")
    return hint(value)
