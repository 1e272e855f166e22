"""The console script `sglang-ess COMMAND`, and the short module name of each command.

`python -m sglang_ess.doctor` runs sglang_ess/launch/doctor.py: the short names stay the same when
a file moves to another folder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType

from sglang_ess import errors
from sglang_ess.config import REFUSED

# command: (module, what it does)
COMMANDS = {
    "serve": ("sglang_ess.launch_server", "run SGLang's HTTP server with ESS"),
    "doctor": ("sglang_ess.launch.doctor", "report what this host has and what ESS can do on it"),
    "plan": (
        "sglang_ess.sim.cli.plan",
        "advise a hot ratio and a batch size for a model and a GPU",
    ),
    "simulate": ("sglang_ess.sim.cli.simulate", "simulate a deployment with ESS and with one tier"),
    "replay": ("sglang_ess.sim.cli.replay", "replay a trace that --ess-trace wrote"),
    "convert": ("sglang_ess.sim.cli.convert", "make a trace of another system's top-k lists"),
}
SHORT_NAMES = {
    "sglang_ess.convert": "sglang_ess.sim.cli.convert",
    "sglang_ess.doctor": "sglang_ess.launch.doctor",
    "sglang_ess.plan": "sglang_ess.sim.cli.plan",
    "sglang_ess.recall_model": "sglang_ess.testing.recall.model",
    "sglang_ess.replay": "sglang_ess.sim.cli.replay",
    "sglang_ess.simulate": "sglang_ess.sim.cli.simulate",
    "sglang_ess.slice_model": "sglang_ess.testing.slice_model",
    "sglang_ess.tiny_model": "sglang_ess.testing.tiny_model",
    "sglang_ess.topk_stream": "sglang_ess.testing.topk_stream",
}
USAGE = "\n".join(
    [
        "usage: sglang-ess [-h] [--version] COMMAND ...",
        "",
        "commands:",
        *(f"  {name:<9} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "sglang-ess COMMAND --help shows the options of one command.",
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command as `python -m` would run its module.

    Raises: SystemExit with the command's exit status; REFUSED for an unknown or missing command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    if name == "--version":
        print(f"sglang-ess {importlib.metadata.version('sglang-ess')}")
        raise SystemExit(0)
    if name not in COMMANDS:
        got = repr(name) if name is not None else "none"
        print(
            f"sglang-ess: the command must be one of {', '.join(COMMANDS)}: got {got}. "
            "Run sglang-ess --help.",
            file=sys.stderr,
        )
        raise SystemExit(REFUSED)
    module, _ = COMMANDS[name]
    errors.console_command = f"sglang-ess {name}"
    sys.argv = [errors.console_command, *arguments[1:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def install_short_names() -> None:
    """Let Python import and run the modules of SHORT_NAMES under their short names. Idempotent."""
    if not any(isinstance(finder, _ShortNames) for finder in sys.meta_path):
        sys.meta_path.append(_ShortNames())


class _ShortNames:
    """A finder for sys.meta_path: it finds a short name at the file of the long one."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SHORT_NAMES:
            return None
        spec = importlib.util.find_spec(SHORT_NAMES[name])
        assert spec is not None and spec.origin is not None, SHORT_NAMES[name]
        return importlib.util.spec_from_file_location(
            name,
            spec.origin,
            loader=_SameModule(name, spec.origin),
            submodule_search_locations=spec.submodule_search_locations,
        )


class _SameModule(SourceFileLoader):
    """A loader that returns the module of the long name for a short one, not a second copy."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(SHORT_NAMES[spec.name])
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own_spec  # importlib has replaced it by the short name's
