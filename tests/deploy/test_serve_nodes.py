"""deploy/ray/serve_nodes.py without Ray: its commands, and how a launcher starts and ends."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from deploy import sizes
from sglang_ess.layout import GIB
from tests.deploy import rules
from tests.deploy.manifests import DEPLOY, REPO
from tests.deploy.rules import Server
from tests.docs import pages

FLAGS = [
    "--model-path=/models/DeepSeek-V3.2", "--tp-size=16", "--kv-cache-dtype=fp8_e4m3",
    "--context-length=131072", "--max-total-tokens=2359296", "--ess-host-gib=96",
    "--ess-hot-ratio=0.2", "--ess-grace-seconds=60",
]  # fmt: skip
# Ends at SIGTERM with status 7, or not at all.
POLITE = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); {}; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); {}; time.sleep(60)"


@pytest.fixture(scope="module")
def program():
    """The module; Ray is not installed here, and importing it must not ask for it."""
    file = DEPLOY / "ray" / "serve_nodes.py"
    spec = importlib.util.spec_from_file_location("serve_nodes", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "ray" not in sys.modules or sys.modules["ray"].__file__ != str(file)
    return module


def test_the_commands_are_the_launchers(program, monkeypatch):
    made = [program.command(FLAGS, rank, 2, "10.0.0.7") for rank in (0, 1)]
    for rank, argv in enumerate(made):
        assert argv[:3] == [sys.executable, "-m", "sglang_ess.launch_server"]
        server = Server.of(tuple(argv[3:]), 1024 * GIB)
        assert (server.args.nnodes, server.args.node_rank) == (2, rank)
        assert server.args.dist_init_addr == "10.0.0.7:20000"
        assert rules.launcher_problems(server, monkeypatch) == []
        assert rules.memory_problems(server) == []
    assert [a for a, b in zip(*made, strict=True) if a != b] == ["--node-rank=0"]
    assert program.command(FLAGS, 0, 1, "10.0.0.7")[3:] == FLAGS


@pytest.mark.parametrize("flag", ["--nnodes=4", "--node-rank", "--dist-init-addr=a:1"])
def test_a_flag_that_differs_between_nodes_is_refused(program, flag):
    with pytest.raises(ValueError, match=f"flags must not have .*: got {flag}"):
        program.command([*FLAGS, flag], 0, 2, "10.0.0.7")


def test_options_and_resources(program):
    options = program._parser().parse_args(["--nodes", "2", "--", *FLAGS])
    assert (options.nodes, options.gpus, options.flags) == (2, sizes.GPUS, FLAGS)
    assert program.bundles(2, 8, 32) == [{"GPU": 8.0, "CPU": 32.0}] * 2
    assert program.grace_seconds(FLAGS) == 60


def test_the_command_in_the_documentation(program):
    (words,) = [
        words
        for block in pages.blocks(REPO / "docs" / "deployment.md", "sh")
        for words in block.commands
        if words[:2] == ["python", "deploy/ray/serve_nodes.py"]
    ]
    options = program._parser().parse_args(words[2:])
    argv = program.command(options.flags, 1, options.nodes, "10.0.0.7")
    server = Server.of(tuple(argv[3:]), 1024 * GIB)
    assert server.args.tp_size == options.nodes * options.gpus and server.tiers == 1


def started(program, tmp_path, code):
    """A Launcher whose process runs `code` and has set its handler."""
    mark, launcher = tmp_path / "mark", program.Launcher()
    launcher.start([sys.executable, "-c", code.format(f"open({str(mark)!r}, 'w')")])
    until = time.monotonic() + 20
    while not mark.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    return launcher


def test_a_launcher_gets_its_grace(program, tmp_path):
    launcher = started(program, tmp_path, POLITE)
    assert launcher.status() is None
    assert launcher.stop(20) == 7
    assert launcher.status() == launcher.stop(20) == 7


def test_a_launcher_that_does_not_end_is_killed(program, tmp_path):
    launcher = started(program, tmp_path, STUBBORN)
    assert launcher.stop(0.2) == -signal.SIGKILL


def test_a_launcher_ends_with_its_worker(program, tmp_path):
    """Ray kills the worker of a program that is gone."""
    log = tmp_path / "status"
    child = f"import os, signal, time; signal.signal(15, lambda *_: open({str(log)!r}, 'w'))\n"
    child += "print(os.getpid(), flush=True); time.sleep(20)"
    code = f"import sys; sys.path.insert(0, {str(DEPLOY / 'ray')!r}); import serve_nodes, time\n"
    code += f"serve_nodes.Launcher().start([sys.executable, '-c', {child!r}]); time.sleep(60)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    launcher = int(worker.stdout.readline())
    try:
        assert not log.exists()
        worker.kill()
        until = time.monotonic() + 10
        while not log.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        worker.kill()
        worker.wait()
        os.kill(launcher, signal.SIGKILL)


def test_the_wait_ends_with_the_first_launcher_or_when_asked(program):
    states = iter([[None, None], [None, None], [None, 1]])
    assert program.wait(lambda: next(states), lambda: False, 0) == [None, 1]
    asked = iter([False, True])
    assert program.wait(lambda: [None], lambda: next(asked), 0) == [None]
