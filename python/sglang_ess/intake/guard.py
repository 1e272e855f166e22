"""The scheduler's last line of defence: a request that it cannot take in gets an error.

This covers a request from its arrival to its place in a queue. An error in a forward pass concerns
all requests of the batch, and still ends the server.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

logger = logging.getLogger(__name__)

# Marks a failure, in the field rid, which answers to control requests otherwise leave empty.
FAILED = "sglang-ess failed: "


def guard_dispatcher(result: Any, scheduler: Any) -> None:
    """Body of the AFTER hook on Scheduler.init_request_dispatcher: wraps the dispatcher."""
    scheduler._request_dispatcher = guarded(scheduler._request_dispatcher, scheduler)


def guarded(dispatch: Callable[[Any], Any], scheduler: Any) -> Callable[[Any], Any]:
    """Wrap SGLang's dispatcher: an exception becomes an error answer to the request.

    With several ranks an exception in a control request still ends the server, because the ranks
    may be in the middle of exchanging messages. Ranks take in a prompt without messages, and all
    raise alike.
    """
    from sglang.srt.runtime_context import get_parallel

    def take_in(recv_req: Any) -> Any:
        queued, prompts = len(scheduler.waiting_queue), _prompts(recv_req)
        if taken := _taken(scheduler, prompts):
            return _refuse(scheduler, prompts, f"rid must be new: got {taken!r}, which runs.")
        try:
            return dispatch(recv_req)
        except Exception as error:
            if not prompts and get_parallel().tp_size * get_parallel().pp_size > 1:
                raise
            logger.exception("ESS: the scheduler could not take in a %s", type(recv_req).__name__)
            line = (
                f"The server must be able to take in the request: got {type(error).__name__}: "
                f"{(str(error).splitlines() or [''])[0][:300]}. Correct the request; the server's "
                "log has more."
            )
            if not prompts:
                return control_failure(type(recv_req).__name__, line)
            del scheduler.waiting_queue[queued:]
            return _refuse(scheduler, prompts, line)

    return take_in


def _taken(scheduler: Any, prompts: list[Any]) -> str | None:
    """An id among the prompts that a request of another tokenizer worker has; None if none.

    The detokenizer identifies requests by their ids alone. A single tokenizer worker checks this
    itself.
    """
    from sglang.srt.runtime_context import get_serving

    if not prompts or get_serving().tokenizer_worker_num == 1:
        return None
    running = [*scheduler.collect_inflight_reqs(), *scheduler.waiting_queue]
    running += scheduler.grammar_manager.grammar_queue
    if scheduler.chunked_req is not None:
        running.append(scheduler.chunked_req)
    return next(iter({req.rid for req in prompts} & {req.rid for req in running}), None)


def _refuse(scheduler: Any, prompts: list[Any], line: str) -> None:
    """Answer each prompt with an error of status 400."""
    from sglang.srt.managers.io_struct import AbortReq

    for req in prompts:
        reason = {"type": "abort", "status_code": 400, "message": line}
        scheduler.send_abort_output(AbortReq(rid=req.rid, finished_reason=reason), req)


def _prompts(recv_req: Any) -> list[Any]:
    """The tokenized requests in a message; empty for a control request."""
    from sglang.srt.managers import io_struct as io

    if isinstance(recv_req, (io.TokenizedGenerateReqInput, io.TokenizedEmbeddingReqInput)):
        return [recv_req]
    batches = (io.BatchTokenizedGenerateReqInput, io.BatchTokenizedEmbeddingReqInput)
    return list(recv_req.batch) if isinstance(recv_req, batches) else []


def control_failure(request: str, line: str) -> Any:
    """SGLang's answer to a control request, marked as failed; None if SGLang has no answer type.

    request: name of the request's type; line: the error. Other fields are empty or zero.
    """
    from sglang.srt.managers import io_struct

    answer = getattr(io_struct, request.removesuffix("Input") + "Output", None)
    if answer is None:
        return None
    values = {
        field.name: line if field.name in ("message", "error") else _empty(field.type)
        for field in msgspec.structs.fields(answer)
        if field.required or field.name in ("message", "error")
    }
    return answer(**values, rid=FAILED + line)


def _empty(annotation: Any) -> Any:
    kinds = {bool: False, int: 0, float: 0.0, str: ""}
    if annotation in kinds:
        return kinds[annotation]
    origin = getattr(annotation, "__origin__", None)
    return origin() if origin in (dict, list) else None
