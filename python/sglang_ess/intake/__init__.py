"""What a server refuses before it costs a process: bodies that ask for what cannot be.

requests: prompts and their parameters; control: requests to the server itself; guard: what
the scheduler still cannot take in ends that request, not the server.
"""

from __future__ import annotations

from fastapi import HTTPException


class Refused(ValueError, HTTPException):
    """One line for the client, answered with status 400 by every route, a ValueError offline."""

    def __init__(self, line: str):
        HTTPException.__init__(self, status_code=400, detail=line)
        self.args = (line,)

    def __str__(self) -> str:
        return self.detail
