"""A fork has torch's thread pool before its first thread asks for it."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from tests.support.engine import in_fork


def os_threads_of_forks(depth: int) -> list[int]:
    """OS threads of a fork of this process as it begins, then of its fork, and so on."""
    receive, send = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            here = len(list(Path("/proc/self/task").iterdir()))
            send.send([here, *(os_threads_of_forks(depth - 1) if depth > 1 else ())])
        finally:
            os._exit(0)
    send.close()
    try:
        return receive.recv()
    finally:
        os.waitpid(pid, 0)


def threads_of_forks() -> tuple[int, list[int]]:
    return torch.get_num_threads(), os_threads_of_forks(3)


def test_a_fork_and_its_forks_begin_with_torch_s_pool():
    """Or threads that begin at once make it, and disturb each other: "Invalid thread pool!"."""
    threads, found = in_fork(threads_of_forks)
    if threads == 1:
        pytest.skip("the pool of one core has no thread to count")
    assert found == [threads] * 3
