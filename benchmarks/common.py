"""Old name of harness.py, until every benchmark imports that."""

from benchmarks.harness import (  # noqa: F401
    ROOT,
    OtherLoad,
    Progress,
    Report,
    failed,
    find,
    measured,
    ratios,
    save_figure,
    simulated,
    table,
)
from benchmarks.harness import argument_parser as arguments  # noqa: F401
from benchmarks.worker import Worker, WorkerError  # noqa: F401
