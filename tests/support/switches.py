"""What a test changes in a running engine, so that many questions need one engine only.

EngineProcess.switched(fault=..., chunk=...) says what; the patches here and in faults.py obey.
"""

import json
import os
from pathlib import Path

from tests.support.engine import RECORD_VAR, SWITCHES


def value(name):
    """The value of a switch now; None: it is not set."""
    try:
        return json.loads(Path(os.environ[RECORD_VAR]).with_name(SWITCHES).read_text()).get(name)
    except FileNotFoundError:
        return None


def chunk() -> None:
    """Meanwhile, switched(chunk=...) stands for --chunked-prefill-size."""
    from sglang.srt.managers.scheduler import Scheduler

    original, own = Scheduler.get_next_batch_to_run, []

    def with_chunk(scheduler, *args, **kwargs):
        if not own:
            own.append(scheduler.chunked_prefill_size)
        scheduler.chunked_prefill_size = value("chunk") or own[0]
        return original(scheduler, *args, **kwargs)

    Scheduler.get_next_batch_to_run = with_chunk
