"""Turns exceptions of SGLang and other libraries into one line for the operator."""

from __future__ import annotations

import linecache
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_ess.config import REFUSED, TEMPLATE

MAX_CHARS = 600  # of a message; a longer one is a dump, and the traceback shows it
PACKAGE = "/sglang/"
# Exceptions that a check may catch before it raises its own.
CAUGHT = (ImportError, OSError, LookupError, ValueError)
STATEMENT_LINES = 20
PEER_SECONDS = 1.0

# "sglang-ess COMMAND" in a process of the console script (launch/commands.py), else None.
console_command: str | None = None


class Refusal(ValueError):
    """One line for the operator: the rule, the value, the remedy."""


class PeerRefusal(Refusal):
    """Another rank of this node cannot start, for the same reason or alone, and says so itself."""


def program_name(module: str) -> str:
    """What the usage text calls a command: "sglang-ess plan" or "python -m sglang_ess.plan".

    module: name of the command's module, without the package
    """
    return console_command or f"python -m sglang_ess.{module}"


def in_one_line(error: BaseException) -> str:
    """Type and text on one line, cut at MAX_CHARS; for a bare assertion, its source line."""
    text = " ".join(str(error).split())
    if not text and isinstance(error, AssertionError):
        text = _statement(error)
    if len(text) > MAX_CHARS:
        text = text[:MAX_CHARS] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def root(error: BaseException) -> BaseException:
    """The original exception of a chain of `raise ... from`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def with_place(error: BaseException) -> str:
    """in_one_line() and the FILE:LINE that raised it, importlib's own frames left out."""
    frames = [frame for frame in _frames(error) if not frame.filename.startswith("<")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return in_one_line(error) + place


def refusal(error: BaseException) -> str:
    """The operator's line for an exception that prevents the start of the server."""
    if isinstance(error, Refusal):
        return str(error)
    if is_check(error):
        return f"SGLang refuses these options: {in_one_line(error)}"
    return f"SGLang cannot start: {with_place(error)}."


def is_check(error: BaseException) -> bool:
    """Whether ESS or SGLang raised the exception on purpose, with a message for the operator.

    True for a Refusal, and for a `raise` or `assert` with a message in SGLang's code, unless an
    unintended error led to it. What Python or a library raises by itself (TypeError, torch's
    RuntimeError) counts as a bug.
    """
    if isinstance(error, Refusal):
        return True
    first, *causes = _chain(error)
    return _is_meant(first) and all(_is_meant(e) or isinstance(e, CAUGHT) for e in causes)


def make_scheduler(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Body of the AROUND hook on Scheduler.__init__: a failed check ends the process in one line.

    Of several ranks, one prints the line: the first that refuses for a reason of its own.
    Raises: SystemExit(REFUSED), which the launcher recognises, for a failed check. As an
    Exception it would reach the operator as a scheduler's traceback. Other exceptions pass.
    """
    try:
        original(scheduler, *args, **kwargs)
    except Exception as error:
        if not is_check(error):
            raise
        if not isinstance(error, PeerRefusal) and _is_first_refusal():
            print(f"sglang-ess: {refusal(error)}", file=sys.stderr, flush=True)
        else:
            # The first scheduler that ends makes SGLang end the others: let that rank speak.
            time.sleep(PEER_SECONDS)
        raise SystemExit(REFUSED) from None


def refusal_mark(template: str) -> Path:
    """The file that the first refusing process of a server makes. template: TEMPLATE's value"""
    return Path(tempfile.gettempdir()) / f"{template}refused"


def _is_first_refusal() -> bool:
    """Whether no other process of this server has refused: ranks refuse alike, and one says why.

    True in each of them where neither our launcher nor our engine has started the server.
    """
    if (template := os.environ.get(TEMPLATE)) is None:
        return True
    try:  # who has set the variable removes it
        refusal_mark(template).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _is_meant(error: BaseException) -> bool:
    frames = _frames(error)
    if not str(error) or not frames:
        return False
    inside = PACKAGE in Path(frames[-1].filename).as_posix()
    return inside and _statement(error).startswith(("raise ", "assert "))


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def _statement(error: BaseException) -> str:
    """First line of the statement that raised the exception.

    Python reports the line of the call or of the condition, which may be further down.
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
