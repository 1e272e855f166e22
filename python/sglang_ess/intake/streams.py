"""Turns an error before a response's first byte into an error response, in streams too.

A stream sends its status before it makes its first chunk. If that raises, SGLang's Ollama routes
break the connection, and the client gets neither a status nor a reason.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)


class FirstByteErrors:
    """ASGI middleware: delays the start of a response until its body begins."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        delayed: list[Any] = []
        began = False

        async def delay_start(message: Any) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                delayed.append(message)
                return
            began = True
            while delayed:
                await send(delayed.pop(0))
            await send(message)

        try:
            await self.app(scope, receive, delay_start)
        except (ValueError, HTTPException) as error:
            if began:
                raise
            logger.info("ESS: %s answered with an error: %s", scope["path"], error)
            status = getattr(error, "status_code", 400)
            line = str(getattr(error, "detail", error))
            body = {"object": "error", "message": line, "code": status}
            await JSONResponse(body, status_code=status)(scope, receive, send)


def before_server(*args: Any, **kwargs: Any) -> None:
    """Body of the BEFORE hook on http_server._setup_and_run_http_server."""
    from sglang.srt.entrypoints.http_server import app

    add_to(app)


def add_to(app: Any) -> None:
    """Add the middleware to a FastAPI app, which must not have started."""
    app.add_middleware(FirstByteErrors)
