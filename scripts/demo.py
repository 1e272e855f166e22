"""Serves the same questions on long documents one-tier and with ESS: scripts/demo.sh.

It starts two servers, one after the other, with the same flags and the same device memory for the
KV pool. It asks each server one question at a time: then both compute the same batches, and their
answers can be compared token by token. Then it asks all questions at once, so that memory is short.

The documents are CPython's documentation topics. The model's weights are random, so its answers are
noise and its hit rates differ from a real model's, but every part of the server does its real work.
"""

import argparse
import json
import re
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from sglang_ess.testing.tiny_model import TinyModelConfig, write_tiny_model
from tests.support.server import Server

OUT = Path("out/demo")
PICTURE = OUT / "hit_rate.png"
DOCUMENTS, DOCUMENT_TOKENS = 8, 3000  # a token of this tokenizer is a byte
QUESTIONS = ("\n\nWhat is this about?", "\n\nWho needs it, and why?", "\n\nGive an example.")
OUTPUT_TOKENS = 32
CONTEXT = 3328
# One-tier it holds about three documents: 4 layers x (656 B latent row + 132 B index key).
DEVICE_GIB = 0.031
FLAGS = (
    *("--ess-device-gib", str(DEVICE_GIB), "--context-length", str(CONTEXT)),
    *("--kv-cache-dtype", "fp8_e4m3", "--chunked-prefill-size", "2048"),
    # A document's questions wait for its first one instead of computing it again.
    *("--schedule-policy", "lpm", "--max-running-requests", "64", "--enable-metrics"),
)
SYSTEMS = {"one-tier": ("--disable-ess",), "ESS": ("--ess-hot-ratio", "0.1")}
POLL_SECONDS = 0.1
METRIC = re.compile(r'sglang:ess_(lookups|misses)_total\{.*?layer="(\d+)".*?\} (\S+)')


@dataclass(frozen=True)
class Answer:
    """One answer. cached_tokens: prompt tokens found in the radix cache; token_ids: generated."""

    prompt_tokens: int
    cached_tokens: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Served:
    """Results of one server.

    facts: "ess" of /server_info
    alone, together: answers to one question at a time and to all at once, in the prompts' order
    running: most requests that decoded together; seconds: duration of the questions asked at once
    lookups, misses: of all decode steps, by layer; empty one-tier
    """

    facts: dict
    alone: list[Answer]
    together: list[Answer]
    running: int
    seconds: float
    lookups: dict[int, int]
    misses: dict[int, int]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(answer.token_ids) for answer in self.together) / self.seconds

    @property
    def cached_share(self) -> float:
        """Share of prompt tokens found in the radix cache, for the questions asked at once."""
        cached, prompts = (
            sum(getattr(answer, name) for answer in self.together)
            for name in ("cached_tokens", "prompt_tokens")
        )
        return cached / prompts

    @property
    def hit_rates(self) -> dict[int, float]:
        return {n: 1 - self.misses[n] / self.lookups[n] for n in self.lookups if self.lookups[n]}


def prompts() -> list[str]:
    """Each of DOCUMENTS texts with each of QUESTIONS, in the order of the documents."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace").decode()
    starts = range(20000, 20000 + DOCUMENTS * DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    documents = [text[at : at + DOCUMENT_TOKENS] for at in starts]
    return [document + question for document in documents for question in QUESTIONS]


def ask(url: str, text: str) -> Answer:
    """Send one greedy request to SGLang's /generate."""
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    body = json.dumps({"text": text, "sampling_params": sampling}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        answer = json.load(response)
    meta = answer["meta_info"]
    return Answer(meta["prompt_tokens"], meta["cached_tokens"], tuple(answer["output_ids"]))


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


def question_all(server: Server, log: Path, texts: list[str]) -> Served:
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


def serve(name: str, model: Path, flags: list[str], texts: list[str]) -> Served:
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


# --- results ----------------------------------------------------------------------------


def table(results: dict[str, Served]) -> str:
    """The comparison as text, with a column for each server."""

    def mib(served: Served, tier: str) -> str:
        return f"{served.facts[f'{tier}_bytes'] / 2**20:.1f} MiB"

    rows = {
        "device bytes of the KV pool": lambda served: mib(served, "device"),
        "host bytes": lambda served: mib(served, "host"),
        "slots": lambda served: str(served.facts["slots"]),
        "requests running together, most": lambda served: str(served.running),
        "prompt tokens found in the cache": lambda served: f"{served.cached_share:.0%}",
        "output tokens/s, all at once": lambda served: f"{served.tokens_per_second:.0f}",
        "hit rate of the hot tier": _hit_rate,
    }
    lines = [("", list(results))]
    lines += [
        (label, [cell(served) for served in results.values()]) for label, cell in rows.items()
    ]
    return "\n".join(f"{label:<34}" + "".join(f"{c:>14}" for c in cells) for label, cells in lines)


def _hit_rate(served: Served) -> str:
    lookups = sum(served.lookups.values())
    return f"{1 - sum(served.misses.values()) / lookups:.1%}" if lookups else "-"


def different(first: list[Answer], second: list[Answer]) -> list[int]:
    """Numbers of the requests whose tokens differ, counted from 1."""
    pairs = enumerate(zip(first, second, strict=True), 1)
    return [number for number, (a, b) in pairs if a.token_ids != b.token_ids]


def bars(hit_rates: dict[int, float]) -> str:
    return "\n".join(
        f"    layer {layer}  {'#' * round(40 * rate):<40} {rate:.1%}"
        for layer, rate in sorted(hit_rates.items())
    )


def draw(hit_rates: dict[int, float], hot_ratio: float) -> bool:
    """Write PICTURE. Returns False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    layers = sorted(hit_rates)
    drawn = axes.bar(layers, [hit_rates[layer] for layer in layers])
    axes.bar_label(drawn, fmt=lambda rate: f"{rate:.0%}")
    axes.set(xlabel="layer", ylabel="hit rate", ylim=(0, 1), xticks=layers)
    title = f"Top-k rows found in the hot tier ({hot_ratio:.0%} of the slots; random weights)"
    axes.set_title(title, fontsize=9)
    figure.savefig(PICTURE, dpi=130)
    return True


def report(results: dict[str, Served]) -> int:
    """Print the comparison. Returns the exit status: 0 if the outputs are identical, else 1."""
    one_tier, ess = results.values()
    print(f"\n{table(results)}\n\nhit rate by layer (random weights: their own locality):")
    print(bars(ess.hit_rates))
    if draw(ess.hit_rates, ess.facts["hot_ratio"]):
        print(f"    picture: {PICTURE}")
    wrong = different(one_tier.alone, ess.alone)
    lengths = statistics.mean(answer.prompt_tokens for answer in ess.alone)
    print(
        f"\n{len(ess.alone)} requests of {lengths:.0f} prompt tokens, {OUTPUT_TOKENS} greedy "
        "tokens each, asked one by one"
    )
    if wrong:
        print(f"outputs identical: no: requests {', '.join(map(str, wrong))} differ")
        return 1
    print("outputs identical: yes")
    # This does not test ESS: bf16 rounding depends on the batch size, one-tier too.
    same = len(ess.together) - len(different(one_tier.together, ess.together))
    print(
        f"(asked at once, where batches and so bf16 rounding differ: {same} of {len(ess.together)})"
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__)
    parser.add_argument("--arch", choices=("v32", "glm"), default="v32")
    args, flags = parser.parse_known_args()
    # A plain kill of the demo must end the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    model = write_tiny_model(OUT / f"tiny-{args.arch}", TinyModelConfig(arch=args.arch))
    texts = prompts()
    print(
        f"model: {model}, random weights\n{len(texts)} requests: {len(QUESTIONS)} questions on "
        f"each of {DOCUMENTS} documents of {DOCUMENT_TOKENS} tokens; {DEVICE_GIB} GiB of device "
        "memory for the KV pool",
        flush=True,
    )
    return report({name: serve(name, model, flags, texts) for name in SYSTEMS})


if __name__ == "__main__":
    sys.exit(main())
