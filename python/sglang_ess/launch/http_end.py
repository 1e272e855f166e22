"""How SGLang's HTTP servers end: no new clients, a grace period, then an error for the rest.

SGLang gives uvicorn no bound, and has no option for one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing.util
import os
import signal
import sys
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

UNAVAILABLE = 503


class BoundedConfig(uvicorn.Config):
    """uvicorn's configuration of one server. It is pickled for every tokenizer worker."""

    grace_seconds = 0.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.timeout_graceful_shutdown = self.grace_seconds

    def load(self) -> None:
        super().load()
        self.loaded_app = answering(self.loaded_app, self.timeout_graceful_shutdown)


def bound(grace_seconds: float) -> None:
    """From now on SGLang's HTTP servers give requests so long. In the launcher's process.

    Effect: replaces names of uvicorn's.
    """
    BoundedConfig.grace_seconds = grace_seconds
    uvicorn.Config = uvicorn.run.__globals__["Config"] = BoundedConfig
    Multiprocess.terminate_all = stop_accepting


def answering(app, grace_seconds: float):
    """The ASGI application, but a request that uvicorn cancels is answered with status 503.

    An answer that has begun is cut off.
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
    """Let a tokenizer worker, which has answered everything, skip what its modules do at exit.

    That takes seconds, for which all others wait. A process without a parent is no worker.
    """
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=sys.maxsize)


def stop_accepting(workers: Multiprocess) -> None:
    """In the stead of Multiprocess.terminate_all: the workers stop listening, requests go on.

    It sends them SIGTERM, at which a worker of SGLang's that has nothing to do ends the scheduler
    under the others; and its own socket goes on listening, which lets new clients hang.
    """
    for listener in vars(workers).get("sockets", ()):  # a property where workers have their own
        listener.close()
    for worker in workers.processes:
        if catches(worker.pid, signal.SIGINT):
            os.kill(worker.pid, signal.SIGINT)
        else:  # it still imports, or it is gone
            worker.kill()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal."""
    try:
        mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    except (OSError, IndexError):
        return False
    return bool(int(mask, 16) >> (number - 1) & 1)
