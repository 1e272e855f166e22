"""Prefixes from files: a server that starts again loads documents, next to computing others.

    python -m benchmarks.serving.third_tier [--quick] [--json FILE] [--plot FILE]

Real servers (`--ess-store`), one rank, two tiers, requests one after another over HTTP. For each
model and each length that fits its context:

    first      computes the documents and saves them, then answers a question about each one from
               its radix tree: the expected outputs
    second     another server over the same store, while the first one runs
    restarted  a new process, once both have ended; the files are not in the page cache

A loading server takes documents in turn with fresh ones of the same length, which it computes.
`ttft`: seconds from sending to the first token; `vs_computed`: loading over computing, paired.
A fresh document is saved meanwhile, as in use. `ttft_hit`: of the same document again, from the
radix tree: to load layer by layer could save that much of `ttft`, and no more. `outputs_equal`:
token ids and their logprobs, compared as they are. `gap`: the longest time between two tokens of a
request that decodes alone, or while another one's document is loaded.

The summary: ttft_ratio (restarted, the tiny model at 16K), ttft_ratio_MODEL_LENGTH, outputs_equal
(all), cached_share (tokens loaded of those in whole pages), written_ratio and read_ratio: bytes of
files, and bytes read, over the floor (latent rows and index keys that the pool keeps), hit_share
(ttft_hit over ttft) and gap_ratio (gap while loading over alone), at 16K as ttft_ratio.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import OtherLoad, Panel, Report, measured, ratios
from benchmarks.serving import shared
from benchmarks.serving.pd_load import Answer, Request, run_load
from benchmarks.serving.shared import (
    engine_env,
    finish_parts,
    parser_with_threads,
    prompts_of,
    run_parts,
)
from benchmarks.store import forget
from sglang_ess.layout import PAGE_SLOTS as PAGE
from sglang_ess.testing import recall
from tools.processes import HttpProcess

TINY, RECALL = "tiny", "recall"
FIRST, SECOND, RESTARTED = "first", "second", "restarted"
TAIL = 32  # tokens after a document's last whole page, and more than a page is never saved
QUESTION = [1, 2, 3]
ANSWER = 16
LIMIT = "32GiB"
REQUEST_SECONDS = 900
SAVED_SECONDS = 300
HEADLINE = 16384
DECODED, LOADED_AT = 96, 0.2  # tokens of the request beside a load; seconds after which it begins
FLAGS = ("--kv-cache-dtype", "fp8_e4m3", "--chunked-prefill-size", "2048", "--enable-metrics",
         "--skip-tokenizer-init", "--skip-server-warmup", "--enable-cache-report",
         "--ess-hot-ratio", "0.1")  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """What one run measures: documents of each length, on each model."""

    models: tuple[str, ...]
    lengths: tuple[int, ...]
    documents: int


QUICK = Grid((TINY,), (4096, HEADLINE), 2)
FULL = Grid((TINY, RECALL), (4096, 8192, HEADLINE, 32768), 20)


class StoreServer(HttpProcess):
    """A server over a store."""

    def __init__(self, bench: Bench, name: str, model: str, store: Path, context: int):
        flags = ("--model-path", model, "--ess-store", f"{store}:{LIMIT}")
        # Room for a document, its fresh partner and what is still being saved.
        size = ("--context-length", str(context), "--max-total-tokens", str(5 * context))
        env = {key: value for key, value in engine_env(bench.threads).items() if value is not None}
        super().__init__("sglang_ess.launch_server", *flags, *size, *FLAGS, env=env,
                         log=bench.directory / f"{name}.log")  # fmt: skip

    def first_token(self, prompt: Sequence[int]) -> Answer:
        """A request for one token. Raises: RuntimeError if it fails."""
        result = run_load(self.url, [Request(prompt, 1, 0.0)], REQUEST_SECONDS)
        if result.errors:
            raise RuntimeError(f"a request must complete: {result.errors[0]}\n{self.tail(5)}")
        return result.answers[0]

    def output(self, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
        """(token ids, logprobs) of an answer."""
        params = {"temperature": 0.0, "max_new_tokens": ANSWER, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": params, "return_logprob": True}
        status, text = self.post("/generate", body, REQUEST_SECONDS)
        if status != 200:
            raise RuntimeError(f"a request must complete: got status {status}, {text[:200]}")
        answer = json.loads(text)
        return answer["output_ids"], [p for p, *_ in answer["meta_info"]["output_token_logprobs"]]

    def floor(self) -> int:
        """Bytes of a token: the latent rows and index keys that the pool keeps."""
        facts = self.get("/server_info")["ess"]
        rows = facts["latent_layers"] * facts["latent_row_bytes"]
        return rows + facts["index_key_layers"] * facts["index_key_bytes"]

    def counter(self, name: str) -> float:
        """One of the store's series, summed over its labels."""
        with self.open("/metrics") as response:
            lines = response.read().decode().splitlines()
        found = [line for line in lines if line.startswith(f"sglang:ess_store_{name}{{")]
        return sum(float(line.split()[-1]) for line in found)


class Bench(shared.Bench):
    def __init__(self, grid: Grid, seed: int, threads: int, directory: Path):
        super().__init__(grid, seed, directory)
        self.threads = threads

    def path_of(self, model: str, context: int) -> str:
        path = self.directory / f"model-{model}"
        if not path.exists() and model == TINY:
            return self.model(path.name, context=context)
        if not path.exists():
            shared.run_module("sglang_ess.recall_model", "--out", str(path))
        return str(path)

    @contextmanager
    def servers(self, names: Sequence[str], *args: Any) -> Iterator[list[StoreServer]]:
        """Start all at once; stop all at the end."""
        self.progress(f"starting {', '.join(names)}")
        with ExitStack() as stack:
            found = [stack.enter_context(StoreServer(self, name, *args)) for name in names]
            for server in found:
                server.wait_ready(shared.START_SECONDS)
            yield found


class Documents:
    """Documents of one length, fresh ones to compute, and the expected outputs."""

    def __init__(self, bench: Bench, length: int):
        self.length, self.pages = length, length // PAGE - 1
        count = bench.grid.documents
        size = self.pages * PAGE + TAIL
        self.saved = prompts_of(bench.seed, count, size)
        self.fresh = {name: prompts_of(bench.seed, count, size, salt)
                      for salt, name in enumerate((SECOND, RESTARTED), 1)}  # fmt: skip
        self.expected: list[Any] = []

    def serve(self, server: StoreServer) -> list[float]:
        """Seconds to compute each; then the expected outputs, from the radix tree."""
        seconds = []
        for document in self.saved:
            seconds.append(server.first_token(document).first_token_s)
            self.expected.append(server.output(document + QUESTION))
        return seconds

    def load(self, server: StoreServer, name: str) -> dict[str, list[float]]:
        """Samples by metric. A document is loaded, then a fresh one computed, or the other way."""
        samples: list[list[float]] = [[] for _ in range(5)]
        loading, computing, cached, equal, hit = samples
        for i, document in enumerate(self.saved):
            order = [(document, loading), (self.fresh[name][i], computing)]
            for prompt, times in order if i % 2 else order[::-1]:
                answer = server.first_token(prompt)
                times.append(answer.first_token_s)
                if prompt is document:
                    cached.append(answer.cached / (self.pages * PAGE))
                    hit.append(server.first_token(prompt).first_token_s)
                    equal.append(float(server.output(document + QUESTION) == self.expected[i]))
        return {"ttft": loading, "ttft_computed": computing, "ttft_hit": hit,
                "vs_computed": ratios(loading, computing), "hit_share": ratios(hit, loading),
                "cached_share": cached, "outputs_equal": equal}  # fmt: skip

    def beside(self, server: StoreServer, seed: int) -> dict[str, list[float]]:
        """Longest gaps of a decoding request, alone and beside loads, in turn."""
        (running,) = prompts_of(seed, 1, 4 * PAGE, salt=9)
        gaps: dict[str, list[float]] = {"alone": [], "loading": []}
        server.first_token(running)
        for document in self.saved:
            for name, samples in gaps.items():
                server.wait_for(lambda: server.post("/flush_cache", {})[0] == 200, 60, "flushed")
                requests = [Request(running, DECODED, 0.0)]
                if name == "loading":
                    requests.append(Request(document, 1, LOADED_AT))
                result = run_load(server.url, requests, REQUEST_SECONDS)
                samples.append(max(result.answers[0].gaps_s))
        return gaps


UNITS = {"ttft": "s", "ttft_computed": "s", "ttft_hit": "s"}


def measure(bench: Bench, model: str) -> None:
    """All rows of a model."""
    context = max(bench.grid.lengths) if model == TINY else recall.SHAPE.context
    lengths = [n for n in bench.grid.lengths if n <= context]
    path, store = bench.path_of(model, context), bench.directory / f"store-{model}"
    asked = [Documents(bench, length) for length in lengths]

    def load(server: StoreServer, name: str) -> None:
        for one in asked:
            others = OtherLoad()
            config = {"model": model, "server": name, "length": one.length}
            found = one.load(server, name)
            rows = [measured("load", config, key, UNITS.get(key, "ratio"), samples)
                    for key, samples in found.items()]  # fmt: skip
            bench.add(rows, others)
            bench.progress(f"{model} {name} {one.length}: {rows[3]['median']:.3f} of computing")
            if name == RESTARTED and one.length == HEADLINE:
                for of, samples in one.beside(server, bench.seed).items():
                    row = measured("beside", config | {"beside": of}, "gap", "s", samples)
                    bench.add([row], others)
        pages = server.counter("loaded_pages_total")
        if pages:
            read = server.counter("read_bytes_total") / pages / PAGE / server.floor()
            bench.report.add(measured("bytes", {"model": model, "server": name}, "read", "x",
                                      [read]))  # fmt: skip

    with bench.servers((FIRST, SECOND), path, store, context) as (first, second):
        for one in asked:
            config = {"model": model, "server": FIRST, "length": one.length}
            bench.report.add(measured("first", config, "ttft", "s", one.serve(first)))
            bench.progress(f"{model} {FIRST}: {one.length} tokens, saved and answered")
        files = saved_files(store, sum(one.pages for one in asked) * bench.grid.documents)
        size = sum(file.stat().st_size for file in files)
        written = size / len(files) / PAGE / first.floor()
        bench.report.add(measured("bytes", {"model": model, "server": FIRST}, "written", "x",
                                  [written]))  # fmt: skip
        load(second, SECOND)
    forget(store)
    with bench.servers((RESTARTED,), path, store, context) as (restarted,):
        load(restarted, RESTARTED)


def saved_files(store: Path, count: int) -> list[Path]:
    """The objects' files, once there are so many. Raises: RuntimeError."""
    until = time.monotonic() + SAVED_SECONDS
    while len(found := [one for one in (store / "objects").rglob("*") if one.is_file()]) < count:
        if time.monotonic() > until:
            raise RuntimeError(f"{count} pages must be saved: got {len(found)}.")
        time.sleep(0.1)
    return found


def summarise(report: Report) -> None:
    """Fill report.summary."""
    for model in FULL.models:
        for length in FULL.lengths:
            config = {"model": model, "server": RESTARTED, "length": length}
            report.summarise(f"ttft_ratio_{model}_{length // 1024}k",
                             report.median("load", "vs_computed", **config))  # fmt: skip
    report.summarise("ttft_ratio", report.summary.get(f"ttft_ratio_{TINY}_{HEADLINE // 1024}k"))
    at = {"model": TINY, "server": RESTARTED, "length": HEADLINE}
    report.summarise("hit_share", report.median("load", "hit_share", **at))
    alone, loading = (report.median("beside", "gap", beside=one) for one in ("alone", "loading"))
    report.summarise("gap_ratio", loading / alone if loading and alone else None)
    for key in ("outputs_equal", "cached_share"):
        found = [row["mean"] for row in report.select("load", key, "measured")]
        report.summarise(key, min(found) if found else None)
    for key in ("written", "read"):
        found = [row["median"] for row in report.select("bytes", key, "measured")]
        report.summarise(f"{key}_ratio", max(found) if found else None)


def print_tables(report: Report) -> None:
    rows = report.select("load", kind="measured")
    found = harness.pivot(rows, ("model", "server", "length"))
    columns = {"model": "model", "server": "server", "tokens": "length", "loading s": "ttft",
               "computing s": "ttft_computed", "a hit s": "ttft_hit", "ratio": "vs_computed",
               "cached": "cached_share",
               "equal": "outputs_equal"}  # fmt: skip
    harness.print_table(found, columns, "time to first token, medians")


def panels(report: Report) -> tuple[Panel, ...]:
    axes = {"xscale": "log", "xlabel": "tokens", "ylabel": "loading / computing", "ylim": (0, None)}
    rows = report.select("load", "vs_computed", server=RESTARTED)
    return (Panel(rows, "length", "median", "model", axes=axes),)


def main(argv: list[str] | None = None) -> int:
    options = parser_with_threads(__doc__).parse_args(argv)
    grid = QUICK if options.quick else FULL
    parts = [update_wrapper(partial(measure, model=model), measure) for model in grid.models]
    bench = run_parts(Bench, grid, parts, options.seed, options.threads)
    summarise(bench.report)
    print_tables(bench.report)
    return finish_parts(bench, options, *panels(bench.report), threads=options.threads)


if __name__ == "__main__":
    sys.exit(main())
