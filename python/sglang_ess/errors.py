"""Exceptions of other people's code, told to the operator in one line."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_ess.config import REFUSED

MAX_CHARS = 600  # of a message; a longer one is a dump, which the traceback shows
PACKAGE = "/sglang/"
# What a check may catch before it says in its own words what is wrong.
CAUGHT = (ImportError, OSError, LookupError, ValueError)
STATEMENT_LINES = 20

# "sglang-ess COMMAND" in a process of the console script (launch/commands.py), else None.
console_command: str | None = None


class Refusal(ValueError):
    """One line for the operator: what must hold, what was got, what to do."""


def program_name(module: str) -> str:
    """What the usage text calls a command: "sglang-ess plan" or "python -m sglang_ess.plan".

    module: name of the command's module, without the package
    """
    return console_command or f"python -m sglang_ess.{module}"


def in_one_line(error: BaseException) -> str:
    """Type and text, whitespace joined, cut at MAX_CHARS; a bare assertion gives its source."""
    text = " ".join(str(error).split())
    if not text and isinstance(error, AssertionError):
        text = _statement(error)
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def root(error: BaseException) -> BaseException:
    """The first of the exceptions that led to this one by `raise ... from`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def with_place(error: BaseException) -> str:
    """in_one_line() and FILE:LINE of where it was raised; importlib's own frames do not count."""
    frames = [frame for frame in _frames(error) if not frame.filename.startswith("<")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return in_one_line(error) + place


def refusal(error: BaseException) -> str:
    """What the operator reads of an exception before there is a server."""
    if isinstance(error, Refusal):
        return str(error)
    if is_check(error):
        return f"SGLang refuses these options: {in_one_line(error)}"
    return f"SGLang cannot start: {with_place(error)}."


def is_check(error: BaseException) -> bool:
    """Whether ESS or SGLang raised it on purpose, with words for the operator.

    That is a Refusal, or a `raise` or an `assert` with a message, and no error that nobody meant
    led to it: what Python or a library raises by itself (TypeError, torch's RuntimeError) is a
    bug until somebody has looked at it.
    """
    if isinstance(error, Refusal):
        return True
    first, *causes = _chain(error)
    return _is_meant(first) and all(_is_meant(e) or isinstance(e, CAUGHT) for e in causes)


def make_scheduler(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Body of the AROUND hook on Scheduler.__init__: checks end the process with one line.

    Raises: SystemExit(REFUSED), which the launcher knows, for a check; an Exception would reach
    the operator as the traceback of a scheduler process. Anything else passes.
    """
    try:
        original(scheduler, *args, **kwargs)
    except Exception as error:
        if not is_check(error):
            raise
        print(f"sglang-ess: {refusal(error)}", file=sys.stderr, flush=True)
        raise SystemExit(REFUSED) from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_meant(error: BaseException) -> bool:
    frames = _frames(error)
    if not str(error) or not frames:
        return False
    inside = PACKAGE in Path(frames[-1].filename).as_posix()
    return inside and _statement(error).startswith(("raise ", "assert "))


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _statement(error: BaseException) -> str:
    """First line of the statement that raised it.

    Python reports the line of the call or the condition, which may be below it.
    """
    frames = _frames(error)
    if not frames:
        return ""
    name, number = frames[-1].filename, frames[-1].lineno or 0
    for line in range(number, max(number - STATEMENT_LINES, 0), -1):
        text = linecache.getline(name, line).strip()
        if text.startswith(("raise ", "assert ")):
            return text.removesuffix(", (").removesuffix("(")
        if line < number and text.endswith(":"):
            break
    return linecache.getline(name, number).strip()
