"""Asks questions about long documents, served one-tier and with ESS: scripts/demo.sh.

It starts two servers, one after the other, with the same flags and the same device memory for the
KV pool. It asks each server one question at a time: then both compute the same batches, and their
answers can be compared token by token. Then it asks all questions at once, so that memory is short.

The model is small and trained to find facts in documents (docs/recall_model.md), so that answers
are right or wrong. The documents are Python's documentation, with facts put in between. No training
saw them.
"""

import argparse
import json
import random
import re
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from scripts.demo_report import Answer, Asked, Served, report
from sglang_ess.testing.recall.documents import STOP, make_document
from sglang_ess.testing.recall.model import write_recall_model
from tests.support.server import Server

OUT = Path("out/demo")
LENGTHS = (2048, 2048, 4096, 4096, 8192, 8192, 8192)  # of the documents; a token is a byte
KINDS = ("code", "hop", "quote", "code")  # of a document's questions
BYTES_A_FACT = 200  # a fact about which no question asks, for each so many bytes
SEED = 0
OUTPUT_TOKENS = 96  # at most; the longest answer has 70
CONTEXT = 8704
# One-tier it holds about two of the longest: 4 layers x (656 B latent row + 132 B index key).
DEVICE_GIB = 0.06
FLAGS = (
    *("--ess-device-gib", str(DEVICE_GIB), "--context-length", str(CONTEXT)),
    *("--kv-cache-dtype", "fp8_e4m3", "--chunked-prefill-size", "2048"),
    # A document's questions wait for its first one instead of computing it again.
    *("--schedule-policy", "lpm", "--max-running-requests", "64", "--enable-metrics"),
)
SYSTEMS = {"one-tier": ("--disable-ess",), "ESS": ("--ess-hot-ratio", "0.1")}
POLL_SECONDS = 0.1
METRIC = re.compile(r'sglang:ess_(lookups|misses)_total\{.*?layer="(\d+)".*?\} (\S+)')


def questions() -> list[Asked]:
    """Each of KINDS about a document of each of LENGTHS, in the order of the documents."""
    rng, asked = random.Random(SEED), []
    for length in LENGTHS:
        document = make_document(rng, length, KINDS, others=length // BYTES_A_FACT)
        asked += [Asked(length, one, document.text + one.prompt) for one in document.questions]
    return asked


def ask(url: str, text: str) -> Answer:
    """Send one greedy request to SGLang's /generate."""
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "stop": STOP}
    body = json.dumps({"text": text, "sampling_params": sampling}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    meta = answer["meta_info"]
    ids = tuple(answer["output_ids"])
    return Answer(meta["prompt_tokens"], meta["cached_tokens"], ids, answer["text"])


@contextmanager
def max_running(server: Server) -> Iterator[list[int]]:
    """Poll how many requests the server runs. Yields [the maximum so far]."""
    maximum, ended = [0], threading.Event()

    def poll():
        while not ended.wait(POLL_SECONDS):
            loads = server.get("/v1/loads?include=core")["loads"]
            maximum[0] = max(maximum[0], sum(load["num_running_reqs"] for load in loads))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield maximum
    finally:
        ended.set()
        thread.join()


def counters(server: Server) -> dict[str, dict[int, int]]:
    """{"lookups" and "misses": {layer: count since the start}} of /metrics; empty one-tier."""
    with server.open("/metrics") as response:
        found = METRIC.findall(response.read().decode())
    result: dict[str, Counter] = {"lookups": Counter(), "misses": Counter()}
    for name, layer, value in found:
        result[name][int(layer)] += int(float(value))
    return result


def last_counters(server: Server) -> dict[str, dict[int, int]]:
    """counters() when they no longer change: SGLang publishes the last ones when it is idle."""
    before, found = None, counters(server)
    until = time.monotonic() + 10
    while found != before and time.monotonic() < until:
        time.sleep(1)
        before, found = found, counters(server)
    return found


class Relay:
    """Prints the lines of sglang_ess from the server's log as they appear."""

    def __init__(self, log: Path):
        self.lines, self.in_block = log.open(errors="replace"), False

    def __call__(self) -> bool:
        """Print new lines. Returns whether the summary is complete."""
        while line := self.lines.readline():
            self.in_block = line.startswith("    ") if self.in_block else " ready after " in line
            if self.in_block or line.startswith("[sglang-ess]"):
                print(line, end="", flush=True)
            if self.in_block and line.startswith("    URL "):
                return True
        return False


def question_all(server: Server, log: Path, texts: Sequence[str]) -> Served:
    """Wait until the server is ready, ask one text at a time, then all of them at once."""
    server.wait_for(Relay(log), 600, "ready")
    facts = server.get("/server_info")["ess"]
    since = time.perf_counter()
    alone = []
    for number, text in enumerate(texts, 1):
        alone.append(ask(server.url, text))
        if sys.stdout.isatty():
            print(f"\rone by one: {number} of {len(texts)}", end="\r", flush=True)
    print(f"one by one: {len(texts)} answers, {time.perf_counter() - since:.1f} s", flush=True)
    since = time.perf_counter()
    with max_running(server) as running, ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(lambda text: ask(server.url, text), texts))
    seconds = time.perf_counter() - since
    print(f"at once: {len(texts)} answers, {seconds:.1f} s", flush=True)
    return Served(facts, alone, together, running[0], seconds, **last_counters(server))


def serve(name: str, model: Path, flags: list[str], texts: Sequence[str]) -> Served:
    """Start a server, ask it, stop it. Raises: SystemExit with one line and the end of the log."""
    log = OUT / f"server-{name.lower()}.log"
    print(f"\n{name}: starting the server ({' '.join(SYSTEMS[name])}); its log: {log}", flush=True)
    with Server(model, *FLAGS, *SYSTEMS[name], *flags, log=log) as server:
        try:
            served = question_all(server, log, texts)
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise SystemExit(f"demo: {type(error).__name__}: {line}\n{server.tail()}") from error
        status = server.stop()
    if status != 0:
        raise SystemExit(f"demo: the server must end with 0: got {status}. See {log}.")
    return served


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__)
    parser.add_argument("--model", type=Path, help="another checkpoint [the trained model]")
    args, flags = parser.parse_known_args()
    # A plain kill of the demo must end the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    OUT.mkdir(parents=True, exist_ok=True)
    model = args.model or write_recall_model(OUT / "recall")
    asked = questions()
    print(
        f"model: {model}\n{len(asked)} requests: {len(KINDS)} questions on each of "
        f"{len(LENGTHS)} documents of {min(LENGTHS)} to {max(LENGTHS)} tokens; {DEVICE_GIB} GiB of "
        "device memory for the KV pool",
        flush=True,
    )
    texts = [one.text for one in asked]
    results = {name: serve(name, model, flags, texts) for name in SYSTEMS}
    return report(results, asked, OUT)


if __name__ == "__main__":
    sys.exit(main())
