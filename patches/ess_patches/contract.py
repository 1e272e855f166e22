"""The contract with SGLang: the upstream names that ESS touches, and what they must look like.

SGLang's HookRegistry logs a missing target and starts without it, and a hook with a wrong
parameter list fails only when it is called first. So every row is checked before any is
registered.

`python -m ess_patches.contract DOTTED...` prints signatures in the form that a row needs.
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
# Each target must have a reason that nothing else serves; a test holds the limit. One process
# registers 21 on the CPU platform and 23 on a GPU.
MAX_TARGETS = 27

HOOK_KINDS = ("around", "before", "after", "replace")  # registered with SGLang's HookRegistry
TOUCH_KINDS = ("subclass", "call", "registry")  # checked, not registered
# Hook.when: the platforms on which a row is in force; () stands for all of them.
PLATFORMS: dict[str, tuple[str, ...]] = {
    "always": (),
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "both": ("cpu", "cuda"),
}
BROKEN = "broken"  # the module exists, but this machine cannot import it


@dataclass(frozen=True)
class Hook:
    """One upstream name that ESS touches.

    target     dotted upstream name, "pkg.mod.function" or "pkg.mod.Class.method"
    kind       one of HOOK_KINDS or TOUCH_KINDS
    signature  what signature_text(target) gives on SGLANG_VERSION
    body       "module:function", imported at registration; for TOUCH_KINDS the module that uses it
    reason     why ESS needs it, in sentences
    when       "cpu": the CPU platform, with one tier or two; "cuda": two tiers on a GPU;
               "both": these two; "always": two tiers on any platform
    test       path of the test that covers it
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
            ("when", self.when, tuple(PLATFORMS)),
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
        """Whether SGLang's HookRegistry gets this row; a touch point is only checked."""
        return self.kind in HOOK_KINDS

    def applies(self, platform: str, two_tiers: bool = True) -> bool:
        """Whether this row is in force on `platform` ("cpu", "cuda" or another name).

        two_tiers: whether ESS is on. With one tier only the CPU platform's own rows are in force.
        """
        platforms = PLATFORMS[self.when]
        if not two_tiers:
            return platform == "cpu" and "cpu" in platforms
        return not platforms or platform in platforms


@dataclass(frozen=True)
class Mismatch:
    """One difference between the installed SGLang and the contract; str() is one line."""

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
    """A module exists and cannot be imported; __cause__ says why."""


def resolve(dotted: str) -> Any:
    """The object of a dotted name. Effect: imports its module.

    Raises: ImportError if the package lacks the module, AttributeError if the module lacks the
    name, BrokenImport for any other failure of an import.
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
            if lacks.split(".")[0] == parts[0]:  # the package itself lacks the name
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

    A decorator that sets __wrapped__ does not change the text, nor does a hook already applied. A
    class gives the text of its __init__; an object that cannot be called gives "<its type>".
    Raises: as resolve().
    """
    target = resolve(dotted)
    if isinstance(target, type):
        target = target.__init__  # type: ignore[misc]  # of the class, not of an instance
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

    It stops at the first import that fails: other rows would report consequences of that failure.
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
    """The number of upstream names that the rows change; touch points do not count."""
    return len({hook.target for hook in hooks if hook.is_registered})


def register(hooks: Iterable[Hook], platform: str) -> list[str]:
    """Register the rows in force on `platform` with SGLang's HookRegistry.

    Returns the targets. Effect: imports the bodies; SGLang applies the hooks later.
    Raises: ImportError or AttributeError, with nothing registered, if a body does not exist.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    due = [hook for hook in hooks if hook.is_registered and hook.applies(platform)]
    bodies = [pkgutil.resolve_name(hook.body) for hook in due]  # all, before the first registers
    for hook, body in zip(due, bodies, strict=True):
        HookRegistry.register(hook.target, body, HookType(hook.kind))
    return [hook.target for hook in due]


def register_late(hooks: Iterable[Hook], platform: str) -> None:
    """Check and apply rows that only some servers need, in a scheduler that turns out to be one.

    Raises: Refusal where SGLang is not as the rows have it.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks = tuple(hooks)
    if mismatches := check(hooks):
        raise errors.Refusal("; ".join(map(str, mismatches)))
    register(hooks, platform)
    HookRegistry.apply_hooks()


def main(argv: list[str]) -> int:
    """Print the signature of each dotted name; return 1 if one cannot be resolved, else 0."""
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
