"""Makes batches reproducible: requests that belong together are admitted together.

A batch reaches the scheduler request by request, so which of them share a forward pass
depends on timing, and with it every last bit of the results.
"""

import re

# "<name>:<number of requests in the group>:<index>"
RID = "{name}:{count}:{index}"
_PATTERN = re.compile(r"(.*):(\d+):\d+")


def rids(name: str, count: int) -> list[str]:
    return [RID.format(name=name, count=count, index=index) for index in range(count)]


def install() -> None:
    """The scheduler does not see its queue until every group in it is complete."""
    from sglang.srt.managers.scheduler import Scheduler

    original = Scheduler.get_next_batch_to_run
    arrived: dict[str, set[str]] = {}

    def complete(rid: str) -> bool:
        match = _PATTERN.fullmatch(rid)
        if match is None:
            return True
        group = arrived.setdefault(match[1], set())
        group.add(rid)
        return len(group) >= int(match[2])

    def gathering(scheduler, *args, **kwargs):
        queue = scheduler.waiting_queue
        # Parallel samples get rids of SGLang's own: they count as arrived.
        if all([complete(req.rid) for req in queue]):
            return original(scheduler, *args, **kwargs)
        scheduler.waiting_queue = []
        plan = original(scheduler, *args, **kwargs)
        scheduler.waiting_queue = queue + scheduler.waiting_queue
        return plan

    Scheduler.get_next_batch_to_run = gathering
