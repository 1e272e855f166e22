"""Mark every log line of every process under --ess-topk-stream."""

from __future__ import annotations

import logging
import os
from functools import cache

from sglang_ess.config import ENV_VAR, EssConfig

MARK = "[UNSAFE top-k stream]"
ACCESS_LOGGER = "uvicorn.access"


def requested() -> str:
    """Return this process's --ess-topk-stream; empty without the switch.

    Raises: ValueError as EssConfig.from_env.
    """
    return _stream_in(os.environ.get(ENV_VAR, "{}"))


@cache
def _stream_in(text: str) -> str:
    config = EssConfig.from_env({ENV_VAR: text})
    return config.topk_stream if config else ""


def mark_log_lines() -> None:
    """Let each log record of this process begin with MARK from now on. Idempotent.

    It replaces the factory of records, which no logging configuration replaces. SGLang's own
    (basicConfig with force, or a file's dictConfig) changes handlers and formatters in each
    process.
    """
    factory = logging.getLogRecordFactory()
    if isinstance(factory, _Marking):
        return
    logging.setLogRecordFactory(_Marking(factory))


class _Marking:
    """A factory of log records that marks those of another factory."""

    def __init__(self, factory):
        self._factory = factory

    def __call__(self, *args, **kwargs) -> logging.LogRecord:
        record = self._factory(*args, **kwargs)
        if record.name == ACCESS_LOGGER and isinstance(record.args, tuple) and record.args:
            # uvicorn's formatter shows only the arguments; the first is the client's address.
            record.args = (f"{MARK} {record.args[0]}", *record.args[1:])
        elif record.name is not None:  # None: makeLogRecord copies a record that is marked already
            record.msg = f"{MARK} {record.msg}"
        return record
