"""The out-of-tree CPU platform: DeepSeek sparse attention with no accelerator."""

import os


def set_thread_defaults() -> None:
    """Environment for processes to come; call before torch is imported.

    Torch and numba each bring a pool of OpenMP threads. libgomp lets idle threads spin for
    milliseconds, so the pools take the cores from each other at every change of hands:
    a decode step of 60 ms took 400. Waiting by futex after 1,000 spins costs neither.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
