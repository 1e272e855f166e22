"""Serves a tiny sparse-attention model and sends it long prompts of real text: scripts/demo.sh.

The text comes from this machine: CPython's documentation topics, and a licence where there is
one. The model's weights are random, so what it writes is noise; the path it takes is not.
"""

import argparse
import json
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import openai

from sglang_ess.tiny_model import TinyModelConfig, write_tiny_model
from tests.support.server import Server

OUT = Path("out/demo")
LICENSES = (Path("/usr/share/common-licenses/GPL-3"), Path("LICENSE"))
OUTPUT_TOKENS = 32
SLOTS = 65536  # enough for all prompts; SGLang's default is most of the machine's memory
HEADER = (
    "request",
    "prompt tokens",
    "cached",
    "first token s",
    "output tokens",
    "output tokens/s",
)


@dataclass(frozen=True)
class Served:
    """One answered request, or several at once. first: seconds until the first token."""

    name: str
    prompt_tokens: int
    cached_tokens: int
    first: float
    output_tokens: int
    tokens_per_second: float
    text: str

    def cells(self) -> tuple[str, ...]:
        return (
            self.name,
            str(self.prompt_tokens),
            str(self.cached_tokens),
            f"{self.first:.2f}",
            str(self.output_tokens),
            f"{self.tokens_per_second:.1f}",
        )


def documents() -> tuple[str, str]:
    """(a licence text, a run of Python's documentation)."""
    licence = next(path for path in LICENSES if path.is_file()).read_text()
    return licence, "\n".join(topics[name] for name in sorted(topics))


def measure(name: str, chunks: Iterator[tuple[str, dict]]) -> Served:
    """Time a stream of (text so far or piece, usage); the last usage counts."""
    since, first, text, usage = time.perf_counter(), None, "", {}
    for piece, seen in chunks:
        first = first or time.perf_counter()
        text, usage = text + piece, seen or usage
    seconds, output = time.perf_counter() - first, usage["output"]
    rate = (output - 1) / seconds
    return Served(name, usage["prompt"], usage["cached"], first - since, output, rate, text)


def chat(url: str, name: str, document: str, question: str) -> Served:
    """A streamed chat completion through the OpenAI client."""

    def chunks():
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": f"{document}\n\n{question}"}],
            max_tokens=OUTPUT_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for part in stream:
            if usage := part.usage:
                details = usage.prompt_tokens_details
                cached = details.cached_tokens if details else 0
                yield (
                    "",
                    {
                        "prompt": usage.prompt_tokens,
                        "cached": cached,
                        "output": usage.completion_tokens,
                    },
                )
            elif part.choices and (piece := part.choices[0].delta.content):
                yield piece, {}

    return measure(name, chunks())


def generate(url: str, name: str, document: str) -> Served:
    """A streamed request to SGLang's own /generate."""

    def chunks():
        body = {
            "text": document,
            "stream": True,
            "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True},
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            written = ""
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                answer = json.loads(line[len(b"data: ") :])
                meta = answer["meta_info"]
                piece, written = answer["text"][len(written) :], answer["text"]
                yield (
                    piece,
                    {
                        "prompt": meta["prompt_tokens"],
                        "cached": meta["cached_tokens"],
                        "output": meta["completion_tokens"],
                    },
                )

    return measure(name, chunks())


def at_once(url: str, name: str, documents: list[str]) -> Served:
    """/generate for all documents together: tokens added up, decoding timed from the last
    first token on (prefill comes first in SGLang's schedule).
    """
    since = time.perf_counter()
    with ThreadPoolExecutor(len(documents)) as pool:
        served = list(pool.map(lambda text: generate(url, name, text), documents))
    seconds, first = time.perf_counter() - since, max(one.first for one in served)
    output = sum(one.output_tokens for one in served)
    return replace(
        served[0],
        prompt_tokens=sum(one.prompt_tokens for one in served),
        cached_tokens=sum(one.cached_tokens for one in served),
        first=first,
        output_tokens=output,
        tokens_per_second=(output - len(served)) / (seconds - first),
    )


def requests(url: str) -> Iterator[Served]:
    licence, docs = documents()
    page, book = licence[:6000], docs[:14000]
    yield chat(url, "chat, 6 KB of a licence", page, "What may I do?")
    yield chat(url, "chat, same text, other question", page, "What must I not do?")
    yield generate(url, "/generate, 14 KB of Python docs", book)
    yield generate(url, "/generate, the same again", book)
    starts = range(20000, 52000, 8000)
    yield at_once(url, "/generate, 4 x 4 KB at once", [docs[at : at + 4000] for at in starts])


def print_row(cells: tuple[str, ...]) -> None:
    widths = (-33, 14, 7, 14, 14, 16)  # of the columns; negative: to the left
    texts = (
        cell.ljust(-width) if width < 0 else cell.rjust(width)
        for cell, width in zip(cells, widths, strict=True)
    )
    print(*texts, flush=True)


class Relay:
    """Prints what sglang_ess says in the server's log as it comes."""

    def __init__(self, log: Path):
        self.lines, self.in_block = log.open(errors="replace"), False

    def __call__(self) -> bool:
        """Whether the summary block has been printed to its end."""
        while line := self.lines.readline():
            self.in_block = line.startswith("    ") if self.in_block else " ready after " in line
            if self.in_block or line.startswith("[sglang-ess]"):
                print(line, end="", flush=True)
            if self.in_block and line.startswith("    URL "):
                return True
        return False


def requests_served(server: Server, log: Path) -> Served:
    """Send the requests once the server is ready, a row of the table each; the last one."""
    server.wait_for(Relay(log), 600, "ready")
    print_row(HEADER)
    for served in requests(server.url):
        print_row(served.cells())
    return served


def serve(model: Path, flags: list[str]) -> None:
    log = OUT / "server.log"
    print(f"starting the server; its log: {log}", flush=True)
    extra = ("--max-total-tokens", str(SLOTS), "--enable-cache-report", *flags)
    with Server(model, *extra, log=log) as server:
        try:
            served = requests_served(server, log)
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise SystemExit(f"demo: {type(error).__name__}: {line}\n{server.tail()}") from error
        status = server.stop()
    print(f"the last answer begins {served.text[:40]!r}: noise, for the weights are random")
    if status != 0:
        raise SystemExit(f"demo: the server must end with 0: got {status}. See {log}.")
    print("the server has stopped")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__)
    parser.add_argument("--arch", choices=("v32", "glm"), default="v32")
    args, flags = parser.parse_known_args()
    # So that a plain kill of the demo takes the server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    model = write_tiny_model(OUT / f"tiny-{args.arch}", TinyModelConfig(arch=args.arch))
    print(f"model: {model}, random weights", flush=True)
    serve(model, flags)
    return 0


if __name__ == "__main__":
    sys.exit(main())
