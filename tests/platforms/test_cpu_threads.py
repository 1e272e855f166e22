"""The ranks of a node share its cores, unless the user says who has which."""

import os
import subprocess
import sys

import pytest

from sglang_ess.platforms import cpu_threads
from sglang_ess.platforms.cpu_threads import (
    BIND_VAR,
    COUNT_VAR,
    SHARED_VAR,
    bind_reasons,
    cores_of,
)
from tests.support.engine import in_fork


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (7, 3, [[0, 1], [2, 3], [4, 5]]),
        (2, 4, [[0], [1], [0], [1]]),
    ],
)
def test_equal_shares_of_at_least_one_core(cores, ranks, shares):
    assert [cores_of(list(range(cores)), rank, ranks) for rank in range(ranks)] == shares


def test_the_share_is_of_usable_cores():
    assert cores_of([3, 5, 8, 9], 1, 2) == [8, 9]


@pytest.fixture
def unset(monkeypatch):
    for name in (BIND_VAR, COUNT_VAR, SHARED_VAR):
        monkeypatch.setenv(name, "")  # so that what share_cores() sets is undone after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_one_rank_has_all_cores(unset):
    cpu_threads.share_cores(1)
    assert BIND_VAR not in os.environ


def test_the_only_rank_of_a_node_among_several_has_them_too(unset):
    """SGLang would count the ranks of all nodes here, and refuse."""
    unset.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    cpu_threads.share_cores(1, nodes=2)
    assert os.environ[BIND_VAR] == "0,1,2,3"


def test_a_later_engine_of_the_same_process_shares_anew(unset):
    unset.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    cpu_threads.share_cores(2)
    assert os.environ[BIND_VAR] == "0,1,2,3|4,5,6,7"
    cpu_threads.share_cores(4)
    assert os.environ[BIND_VAR] == "0,1|2,3|4,5|6,7"
    cpu_threads.share_cores(1)
    assert BIND_VAR not in os.environ


def test_an_earlier_engines_cores_are_not_the_users_in_a_process_started_since(unset):
    unset.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    cpu_threads.share_cores(1, nodes=2)
    assert bind_reasons(2, os.environ) == []
    again = "cpu_threads.share_cores(2); print(os.environ[cpu_threads.BIND_VAR])"
    code = f"import os; from sglang_ess.platforms import cpu_threads; {again}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "|" in found.stdout


def test_what_the_user_names_stays(unset):
    unset.setenv(BIND_VAR, "0-2|3")
    cpu_threads.share_cores(2)
    assert os.environ[BIND_VAR] == "0-2|3"
    assert cpu_threads.named_cores(os.environ) == [[0, 1, 2], [3]]


def threads_of(rank, environ):
    """(torch's threads, numba's) of a rank in this process."""
    import numba
    import torch

    torch.set_num_threads(1)
    os.environ.pop(COUNT_VAR, None)
    os.environ.update(environ)
    cpu_threads.use_own_threads(rank)
    return torch.get_num_threads(), numba.get_num_threads()


def test_each_rank_computes_with_its_own():
    import numba

    most = numba.config.NUMBA_NUM_THREADS
    named = {BIND_VAR: f"0|0-{most - 1}"}
    assert in_fork(threads_of, 0, named) == (1, 1)
    assert in_fork(threads_of, 1, named) == (most, most)
    assert in_fork(threads_of, 1, {**named, COUNT_VAR: "1"})[0] == 1


CHOICE = """
import numba, os, torch
import sglang_ess.cpu.ops.sparse_mla
from sglang_ess.platforms import cpu_threads
cpu_threads.{call}
print(torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.parametrize(
    "call", ["use_own_threads(0)", "use_threads(cpu_threads.chosen_threads())"]
)
def test_numba_leaves_torch_its_threads(call):
    """At its start numba gives torch all cores; only a process without numba's threads shows it."""
    environ = os.environ | {"NUMBA_NUM_THREADS": "3", BIND_VAR: "0|1"}
    environ.pop(COUNT_VAR, None)
    if call == "use_threads(cpu_threads.chosen_threads())":
        environ[COUNT_VAR] = "1"
    command = [sys.executable, "-c", CHOICE.format(call=call)]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("value", ["0|x", "0", "0|", "0-|1", "0,1;2,3"])
def test_cores_that_cannot_be_meant(value):
    (line,) = bind_reasons(2, {BIND_VAR: value})
    assert line.startswith(f"{BIND_VAR} must name cores for each of 2 ranks")
    assert repr(value) in line and line.endswith("Correct it or unset it.")


@pytest.mark.parametrize("value", ["0|1", "0-3|4-7|8", "all", ""])
def test_cores_that_can(value):
    assert bind_reasons(2, {BIND_VAR: value}) == []
