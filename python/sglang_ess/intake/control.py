"""Requests to the server itself: refuses those it cannot serve, and reports those that failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sglang_ess.config import EssConfig
from sglang_ess.intake import Refused
from sglang_ess.intake.guard import FAILED
from sglang_ess.plugin import active_platform

MAX_SLEEP_SECONDS = 60.0

_MEMORY = "needs --enable-memory-saver, which this server does not take"
_GROUP = "needs a process group of GPUs, and this server runs on the CPU platform"
# SGLang's request type: why neither ESS nor the CPU platform serves it.
UNSERVED = {
    "ReleaseMemoryOccupationReqInput": _MEMORY,
    "ResumeMemoryOccupationReqInput": _MEMORY,
}
# SGLang's request type: why the CPU platform does not serve it.
UNSERVED_ON_CPU = UNSERVED | {
    "InitWeightsUpdateGroupReqInput": _GROUP,
    "DestroyWeightsUpdateGroupReqInput": _GROUP,
    "UpdateWeightsFromDistributedReqInput": _GROUP,
    "InitWeightsSendGroupForRemoteInstanceReqInput": _GROUP,
    "SendWeightsToRemoteInstanceReqInput": _GROUP,
    "UpdateWeightsFromIPCReqInput": _GROUP,
    "ProfileReq": "needs a GPU's profiler, and this server runs on the CPU platform",
}
# SGLang's request types that change the weights, from which a store's pages were computed.
NEW_WEIGHTS = (
    "UpdateWeightFromDiskReqInput",
    "UpdateWeightsFromDistributedReqInput",
    "UpdateWeightsFromIPCReqInput",
    "UpdateWeightsFromTensorReqInput",
)


async def ask(original: Callable, communicator: Any, obj: Any) -> list[Any]:
    """Body of the AROUND hook on FanOutCommunicator.__call__, which sends obj to the scheduler.

    Raises: Refused, also for a failure in the scheduler that guard.py marked.
    """
    if line := problem(obj, on_cpu=active_platform() == "cpu"):
        raise Refused(line)
    answers = await original(communicator, obj)
    for answer in answers:
        if str(getattr(answer, "rid", None)).startswith(FAILED):
            raise Refused(answer.rid.removeprefix(FAILED))
    return answers


def problem(obj: Any, on_cpu: bool) -> str | None:
    """Why a control request cannot be served, in one line; None if it can."""
    name = type(obj).__name__
    if name in NEW_WEIGHTS and (config := EssConfig.from_env()) and config.store:
        return (
            f"{name} must not come to a server with --ess-store: its pages are of the weights that "
            "the server has started with. Restart it with the new ones."
        )
    if why := (UNSERVED_ON_CPU if on_cpu else UNSERVED).get(name):
        return f"{name} must be one that this server serves: it {why}. Do without it."
    if name == "SlowDownReqInput" and obj.forward_sleep_time is not None:
        seconds = obj.forward_sleep_time
        if not (math.isfinite(seconds) and seconds <= MAX_SLEEP_SECONDS):
            return f"forward_sleep_time must be at most {MAX_SLEEP_SECONDS} s: got {seconds}."
    return None
