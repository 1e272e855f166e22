"""Forks of a process that has imported SGLang, for tests and benchmarks: no second import.

A server's processes are spawned and need none of this.
"""

from __future__ import annotations

import functools
import multiprocessing
import os


@functools.cache  # a second call would register a second renewal
def renew_torch_pools() -> None:
    """From now on a fork of this process, or of its forks, has a whole thread pool of torch's.

    Torch marks the pool in a fork as broken, and the first thread that needs it makes another.
    Nothing guards this: where several threads need it at once, as in SGLang's loading of weights,
    one finds none ("Invalid thread pool!", ATen/ParallelOpenMP.cpp). Torch's own handler calls
    get_num_threads(), which does nothing in a thread that has called it before.
    """
    import torch

    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


def fork_children() -> None:
    """Let SGLang's Engine in this process fork its children. It would choose "spawn"."""
    import sglang.srt.entrypoints.engine as engine_module

    renew_torch_pools()
    multiprocessing.set_start_method("fork", force=True)
    engine_module.mp.set_start_method = lambda *args, **kwargs: None
