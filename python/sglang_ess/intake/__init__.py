"""Checks of requests, so that no request can end the server or stop the others.

request_checks: prompts and their parameters; stop_regex: the cost of a pattern; control: requests
to the server itself; guard: an exception in the scheduler ends the request that caused it, not
the server; streams: errors before the first byte of a response.
"""

from __future__ import annotations

from fastapi import HTTPException


class Refused(ValueError, HTTPException):
    """A refused request: one line, sent with status 400 by every route, a ValueError offline."""

    def __init__(self, line: str):
        HTTPException.__init__(self, status_code=400, detail=line)
        self.args = (line,)

    def __str__(self) -> str:
        return self.detail
