"""The console script sglang-ess, and the short module names of its commands."""

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import sglang_ess
from sglang_ess import errors
from sglang_ess.config import EssConfig
from sglang_ess.launch import commands
from tests.support import forked


def sglang_ess_command(capsys, *arguments):
    """(exit status, stdout, stderr) of the console script's function."""
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    return ended.value.code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    """The console script's process has imported no command yet: runpy warns if it has."""
    for module, _ in commands.COMMANDS.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(errors, "console_command", None)


def test_the_console_script_is_declared():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sglang-ess")
    assert script.load() is commands.main


@pytest.mark.parametrize("name", commands.SHORT_NAMES)
def test_a_short_name_is_the_same_module(name):
    assert importlib.import_module(name) is importlib.import_module(commands.SHORT_NAMES[name])


@pytest.mark.parametrize("name", commands.SHORT_NAMES)
def test_a_short_name_runs_as_a_module(tmp_path, name):
    """By runpy, in a process that has imported torch already."""
    log = tmp_path / "log"
    status = forked.run(name, "--help", log=log)
    assert status == 0, log.read_text()
    assert log.read_text().startswith(f"usage: python -m {name} ")


def test_a_new_interpreter_runs_a_short_name():
    command = [sys.executable, "-m", "sglang_ess.doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m sglang_ess.doctor ")


@pytest.mark.parametrize("name", ["doctor", "plan", "simulate", "replay"])
def test_a_command_has_its_own_usage(capsys, name):
    status, out, _ = sglang_ess_command(capsys, name, "--help")
    assert status == 0 and out.startswith(f"usage: sglang-ess {name} ")


def test_serve_is_the_launcher(capsys):
    status, out, _ = sglang_ess_command(capsys, "serve", "--help")
    assert status == 0 and out.startswith("usage: sglang-ess serve ")
    assert all(flag in out for flag in EssConfig.flags())


@pytest.mark.parametrize("name", ["plan", "simulate", "replay"])
def test_a_refused_argument_has_the_commands_status(capsys, name):
    status, _, error = sglang_ess_command(capsys, name, "--no-such-option")
    assert status == 2 and f"sglang-ess {name}: error: " in error


def test_help(capsys):
    status, out, _ = sglang_ess_command(capsys, "--help")
    assert status == 0
    assert all(f"  {name} " in out for name in commands.COMMANDS)


def test_version(capsys):
    status, out, _ = sglang_ess_command(capsys, "--version")
    assert status == 0 and out == f"sglang-ess {sglang_ess.__version__}\n"
    assert sglang_ess.__version__ == importlib.metadata.version("sglang-ess")


@pytest.mark.parametrize(("arguments", "got"), [((), "none"), (("sreve",), "'sreve'")])
def test_an_unknown_command_is_refused_in_one_line(capsys, arguments, got):
    status, out, error = sglang_ess_command(capsys, *arguments)
    assert status == 2 and out == "" and len(error.splitlines()) == 1
    assert all(name in error for name in commands.COMMANDS) and f"got {got}" in error
