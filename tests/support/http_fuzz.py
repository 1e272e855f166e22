"""Hostile bodies for every route of a server, sent over HTTP: does it still answer after each?

    python -m tests.support.http_fuzz --bodies 3000 [--seed 0] [flags of the server, last]

The server is one of our own, with a tiny model, on 127.0.0.1. http_bodies.py makes the bodies.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.http_bodies import Body, as_json, routes, walk
from tools.processes import HttpProcess

ANSWER_SECONDS = 90  # a request that a busy two-core machine serves takes a few
GROUP = 8  # bodies between two greedy requests
CONTEXT = 512  # of the servers made here: it bounds what a body can ask for
FLAGS = ("--context-length", str(CONTEXT), "--max-total-tokens", "8192")
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
# What a body may have switched off by design is switched on again before the server is judged.
UNDO = (
    ("/continue_generation", {}),
    ("/slow_down", {"forward_sleep_time": None}),
    ("/configure_logging", {"log_requests": False, "log_level": "info"}),
)


@dataclass
class Tally:
    """What became of the bodies. ended, unanswered, failed: the bodies that did it."""

    tried: int = 0
    statuses: collections.Counter = field(default_factory=collections.Counter)
    ended: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        statuses = ", ".join(f"{k}: {v}" for k, v in sorted(self.statuses.items(), key=str))
        lines = [
            f"{self.tried} bodies ({statuses}); {len(self.ended)} ended the server, "
            f"{len(self.unanswered)} got no answer"
        ]
        for name in ("ended", "unanswered", "failed"):
            lines += [f"  {name}: {body}" for body in getattr(self, name)]
        return "\n".join(lines)


class Prober:
    """Sends bodies to one server, and finds out after each few whether it still serves."""

    def __init__(self, server: HttpProcess, tally: Tally | None = None):
        self.server, self.tally = server, tally or Tally()
        self._expected = self.greedy()

    def send(self, body: Body, seconds: float = ANSWER_SECONDS) -> int | None:
        """The status of the answer; None without a whole answer in time."""
        until = time.monotonic() + seconds
        link = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=seconds)
        try:
            headers = {"Content-Type": body.kind} if body.data is not None else {}
            link.request(body.method, body.path, body.data, headers)
            answer = link.getresponse()
            while answer.read1(1 << 20):
                if time.monotonic() > until:
                    return None
            return answer.status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            link.close()

    def greedy(self) -> list[int] | None:
        """Output ids of a greedy request, None without an answer."""
        body = {"text": "The quick brown fox", "sampling_params": GREEDY}
        try:
            status, text = self.server.post("/generate", body, seconds=ANSWER_SECONDS)
            return json.loads(text)["output_ids"] if status == 200 else None
        except (OSError, ValueError, http.client.HTTPException):
            return None

    def serves(self) -> bool:
        """Whether the server answers a greedy request as it did at first."""
        self.undo()
        return self.greedy() == self._expected

    def undo(self) -> None:
        for path, value in UNDO:
            self.send(Body("POST", path, as_json(value)))

    def try_all(self, bodies: list[Body]) -> Tally:
        """Send all of them; a server that one ends is started again."""
        for start in range(0, len(bodies), GROUP):
            group = bodies[start : start + GROUP]
            if not (all([self._count(body) for body in group]) and self.serves()):
                self._find(group)
        return self.tally

    def _find(self, group: list[Body]) -> None:
        """Which of a group's bodies did it; the whole group if none does alone."""
        self._restart()
        culprits = 0
        for body in group:
            if self.send(body) is not None and self.serves():
                continue
            culprits += 1
            self._blame(str(body))
        if not culprits:
            self._blame("one of: " + "; ".join(map(str, group)))

    def _blame(self, what: str) -> None:
        alive = self.server.process.poll() is None and self.serves()
        (self.tally.unanswered if alive else self.tally.ended).append(what)
        print(f"{'no answer' if alive else 'ended'}: {what}", flush=True)
        if not alive:
            text = self.server.log.read_text(errors="replace")
            print(text[text.rfind("Traceback") :][:4000], flush=True)
        self._restart()

    def _count(self, body: Body) -> bool:
        status = self.send(body)
        self.tally.tried += 1
        self.tally.statuses[status] += 1
        if status is not None and status >= 500:
            self.tally.failed.append(f"{status} {body}")
        if "pause" in body.path:  # what follows would wait, as it is meant to
            self.undo()
        return status is not None

    def _restart(self) -> None:
        self.server.stop()
        self.server.start()
        self.server.wait_ready()


def start(model: Path, folder: Path, *flags: str) -> HttpProcess:
    """A server for a walk, in a working directory of its own: some bodies name files."""
    flags = ("--model-path", str(model), *FLAGS, *flags)
    return HttpProcess(
        "sglang_ess.launch_server",
        *flags,
        log=folder / "server.log",
        env={"SGLANG_TORCH_PROFILER_DIR": str(folder)},
        settle=lambda: os.chdir(folder),
    )


def walk_server(server: HttpProcess, bodies: int, seed: int, only: str = "") -> Tally:
    """walk() over the routes of a running server whose paths contain `only`."""
    document = server.get("/openapi.json")
    paths = {path: value for path, value in document["paths"].items() if only in path}
    document["paths"] = paths
    every = routes(document)
    fields = sum(len(route.fields) + len(route.query) for route in every)
    print(f"{len(every)} routes, {fields} fields", flush=True)
    return Prober(server).try_all(walk(document, bodies, seed))


def main(argv: list[str]) -> int:
    """Print what became of the bodies; 1 if one ended the server or got no answer."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--bodies", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="walk only paths that contain this")
    args, flags = parser.parse_known_args(argv)
    from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model", TinyModelConfig())
        with start(model, Path(folder), *flags) as server:
            server.wait_ready()
            tally = walk_server(server, args.bodies, args.seed, args.only)
    print(f"{' '.join(flags) or 'two-tier'}: {tally}")
    return 1 if tally.ended or tally.unanswered else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
