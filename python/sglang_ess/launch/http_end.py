"""How SGLang's HTTP servers end: no new clients, a grace period, then errors for what still runs.

SGLang lets uvicorn wait for running requests without a limit, and has no option for one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.supervisors import Multiprocess

from sglang_ess.launch import startup

UNAVAILABLE = 503


class BoundedConfig(uvicorn.Config):
    """uvicorn's configuration of one server, with our grace period; pickled for each worker."""

    grace_seconds = 0.0
    loaded_app: Any

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.timeout_graceful_shutdown = self.grace_seconds

    def load(self) -> None:
        super().load()
        if self.workers > 1:  # uvicorn loads in the workers alone
            startup.tell_ready()
        self.loaded_app = answering(self.loaded_app, self.timeout_graceful_shutdown)


def bound(grace_seconds: float) -> None:
    """Limit how long SGLang's HTTP servers wait for running requests when they end.

    Call it in the process that starts those servers.
    Effect: replaces uvicorn's Config and the way its workers are stopped.
    """
    BoundedConfig.grace_seconds = grace_seconds
    uvicorn.Config = uvicorn.run.__globals__["Config"] = BoundedConfig
    Multiprocess.terminate_all = stop_accepting


def answering(app, grace_seconds: float):
    """Wrap an ASGI application: a request that uvicorn cancels is answered with status 503.

    If its response has begun, the response is cut off.
    """
    message = (
        f"The server is ending: the request was not finished {grace_seconds:g} s after the signal "
        "(--ess-grace-seconds). Send it to another server."
    )
    body = json.dumps({"error": {"message": message, "code": UNAVAILABLE}}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]

    async def run(scope, receive, send):
        begun = False

        async def watched(event):
            nonlocal begun
            begun = True
            if event["type"] == "lifespan.shutdown.complete":
                leave_soon()
            await send(event)

        try:
            await app(scope, receive, watched)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not begun:
                size = (b"content-length", str(len(body)).encode())
                start = {"status": UNAVAILABLE, "headers": [*headers, size]}
                await send({"type": "http.response.start", **start})
                await send({"type": "http.response.body", "body": body})

    return run


def leave_soon() -> None:
    """Let a tokenizer worker that has answered everything skip the exit handlers of its modules.

    They take seconds, and all other processes wait for them. Only a worker has a parent process
    in the sense of multiprocessing.
    """
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=sys.maxsize)


def stop_accepting(workers: Multiprocess) -> None:
    """Replaces uvicorn's Multiprocess.terminate_all: workers stop listening, requests continue.

    terminate_all sends SIGTERM. An idle worker of SGLang's then ends the scheduler that the other
    workers still need. The parent's socket also stays open, so that new clients would hang.
    """
    for listener in vars(workers).get("sockets", ()):  # a property if workers have their own
        listener.close()
    for worker in workers.processes:
        if catches(worker.pid, signal.SIGINT):
            os.kill(worker.pid, signal.SIGINT)
        else:  # it is still importing, or it has ended
            worker.kill()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal."""
    try:
        mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    except (OSError, IndexError):
        return False
    return bool(int(mask, 16) >> (number - 1) & 1)
