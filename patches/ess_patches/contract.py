"""The contract with SGLang: which upstream names ESS touches, and what they must look like.

SGLang's HookRegistry logs a missing target and starts without it, and a hook with a wrong
parameter list fails at its first call only. So every row is checked before any is registered.

`python -m ess_patches.contract DOTTED...` prints signatures in the form a row needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_ess import errors

SGLANG_VERSION = "0.5.23"
# The target is 12, and each one more needs a reason. Disaggregation brought four: two
# scheduling rounds (colocated and decode) that admission has to see, the metadata that travels
# between nodes, and NIXL's kinds of memory. Intake brought five: a body, a prompt, a control
# request, a response and the scheduler's dispatcher each have one place that all of their kind
# pass. Scheduler.__init__ is the one place where a check that only a scheduler process makes can
# reach the operator as a line. One process registers 17 of them on the CPU, 19 on a GPU.
MAX_TARGETS = 22

HOOK_KINDS = ("around", "before", "after", "replace")  # registered with SGLang's HookRegistry
TOUCH_KINDS = ("subclass", "call", "registry")  # used in place, so checked only
PLATFORMS = ("always", "cpu", "cuda")
BROKEN = "broken"  # the module is there, and its import fails for a reason of this machine


@dataclass(frozen=True)
class Hook:
    """One upstream name that ESS touches.

    target     dotted upstream name, "pkg.mod.function" or "pkg.mod.Class.method"
    kind       one of HOOK_KINDS or TOUCH_KINDS
    signature  what signature_text(target) gives on SGLANG_VERSION
    body       "module:function" (HOOK_KINDS, imported at registration) or who touches it
    reason     one sentence
    when       "cpu" makes the CPU platform work; "always" and "cuda" are ESS itself
    test       the test that covers it
    Raises: ValueError for a kind, when or body outside these rules.
    """

    target: str
    kind: str
    signature: str
    body: str
    reason: str
    when: str = "always"
    test: str = ""

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("kind", self.kind, HOOK_KINDS + TOUCH_KINDS),
            ("when", self.when, PLATFORMS),
        ):
            if value not in limit:
                raise ValueError(
                    f"Hook {self.target}: {name} must be one of {', '.join(limit)}: got {value!r}."
                )
        if self.is_registered and not re.fullmatch(r"[\w.]+:\w+", self.body):
            raise ValueError(
                f"Hook {self.target}: body must be 'module:function': got {self.body!r}."
            )

    @property
    def is_registered(self) -> bool:
        return self.kind in HOOK_KINDS

    def applies(self, platform: str) -> bool:
        """Whether this row is in force on `platform` ("cpu", "cuda" or another name)."""
        return self.when in ("always", platform)


@dataclass(frozen=True)
class Mismatch:
    """One way in which the installed SGLang differs from the contract; str() is one line."""

    target: str
    state: str  # "version", "missing", "changed" or BROKEN
    expected: str
    found: str

    def __str__(self) -> str:
        if self.state == BROKEN:
            return (
                f"{self.target} must be importable: got {self.found}. Mend that first: it is no "
                "difference between SGLang's versions."
            )
        return (
            f"{self.target} must be as in SGLang {SGLANG_VERSION} ({self.state}): "
            f"got {self.found}, expected {self.expected}. "
            f"Run pip install --force-reinstall sglang=={SGLANG_VERSION} and remove other "
            "plugins that change it."
        )


class BrokenImport(ImportError):
    """A module that is there fails to import; __cause__ says why."""


def resolve(dotted: str) -> Any:
    """The object a dotted name stands for; its module is imported.

    Raises: ImportError if its package lacks a module, AttributeError if the module lacks the
    name, BrokenImport for whatever else an import raises.
    """
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        path = ".".join(parts[:length])
        try:
            found = importlib.import_module(path)
        except ImportError as error:
            lacks = error.name or ""
            missing = isinstance(error, ModuleNotFoundError)
            if missing and length > 1 and (path + ".").startswith(lacks + "."):
                continue
            if lacks.split(".")[0] == parts[0]:  # it is a name of the package itself
                raise
            raise BrokenImport(path) from error
        except Exception as error:
            raise BrokenImport(path) from error
        break
    for name in parts[length:]:
        found = getattr(found, name)
    return found


def signature_text(dotted: str) -> str:
    """Parameter names, kinds and defaults of a target, without annotations and addresses.

    Decorators that keep __wrapped__ are seen through (so is a hook already applied); a class
    gives its __init__; an object that cannot be called gives "<its type>".
    Raises: as resolve().
    """
    target = resolve(dotted)
    if isinstance(target, type):
        target = target.__init__
    if not callable(target):
        return f"<{type(target).__name__}>"
    full = inspect.signature(target)
    bare = full.replace(
        parameters=[p.replace(annotation=p.empty) for p in full.parameters.values()],
        return_annotation=full.empty,
    )
    return re.sub(r" at 0x[0-9a-f]+", "", str(bare))


def check_hook(hook: Hook) -> Mismatch | None:
    """The mismatch of one row, or None. Effect: imports the target's module."""
    try:
        found = signature_text(hook.target)
        is_class = isinstance(resolve(hook.target), type)
    except BrokenImport as error:
        found = errors.with_place(errors.root(error))
        return Mismatch(hook.target, BROKEN, hook.signature, found)
    except Exception as error:
        return Mismatch(hook.target, "missing", hook.signature, errors.in_one_line(error))
    if is_class and hook.kind in ("around", "before", "after"):
        return Mismatch(hook.target, "changed", f"a function {hook.signature}", "a class")
    if found != hook.signature:
        return Mismatch(hook.target, "changed", hook.signature, found)
    return None


def check(hooks: Iterable[Hook]) -> list[Mismatch]:
    """Every difference between the installed SGLang and these rows, the version first.

    It ends at the first import that fails: the same module fails under other rows too, in ways
    that follow from it.
    """
    found = []
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != SGLANG_VERSION:
        found.append(Mismatch("sglang", "version", SGLANG_VERSION, version))
    for hook in hooks:
        if mismatch := check_hook(hook):
            found.append(mismatch)
            if mismatch.state == BROKEN:
                break
    return found


def target_count(hooks: Iterable[Hook]) -> int:
    """How many upstream names the rows patch; touch points do not count."""
    return len({hook.target for hook in hooks if hook.is_registered})


def register(hooks: Iterable[Hook], platform: str) -> list[str]:
    """Register the rows in force on `platform` with SGLang's HookRegistry.

    Returns the targets. Effect: bodies are imported; SGLang applies the hooks later.
    Raises: ImportError or AttributeError if a body does not exist.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    due = [hook for hook in hooks if hook.is_registered and hook.applies(platform)]
    bodies = [pkgutil.resolve_name(hook.body) for hook in due]  # all exist, or none registered
    for hook, body in zip(due, bodies, strict=True):
        HookRegistry.register(hook.target, body, HookType(hook.kind))
    return [hook.target for hook in due]


def main(argv: list[str]) -> int:
    """Print the signature of each dotted name; 1 if one cannot be resolved."""
    failed = 0
    for dotted in argv:
        try:
            print(f"{dotted}\n    {signature_text(dotted)}")
        except Exception as error:
            print(f"{dotted}\n    {type(error).__name__}: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
