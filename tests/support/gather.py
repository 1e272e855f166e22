"""Makes batches reproducible: requests that belong together are admitted together.

A batch reaches the scheduler request by request, so which of them share a forward pass
depends on timing, and with it every last bit of the results.
"""

import re

# "<name>:<number of requests in the group>:<index>"
RID = "{name}:{count}:{index}"
_PATTERN = re.compile(r"(.*):(\d+):(\d+)")


def rids(name: str, count: int) -> list[str]:
    return [RID.format(name=name, count=count, index=index) for index in range(count)]


def install() -> None:
    """The scheduler does not see its queue until every group in it is complete.

    With data-parallel attention a group may be spread over ranks: all of them begin it in one step.
    """
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.get_next_batch_to_run
    arrived: dict[str, set[str]] = {}  # of groups that have not begun
    begun: set[str] = set()

    def gathering(scheduler, *args, **kwargs):
        queue = scheduler.waiting_queue
        # Parallel samples get rids of SGLang's own: they count as arrived.
        for match in filter(None, (_PATTERN.fullmatch(req.rid) for req in queue)):
            if match[1] not in begun:
                arrived.setdefault(match[1], set()).add(match[0])
        for name, count in _on_all_ranks(scheduler, {k: len(v) for k, v in arrived.items()}):
            if count >= int(_PATTERN.fullmatch(min(arrived[name]))[2]):
                begun.add(name)
                del arrived[name]
                queue.sort(key=_index)  # sent one by one, they come in any order
        if not arrived:
            return original(scheduler, *args, **kwargs)
        scheduler.waiting_queue = []
        plan = original(scheduler, *args, **kwargs)
        scheduler.waiting_queue = queue + scheduler.waiting_queue
        return plan

    Scheduler.get_next_batch_to_run = gathering


def _index(req) -> int:
    match = _PATTERN.fullmatch(req.rid)
    return int(match[3]) if match else -1


def _on_all_ranks(scheduler, arrived: dict[str, int]) -> list[tuple[str, int]]:
    """(name, requests that have arrived) of this rank's groups.

    With data-parallel attention, of all ranks together: they have the same group, if any.
    """
    import torch
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    if not parallel.attn_dp_enabled:
        return list(arrived.items())
    total = torch.tensor([sum(arrived.values()) if parallel.attn_tp_rank == 0 else 0])
    torch.distributed.all_reduce(total, group=scheduler.tp_cpu_group)
    return [(name, int(total)) for name in arrived]
