"""How the ranks of a node share its cores: each has the threads of its own part of them.

SGLang gives a rank the cores of a NUMA node and refuses more ranks, of all hosts, than this host
has NUMA nodes, unless BIND_VAR names each rank's cores. It binds threads to them by sgl-kernel's
CPU build alone, which this platform does without: here the cores only say how many threads a rank
has.
Source: init_threads_binding in sglang/srt/utils/numa_utils.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

BIND_VAR = "SGLANG_CPU_OMP_THREADS_BIND"  # cores of each rank, as 0-3,8|4-7,9; all: unset
COUNT_VAR = "OMP_NUM_THREADS"  # a user who sets it chooses the threads of every rank
# The value of BIND_VAR that share_cores() has set, in this process or one that started it.
SHARED_VAR = "SGLANG_ESS_SHARED_CORES"


def share_cores(ranks: int, nodes: int = 1) -> None:
    """Name the cores of each of this node's ranks, unless it is the only one or the user did.

    Effect: sets BIND_VAR for this process and its children.
    """
    if _is_shared(os.environ):
        del os.environ[BIND_VAR], os.environ[SHARED_VAR]
    if ranks == nodes == 1 or BIND_VAR in os.environ:
        return
    usable = sorted(os.sched_getaffinity(0))
    parts = [cores_of(usable, rank, ranks) for rank in range(ranks)]
    os.environ[BIND_VAR] = "|".join(",".join(map(str, part)) for part in parts)
    os.environ[SHARED_VAR] = os.environ[BIND_VAR]


def _is_shared(environ: Mapping[str, str]) -> bool:
    """Whether BIND_VAR is an earlier engine's, and no choice of the user's."""
    return BIND_VAR in environ and environ[BIND_VAR] == environ.get(SHARED_VAR)


def cores_of(usable: list[int], rank: int, ranks: int) -> list[int]:
    """The cores of a rank: an equal share of the usable ones, at least one.

    Where there are more ranks than cores, several ranks have the same one.
    """
    share = max(1, len(usable) // ranks)
    return [usable[(rank * share + i) % len(usable)] for i in range(share)]


def use_own_threads(rank: int) -> None:
    """Give torch and numba as many threads as this rank has cores. rank: its number on this node

    Does nothing where BIND_VAR names no cores, or the user has chosen a number of threads.
    """
    named = named_cores(os.environ)
    if named is None or COUNT_VAR in os.environ:
        return
    use_threads(len(named[rank]))


def chosen_threads() -> int:
    """How many threads the user has chosen, else those of torch.

    Torch's own number may be numba's by now: kernels with declared types start it at their import.
    """
    import torch

    first = os.environ.get(COUNT_VAR, "").partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else torch.get_num_threads()


def use_threads(count: int) -> None:
    """Give torch and numba so many threads each."""
    import numba
    import torch

    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    # Last: numba's first call starts its threads, and gives torch, which has the same libgomp, as
    # many as there are cores (launch_threads in numba/np/ufunc/omppool.cpp).
    torch.set_num_threads(count)


def named_cores(environ: Mapping[str, str]) -> list[list[int]] | None:
    """Each rank's cores in BIND_VAR; None where it names none.

    Raises: ValueError for anything but numbers and ranges.
    """
    text = environ.get(BIND_VAR) or "all"
    if text == "all":
        return None
    return [[core for span in part.split(",") for core in _span(span)] for part in text.split("|")]


def _span(text: str) -> range:
    match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", text)
    if match is None:
        raise ValueError(f"cores must be a number or a range: got {text!r}.")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


def bind_reasons(ranks: int, environ: Mapping[str, str]) -> list[str]:
    """Why BIND_VAR, where the user has set it, does not name cores for each of a node's ranks."""
    if _is_shared(environ):
        return []
    try:
        named = named_cores(environ)
    except ValueError:
        named = []
    if named is None or (len(named) >= ranks and all(named)):
        return []
    return [
        f"{BIND_VAR} must name cores for each of {ranks} ranks, as 0-3|4-7: got "
        f"{environ[BIND_VAR]!r}. Correct it or unset it."
    ]
