"""Old name of harness.py, until every benchmark imports that."""

from benchmarks.harness import *  # noqa: F403
from benchmarks.harness import argument_parser as arguments  # noqa: F401
from benchmarks.processes import Worker, WorkerError  # noqa: F401
