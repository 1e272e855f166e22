"""Under --ess-topk-stream every log line of every process says so."""

from __future__ import annotations

import logging
import os
from functools import cache

from sglang_ess.config import ENV_VAR, EssConfig

MARK = "[UNSAFE top-k stream]"
ACCESS_LOGGER = "uvicorn.access"


def requested() -> str:
    """--ess-topk-stream of this process, asked in every layer of a step; empty: none.

    Raises: ValueError as EssConfig.from_env.
    """
    return _stream_in(os.environ.get(ENV_VAR, "{}"))


@cache
def _stream_in(text: str) -> str:
    return EssConfig.from_env({ENV_VAR: text}).topk_stream


def mark_log_lines() -> None:
    """From now on each record of this process begins with MARK. Idempotent.

    By the factory of records, which no configuration replaces: SGLang's (basicConfig with force,
    or a file's dictConfig) changes handlers and formatters, in each process anew.
    """
    factory = logging.getLogRecordFactory()
    if isinstance(factory, _Marking):
        return
    logging.setLogRecordFactory(_Marking(factory))


class _Marking:
    """A factory of records around another."""

    def __init__(self, factory):
        self._factory = factory

    def __call__(self, *args, **kwargs) -> logging.LogRecord:
        record = self._factory(*args, **kwargs)
        if record.name == ACCESS_LOGGER and isinstance(record.args, tuple) and record.args:
            # uvicorn's formatter shows the arguments alone: first the client's address.
            record.args = (f"{MARK} {record.args[0]}", *record.args[1:])
        elif record.name is not None:  # makeLogRecord fills in the rest, marked where it was made
            record.msg = f"{MARK} {record.msg}"
        return record
