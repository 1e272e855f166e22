"""tools/gpu_check.sh: its stages, their time and what it says of them, with commands that only
pretend. What the stages do is run on a GPU host; that it refuses to run without a GPU is in
test_kernel_benchmark.py.
"""

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# Writes what it was called with; fails, or hangs, when that holds a word of the environment; a
# benchmark's file holds its arguments.
PYTHON = """#!/usr/bin/env bash
echo "$0 $*" | tee -a "$CALLS"
case "$*" in
  *"import xdist"*) exit 1 ;;
  *"${FAILS:-nothing fails}"*) echo "the reason"; exit 3 ;;
  *"${HANGS:-nothing hangs}"*) exec sleep 60 ;;
esac
while [ $# -gt 0 ]; do
  [ "$1" != --json ] || echo "{}" >"$2"
  shift
done
"""


@pytest.fixture
def host(tmp_path):
    """run(*arguments, **environment) -> (exit status, {stage: result}, calls), and its folder."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in {
        "python": PYTHON,
        "nvidia-smi": "#!/bin/sh\necho H100",
        "nvcc": "#!/bin/sh\necho release 13.0\necho Build",
    }.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)

    def run(*arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        names = dict(OUT="out", SITE="site", VENV="venv", WORK="kept", WHEELS="whl", JOINED="all")
        env = os.environ | {name: str(tmp_path / path) for name, path in names.items()}
        env |= {"PATH": f"{bin}:{os.environ['PATH']}", "PYTHON": str(bin / "python")}
        done = subprocess.run(
            [REPO / "tools/gpu_check.sh", *arguments],
            env=env | {"CALLS": str(calls)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        rows = [line.split(None, 3) for line in done.stdout.splitlines() if " s  " in line]
        results = {row[0]: row[3] for row in rows}
        return done, results, calls.read_text().splitlines()

    run.folder = tmp_path
    return run


def test_a_failed_stage_does_not_stop_the_next(host):
    (host.folder / "whl").mkdir()
    (host.folder / "whl" / "a-1-py3-none-any.whl").write_bytes(b"")
    done, results, calls = host(FAILS="tests/kernels")
    assert done.returncode == 1, done.stdout + done.stderr
    assert list(results) == ["facts", "wheels", "tests", "bench"]
    assert results.pop("tests") == "failed, status 1" and set(results.values()) == {"passed"}
    assert "the reason" in done.stdout and "the reason" in logged(host)
    assert sum("benchmarks.kernels" in call for call in calls) == 1
    assert (host.folder / "out" / "kernels.json").exists()


def test_stages_are_chosen_and_later_ones_find_what_earlier_calls_left(host):
    done, results, _ = host("--stages", "bench")
    assert done.returncode == 0 and list(results) == ["facts", "bench"]
    for name in ("kernels.json", "gpu_check.log"):  # as the device's OUT is before a call
        (host.folder / "out" / name).unlink()
    (host.folder / "kept" / "slice").mkdir()
    (host.folder / "kept" / "slice" / "config.json").write_text("{}")
    done, results, calls = host(
        "--stages", "predict,serving,exact", "--seconds", "205", "--", "--only", "first"
    )
    assert done.returncode == 0 and list(results) == ["facts", "exact", "serving", "predict"]
    exact, serving, predict = [call for call in calls if " -m " in call]
    assert "-m pytest" in exact and "tests/gpu" in exact
    kernels = f"{host.folder}/kept/kernels.json"
    assert f"--overlap-costs {kernels}" in serving and "--only" not in serving
    assert f"--kernels {kernels}" in predict and predict.endswith("--only first")
    # Of 200 s, 60 are predict's; the rest is exact's and serving's, and serving inherits.
    (most,) = re.findall(r"== exact \(at most (\d+) s\)", done.stdout)
    (rest,) = re.findall(r"--seconds (\d+)", serving)
    assert 60 < int(most) <= 70 and 85 < int(rest) <= 100


def test_every_tool_of_the_sanitizer_runs_tests_that_exist(host):
    tools = ["memcheck", "racecheck", "synccheck", "initcheck"]
    sanitizer = host.folder / "bin" / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$0 $*" >>"$CALLS"\n')
    sanitizer.chmod(0o755)
    done, results, calls = host("--stages", ",".join(tools))
    assert done.returncode == 0 and list(results) == ["facts", *tools]
    calls = [call for call in calls if "compute-sanitizer" in call]
    assert [re.search(r"--tool (\w+)", call)[1] for call in calls] == tools
    (file,) = {re.search(r"tests/\S+", call)[0] for call in calls}
    assert (REPO / file).exists()


def test_time_is_kept(host):
    done, results, _ = host("--stages", "tests,bench", "--seconds", "11", HANGS="pytest")
    assert done.returncode == 1
    assert results["tests"].startswith("stopped after") and results["bench"] == "no time left"


def test_a_complete_installation_is_used(host):
    venv = host.folder / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(host.folder / "bin" / "python")
    for complete in (False, True):
        if complete:
            (venv / "complete").touch()
        _, _, calls = host("--stages", "exact")
        (exact,) = [call for call in calls if "tests/gpu" in call]
        assert exact.startswith(f"{host.folder}/{'venv/bin' if complete else 'bin'}/python ")


def test_parts_are_kept_as_they_come(host):
    wheels = {"a-1-py3.whl": b"a", "b-1-py3.whl": b"b"}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in wheels.items())
    for i, (name, data) in enumerate(wheels.items()):
        for old in (host.folder / "whl").glob("*/*"):
            old.unlink()  # only what is carried is there
        part = host.folder / "whl" / f"part{i + 1}"
        part.mkdir(parents=True)
        (part / "SHA256SUMS").write_text(sums)
        (part / name).write_bytes(data)
        done, results, calls = host("--receive")
        assert not results and not calls
        assert done.returncode == (1 if i == 0 else 0)
    assert {f.name: f.read_bytes() for f in (host.folder / "all").iterdir()} == wheels


def test_unknown_options_and_stages_are_refused(host):
    for arguments in (["--all"], ["--stages", "tests,all"], ["--seconds", "soon"]):
        done, results, calls = host(*arguments)
        assert done.returncode == 1 and "--stages LIST" in done.stderr and not results


def logged(host) -> str:
    return (host.folder / "out" / "gpu_check.log").read_text()
