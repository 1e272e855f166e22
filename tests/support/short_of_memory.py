"""`python -m tests.support.short_of_memory ARGUMENTS`: a server one of whose ranks cannot start.

The variable FAILS says where: "tier" (it cannot map the host tier) or "rank" (its process is killed
before the ranks agree on their sizes).
The ranks must be forks of this process.
"""

import os
import runpy
import signal
import sys

FAILS = "ESS_TEST_FAILS"
LINE = "host memory must suffice for rank 1: got none. Free some."


def fails() -> bool:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().launch_world_rank == 1


def install(where: str) -> None:
    from sglang_ess.mem_cache import capacity
    from sglang_ess.tiers import host_tier
    from sglang_ess.tiers.host_memory import HostMemoryError

    def failing(original):
        def call(*args, **kwargs):
            if not fails():
                return original(*args, **kwargs)
            if where == "rank":
                os.kill(os.getpid(), signal.SIGKILL)
            raise HostMemoryError(LINE)

        return call

    if where == "tier":
        host_tier.HostMemory = failing(host_tier.HostMemory)
    else:
        capacity.free_host_bytes = failing(capacity.free_host_bytes)


if __name__ == "__main__":
    install(os.environ[FAILS])
    sys.argv[0] = "sglang_ess.launch_server"
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
