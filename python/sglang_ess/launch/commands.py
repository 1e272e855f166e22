"""The console script `sglang-ess COMMAND`, and the short module name of each command.

`python -m sglang_ess.doctor` runs sglang_ess/launch/doctor.py: the short names do not change when
a file moves to another room.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {
    "serve": "sglang_ess.launch_server",
    "doctor": "sglang_ess.doctor",
    "plan": "sglang_ess.plan",
    "simulate": "sglang_ess.simulate",
    "replay": "sglang_ess.replay",
}
SHORT_NAMES = {
    "sglang_ess.doctor": "sglang_ess.launch.doctor",
    "sglang_ess.plan": "sglang_ess.sim.cli.plan",
    "sglang_ess.replay": "sglang_ess.sim.cli.replay",
    "sglang_ess.simulate": "sglang_ess.sim.cli.simulate",
    "sglang_ess.slice_model": "sglang_ess.testing.slice_model",
    "sglang_ess.tiny_model": "sglang_ess.testing.tiny_model",
    "sglang_ess.topk_stream": "sglang_ess.testing.topk_stream",
}
USAGE = (
    f"usage: sglang-ess {{{','.join(COMMANDS)}}} ...\n"
    "       sglang-ess COMMAND --help shows a command's options."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command as `python -m` runs its module.

    Raises: SystemExit with the command's exit status; 2 for a command that there is not.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    if name not in COMMANDS:
        got = repr(name) if name is not None else "none"
        print(
            f"sglang-ess: a command must be one of {', '.join(COMMANDS)}: got {got}. "
            "Run sglang-ess --help.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    sys.argv = [f"sglang-ess {name}", *arguments[1:]]
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)


def install_short_names() -> None:
    """Let Python find the modules of SHORT_NAMES under both their names. Idempotent."""
    if not any(isinstance(finder, _ShortNames) for finder in sys.meta_path):
        sys.meta_path.append(_ShortNames())


class _ShortNames:
    """A finder on sys.meta_path: imports and `python -m` of a short name get the file it names."""

    def find_spec(self, name, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name not in SHORT_NAMES:
            return None
        spec = importlib.util.find_spec(SHORT_NAMES[name])
        return importlib.util.spec_from_file_location(
            name,
            spec.origin,
            loader=_SameModule(name, spec.origin),
            submodule_search_locations=spec.submodule_search_locations,
        )


class _SameModule(importlib.machinery.SourceFileLoader):
    """Loads a short name as the module that it is short for, not as a copy."""

    def create_module(self, spec) -> ModuleType:
        module = importlib.import_module(SHORT_NAMES[spec.name])
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec  # importlib has just put the short name's there
