"""The load of pd_serving: requests at random moments, streamed, and when their tokens came.

Figures are those of sglang.benchmark.serving (bench_serving): Poisson arrivals; time to first token
from the moment a request was sent; inter-token latency the gap between two chunks over the tokens
in the second one; output tokens/s all tokens of completed requests over the time from the first
request sent to the last one answered. Its own client counts a token by the text that it adds. The
servers here take and give token ids, so that no tokenizer takes decode's core.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

SATURATED = float("inf")  # a request rate: all requests at once
DATA = b"data: "


@dataclass(frozen=True)
class Request:
    """prompt: token ids; at: seconds after the start of the load"""

    prompt: Sequence[int]
    new_tokens: int
    at: float


@dataclass
class Answer:
    """When the tokens of one request came, by time.perf_counter().

    chunks: (time, tokens so far); error: why it did not complete, or empty
    cached: tokens of the prompt that were not computed
    """

    sent: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    error: str = ""
    cached: int = 0

    @property
    def tokens(self) -> int:
        return self.chunks[-1][1] if self.chunks else 0

    @property
    def first_token_s(self) -> float:
        return self.chunks[0][0] - self.sent

    @property
    def gaps_s(self) -> list[float]:
        """One for each token after the first chunk's."""
        gaps = []
        for (before, had), (now, has) in zip(self.chunks, self.chunks[1:], strict=False):
            gaps += [(now - before) / (has - had)] * (has - had)
        return gaps


class Result:
    """Answers of one load. started: when its first request was due"""

    def __init__(self, answers: Sequence[Answer], started: float):
        self.answers, self.started = answers, started
        self.completed = [answer for answer in answers if not answer.error]
        self.errors = [answer.error for answer in answers if answer.error]
        self.gaps_s = [gap for answer in self.completed for gap in answer.gaps_s]
        self.first_tokens_s = [answer.first_token_s for answer in self.completed]

    @property
    def seconds(self) -> float:
        return max(answer.chunks[-1][0] for answer in self.completed) - self.started

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.tokens for answer in self.completed) / self.seconds


def arrivals(rate: float, count: int, rng: np.random.Generator) -> list[float]:
    """Seconds at which requests are sent: Poisson at `rate` requests/s, the first one at 0."""
    if rate == SATURATED:
        return [0.0] * count
    return np.cumsum([0.0, *rng.exponential(1 / rate, count - 1)]).tolist()


def requests_of(
    documents: Sequence[Sequence[int]], lengths: tuple[int, int], rate: float, count: int, seed: int
) -> list[Request]:
    """Requests for the documents in turn, with outputs of lengths[0] to lengths[1] tokens.

    Documents and lengths depend on seed and place alone: every rate and system has the same.
    """
    rng = np.random.default_rng((seed, 1))
    sizes = rng.integers(lengths[0], lengths[1] + 1, count).tolist()
    moments = arrivals(rate, count, np.random.default_rng((seed, 2)))
    return [Request(documents[i % len(documents)], sizes[i], moments[i]) for i in range(count)]


def run_load(url: str, requests: Sequence[Request], timeout_s: float) -> Result:
    """Send the requests at their moments to url's /generate and read the streams to their end.

    timeout_s: of one request, after which it counts as an error
    """
    return asyncio.run(_run_load(url, requests, timeout_s))


async def _run_load(url: str, requests: Sequence[Request], timeout_s: float) -> Result:
    options = {"timeout": aiohttp.ClientTimeout(total=timeout_s)}
    async with aiohttp.ClientSession(**options, connector=aiohttp.TCPConnector(limit=0)) as session:
        started = time.perf_counter()
        asked = (_ask(session, url, request, started) for request in requests)
        return Result(await asyncio.gather(*asked), started)


async def _ask(session, url: str, request: Request, started: float) -> Answer:
    params = {"temperature": 0.0, "max_new_tokens": request.new_tokens, "ignore_eos": True}
    body = {"input_ids": request.prompt, "sampling_params": params, "stream": True}
    await asyncio.sleep(max(started + request.at - time.perf_counter(), 0))
    answer = Answer(time.perf_counter())
    try:
        async with session.post(f"{url}/generate", json=body) as response:
            if response.status != 200:
                answer.error = f"status {response.status}: {(await response.text())[:200]}"
                return answer
            async for line in response.content:
                _read(line.strip(), answer)
    except (TimeoutError, aiohttp.ClientError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if not answer.error and answer.tokens != request.new_tokens:
        answer.error = f"{answer.tokens} of {request.new_tokens} tokens"
    return answer


def _read(line: bytes, answer: Answer) -> None:
    """One line of a server-sent event stream."""
    if not line.startswith(DATA) or line == DATA + b"[DONE]":
        return
    event = json.loads(line.removeprefix(DATA))
    if "error" in event:
        answer.error = str(event["error"])[:200]
        return
    reason = event["meta_info"].get("finish_reason") or {}
    if reason.get("type") == "abort":
        answer.error = f"aborted: {reason.get('message')}"[:200]
        return
    count = event["meta_info"]["completion_tokens"]
    if count > answer.tokens:
        answer.chunks.append((time.perf_counter(), count))
        answer.cached = event["meta_info"].get("cached_tokens", 0)
