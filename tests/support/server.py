"""A real HTTP server for tests and for the demo: `python -m sglang_ess.launch_server`."""

from pathlib import Path

from tools.processes import HttpProcess, free_port

__all__ = ["Server", "free_port"]


class Server(HttpProcess):
    """One server. model: checkpoint directory; flags: further arguments; the rest: HttpProcess's"""

    def __init__(self, model, *flags: str, log: Path, **options):
        given = ("--model-path", str(model), *flags)
        super().__init__("sglang_ess.launch_server", *given, log=log, **options)
