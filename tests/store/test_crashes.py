"""Real processes over one store, killed with kill -9: no wrong byte, and never over the limit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def run(*arguments, timeout):
    """What a mode of tests.store.crashes has counted."""
    command = [sys.executable, "-m", "tests.store.crashes", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_at_random_with_damaged_files(tmp_path, rounds):
    found = run("random", tmp_path / "s", rounds, timeout=6 * rounds)
    assert found["kills"] >= 0.8 * rounds
    assert found["torn"] >= rounds / 20  # kills in the middle of a write
    assert found["damaged"] >= rounds / 5
    assert found["served"] >= rounds


def test_killed_before_each_system_call(tmp_path):
    found = run("each", tmp_path, timeout=120)
    assert found["calls"] > 60
    assert found["torn"] and found["too high"]


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_three_servers_over_one_store(tmp_path, seconds):
    found = run("together", tmp_path / "s", seconds, timeout=seconds + 120)
    assert found["kills"] >= seconds
    assert found["full"] > 10  # samples of a store that evicts
