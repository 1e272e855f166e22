"""Many requests of random length through one engine, some of them given up half way."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import psutil

from tests.support import engine as engines


@dataclass
class Soaked:
    """What came of it.

    rss_mib: of the scheduler's process, at every tenth of the requests
    answers: (prompt, tokens given) of every 20th request, if it finished
    accepted: mean tokens that a verify step gave; None without speculation
    """

    finished: int = 0
    aborted: int = 0
    incomplete: int = 0
    reasons: Counter = field(default_factory=Counter)  # of the aborts
    rss_mib: list[float] = field(default_factory=list)
    answers: list[tuple[list[int], list[int]]] = field(default_factory=list)
    tokens: int = 0  # of the requests that finished
    steps: int = 0  # of a request, that verified drafts

    @property
    def accepted(self) -> float | None:
        return self.tokens / self.steps if self.steps else None


def install() -> None:
    """EngineProcess.call knows "_soak" then; the scheduler never learns from a retraction.

    It would admit fewer requests after the first few, and memory would not run short again.
    """
    from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import (
        NewTokenRatioTracker,
    )

    engines._soak = soak
    NewTokenRatioTracker.estimate_new_token_ratio_after_retract = staticmethod(lambda reqs: 0.0)


def soak(engine, count, seed, at_once=32, abort_share=0.15) -> Soaked:
    return engine.loop.run_until_complete(_run(engine, count, seed, at_once, abort_share))


async def _run(engine, count, seed, at_once, abort_share) -> Soaked:
    chance, result, gate = random.Random(seed), Soaked(), asyncio.Semaphore(at_once)
    documents = [[chance.randrange(256) for _ in range(700)] for _ in range(5)]

    async def one(number) -> None:
        async with gate:
            prompt = documents[number % 5][: chance.randrange(0, 200)]
            prompt = prompt + [chance.randrange(256) for _ in range(chance.randrange(1, 40))]
            tokens = chance.randrange(1, 300)
            # With ignore_eos SGLang reserves all output tokens at once: nothing to retract.
            params = {"temperature": 0.0, "max_new_tokens": tokens}
            name = f"soak-{number:06}"  # SGLang aborts by prefix
            request = asyncio.ensure_future(
                engine.async_generate(input_ids=prompt, sampling_params=params, rid=name)
            )
            if chance.random() < abort_share:
                await asyncio.sleep(chance.random())
                engine.tokenizer_manager.abort_request(rid=name)
            output = await request
            answer = output["meta_info"]
            aborted = answer["finish_reason"]["type"] == "abort"
            result.aborted += aborted
            if aborted:
                result.reasons[answer["finish_reason"]["message"]] += 1
            result.finished += not aborted
            if not aborted:
                result.tokens += answer["completion_tokens"]
                result.steps += answer.get("spec_verify_ct", 0)
                if number % 20 == 0:
                    result.answers.append((prompt, list(output["output_ids"])))
            ended = answer["finish_reason"]["type"] == "stop"
            result.incomplete += not (aborted or ended or answer["completion_tokens"] == tokens)
            if (result.finished + result.aborted) % (count // 10) == 0:
                result.rss_mib.append(_scheduler_rss_mib())

    await asyncio.gather(*(one(number) for number in range(count)))
    return result


def _scheduler_rss_mib() -> float:
    """The largest of this process's children: the scheduler, with model and pool."""
    children = psutil.Process().children(recursive=True)
    return max(child.memory_info().rss for child in children) / 2**20
